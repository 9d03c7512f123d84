"""Client, Model, Sequence, HostStep: thinkv.h as context managers."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable
from ctypes import byref, c_uint32, c_uint64, c_void_p
from types import TracebackType
from typing import Any

from . import _library as c
from ._arrays import as_device, as_input, dtype_number, make_output
from ._batch import Batch, current_stream, open_batch
from ._handle import Handle
from ._library import call, lib


def library_version() -> str:
    """Version of libthinkv itself."""
    return lib.thinkv_version().decode()


def _encode(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


class Client(Handle):
    """A connection to thinkvd. May be used from any thread.

    pool: a name of the configuration, or the UUID of a GPU ("GPU-..."). Without it: $THINKV_POOL,
    else the daemon's only pool, else the pool on this thread's current GPU.
    """

    _what = "client"

    def __init__(
        self,
        socket: str | None = None,
        name: str | None = None,
        *,
        threads: int = 0,
        timeout: float = 10.0,
        pool: str | None = None,
    ) -> None:
        options = c.ClientOptions(
            struct_size=ctypes.sizeof(c.ClientOptions),
            threads=threads,
            socket_path=_encode(socket),
            client_name=_encode(name),
            timeout_ms=max(1, int(timeout * 1000)),
            pool_name=_encode(pool),
        )
        handle = c_void_p()
        call("thinkv_client_open", byref(options), byref(handle))
        super().__init__(handle.value or 0, lib.thinkv_client_close)
        own = self._pool_stats()
        self.backend: str = own.backend.decode()  # "host" or "cuda"
        self.pool: str = own.pool_name.decode()

    def _pool_stats(self) -> c.PoolStats:
        own = c.PoolStats(struct_size=ctypes.sizeof(c.PoolStats))
        call("thinkv_client_pool_stats", self._handle, byref(own))
        return own

    def model(
        self,
        *,
        layers: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float16",
        softmax_scale: float | None = None,
        name: str | None = None,
    ) -> Model:
        """Registers the shape of a model's attention. dtype: of 16-bit pages."""
        options = c.ModelOptions(
            struct_size=ctypes.sizeof(c.ModelOptions),
            layers=layers,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_type=dtype_number(dtype),
            softmax_scale=softmax_scale or 0.0,
            model_name=_encode(name),
        )
        handle = c_void_p()
        call("thinkv_model_open", self._handle, byref(options), byref(handle))
        return Model(handle.value or 0, self, layers, q_heads, kv_heads, head_dim)

    def stats(self) -> dict[str, Any]:
        """The daemon's status (as `thinkvctl status --json`), with this client's own numbers."""
        status = self.status()
        own = self._pool_stats()
        mine = [one for one in status.get("pools", []) if one["name"] == self.pool]
        pool = mine[0] if mine else status.get("pool", {})
        return {
            **status,
            **pool,
            "backend": own.backend.decode(),
            "bytes_total": own.pool_bytes,
            "bytes_free": own.pool_free_bytes,
            "tenant_used_bytes": own.tenant_used_bytes,
            "tenant_limit_bytes": own.tenant_limit_bytes,
            "client_granted_bytes": own.client_granted_bytes,
            "client_leased_bytes": own.client_leased_bytes,
        }

    def status(self) -> dict[str, Any]:
        """The daemon's status as it is."""
        text = c_void_p()
        call("thinkv_client_status_json", self._handle, byref(text))
        try:
            return json.loads(ctypes.string_at(text.value or 0))
        finally:
            lib.thinkv_string_free(text)

    def ping(self) -> None:
        """One empty round trip."""
        call("thinkv_client_ping", self._handle)


class Model(Handle):
    """A registered model. Made by Client.model()."""

    _what = "model"

    def __init__(
        self,
        handle: int,
        client: Client,
        layers: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        self.client = client  # and keeps it open
        self.layers = layers
        self.q_heads = q_heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.on_gpu = client.backend == "cuda"
        self._stream = 0
        super().__init__(handle, lib.thinkv_model_close)

    def set_stream(self, stream: int) -> None:
        """cuda backend: the stream (cudaStream_t as a number) of all work launched from now on.
        Not needed with PyTorch or CuPy, whose current stream is used."""
        call("thinkv_model_set_stream", self._handle, stream)
        self._stream = stream

    def use_current_stream(self) -> None:
        """Work goes to PyTorch's or CuPy's current stream from now on."""
        if self.on_gpu and (stream := current_stream()) != self._stream:
            self.set_stream(stream)

    def batch(self, capacity: int, tokens_max: int = 0, *, grows: bool = False) -> Batch:
        """cuda backend: rows for `capacity` sequences. tokens_max: live tokens a lane that working
        memory is sized for, on average over the rows, in 4-bit pages (16-bit pages hold a
        quarter); 0: 8192. grows: a reserve() that needs more makes it larger; for batches whose
        steps are in no CUDA graph."""
        return open_batch(self, capacity, tokens_max, grows)

    def sequence(
        self,
        policy: str = "thinkv",
        budget: int | None = None,
        name: str = "",
        *,
        trace_sparsity: bool = False,
    ) -> Sequence:
        """Opens a sequence. budget: live tokens of a lane, as the policy counts them; None: the
        policy's; 0: none. name: for the caller alone."""
        options = c.SequenceOptions(
            struct_size=ctypes.sizeof(c.SequenceOptions),
            budget_tokens=_budget(budget),
            policy_name=_encode(policy),
            flags=c.TRACE_SPARSITY if trace_sparsity else 0,
        )
        handle = c_void_p()
        self.use_current_stream()
        call("thinkv_sequence_open", self._handle, byref(options), byref(handle))
        return Sequence(handle.value or 0, self, policy, name)

    def step(self, sequences: Iterable[Sequence]) -> HostStep:
        """One decode step: `with model.step([a, b]) as step`. Leaving the block ends the step;
        leaving it by an exception takes it back."""
        batch = list(sequences)
        handles = (c_void_p * max(1, len(batch)))(*[sequence._handle for sequence in batch])
        handle = c_void_p()
        call("thinkv_step_begin", self._handle, handles, len(batch), byref(handle))
        return HostStep(handle.value or 0, self, batch)


def _budget(budget: int | None) -> int:
    if budget is None:
        return c.BUDGET_OF_POLICY
    if budget < 0 or budget >= c.BUDGET_NONE:
        raise ValueError(f"budget is {budget}, expected tokens, 0 (none) or None (the policy's)")
    return budget if budget > 0 else c.BUDGET_NONE


class Sequence(Handle):
    """The KV cache of one sequence. Calls on one sequence must not overlap."""

    _what = "sequence"

    def __init__(self, handle: int, model: Model, policy: str, name: str) -> None:
        self.model = model
        self.policy = policy
        self.name = name
        super().__init__(handle, lib.thinkv_sequence_close)

    def prefill(self, layer: int, k: Any, v: Any) -> None:
        """k, v: [tokens, kv_heads, head_dim], after rotary embedding; every layer once. On the
        cuda backend tensors in GPU memory."""
        shape = (None, self.model.kv_heads, self.model.head_dim)
        self.model.use_current_stream()
        check = as_device if self.model.on_gpu else as_input
        keys, values = check("k", k, shape), check("v", v, shape)
        call("thinkv_sequence_prefill", self._handle, layer, byref(keys.tensor),
             byref(values.tensor))

    def prefill_end(self) -> None:
        """Ends the prompt, after every layer was given."""
        call("thinkv_sequence_prefill_end", self._handle)

    def prefill_queries(self, layer: int, q: Any) -> None:
        """q: [count, q_heads, head_dim], the newest queries of the prompt after rotary embedding,
        up to all of them; the policy says which count. Optional, for policies with rules that fire
        at the prompt's end: for all layers or for none, each after its prefill and before
        prefill_end."""
        shape = (None, self.model.q_heads, self.model.head_dim)
        self.model.use_current_stream()
        check = as_device if self.model.on_gpu else as_input
        queries = check("q", q, shape)
        call("thinkv_sequence_prefill_queries", self._handle, layer, byref(queries.tensor))

    def token_classes(self, classes: Iterable[int], first: int = 0) -> None:
        """Class bits (0 to 255; bit n: class n) of the tokens at positions first, first + 1, ...;
        before or after they come. Optional, for policies with rules that protect classes."""
        bits = bytes(classes)
        self.model.use_current_stream()
        call("thinkv_sequence_token_classes", self._handle, first, bits, len(bits))

    def prefetch(self, layer: int, q: Any) -> None:
        """q: [q_heads, head_dim], a guess of the layer's query in the open step. Optional, for
        policies with a tier: the rows that the step fetches are chosen by it."""
        check = as_device if self.model.on_gpu else as_input
        query = check("q", q, (self.model.q_heads, self.model.head_dim))
        self.model.use_current_stream()
        call("thinkv_sequence_prefetch", self._handle, layer, byref(query.tensor))

    def evict(self, positions: Iterable[int]) -> int:
        """Evicts tokens by position in every lane; result: (token, lane) pairs evicted."""
        chosen = list(positions)
        array = (c_uint32 * max(1, len(chosen)))(*chosen)
        evicted = c_uint64()
        call("thinkv_sequence_evict", self._handle, array, len(chosen), byref(evicted))
        return evicted.value

    def trim(self, keep: int) -> None:
        """cuda backend: evicts all but the newest `keep` tokens, as a sliding window allows,
        without waiting for the GPU. The newest 16 always stay."""
        self.model.use_current_stream()
        call("thinkv_sequence_trim", self._handle, keep)

    def copy(self, name: str = "") -> Sequence:
        """cuda backend: a sequence of its own that goes on from where this one is. Waits for the
        GPU. Raises ExhaustedError or QuotaExceededError."""
        handle = c_void_p()
        self.model.use_current_stream()
        call("thinkv_sequence_copy", self._handle, byref(handle))
        return Sequence(handle.value or 0, self.model, self.policy, name)

    def quantize(self, first: int, last: int, format: str) -> int:
        """Recodes the live tokens first..last (inclusive); result: slots recoded."""
        recoded = c_uint64()
        call("thinkv_sequence_quantize", self._handle, first, last, _encode(format),
             byref(recoded))
        return recoded.value

    def set_budget(self, budget: int | None) -> None:
        call("thinkv_sequence_set_budget", self._handle, _budget(budget))

    def sparsity(self) -> Any:
        """[layers] of the last step: share of near-zero entries; NaN where not measured."""
        array, output = make_output((self.model.layers,))
        call("thinkv_sequence_sparsity", self._handle, byref(output))
        return array

    def stats(self) -> dict[str, Any]:
        """Real bytes, live tokens, evictions, thoughts. Local: no round trip; on the cuda backend
        it waits for the stream."""
        s = c.SequenceStats(struct_size=ctypes.sizeof(c.SequenceStats))
        call("thinkv_sequence_get_stats", self._handle, byref(s))
        sparsity = [float(value) for value in self.sparsity()]
        measured = any(value == value for value in sparsity)  # not NaN
        return {
            "tokens": s.tokens,
            "prompt_tokens": s.prompt_tokens,
            "live_tokens": s.live_slots / s.lanes,
            "live_tokens_max": s.live_tokens_max,
            "lanes": s.lanes,
            "pages": s.pages,
            "page_bytes": s.page_bytes,
            "metadata_bytes": s.metadata_bytes,
            "bytes_held": s.bytes_held,
            "bytes_f16": s.bytes_f16,
            "evicted_tokens": s.evicted_slots / s.lanes,
            "evicted_slots": s.evicted_slots,
            "slots_reused": s.reused_slots,
            "gathered_bytes": s.gathered_bytes,
            "recoded_slots": s.recoded_slots,
            "demotions": s.demotions,
            "over_budget_steps": s.over_budget_steps,
            "budget_tokens": s.budget_tokens,
            "tier_bytes": s.tier_bytes,
            "thoughts": {
                "reasoning": s.thoughts[0],
                "execution": s.thoughts[1],
                "transition": s.thoughts[2],
            },
            "sparsity": sparsity if measured else None,
        }


class HostStep(Handle):
    """One token of each sequence, on the host backend. Made by Model.step()."""

    _what = "step"

    def __init__(self, handle: int, model: Model, sequences: list[Sequence]) -> None:
        self.model = model
        self.sequences = sequences
        super().__init__(handle, lib.thinkv_step_cancel)

    def append(self, layer: int, k: Any, v: Any) -> None:
        """k, v: [batch, kv_heads, head_dim]; each layer once."""
        shape = (len(self.sequences), self.model.kv_heads, self.model.head_dim)
        keys, values = as_input("k", k, shape), as_input("v", v, shape)
        call("thinkv_step_append", self._handle, layer, byref(keys.tensor),
             byref(values.tensor))

    def attend(self, layer: int, q: Any, lse: bool = False) -> Any:
        """q: [batch, q_heads, head_dim]; result of the same shape, float32, and with lse=True
        also the natural log-sum-exp [batch, q_heads]. The layer was appended before."""
        shape = (len(self.sequences), self.model.q_heads, self.model.head_dim)
        query = as_input("q", q, shape)
        out, output = make_output(shape)
        if not lse:
            call("thinkv_step_attend", self._handle, layer, byref(query.tensor),
                 byref(output), None)
            return out
        sums, sums_output = make_output(shape[:2])
        call("thinkv_step_attend", self._handle, layer, byref(query.tensor), byref(output),
             byref(sums_output))
        return out, sums

    def end(self) -> None:
        """Labels, budget, evictions. Every layer was appended."""
        handle = self._handle
        self._value = None
        self._finalizer.detach()
        call("thinkv_step_end", handle)

    def cancel(self) -> None:
        """Takes the step back: its sequences are as before."""
        self.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.cancel()
        elif not self.closed:
            self.end()
