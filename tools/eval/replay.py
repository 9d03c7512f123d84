"""A text's exact q, k, v fed to the pool alone, without the model: bytes, time and the error of
attention's output at equal inputs.

It costs about a third of teacher forcing, which makes it the measurement that searches for a
memory point run on. The pool's scores are those of the exact queries; teacher forcing, which has
the last word, differs from it a little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable

import numpy as np

from engine.caches import PoolCache
from engine.gguf_weights import Config

from .policies import Run
from .pools import Bytes, fill, open_pool
from .reference import Reference


@dataclasses.dataclass(frozen=True)
class Replayed:
    bytes: int
    error: np.ndarray  # [layers] |out - exact| / |exact|, norms over steps and heads
    us_per_token: float  # CPU time of append, attend and evictions; mean of the policy's runs


class _Group:
    """The runs of one policy, stepped by one call each layer."""

    def __init__(self, cache: PoolCache, reference: Reference) -> None:
        self.cache = cache
        self.bytes = Bytes(cache)
        self.seconds = 0.0
        self._reference = reference
        self._squares = np.zeros((len(cache.sequences), len(reference.q)))

    def step(self, index: int) -> None:
        reference, runs = self._reference, len(self.cache.sequences)
        keys = np.repeat(reference.k[:, index, None], runs, axis=1)
        values = np.repeat(reference.v[:, index, None], runs, axis=1)
        queries = np.repeat(reference.q[:, index, None], runs, axis=1)
        outputs = np.empty_like(queries)
        started = time.process_time()
        with self.cache.step() as step:
            for layer in range(len(keys)):
                step.append(layer, keys[layer], values[layer])
                outputs[layer] = step.attend(layer, queries[layer])
        self.seconds += time.process_time() - started
        outputs -= reference.out[:, index, None]
        self._squares += np.square(outputs).sum(axis=(2, 3), dtype=np.float64).T

    def results(self, steps: int, norms: np.ndarray) -> list[Replayed]:
        runs = len(self.cache.sequences)
        us_per_token = self.seconds / steps / runs * 1e6
        return [Replayed(self.bytes.at_end(run), np.sqrt(self._squares[run] / norms), us_per_token)
                for run in range(runs)]


def replay(
    config: Config,
    reference: Reference,
    prompt: int,
    runs: list[Run],
    tick: Callable[[int], None] = lambda steps: None,
) -> list[Replayed]:
    """One result a run, in their order. tick: called with run-steps as they are done."""
    order: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        order.setdefault(run.policy.name, []).append(index)
    total = len(reference.tokens)
    with open_pool(config, runs) as pool, contextlib.ExitStack() as stack:
        groups = []
        for indices in order.values():
            options = [runs[index].sequence() for index in indices]
            groups.append(_Group(stack.enter_context(PoolCache(pool, *options)), reference))
            fill(groups[-1].cache, reference, prompt)
        for index in range(prompt, total):
            for group in groups:
                group.step(index)
                group.bytes.look(index == total - 1)
            tick(len(runs))
        norms = np.square(reference.out[:, prompt:]).sum(axis=(1, 2, 3), dtype=np.float64)
        found: list[Replayed | None] = [None] * len(runs)
        for group, indices in zip(groups, order.values()):
            for index, result in zip(indices, group.results(total - prompt, norms)):
                found[index] = result
    return [each for each in found if each is not None]
