"""A private thinkvd with the policy files of some runs, and their sequences in its pool."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import thinkv

from engine.caches import PoolCache, pool_model
from engine.daemon import Daemon
from engine.gguf_weights import Config

from .policies import Run
from .reference import Reference

POOL = "6GiB"  # of address space; memory is taken as it is used
SAMPLE = 16  # steps between two looks at the bytes
WINDOW = 128  # tokens at the end over which the largest bytes count


@contextlib.contextmanager
def open_pool(config: Config, runs: list[Run]) -> Iterator[Any]:
    """The pool's model. Its daemon knows the shipped policies and those that `runs` need."""
    files = {file[0]: file[1] for run in runs if (file := run.file()) is not None}
    with tempfile.TemporaryDirectory(prefix="thinkv-eval-") as folder:
        for name, text in files.items():
            (pathlib.Path(folder) / f"{name}.yaml").write_text(text, encoding="utf-8")
        extra = [pathlib.Path(folder)] if files else None
        with (
            Daemon(policies=extra, pool=POOL) as daemon,
            thinkv.Client(socket=str(daemon.socket), name="eval", threads=1) as client,
        ):
            yield pool_model(client, config)


def fill(cache: PoolCache, reference: Reference, prompt: int) -> None:
    """Prefills every sequence with the first `prompt` tokens of the text."""
    for layer in range(len(reference.k)):
        cache.prefill(layer, reference.k[layer, :prompt], reference.v[layer, :prompt])
        queries = np.ascontiguousarray(reference.q[layer, :prompt])
        for sequence in cache.sequences:
            if hasattr(sequence, "prefill_queries"):
                sequence.prefill_queries(layer, queries)
    cache.prefill_end()


class Bytes:
    """What each sequence held over time."""

    def __init__(self, cache: PoolCache) -> None:
        self._cache = cache
        self._samples: list[list[int]] = []
        self._tokens: list[int] = []

    def look(self, last: bool) -> None:
        """After each step. last: nothing follows."""
        tokens = self._cache.tokens
        if tokens % SAMPLE == 0 or last:
            self._tokens.append(tokens)
            self._samples.append([self._cache.stats(index)["bytes_held"]
                                  for index in range(len(self._cache.sequences))])

    def at_end(self, run: int) -> int:
        """The most over the last WINDOW tokens: no policy gains by the phase of its evictions."""
        first = self._tokens[-1] - WINDOW
        return max(row[run] for row, tokens in zip(self._samples, self._tokens) if tokens > first)

    def last(self, run: int) -> int:
        return self._samples[-1][run]

    def mean(self, run: int) -> float:
        return float(np.mean([row[run] for row in self._samples]))
