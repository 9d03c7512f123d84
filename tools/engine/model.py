"""Forward pass of a Llama model in plain numpy, float32 throughout.

The model computes projections, rotary embedding and the feed-forward part; what happens between
the fresh k, v and the attention output belongs to the cache that the caller passes in. Every
constant below is float32 on purpose: one float64 scalar promotes whole arrays and makes a decode
step about 15 times slower.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .attention import causal_attention
from .caches import Cache
from .gguf_weights import Layer, Weights

# Attention of one layer over fresh q, k, v [tokens, heads, head_dim] -> out like q.
LayerAttention = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _exact_attention(_: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    return causal_attention(q, k, v)


class Model:
    def __init__(self, weights: Weights) -> None:
        self.config = weights.config
        self._weights = weights
        half = self.config.head_dim // 2
        exponent = np.arange(half, dtype=np.float64) / half
        frequency = self.config.rope_base ** -exponent
        angle = np.arange(self.config.context, dtype=np.float64)[:, None] * frequency
        # Angles in double precision, tables in single: rounding the angle itself would cost
        # accuracy that grows with the position.
        self._cos = np.cos(angle).astype(np.float32)
        self._sin = np.sin(angle).astype(np.float32)
        self._eps = np.float32(self.config.norm_eps)

    def prefill(self, tokens: list[int], cache: Cache) -> np.ndarray:
        """Runs the prompt with exact causal attention and hands every layer's k, v to the cache.

        Returns the logits [vocab] after the last token.
        """

        def attention(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            cache.prefill(layer, k, v)
            return causal_attention(q, k, v)

        hidden = self._forward(np.asarray(tokens), np.arange(len(tokens)), attention)
        cache.prefill_end()
        return self.logits(hidden[-1:])[0]

    def step(self, token: int, cache: Cache) -> np.ndarray:
        """One decode step. Returns the logits [vocab] after `token`."""
        return self.step_batch([token], cache)[0]

    def step_batch(self, tokens: list[int], cache: Cache) -> np.ndarray:
        """One token for each sequence of the cache. Returns logits [len(tokens), vocab]."""
        with cache.step() as step:

            def attention(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
                step.append(layer, k, v)
                return step.attend(layer, q)

            hidden = self._forward(np.asarray(tokens), step.positions, attention)
        return self.logits(hidden)

    def hidden_states(
        self, tokens: list[int], attention: LayerAttention | None = None
    ) -> np.ndarray:
        """Teacher forcing: the last hidden states [len(tokens), width], with the caller's
        attention over the whole text; exact causal attention by default."""
        positions = np.arange(len(tokens))
        return self._forward(np.asarray(tokens), positions, attention or _exact_attention)

    def log_probs(self, hidden: np.ndarray) -> np.ndarray:
        """Log-probabilities [rows, vocab] of the next token. 0.2 MB a row: give it blocks."""
        return log_softmax(self.logits(hidden))

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """[rows, vocab] of last hidden states [rows, width]."""
        return self._norm(hidden, self._weights.output_norm) @ self._weights.output.T

    def _forward(
        self, tokens: np.ndarray, positions: np.ndarray, attention: LayerAttention
    ) -> np.ndarray:
        if positions.max() >= self.config.context:
            raise ValueError(f"the model's context is {self.config.context} tokens")
        x = self._weights.embedding[tokens]
        for index, layer in enumerate(self._weights.layers):
            q, k, v = self._project(layer, x, positions)
            out = attention(index, q, k, v)
            x = x + out.reshape(len(x), -1) @ layer.attn_out.T
            x = x + self._feed_forward(layer, x)
        return x

    def _project(
        self, layer: Layer, x: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config = self.config
        heads = (self._norm(x, layer.attn_norm) @ layer.qkv.T).reshape(len(x), -1, config.head_dim)
        turned = self._rotate(heads[:, : config.q_heads + config.kv_heads], positions)
        return (
            turned[:, : config.q_heads],
            np.ascontiguousarray(turned[:, config.q_heads :]),
            np.ascontiguousarray(heads[:, config.q_heads + config.kv_heads :]),
        )

    def _rotate(self, heads: np.ndarray, positions: np.ndarray) -> np.ndarray:
        cos, sin = self._cos[positions, None, :], self._sin[positions, None, :]
        even, odd = heads[..., 0::2], heads[..., 1::2]
        out = np.empty(heads.shape, dtype=np.float32)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out

    def _feed_forward(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        both = self._norm(x, layer.ffn_norm) @ layer.gate_up.T
        gate, up = both[:, : self.config.ffn_width], both[:, self.config.ffn_width :]
        silu = gate / (np.float32(1) + np.exp(-gate))
        return (silu * up) @ layer.down.T

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        mean = np.square(x).mean(axis=-1, keepdims=True, dtype=np.float32)
        return x / np.sqrt(mean + self._eps) * weight
