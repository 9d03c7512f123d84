"""Teacher forcing of many runs over one text: one matrix product, one call of the pool a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from engine.batch import TILE_ROWS, TiledCache
from engine.caches import PoolCache
from engine.model import Model

from .policies import Run
from .pools import Bytes, fill, open_pool
from .reference import ExactLogits, Reference
from .scores import Exact, Quality, Scores


@dataclasses.dataclass(frozen=True)
class Forced:
    quality: Quality
    bytes: int  # the most over the last tokens
    bytes_end: int
    bytes_mean: float
    stats: dict[str, Any]  # of the sequence, at the end


def force(
    model: Model,
    reference: Reference,
    answers: frozenset[int],
    prompt: int,
    runs: list[Run],
    tick: Callable[[int], None] = lambda steps: None,
    tile: int = TILE_ROWS,
) -> list[Forced]:
    """One result a run, `tile` runs at most. answers: indices of tokens that answer questions about
    the text. tick: called with run-steps as they are done."""
    tokens = reference.tokens
    total = len(tokens)
    if not 0 < prompt < total:
        raise ValueError(f"a prompt of {prompt} tokens does not fit a text of {total}")
    exact = ExactLogits(model, reference)
    scores = Scores(len(runs), total - prompt)
    options = [run.sequence() for run in runs]
    with open_pool(model.config, runs) as pool, PoolCache(pool, *options) as cache:
        fill(cache, reference, prompt)
        tiled = TiledCache(cache, len(runs), tile)
        sizes = Bytes(cache)
        for index in range(prompt, total):
            logits = model.step_batch([tokens[index]] * tiled.rows, tiled)[: len(runs)]
            target = tokens[index + 1] if index + 1 < total else None
            scores.add(Exact.of(exact.row(index)), logits, target, index + 1 in answers)
            sizes.look(index == total - 1)
            tick(len(runs))
        return [
            Forced(scores.quality(run), sizes.at_end(run), sizes.last(run), sizes.mean(run),
                   cache.stats(run))
            for run in range(len(runs))
        ]
