"""The largest setting of a knob whose bytes fit: a deterministic search over measured bytes.

Settings are indices into a list that rises with the bytes it costs. Each round asks for a few
indices, all measured together; every memory point narrows its own bracket by interpolation.
"""

from __future__ import annotations

import dataclasses

TIGHT = 0.97  # a setting that uses this share of its target has nearly its bytes
AIM = 0.99  # of the target, so that most interpolations end below it
ROUNDS_MAX = 10
EDGE = 1 / 128  # of the range: how near to the first setting that is too large a search ends
LADDER = (0.05, 0.20, 0.60)  # of the range: where a search without a guess begins


@dataclasses.dataclass(frozen=True)
class Bracket:
    below: int | None  # the largest index that is known to fit
    above: int | None  # the smallest one above it that is known not to


class Search:
    """One policy's knob for several targets at once."""

    def __init__(self, count: int, targets: list[float], guesses: list[int] | None = None) -> None:
        """count: of settings. guesses: indices to begin with."""
        if count < 1:
            raise ValueError("Search: there is no setting")
        self._last = count - 1
        self._targets = targets
        self._begin = guesses or [round(share * self._last) for share in LADDER]
        self._bytes: dict[int, float] = {}
        self._rounds = 0

    def wanted(self) -> list[int]:
        """Indices to measure next; empty when every target is settled."""
        if self._rounds >= ROUNDS_MAX:
            return []
        if not self._bytes:
            return sorted({min(max(each, 0), self._last) for each in self._begin})
        asked = {self._next(target) for target in self._targets}
        return sorted(each for each in asked if each is not None and each not in self._bytes)

    def add(self, measured: dict[int, float]) -> None:
        self._bytes.update(measured)
        self._rounds += 1

    def found(self, target: float) -> int | None:
        """The index for a target; None if nothing measured fits it."""
        return self._bracket(target).below

    def bytes(self, index: int) -> float:
        return self._bytes[index]

    def least(self) -> float:
        return min(self._bytes.values())

    def _bracket(self, target: float) -> Bracket:
        fits = [index for index, size in self._bytes.items() if size <= target]
        below = max(fits, default=None)
        over = [index for index, size in self._bytes.items()
                if size > target and (below is None or index > below)]
        return Bracket(below, min(over, default=None))

    def _next(self, target: float) -> int | None:
        bracket = self._bracket(target)
        low, high = bracket.below, bracket.above
        if low == self._last:
            return None
        if low is not None and self._bytes[low] >= TIGHT * target:
            return self._along_the_step(low, high)
        if low is not None and high is not None:
            if high == low + 1:
                return None
            share = (AIM * target - self._bytes[low]) / (self._bytes[high] - self._bytes[low])
            return min(max(low + int(share * (high - low)), low + 1), high - 1)
        if low is not None:
            return self._upwards(low, target)
        if high is None or high == 0:
            return None
        return self._downwards(high, target)

    def _along_the_step(self, low: int, high: int | None) -> int | None:
        """Bytes come in whole pages: many settings hold the same, and the last of them keeps the
        most tokens."""
        near = max(1, int(EDGE * self._last))
        if high is None:
            return min(low + 4 * near, self._last)
        return None if high - low <= near else low + min((high - low + 1) // 2, 4 * near)

    def _upwards(self, low: int, target: float) -> int:
        """Nothing measured is too large: on along the last two measurements."""
        slope = self._slope()
        guess = self._last if slope <= 0 else low + int((AIM * target - self._bytes[low]) / slope)
        return min(max(guess, low + 1), self._last)

    def _downwards(self, high: int, target: float) -> int:
        """Nothing measured is small enough."""
        slope = self._slope()
        guess = 0 if slope <= 0 else high - int((self._bytes[high] - AIM * target) / slope) - 1
        return max(min(guess, high - 1), 0)

    def _slope(self) -> float:
        """Bytes an index, over everything measured."""
        first, last = min(self._bytes), max(self._bytes)
        if first == last:
            return self._bytes[last] / (last + 1)
        return (self._bytes[last] - self._bytes[first]) / (last - first)
