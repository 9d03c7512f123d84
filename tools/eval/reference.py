"""The exact side of a text: one block-parallel pass that records what every run is held against."""

from __future__ import annotations

import dataclasses

import numpy as np

from engine.attention import causal_attention
from engine.model import Model

BLOCK = 64  # rows of exact logits at a time: 13 MB for a vocabulary of 49,152


@dataclasses.dataclass(frozen=True)
class Reference:
    """Attention's inputs and outputs of every layer and token, float32 after rotary embedding."""

    tokens: list[int]
    hidden: np.ndarray  # [tokens, width], before the last norm
    q: np.ndarray  # [layers, tokens, q_heads, head_dim]
    k: np.ndarray  # [layers, tokens, kv_heads, head_dim]
    v: np.ndarray
    out: np.ndarray  # like q


def record(model: Model, tokens: list[int]) -> Reference:
    config = model.config
    rows = (config.layers, len(tokens))
    q = np.empty((*rows, config.q_heads, config.head_dim), dtype=np.float32)
    k = np.empty((*rows, config.kv_heads, config.head_dim), dtype=np.float32)
    v = np.empty_like(k)
    out = np.empty_like(q)

    def attention(layer: int, *fresh: np.ndarray) -> np.ndarray:
        q[layer], k[layer], v[layer] = fresh
        out[layer] = causal_attention(*fresh)
        return out[layer]

    hidden = model.hidden_states(tokens, attention)
    return Reference(tokens, hidden, q, k, v, out)


class ExactLogits:
    """Rows of the exact logits, made a block at a time as the steps reach them."""

    def __init__(self, model: Model, reference: Reference) -> None:
        self._model = model
        self._hidden = reference.hidden
        self._first = 0
        self._block = np.empty((0, 0), dtype=np.float32)

    def row(self, index: int) -> np.ndarray:
        if not self._first <= index < self._first + len(self._block):
            self._first = index
            self._block = self._model.logits(self._hidden[index : index + BLOCK])
        return self._block[index - self._first]
