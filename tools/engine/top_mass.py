"""Which layers a policy with a host tier should keep dense: those whose attention is spread out.

arXiv 2505.19586 (TailorKV): over the last 32 queries of one prompt, what the largest 5 % of each
row's weights leave out, on average over queries and heads. A layer above 0.2 is dense
("quantization-friendly"). The same numbers as kernels/policy/tier_select.h.
"""

from __future__ import annotations

import numpy as np

from .attention import causal_attention, softmax_rows
from .model import Model

SHARE = 0.05
ERROR_MAX = 0.2
QUERIES = 32
TOKENS_MIN = 256  # fewer, and the top 5 % is a handful of tokens


def top_mass_error(weights: np.ndarray, share: float = SHARE) -> float:
    """weights [..., n], each row a softmax."""
    n = weights.shape[-1]
    top = max(1, int(np.float32(n) * np.float32(share)))
    largest = np.partition(weights, n - top, axis=-1)[..., n - top :]
    return float(np.mean(1.0 - largest.astype(np.float64).sum(axis=-1)))


def query_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The attention [q_heads, rows, n] of the newest queries of a prompt.

    q [rows, q_heads, d] of the last rows, k [n, kv_heads, d]; causal.
    """
    rows, q_heads, dim = q.shape
    n, kv_heads, _ = k.shape
    queries = (q * np.float32(dim**-0.5)).transpose(1, 0, 2).reshape(kv_heads, -1, dim)
    scores = np.matmul(queries, k.transpose(1, 2, 0)).reshape(q_heads, rows, n)
    future = np.arange(n)[None, :] > np.arange(n - rows, n)[:, None]
    scores[:, future] = -np.inf
    return softmax_rows(scores)


def layer_errors(model: Model, tokens: list[int]) -> np.ndarray:
    """The error [layers] of one prompt. Raises ValueError where it is too short to say anything."""
    if len(tokens) < TOKENS_MIN:
        raise ValueError(f"the prompt has {len(tokens)} tokens, at least {TOKENS_MIN} are needed")
    errors = np.zeros(model.config.layers)

    def attention(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        errors[layer] = top_mass_error(query_weights(q[-QUERIES:], k))
        return causal_attention(q, k, v)

    model.hidden_states(tokens, attention)
    return errors


def dense_layers(errors: np.ndarray, limit: float = ERROR_MAX) -> list[int]:
    return [layer for layer, error in enumerate(errors) if error > limit]


def describe(errors: np.ndarray) -> str:
    """One line a layer, and the line for the policy."""
    lines = ["attention that the top 5 % of tokens leave out, by layer (dense above 0.2):"]
    lines += [f"  layer {layer:3}: {error:.3f}{'  dense' if error > ERROR_MAX else ''}"
              for layer, error in enumerate(errors)]
    dense = ", ".join(str(layer) for layer in dense_layers(errors))
    return "\n".join([*lines, f"tier: {{dense_layers: [{dense}]}}"])
