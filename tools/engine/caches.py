"""KV caches behind one small interface: exact in this process, or in the ThinKV pool.

A step adds one token to each sequence of the cache. It appends the tokens' k, v of a layer before
it attends in that layer, so a token sees itself. All arrays are float32 after rotary embedding:
k, v [tokens, kv_heads, head_dim] in a prefill; k, v [batch, kv_heads, head_dim] and q
[batch, q_heads, head_dim] in a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from .attention import step_attention, step_sparsity
from .gguf_weights import Config


class Step(Protocol):
    positions: np.ndarray  # [batch] of the tokens that this step adds

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None: ...

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray: ...


class Cache(Protocol):
    def prefill(self, layer: int, k: np.ndarray, v: np.ndarray) -> None: ...

    def prefill_end(self) -> None: ...

    def step(self) -> contextlib.AbstractContextManager[Step]: ...


class ExactCache:
    """One sequence, every token kept in this process. dtype "float16" rounds each k and v once,
    as a 16-bit
    cache does; the arithmetic stays float32."""

    def __init__(
        self,
        config: Config,
        capacity: int = 1024,
        dtype: str = "float32",
        trace_sparsity: bool = False,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise ValueError(f"ExactCache: dtype must be float32 or float16, not {dtype!r}")
        self._dtype = np.dtype(dtype)
        self._config = config
        shape = (2, config.layers, config.kv_heads, capacity, config.head_dim)
        self._kv = np.zeros(shape, dtype=np.float32)
        self._tokens = 0
        self._incoming = 0
        self._trace = trace_sparsity
        self._sparsity = np.zeros(config.layers, dtype=np.float32)

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def bytes_held(self) -> int:
        config = self._config
        values = 2 * config.layers * config.kv_heads * config.head_dim * self._tokens
        return values * self._dtype.itemsize

    def sparsity(self) -> np.ndarray:
        """[layers] of the last step; zeros unless trace_sparsity was asked for."""
        return self._sparsity.copy()

    def prefill(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self._write(layer, k, v)

    def prefill_end(self) -> None:
        self._advance()

    @contextlib.contextmanager
    def step(self) -> Iterator[Step]:
        yield _ExactStep(self)
        self._advance()

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self._write(layer, k, v)

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        live = self._tokens + self._incoming
        k, v = self._kv[0, layer, :, :live], self._kv[1, layer, :, :live]
        if self._trace:
            self._sparsity[layer] = step_sparsity(q[0], k)
        return step_attention(q[0], k, v)[None]

    def _write(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        count = len(k)
        end = self._tokens + count
        if end > self._kv.shape[3]:
            self._grow(end)
        for which, array in enumerate((k, v)):
            rounded = array.astype(self._dtype, copy=False).transpose(1, 0, 2)
            self._kv[which, layer, :, self._tokens : end] = rounded
        self._incoming = count

    def _grow(self, needed: int) -> None:
        shape = list(self._kv.shape)
        shape[3] = max(needed, 2 * shape[3])
        grown = np.zeros(shape, dtype=np.float32)
        grown[:, :, :, : self._kv.shape[3]] = self._kv
        self._kv = grown

    def _advance(self) -> None:
        self._tokens += self._incoming
        self._incoming = 0


class _ExactStep:
    def __init__(self, cache: ExactCache) -> None:
        self.positions = np.asarray([cache.tokens])
        self.append = cache.append
        self.attend = cache.attend


class PoolCache:
    """Sequences in the daemon's pool, through the Python package `thinkv`.

    All sequences get the same prompt and are stepped together; each has its own options, so one
    pass of the model can compare several policies. Owns the sequences: close() or the `with` block
    gives their pages back.
    """

    def __init__(self, pool_model: Any, *options: dict[str, Any]) -> None:
        """`pool_model` is thinkv.Client.model(...); each `options` goes to its sequence()."""
        if not options:
            raise ValueError("PoolCache: at least one sequence is needed")
        self._model = pool_model
        self.sequences: list[Any] = []
        try:
            for each in options:
                self.sequences.append(pool_model.sequence(**each))
        except BaseException:
            self.close()
            raise
        self._tokens = 0
        self._prompt = 0

    def __enter__(self) -> PoolCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def tokens(self) -> int:
        """Of one sequence, prompt included."""
        return self._tokens

    def prefill(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        for sequence in self.sequences:
            sequence.prefill(layer, k, v)
        self._prompt = len(k)

    def prefill_end(self) -> None:
        for sequence in self.sequences:
            sequence.prefill_end()
        self._tokens += self._prompt

    @contextlib.contextmanager
    def step(self) -> Iterator[Step]:
        with self._model.step(self.sequences) as step:
            yield _PoolStep(step, np.full(len(self.sequences), self._tokens))
        self._tokens += 1

    def stats(self, index: int = 0) -> dict[str, Any]:
        return self.sequences[index].stats()

    def sparsity(self, index: int = 0) -> np.ndarray:
        return self.sequences[index].sparsity()

    def close(self) -> None:
        for sequence in self.sequences:
            sequence.close()


class _PoolStep:
    def __init__(self, step: Any, positions: np.ndarray) -> None:
        self.positions = positions
        self.append = step.append
        self._step = step

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        return self._step.attend(layer, np.ascontiguousarray(q))


def pool_model(client: Any, config: Config) -> Any:
    """Registers the model's geometry with a thinkv.Client."""
    return client.model(
        layers=config.layers,
        q_heads=config.q_heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype="float16",
    )
