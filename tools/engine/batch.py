"""Many sequences in one step of the model: weights in the faster order, a fixed number of rows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np

from .caches import Cache, Step
from .gguf_weights import Layer, Weights

# A matrix product rounds by its number of rows, and an eviction that hangs on the last bit then
# goes another way. So a batch is always filled up to this many rows; more sequences than this are
# two batches. With OpenBLAS's 512-bit kernels a row's bits are then the same at every place and in
# any company (measured); its 256-bit ones round by the place in the batch.
TILE_ROWS = 32


def for_batches(weights: Weights) -> Weights:
    """The same numbers with each matrix stored as its transpose: products of a few dozen rows are
    up to 1.3 times faster, because the library need not turn the weights around at every call."""

    def turned(layer: Layer) -> Layer:
        return Layer(**{
            field.name: np.asfortranarray(getattr(layer, field.name))
            for field in dataclasses.fields(Layer)
        })

    return dataclasses.replace(
        weights,
        output=np.asfortranarray(weights.output),
        layers=[turned(layer) for layer in weights.layers],
    )


class TiledCache:
    """A cache of up to `rows` sequences as the model sees it: with idle rows up to a tile."""

    def __init__(self, cache: Cache, sequences: int, rows: int = TILE_ROWS) -> None:
        self._cache = cache
        if not 0 < sequences <= rows:
            raise ValueError(f"TiledCache: 1 to {rows} sequences, not {sequences}")
        self.sequences = sequences
        self.rows = rows
        self.prefill = cache.prefill
        self.prefill_end = cache.prefill_end

    @contextlib.contextmanager
    def step(self) -> Iterator[Step]:
        with self._cache.step() as step:
            yield _TiledStep(step, self.sequences, self.rows)


class _TiledStep:
    def __init__(self, step: Step, sequences: int, rows: int) -> None:
        self._step = step
        self._sequences = sequences
        self.positions = np.zeros(rows, dtype=np.int64)
        self.positions[:sequences] = step.positions

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self._step.append(layer, k[: self._sequences], v[: self._sequences])

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        out = np.zeros(q.shape, dtype=np.float32)
        out[: self._sequences] = self._step.attend(layer, q[: self._sequences])
        return out
