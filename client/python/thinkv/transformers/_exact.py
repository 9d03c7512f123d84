"""Attention over tensors, with its log-sum-exp: for fresh tokens that the pool does not have yet.

SDPA has neither the log-sum-exp, by which two parts of one attention are merged, nor learned sinks.
"""

from __future__ import annotations

import torch

_SCORES_MAX = 1 << 26  # entries of one block of scores: 256 MiB of float32


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [batch, q_heads, n, dim] over key, value [batch, kv_heads, m, dim]; float32.

    mask: [batch or 1, 1, n, m], boolean or added to the scores; None: causal, the last query sees
    the last key, over the newest `window` keys (0: all). Result: out [batch, q_heads, n, dim] and
    the natural log-sum-exp [batch, q_heads, n], -inf where a query sees nothing."""
    batch, heads, n, dim = query.shape
    kv_heads, m = key.shape[1], key.shape[2]
    grouped = query.float().view(batch, kv_heads, heads // kv_heads, n, dim)
    keys, values = key.float().unsqueeze(2), value.float().unsqueeze(2)
    outs, sums = [], []
    rows = max(1, _SCORES_MAX // (batch * heads * m))
    for first in range(0, n, rows):
        last = min(first + rows, n)
        scores = grouped[..., first:last, :] @ keys.transpose(-1, -2) * scale
        scores = scores + _bias(mask, first, last, n, m, window, query.device)
        peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        weights = (scores - peak).exp()
        total = weights.sum(-1, keepdim=True)
        outs.append((weights @ values) / total.clamp_min(1e-38))
        sums.append((peak + total.log()).squeeze(-1))
    out = torch.cat(outs, -2).view(batch, heads, n, dim)
    return out, torch.cat(sums, -1).view(batch, heads, n)


def _bias(
    mask: torch.Tensor | None,
    first: int,
    last: int,
    n: int,
    m: int,
    window: int,
    device: torch.device,
) -> torch.Tensor:
    if mask is None:
        at = torch.arange(first, last, device=device)[:, None] + (m - n)
        keys = torch.arange(m, device=device)[None]
        seen = keys <= at
        if window:
            seen &= keys > at - window
    else:
        seen = mask[:, :, None, first:last, :m]  # a place for the heads of a kv head
        if seen.dtype != torch.bool:
            return seen.float()
    return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, float("-inf"))


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts of one attention, over different keys, as one. float32."""
    total = torch.logaddexp(lse, other_lse)
    known = total.clamp_min(torch.finfo(torch.float32).min)  # where neither part sees a key
    mine, theirs = (lse - known).exp(), (other_lse - known).exp()
    return out * mine[..., None] + other * theirs[..., None], total


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Lets a learned logit of each query head take its share. out: [..., q_heads, dim]; lse:
    [..., q_heads]."""
    return out * torch.sigmoid(lse - sinks.float())[..., None].to(out.dtype)
