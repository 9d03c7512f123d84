"""One unit of work: some policies at all memory points over one text. Makes the rows.

A point is met by bytes that were measured: the search runs on replays, and a run whose bytes under
teacher forcing come out above the point is done again with a smaller setting. No row is ever over
its point; a policy that cannot get there says so by "reached": false and has no quality.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from engine.batch import TILE_ROWS
from engine.model import Model

from .force import Forced, force
from .policies import Policy, Run
from .reference import Reference, record
from .replay import Replayed, replay
from .search import Search
from .store import key_of
from .texts import Text

FULL = 1.0  # the point without a limit: policies without a knob, as they are
RETRIES = 3
REPLAYS_MAX = 48  # runs replayed at once: bounds the pool's memory
Tick = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Task:
    text: Text
    mode: str  # of the prompt
    policies: list[Policy]
    points: list[float]  # shares of the bytes of a 16-bit cache, FULL among them or not
    library: str  # digest
    tile: int = TILE_ROWS  # rows of a forced batch, idle ones included
    # Settings that met the points on another text, as shares of that text's tokens.
    guesses: dict[tuple[str, float], float] = dataclasses.field(default_factory=dict)

    def keys(self) -> list[str]:
        return [key_of(policy, self.text, self.mode, point, self.library, self.tile)
                for policy in self.policies for point in points_of(policy, self.points)]


def points_of(policy: Policy, points: list[float]) -> list[float]:
    return [point for point in points if point != FULL or policy.knob is None]


@dataclasses.dataclass
class _Knob:
    """A policy's search on this text."""

    policy: Policy
    values: list[float]
    search: Search
    replayed: dict[int, Replayed] = dataclasses.field(default_factory=dict)


class Judge:
    """Carries out one task."""

    def __init__(self, model: Model, task: Task, tick: Tick) -> None:
        self._model = model
        self._task = task
        self._tick = tick
        self._prompt = task.text.prompt(task.mode)
        config = model.config
        values = 2 * config.layers * config.kv_heads * config.head_dim
        self._bytes_f16 = 2 * values * len(task.text.tokens)
        self._reference: Reference = record(model, task.text.tokens)

    def rows(self) -> list[dict[str, Any]]:
        knobs = [self._knob(policy) for policy in self._task.policies]
        self._settle(knobs)
        chosen = {
            (knob.policy.name, point): knob.search.found(self._target(point))
            for knob in knobs for point in points_of(knob.policy, self._task.points)
        }
        forced = self._force(knobs, chosen)
        return [
            self._row(knob, point, chosen[knob.policy.name, point], forced)
            for knob in knobs for point in points_of(knob.policy, self._task.points)
        ]

    def _knob(self, policy: Policy) -> _Knob:
        values = [0.0] if policy.knob is None else policy.knob.values(len(self._task.text.tokens))
        targets, guesses = [], []
        for point in points_of(policy, self._task.points):
            targets.append(self._target(point))
            share = self._task.guesses.get((policy.name, point))
            if share is not None:
                guesses.append(round(share * (len(values) - 1)))
        return _Knob(policy, values, Search(len(values), targets, guesses or None))

    def _run(self, knob: _Knob, index: int) -> Run:
        return Run(knob.policy, knob.values[index] if knob.policy.knob is not None else None)

    def _settle(self, knobs: list[_Knob]) -> None:
        """Replays until every search is done."""
        while wanted := [(knob, index) for knob in knobs for index in knob.search.wanted()]:
            for first in range(0, len(wanted), REPLAYS_MAX):
                part = wanted[first : first + REPLAYS_MAX]
                runs = [self._run(knob, index) for knob, index in part]
                found = replay(self._model.config, self._reference, self._prompt, runs, self._tick)
                for (knob, index), result in zip(part, found):
                    knob.replayed[index] = result
            for knob in knobs:
                asked = {index: float(knob.replayed[index].bytes)
                         for each, index in wanted if each is knob}
                if asked:
                    knob.search.add(asked)

    def _force(
        self, knobs: list[_Knob], chosen: dict[tuple[str, float], int | None]
    ) -> dict[tuple[str, int], Forced]:
        """Forces every chosen setting once; lowers those in `chosen` that end above their point."""
        by_name = {knob.policy.name: knob for knob in knobs}
        forced: dict[tuple[str, int], Forced] = {}
        for _ in range(1 + RETRIES):
            needed = sorted({(name, index) for (name, _), index in chosen.items()
                             if index is not None and (name, index) not in forced})
            for first in range(0, len(needed), self._task.tile):
                part = needed[first : first + self._task.tile]
                runs = [self._run(by_name[name], index) for name, index in part]
                found = force(self._model, self._reference, self._task.text.answers, self._prompt,
                              runs, self._tick, self._task.tile)
                forced.update(zip(part, found))
            over = [each for each, index in chosen.items()
                    if index is not None
                    and forced[each[0], index].bytes > self._target(each[1])]
            if not over:
                return forced
            for name, point in over:
                index = chosen[name, point]
                assert index is not None
                step = max(1, len(by_name[name].values) // 100)
                chosen[name, point] = index - step if index >= step else None
        for each in over:
            chosen[each] = None
        return forced

    def _target(self, point: float) -> float:
        """Bytes; without a limit everything fits."""
        return point * self._bytes_f16 if point != FULL else math.inf

    def _row(
        self, knob: _Knob, point: float, index: int | None, forced: dict[tuple[str, int], Forced]
    ) -> dict[str, Any]:
        task, policy = self._task, knob.policy
        row: dict[str, Any] = {
            "policy": policy.name, "text": task.text.name, "split": task.text.split,
            "prompt": task.mode, "memory_fraction": point, "reached": index is not None,
            "bytes_f16": self._bytes_f16, "bytes_target": int(point * self._bytes_f16),
            "tokens": len(task.text.tokens), "prompt_tokens": self._prompt,
            "key": key_of(policy, task.text, task.mode, point, task.library, task.tile),
        }
        if index is None or (policy.name, index) not in forced:
            return {**row, "reached": False, "bytes": int(knob.search.least()),
                    **dict.fromkeys(("kl", "top1", "ppl", "needle"))}
        result = forced[policy.name, index]
        replayed = knob.replayed.get(index)
        row.update(
            bytes=result.bytes, bytes_end=result.bytes_end, bytes_mean=round(result.bytes_mean),
            **{name: _round(value)
               for name, value in dataclasses.asdict(result.quality).items() if name != "rows"},
            steps=result.quality.rows,
            live_tokens=round(result.stats["live_tokens"], 2),
            evicted_tokens=round(result.stats["evicted_tokens"], 2),
            knob=None if policy.knob is None else policy.knob.path,
            knob_value=None if policy.knob is None else knob.values[index],
            knob_share=index / max(1, len(knob.values) - 1),
        )
        if replayed is not None:
            row.update(attention_error=_round(float(replayed.error.mean())),
                       attention_error_by_layer=[_round(float(each)) for each in replayed.error],
                       us_per_token=round(replayed.us_per_token, 1))
        return row


def _round(value: float | None) -> float | None:
    """Six significant digits: more would not repeat on another machine."""
    return None if value is None else float(f"{value:.6g}")
