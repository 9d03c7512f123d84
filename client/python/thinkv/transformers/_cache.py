"""ThinkvCache: the cache object that transformers' models and generate() take."""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from .._client import Client
from ._plan import SLIDING, STATEFUL, plan_of
from ._pool import PoolModels
from ._rows import Rows


class ThinkvLayer(CacheLayerMixin):
    """One attention layer. Its keys and values are in the pool; what update() returns are the fresh
    ones alone, which the attention "thinkv" knows what to do with."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, rows: Rows, layer: int, sliding: bool) -> None:
        super().__init__()
        self._rows = rows
        self._layer = layer
        self.is_sliding = sliding

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.is_initialized = True
        return self._rows.update(self._layer, key_states, value_states), value_states

    def get_seq_length(self, *args: Any) -> int:
        return self._rows.length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # Late 4.x passes the positions of the queries.
        tokens = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self._rows.length + tokens, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def offload(self) -> None:
        raise NotImplementedError("the pool's memory is not offloaded by transformers")

    prefetch = offload

    @property
    def batch_size(self) -> int:
        return len(self._rows.sequences[0]) if self._rows.sequences else -1

    # The container asks every layer; the rows belong to all of them, so ThinkvCache answers once.
    def _of_the_cache(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("ask the ThinkvCache, not one of its layers")

    reset = crop = reorder_cache = _of_the_cache
    batch_repeat_interleave = batch_select_indices = _of_the_cache


class ThinkvCache(Cache):
    """A model's KV cache in thinkvd's pool.

    policy, budget: of the full layers' sequences, as Model.sequence(). Sliding layers keep their
    window exactly, in 16 bits. client: an open thinkv.Client to share; else one of its own is
    opened on `socket`. rows: for an engine of its own loop: that many rows, which prompts join and
    leave (prompt(), join(), leave()); None: the rows of the first prompt, as generate() needs it.
    tokens_max: as Model.batch(), for an engine whose steps are in a CUDA graph.

    Raises what opening a client raises, NotFoundError (policy), UnsupportedError (a pool in host
    memory), NotImplementedError (a layer that the pool cannot hold). In use: thinkv.Error;
    ExhaustedError and QuotaExceededError leave the cache as it was before the pass."""

    def __init__(
        self,
        model: torch.nn.Module,
        policy: str = "thinkv",
        budget: int | None = None,
        socket: str | None = None,
        *,
        client: Client | None = None,
        name: str | None = None,
        rows: int | None = None,
        tokens_max: int = 0,
        _pool: PoolModels | None = None,
    ) -> None:
        if _pool is None:
            label = name or getattr(model.config, "name_or_path", "") or type(model).__name__
            _pool = PoolModels(plan_of(model), policy, budget, client, socket, label)
        self._pool = _pool
        self._rows = Rows(_pool, rows, tokens_max)
        super().__init__(layers=[self._make_layer(i) for i in range(len(_pool.plan.layer_types))])

    def _make_layer(self, layer: int) -> Any:
        kind = self._pool.plan.layer_types[layer]
        if kind not in STATEFUL:
            return ThinkvLayer(self._rows, layer, kind == SLIDING)
        states = getattr(self._pool.plan.config, "number_of_conv_states", 1)
        return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[kind](number_of_states=states)

    def _others(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, ThinkvLayer)]

    @property
    def client(self) -> Client:
        return self._pool.client

    # ---- what generate() asks for ----

    def reset(self) -> None:
        """Gives every page back; the cache is empty."""
        self._rows.reset()
        for layer in self._others():
            layer.reset()

    def activate_past_recording(self) -> None:
        """From the next prompt on, its end can be cropped too; it costs the prompt's keys and
        values in memory of its own until the pass after it."""
        self._rows.hold = True
        super_method = getattr(super(), "activate_past_recording", None)
        if super_method is not None:
            super_method()

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: takes back that many of the newest tokens; positive: keeps that many. Only the
        tokens of the newest pass, but its first, can be taken back."""
        if tokens_to_remove >= 0:
            keep = tokens_to_remove if tokens_to_remove > 0 else self._rows.length
            tokens_to_remove = -max(0, self._rows.length - keep)
        self._rows.crop(-tokens_to_remove)
        for layer in self._others():
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows follow their beams; a beam that parts is copied, page by page."""
        self._select(beam_idx.tolist())
        for layer in self._others():
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices.tolist())
        for layer in self._others():
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = len(self._rows.sequences[0]) if self._rows.sequences else 0
        self._select([row for row in range(count) for _ in range(repeats)])
        for layer in self._others():
            layer.batch_repeat_interleave(repeats)

    def _select(self, indices: list[int]) -> None:
        self._rows.select(indices)

    # ---- what an engine asks for ----

    def prompt(self) -> ThinkvCache:
        """An empty cache for the prompt of one sequence, in the same pool."""
        return ThinkvCache(torch.nn.Module(), _pool=self._pool)

    def join(self, row: int, prompt: ThinkvCache) -> None:
        """After the model ran over a prompt with `prompt` as its cache: its sequence goes on in
        `row`, between steps."""
        if self._others():
            raise NotImplementedError("layers with a state of their own cannot join rows")
        self._rows.join(row, prompt._rows)

    def leave(self, row: int) -> None:
        """Closes the sequence of a row, between steps; its pages go back."""
        self._rows.leave(row)

    # ---- numbers ----

    def stats(self) -> list[dict[str, Any]]:
        """Of each row: real bytes, live tokens, evictions. Waits for the GPU."""
        self._rows.commit()
        return self._rows.stats()

    def close(self) -> None:
        """Gives every page back, and closes the client where it is the cache's own."""
        self._rows.reset()
        self._pool.close()
