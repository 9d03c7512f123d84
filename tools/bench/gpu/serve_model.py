"""An 8B-shaped decoder with random weights, one token of every sequence a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from . import serve_ops

GENERATED = 32768


@dataclass(frozen=True)
class Shape:
    layers: int = 32
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    mlp: int = 14336
    vocabulary: int = 128256

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        qkv = self.hidden * (self.q_heads + 2 * self.kv_heads) * self.head_dim
        out = self.q_heads * self.head_dim * self.hidden
        return qkv + out + 3 * self.hidden * self.mlp

    @property
    def read_weights(self) -> int:
        """Numbers that every step reads: all layers and the head, not the embedding."""
        return self.layers * self.layer_weights + self.hidden * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        return 2 * (self.read_weights + self.hidden * self.vocabulary)

    @property
    def token_bytes(self) -> int:
        """Of a bf16 cache."""
        return 4 * self.layers * self.kv_heads * self.head_dim

    def activation_bytes(self, batch: int) -> int:
        """Buffers of a step; the logits and the MLP are most of it."""
        wide = 3 * self.mlp + self.vocabulary + 6 * self.hidden
        return 2 * batch * wide + (1 << 29)


SHAPE = Shape()


class Cache(Protocol):
    """What a system does with K and V. All calls launch work on the current stream only."""

    batch: int
    positions: torch.Tensor  # [batch] int32, of this step's tokens

    def begin(self) -> None: ...
    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None: ...
    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor: ...
    def end(self) -> None: ...


class Parts:
    """Milliseconds of a step by part: events between the parts, recorded inside the captured
    graph, so that they mark what the replay does. A part is what lies before its event."""

    def __init__(self) -> None:
        self.enabled = False
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._sums: dict[str, float] = {}

    def mark(self, name: str) -> None:
        if not self.enabled:
            return
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record()
        self._marks.append((name, event))

    def add_replay(self) -> None:
        """After a replay was waited for."""
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:]):
            self._sums[name] = self._sums.get(name, 0.0) + begin.elapsed_time(end)

    def take(self, replays: int) -> dict[str, float]:
        result = {name: ms / replays for name, ms in self._sums.items()}
        self._marks.clear()
        self._sums.clear()
        return result


class Decoder:
    """Weights, and the activations of at most `batch` rows."""

    def __init__(self, shape: Shape = SHAPE) -> None:
        self.shape = shape
        width = (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim
        self.layers = [tuple(self._matrix(*size) for size in (
            (shape.hidden, width), (shape.q_heads * shape.head_dim, shape.hidden),
            (shape.hidden, 2 * shape.mlp), (shape.mlp, shape.hidden)))
            for _ in range(shape.layers)]
        self.embedding = self._matrix(shape.hidden, shape.vocabulary).t()
        self.head = self._matrix(shape.hidden, shape.vocabulary)
        self.parts = Parts()

    @staticmethod
    def _matrix(rows: int, columns: int) -> torch.Tensor:
        """As torch's Linear keeps it: [out, in], used transposed."""
        weight = torch.empty(columns, rows, device="cuda", dtype=torch.bfloat16)
        return weight.normal_(0.0, rows ** -0.5).t()

    def buffers(self, batch: int) -> None:
        shape = self.shape

        def empty(*size: int) -> torch.Tensor:
            return torch.zeros(batch, *size, device="cuda", dtype=torch.bfloat16)

        self.tokens = torch.randint(0, shape.vocabulary, (batch,), device="cuda")
        self.x, self.normed, self.delta = (empty(shape.hidden) for _ in range(3))
        self.q = empty(shape.q_heads, shape.head_dim)
        self.k, self.v = (empty(shape.kv_heads, shape.head_dim) for _ in range(2))
        self.qkv = empty((shape.q_heads + 2 * shape.kv_heads) * shape.head_dim)
        self.gate_up, self.gated = empty(2 * shape.mlp), empty(shape.mlp)
        self.logits = empty(shape.vocabulary)

    def step(self, cache: Cache) -> None:
        """Greedy: the next tokens replace the present ones."""
        mark = self.parts.mark
        mark("start")
        torch.index_select(self.embedding, 0, self.tokens, out=self.x)
        self.delta.zero_()
        mark("other")
        cache.begin()
        mark("begin")
        for layer in range(self.shape.layers):
            self._layer(layer, cache)
        serve_ops.add_norm(self.x, self.delta, self.normed)
        mark("other")
        torch.mm(self.normed, self.head, out=self.logits)
        mark("gemm")
        torch.argmax(self.logits, 1, out=self.tokens)
        mark("other")
        cache.end()
        mark("end")

    def _layer(self, layer: int, cache: Cache) -> None:
        mark, (qkv, out, gate_up, down) = self.parts.mark, self.layers[layer]
        serve_ops.add_norm(self.x, self.delta, self.normed)
        mark("other")
        torch.mm(self.normed, qkv, out=self.qkv)
        mark("gemm")
        serve_ops.split_rope(self.qkv, cache.positions, self.q, self.k, self.v)
        mark("other")
        cache.append(layer, self.k, self.v)
        mark("append")
        attended = cache.attend(layer, self.q)
        mark("attention")
        torch.mm(attended.reshape(attended.shape[0], -1), out, out=self.delta)
        mark("gemm")
        serve_ops.add_norm(self.x, self.delta, self.normed)
        mark("other")
        torch.mm(self.normed, gate_up, out=self.gate_up)
        mark("gemm")
        serve_ops.silu_mul(self.gate_up, self.gated)
        mark("other")
        torch.mm(self.gated, down, out=self.delta)
        mark("gemm")
