"""A tiny random model, and a stand-in for the package thinkv that keeps every token exactly."""

from __future__ import annotations

import contextlib
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from engine.attention import step_attention  # noqa: E402
from engine.gguf_weights import Config, Layer, Weights  # noqa: E402
from engine.model import Model  # noqa: E402

TINY = Config(name="tiny", layers=2, width=64, q_heads=4, kv_heads=2, head_dim=16, ffn_width=96,
              vocab=50, norm_eps=1e-5, rope_base=10000.0, context=256)


def tiny_model(seed: int = 0) -> Model:
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    config = TINY
    kv = config.kv_heads * config.head_dim
    ones = np.ones(config.width, dtype=np.float32)
    layers = [
        Layer(attn_norm=ones, qkv=2 * matrix(config.width + 2 * kv, config.width),
              attn_out=matrix(config.width, config.width), ffn_norm=ones,
              gate_up=matrix(2 * config.ffn_width, config.width),
              down=matrix(config.width, config.ffn_width))
        for _ in range(config.layers)
    ]
    embedding = matrix(config.vocab, config.width) * np.float32(3)
    return Model(Weights(config, embedding, ones, embedding, layers))


class FakeSequence:
    """Stores k, v [kv_heads, tokens, head_dim] a layer; `damage` is added to every stored value."""

    def __init__(self, model: FakePoolModel, policy: str, damage: float) -> None:
        self.model = model
        self.policy = policy
        self.damage = np.float32(damage)
        self.layers = [[np.zeros((model.kv_heads, 0, model.head_dim), np.float32)] * 2
                       for _ in range(model.layer_count)]
        self.closed = False
        self.prefilled: set[int] = set()

    def add(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        assert k.flags.c_contiguous and v.flags.c_contiguous and k.dtype == np.float32
        self.layers[layer] = [
            np.concatenate([old, new.transpose(1, 0, 2) + self.damage], axis=1)
            for old, new in zip(self.layers[layer], (k, v))
        ]

    def prefill(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        assert layer not in self.prefilled
        self.prefilled.add(layer)
        self.add(layer, k, v)

    def prefill_end(self) -> None:
        assert self.prefilled == set(range(self.model.layer_count))

    def stats(self) -> dict[str, int]:
        return {"tokens": self.layers[0][0].shape[1]}

    def close(self) -> None:
        self.closed = True


class FakeStep:
    def __init__(self, sequences: list[FakeSequence]) -> None:
        self.sequences = sequences
        self.appended: set[int] = set()

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        assert layer not in self.appended
        self.appended.add(layer)
        for index, sequence in enumerate(self.sequences):
            sequence.add(layer, k[index : index + 1], v[index : index + 1])

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        assert layer in self.appended and q.flags.c_contiguous
        return np.stack([step_attention(q[index], *sequence.layers[layer])
                         for index, sequence in enumerate(self.sequences)])


class FakePoolModel:
    """Has the methods of thinkv.Model that the engine uses. policy "broken" cannot be opened."""

    def __init__(self, config: Config) -> None:
        self.layer_count = config.layers
        self.kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        self.opened: list[FakeSequence] = []

    def sequence(self, policy: str = "thinkv", damage: float = 0.0) -> FakeSequence:
        if policy == "broken":
            raise LookupError("no such policy")
        self.opened.append(FakeSequence(self, policy, damage))
        return self.opened[-1]

    @contextlib.contextmanager
    def step(self, sequences: list[FakeSequence]):
        yield FakeStep(sequences)
