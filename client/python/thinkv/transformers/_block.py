"""Several tokens at once over what the pool holds: the check of speculative tokens, the next turn
of a conversation.

The first token of a block takes an ordinary step. The others attend in the same step, to the pool
and to each other, and stay outside the pool until the next pass: so they can be taken back. Then
each takes a step of its own, which is what it would have taken alone.
"""

from __future__ import annotations

import torch

from .._batch import Batch
from ._exact import exact_attention, merge
from ._plan import Group


class Tail:
    """The tokens of the newest block that are not in the pool yet, by layer."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._done = 0  # of the tokens kept here, already in the pool

    def keep(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """[batch, heads, 1 + tokens, head_dim] of a block, its first token included."""
        self._layers[layer] = (query[:, :, 1:], key[:, :, 1:], value[:, :, 1:])

    def crop(self, tokens: int) -> None:
        self.tokens -= tokens

    def step(self, groups: list[Group], batches: list[Batch]) -> None:
        """One token of the tail into the pool; its pages were reserved, the step was begun."""
        for group, batch in zip(groups, batches):
            for index, layer in enumerate(group.layers):
                query, key, value = (_token(x, self._done) for x in self._layers[layer])
                batch.append(index, key, value)
                batch.attend(index, query, torch.empty_like(query), window=group.shape.window,
                             measure_only=True)
        self._done += 1
        self.tokens -= 1


def _token(tensor: torch.Tensor, i: int) -> torch.Tensor:
    """Token i of [batch, heads, tokens, head_dim] as [batch, heads, head_dim]."""
    return tensor[:, :, i].contiguous()


def attend_block(
    group: Group,
    batch: Batch,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query, key, value: [batch, heads, tokens, head_dim], in a step that was begun. The first
    token is appended. Result: out and log-sum-exp, float32, [batch, tokens, q_heads(, dim)]."""
    index, window = group.index(layer), group.shape.window
    batch.append(index, _token(key, 0), _token(value, 0))
    outs, sums = [], []
    for i in range(query.shape[2]):
        q = _token(query, i)
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
        if window == 0 or i < window:  # else everything in the pool is out of its sight
            # The pool counts from the step's token: later ones see as much less of it.
            batch.attend(index, q, out, lse, window=window - i if window else 0, silent=i > 0)
        outs.append(out.float())
        sums.append(lse)
    pool_out, pool_lse = torch.stack(outs, 1), torch.stack(sums, 1)
    fresh, fresh_lse = exact_attention(
        query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], group.shape.scale, window=window
    )
    out, lse = merge(
        pool_out[:, 1:], pool_lse[:, 1:], fresh.transpose(1, 2), fresh_lse.transpose(1, 2)
    )
    return torch.cat([pool_out[:, :1], out], 1), torch.cat([pool_lse[:, :1], lse], 1)
