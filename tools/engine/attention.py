"""Exact grouped-query attention in numpy: the yardstick that compressed caches are held against."""

from __future__ import annotations

import numpy as np

QUERY_ROWS = 256  # query tokens at a time: bounds the score matrix


def softmax_rows(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in place. -inf entries get probability 0."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """q [tokens, q_heads, d], k and v [tokens, kv_heads, d] of the same tokens -> out like q."""
    tokens, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    scale = np.float32(dim**-0.5)
    keys = np.ascontiguousarray(k.transpose(1, 2, 0))
    values = np.ascontiguousarray(v.transpose(1, 0, 2))
    out = np.empty(q.shape, dtype=np.float32)
    for first in range(0, tokens, QUERY_ROWS):
        last = min(first + QUERY_ROWS, tokens)
        rows = last - first
        future = np.arange(last)[None, :] > np.arange(first, last)[:, None]
        for head in range(kv_heads):
            heads = slice(head * group, (head + 1) * group)
            queries = (q[first:last, heads] * scale).transpose(1, 0, 2).reshape(group * rows, dim)
            scores = (queries @ keys[head][:, :last]).reshape(group, rows, last)
            scores[:, future] = -np.inf
            mixed = softmax_rows(scores).reshape(group * rows, last) @ values[head, :last]
            out[first:last, heads] = mixed.reshape(group, rows, dim).transpose(1, 0, 2)
    return out


def step_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One query token: q [q_heads, d], k and v [kv_heads, tokens, d] -> out like q."""
    kv_heads, _, dim = k.shape
    queries = q.reshape(kv_heads, -1, dim) * np.float32(dim**-0.5)
    scores = np.matmul(queries, k.transpose(0, 2, 1))
    return np.matmul(softmax_rows(scores), v).reshape(q.shape)


def step_sparsity(q: np.ndarray, k: np.ndarray, near_zero: float = 0.01) -> float:
    """Fraction of one step's attention entries below `near_zero` of their row's maximum.

    As the pool measures it: one row a kv head, the maximum of the logits over its query heads;
    the fractions are averaged over the kv heads (tools/decisions/0004-sparsity-by-lane.md).
    """
    kv_heads, _, dim = k.shape
    queries = q.reshape(kv_heads, -1, dim) * np.float32(dim**-0.5)
    logits = np.matmul(queries, k.transpose(0, 2, 1)).max(axis=1)
    below = logits < logits.max(axis=1, keepdims=True) + np.float32(np.log(near_zero))
    return float(np.mean(below))
