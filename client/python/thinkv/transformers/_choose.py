"""Rows that are chosen, repeated or dropped, and their numbers."""

from __future__ import annotations

from typing import Any

from .._batch import Batch
from .._client import Sequence


def sum_of(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a row's sequences together."""
    if len(parts) == 1:
        return parts[0]
    added = ("bytes_held", "bytes_f16", "metadata_bytes", "pages", "evicted_slots", "slots_reused")
    largest = ("tokens", "live_tokens_max", "live_tokens")
    return {
        **{name: sum(part[name] for part in parts) for name in added},
        **{name: max(part[name] for part in parts) for name in largest},
    }


def take_rows(
    groups: list[list[Sequence | None]], indices: list[int]
) -> list[list[Sequence | None]]:
    """The sequences of `indices` in each group; a second one of the same row is a copy. All copies
    or none."""
    chosen: list[list[Sequence | None]] = [[None] * len(indices) for _ in groups]
    # A row that stays where it is needs not join again.
    order = sorted(range(len(indices)), key=lambda place: indices[place] != place)
    copies: list[Sequence] = []
    try:
        for group, new in zip(groups, chosen):
            taken: set[int] = set()
            for place in order:
                source = group[indices[place]]
                if source is not None and indices[place] in taken:
                    source = source.copy()
                    copies.append(source)
                new[place] = source
                taken.add(indices[place])
    except BaseException:
        for copy in copies:
            copy.close()
        raise
    return chosen


def rejoin(batch: Batch, old: list[Sequence | None], new: list[Sequence | None]) -> None:
    """The batch's rows become `new`; those that stay are left alone."""
    changed = [row for row, (a, b) in enumerate(zip(old, new)) if a is not b]
    for row in changed:
        if old[row] is not None:
            batch.leave(row)
    for row in changed:
        if new[row] is not None:
            batch.join(row, new[row])
