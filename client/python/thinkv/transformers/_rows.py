"""The sequences of a batch, and what one forward pass does with them.

A pass calls update() and attend() once for each layer. The first update begins it: a prompt opens
its sequences, anything later begins a step of the pool; the last attend ends it. A pass that stops
in between leaves steps half done: only reset() goes on from there.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

from .._batch import Batch
from .._client import Sequence
from ._attention import carry, fresh_attention
from ._block import Tail, attend_block
from ._choose import rejoin, sum_of, take_rows
from ._exact import with_sinks
from ._mask import left_padding, padding_of, real_mask
from ._pool import PoolModels
from ._prompt import Prompt

_TRIM_EVERY = 64  # tokens: sliding layers hold that many more than their window


class Pass(Enum):
    NONE = 0
    PROMPT = 1
    STEP = 2  # one token
    BLOCK = 3  # several


class Rows:
    def __init__(self, pool: PoolModels, capacity: int | None = None, tokens_max: int = 0) -> None:
        """capacity: rows that sequences join and leave; None: those of the first prompt."""
        self.pool = pool
        self.capacity = capacity
        self.tokens_max = tokens_max
        self.length = 0  # tokens that the model was shown, padding included
        self.hold = False  # prompts stay outside the pool until the next pass
        self.reserves = True  # False: whoever replays the step reserves its pages
        self.sequences: list[list[Sequence | None]] = []  # by group and row
        self.batches: list[Batch] = []
        self._layers = {layer for group in pool.plan.groups for layer in group.layers}
        self._clear()
        if capacity is not None:
            self.sequences = [[None] * capacity for _ in pool.plan.groups]

    def _clear(self) -> None:
        self._pass = Pass.NONE
        self._tokens = 0  # of the pass
        self._seen: set[int] = set()  # layers that attended in this pass
        self._pending: int | None = None  # the layer whose keys are on their way to attend()
        self._prompt: Prompt | None = None
        self._tail: Tail | None = None
        self._untrimmed = 0

    # ---- a pass ----

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The fresh keys of a layer, marked for attend()."""
        if self._pending is not None or layer in self._seen:
            raise RuntimeError(
                "the last forward pass did not come to its end: it was interrupted, or this model "
                "does not attend through transformers' attention interface. cache.reset() starts "
                "over with an empty cache"
            )
        if self.pool.plan.config._attn_implementation != "thinkv":
            raise RuntimeError(
                "this cache needs the attention 'thinkv': call "
                "model.set_attn_implementation('thinkv') before the model runs"
            )
        if self._pass is Pass.NONE:
            self._begin(key.shape[0], key.shape[2])
        self._pending = layer
        return carry(key, self, layer)

    def _begin(self, batch: int, tokens: int) -> None:
        self.commit()
        self._tokens = tokens
        if self.capacity is None and not self.sequences:
            self._prompt = Prompt(self.pool, batch, tokens, self.hold)
            self._pass = Pass.PROMPT
            return
        if batch != len(self.sequences[0]):
            raise ValueError(f"{batch} rows for a cache with {len(self.sequences[0])}")
        self._begin_step()
        self._pass = Pass.STEP if tokens == 1 else Pass.BLOCK

    def _begin_step(self) -> None:
        """On error nothing has changed."""
        self.open_batches()
        if self.reserves:
            self.reserve()
        for batch in self.batches:
            batch.begin()

    def open_batches(self) -> None:
        """Working memory for the rows, where there is none yet."""
        if self.batches:
            return
        rows = len(self.sequences[0])
        made = [
            self.pool.batch(i, rows, self.tokens_max, grows=self.reserves)
            for i in range(len(self.pool.plan.groups))
        ]
        for batch, group in zip(made, self.sequences):
            for row, sequence in enumerate(group):
                if sequence is not None:
                    batch.join(row, sequence)
        self.batches = made

    def reserve(self) -> None:
        """The pages of one step, in all groups or in none."""
        done: list[Batch] = []
        try:
            for batch in self.batches:
                batch.reserve()
                done.append(batch)
        except BaseException:
            for batch in done:
                batch.unreserve()
            raise

    def attend(
        self,
        layer: int,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        window: int,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """query: [batch, q_heads, tokens, head_dim]; result: [batch, tokens, q_heads, head_dim]."""
        self._check(layer, scale, window)
        try:
            if self._pass is Pass.PROMPT:
                out = self._attend_prompt(layer, module, query, key, value, mask, scale, sinks)
            elif self._pass is Pass.STEP:
                out = self._attend_step(layer, query, key, value, sinks)
            else:
                out = self._attend_block(layer, query, key, value, mask, sinks)
        except BaseException:
            if self._pass is Pass.PROMPT:  # nothing decodes it yet
                self.reset()
            raise
        self._pending = None
        self._seen.add(layer)
        if len(self._seen) == len(self._layers):
            self._end()
        return out

    def _check(self, layer: int, scale: float, window: int) -> None:
        shape = self.pool.plan.group_of(layer).shape
        if self._pending != layer:
            raise RuntimeError(f"layer {layer} attends without having updated the cache")
        # Not every model names its window when it attends; a mask has it then.
        if (window and window != shape.window) or abs(scale - shape.scale) > 1e-5 * abs(scale):
            raise NotImplementedError(
                f"layer {layer} attends with scale {scale} and window {window}; its configuration "
                f"says {shape.scale} and {shape.window}"
            )

    def _attend_prompt(
        self,
        layer: int,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self._prompt is not None
        if self._prompt.padding is None:
            self._prompt.padding = left_padding(mask, query.shape[0], self._tokens)
        out = fresh_attention(module, query, key, value, real_mask(mask), scale, sinks)
        self._prompt.take(layer, query, key, value)
        return out

    def _attend_step(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        group = self.pool.plan.group_of(layer)
        batch, index = self.batches[self.pool.plan.groups.index(group)], group.index(layer)
        q, k, v = (x[:, :, 0].contiguous() for x in (query, key, value))
        batch.append(index, k, v)
        lse = None
        if sinks is not None:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        out = torch.empty_like(q)
        batch.attend(index, q, out, lse, window=group.shape.window)
        if sinks is not None:
            out = with_sinks(out, lse, sinks)
        return out[:, None]

    def _attend_block(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if self._tail is None:
            padding = padding_of(mask)
            if padding is not None and not bool(padding[:, -self._tokens :].all()):
                raise ValueError(
                    "only the first prompt of a cache can be padded: all rows must get the same "
                    "number of further tokens"
                )
            self._tail = Tail(self._tokens - 1)
        group = self.pool.plan.group_of(layer)
        batch = self.batches[self.pool.plan.groups.index(group)]
        out, lse = attend_block(group, batch, layer, query, key, value)
        self._tail.keep(layer, query, key, value)
        if sinks is not None:
            out = with_sinks(out, lse, sinks)
        return out.to(query.dtype)

    def _end(self) -> None:
        if self._pass is Pass.PROMPT:
            assert self._prompt is not None
            self._prompt.end()
            self.sequences = self._prompt.move() if not self.hold else self._prompt.sequences
        else:
            self._end_step()
        self.length += self._tokens
        self._pass, self._seen = Pass.NONE, set()

    def _end_step(self) -> None:
        for batch in self.batches:
            batch.end()
        self.count_step()

    def count_step(self) -> None:
        """After each step: sliding layers let go, from time to time."""
        self._untrimmed += 1
        if self._untrimmed < _TRIM_EVERY:
            return
        self._untrimmed = 0
        for group, sequences in zip(self.pool.plan.groups, self.sequences):
            for sequence in sequences if group.shape.window else ():
                if sequence is not None:
                    sequence.trim(group.shape.window)

    # ---- between passes ----

    def restart(self) -> None:
        """Counts from zero: what ran so far had no sequences."""
        self.length = 0
        self._clear()

    def commit(self) -> None:
        """Writes what could still be taken back."""
        if self._prompt is not None:
            self._prompt.write_held()
            self._prompt = None
        while self._tail is not None and self._tail.tokens > 0:
            self._begin_step()
            self._tail.step(self.pool.plan.groups, self.batches)
            self._end_step()
        self._tail = None

    def crop(self, tokens: int) -> None:
        """Takes the last tokens back: those of the newest pass but its first, or all."""
        if tokens == 0:
            return
        if tokens == self.length:
            return self.reset()
        held = self._prompt is not None and self._prompt.crop(tokens)
        if not held and (self._tail is None or tokens > self._tail.tokens):
            kept = 0 if self._tail is None else self._tail.tokens
            raise NotImplementedError(
                f"{tokens} tokens are to be taken back, and only the newest {kept} can be: older "
                "ones are compressed or evicted. Start a new ThinkvCache with the shorter prompt, "
                "or call activate_past_recording() before the prompt whose end is to be cropped"
            )
        if not held and self._tail is not None:
            self._tail.crop(tokens)
        self.length -= tokens

    def select(self, indices: list[int]) -> None:
        """The rows become those of `indices`, which may name a row more than once (a copy) or not
        at all (closed). On error nothing has changed."""
        self.commit()
        count = len(self.sequences[0]) if self.sequences else 0
        if any(not 0 <= i < count for i in indices):
            raise IndexError(f"rows {indices} of a cache with {count}")
        if not self.sequences or indices == list(range(count)):
            return
        before, self.sequences = self.sequences, take_rows(self.sequences, indices)
        if len(indices) == count and self.batches:
            for batch, old, new in zip(self.batches, before, self.sequences):
                rejoin(batch, old, new)
        else:
            self._close_batches()
        for group in before:
            for row, sequence in enumerate(group):
                if row not in indices and sequence is not None:
                    sequence.close()

    def _close_batches(self) -> None:
        for batch in self.batches:
            batch.close()
        self.batches = []

    def reset(self) -> None:
        """Empty, as at the start."""
        self._close_batches()
        if self._prompt is not None:
            self._prompt.close()
        for group in self.sequences:
            for sequence in group:
                if sequence is not None:
                    sequence.close()
        self.length = 0
        empty = [[None] * (self.capacity or 0) for _ in self.pool.plan.groups]
        self.sequences = [] if self.capacity is None else list(empty)
        self._clear()

    # ---- rows of an engine ----

    def join(self, row: int, other: Rows) -> None:
        """Takes the one sequence of another cache, after its prompt, into a free row."""
        other.commit()
        if len(other.sequences) == 0 or len(other.sequences[0]) != 1:
            raise ValueError("only a cache with one row, after its prompt, can join")
        if self.sequences[0][row] is not None:
            raise ValueError(f"row {row} is taken: let its sequence leave first")
        self.open_batches()
        other._close_batches()
        for i, group in enumerate(other.sequences):
            self.batches[i].join(row, group[0])
            self.sequences[i][row] = group[0]
        other.sequences = []

    def leave(self, row: int) -> None:
        """Closes the sequence of a row."""
        for i, group in enumerate(self.sequences):
            sequence, group[row] = group[row], None
            if sequence is None:
                continue
            if self.batches:
                self.batches[i].leave(row)
            sequence.close()

    def stats(self) -> list[dict[str, Any]]:
        """By row: the numbers of its sequences together; waits for the GPU."""
        rows: list[dict[str, Any]] = []
        for row in range(len(self.sequences[0]) if self.sequences else 0):
            parts = [group[row] for group in self.sequences]
            known = [part.stats() for part in parts if part is not None]
            rows.append(sum_of(known) if known else {})
        return rows
