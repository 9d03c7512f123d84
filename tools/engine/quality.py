"""How far a compressed cache moves the model: KL and top-1 against the exact cache, same text.

The text is given (teacher forcing), so the exact side needs no decoding: one block-parallel pass
gives the hidden states of all tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .caches import Cache
from .model import Model, log_softmax

BLOCK = 128  # rows of log-probabilities at a time: 25 MB for a vocabulary of 49,152
NO_TARGET = -1


@dataclasses.dataclass(frozen=True)
class Quality:
    """Means over `rows` next-token distributions. The perplexities cover the rows whose next token
    is part of the text."""

    rows: int
    kl: float  # KL(exact || compressed), nats
    top1: float  # how often both have the same most likely token
    perplexity: float
    exact_perplexity: float


class Meter:
    """Adds up the comparison, in double precision, row by row."""

    def __init__(self) -> None:
        self._rows = 0
        self._scored = 0
        self._kl = 0.0
        self._top1 = 0
        self._nll = 0.0
        self._exact_nll = 0.0

    def add(self, exact: np.ndarray, mine: np.ndarray, targets: np.ndarray) -> None:
        """Log-probabilities [rows, vocab] of both sides, and the token that really follows each row
        (NO_TARGET at the end of the text)."""
        if exact.shape != mine.shape or len(targets) != len(exact):
            raise ValueError(f"Meter: {exact.shape}, {mine.shape} and {len(targets)} targets")
        self._rows += len(exact)
        self._kl += float((np.exp(exact) * (exact - mine)).sum(dtype=np.float64))
        self._top1 += int((exact.argmax(axis=1) == mine.argmax(axis=1)).sum())
        index = np.flatnonzero(targets != NO_TARGET)
        self._scored += len(index)
        self._nll -= float(mine[index, targets[index]].sum(dtype=np.float64))
        self._exact_nll -= float(exact[index, targets[index]].sum(dtype=np.float64))

    def quality(self) -> Quality:
        if self._rows == 0:
            raise ValueError("Meter: nothing was added")
        scale = max(1, self._scored)
        return Quality(
            rows=self._rows,
            kl=self._kl / self._rows,
            top1=self._top1 / self._rows,
            perplexity=float(np.exp(self._nll / scale)),
            exact_perplexity=float(np.exp(self._exact_nll / scale)),
        )


def _targets(tokens: list[int], first: int, rows: int) -> np.ndarray:
    following = tokens[first + 1 : first + 1 + rows]
    return np.asarray(following + [NO_TARGET] * (rows - len(following)), dtype=np.int64)


def compare(
    model: Model, tokens: list[int], hidden: np.ndarray, first: int, compressed: np.ndarray
) -> Quality:
    """`hidden` are the exact states of all tokens; `compressed` row i holds the log-probabilities
    after tokens[first + i]."""
    rows = len(compressed)
    if first + rows > len(tokens) or len(hidden) != len(tokens):
        raise ValueError(f"{rows} rows from token {first} on do not fit {len(tokens)} tokens")
    meter = Meter()
    for start in range(0, rows, BLOCK):
        mine = compressed[start : start + BLOCK]
        at = first + start
        exact = model.log_probs(hidden[at : at + len(mine)])
        meter.add(exact, mine, _targets(tokens, at, len(mine)))
    return meter.quality()


def force(
    model: Model, cache: Cache, batch: int, tokens: list[int], prompt: int
) -> list[Quality]:
    """Teacher forcing of one text through every sequence of the cache, which must be new: the first
    `prompt` tokens by prefill, the others step by step. Returns one Quality a sequence, over the
    distributions after each stepped token."""
    if not 0 < prompt < len(tokens):
        raise ValueError(f"a prompt of {prompt} tokens does not fit a text of {len(tokens)}")
    hidden = model.hidden_states(tokens)
    meters = [Meter() for _ in range(batch)]
    model.prefill(tokens[:prompt], cache)
    for index in range(prompt, len(tokens)):
        rows = log_softmax(model.step_batch([tokens[index]] * batch, cache))
        exact = model.log_probs(hidden[index : index + 1])
        target = _targets(tokens, index, 1)
        for row, meter in zip(rows, meters):
            meter.add(exact, row[None], target)
    return [meter.quality() for meter in meters]
