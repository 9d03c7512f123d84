"""A prompt on its way into the pool: row by row, layer by layer, each written once."""

from __future__ import annotations

import torch

from .._client import Sequence
from ._pool import PoolModels



class Prompt:
    """The sequences of one prompt pass. With `held` nothing is written before write_held(): until
    then tokens can be taken back."""

    def __init__(self, pool: PoolModels, batch: int, tokens: int, held: bool) -> None:
        self.pool = pool
        self.tokens = tokens  # of the longest row, padding included
        self.padding: list[int] | None = None  # before each row; known with the first layer's mask
        self.sequences: list[list[Sequence | None]] = [[None] * batch for _ in pool.plan.groups]
        self._held: dict[int, tuple[torch.Tensor, ...]] | None = {} if held else None
        if not held:
            self._open()

    def _open(self) -> None:
        """All sequences or none."""
        try:
            for i, group in enumerate(self.sequences):
                for row in range(len(group)):
                    group[row] = self.pool.open(i)
        except BaseException:
            self.close()
            raise

    def take(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """query: [batch, q_heads, tokens, head_dim], for rules of the prompt's end; key, value:
        [batch, kv_heads, tokens, head_dim]."""
        if self._held is not None:
            self._held[layer] = (query, key, value)
        else:
            self._write(layer, query, key, value)

    def crop(self, tokens: int) -> bool:
        """Takes the last tokens back, where nothing was written. Result: whether it could."""
        if self._held is None or tokens >= self.tokens:
            return False
        self.tokens -= tokens
        for layer, (query, key, value) in self._held.items():
            self._held[layer] = (query[:, :, : self.tokens], key[:, :, : self.tokens],
                                 value[:, :, : self.tokens])
        return True

    def end(self) -> None:
        """After the last layer."""
        if self._held is None:
            self._end()

    def write_held(self) -> None:
        """On error nothing has changed: it is still held, and can be written later."""
        if self._held is None:
            return
        self._open()
        try:
            for layer, held in self._held.items():
                self._write(layer, *held)
            self._end()
        except BaseException:
            self.close()
            raise
        self._held = None

    def close(self) -> None:
        for group in self.sequences:
            for row, sequence in enumerate(group):
                group[row] = None
                if sequence is not None:
                    sequence.close()

    def _row_tokens(self, row: int) -> int:
        return self.tokens - (self.padding[row] if self.padding is not None else 0)

    def _write(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        group = self.pool.plan.group_of(layer)
        i = self.pool.plan.groups.index(group)
        for row, sequence in enumerate(self.sequences[i]):
            # Of a sliding layer only what the next token can see.
            tokens = self._row_tokens(row)
            if group.shape.window:
                tokens = min(tokens, group.shape.window)
            if sequence is not None and tokens > 0:
                sequence.prefill(group.index(layer), _rows_of(key, row, tokens),
                                 _rows_of(value, row, tokens))
                queries = min(tokens, query.shape[2])
                if queries > 0 and not group.shape.window:
                    sequence.prefill_queries(group.index(layer), _rows_of(query, row, queries))

    def _end(self) -> None:
        for group in self.sequences:
            for row, sequence in enumerate(group):
                if sequence is not None and self._row_tokens(row) > 0:
                    sequence.prefill_end()

    def move(self) -> list[list[Sequence | None]]:
        """The sequences, by group and row, for whoever decodes them."""
        moved, self.sequences = self.sequences, []
        return moved


def _rows_of(tensor: torch.Tensor, row: int, tokens: int) -> torch.Tensor:
    """The last tokens of a row as [tokens, heads, head_dim]."""
    return tensor[row, :, tensor.shape[2] - tokens :].transpose(0, 1).contiguous()
