"""How far many compressed caches move the model at once: KL, top-1, perplexity, needle recall.

One `add` is one step of teacher forcing: the exact model's logits, and one row of logits a run.
KL(exact || run) = sum p (z - z') - log Z + log Z' with p, z and Z of the exact side and z', Z' of
the run. The difference z - z' is formed before it is summed: for a good cache it is small, so
float32 keeps a KL of 1e-5, which the difference of two entropies would lose.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Exact:
    """The exact side of one step, worked out once for all runs."""

    logits: np.ndarray  # [vocab]
    probabilities: np.ndarray  # [vocab]
    log_sum: float
    best: int

    @staticmethod
    def of(logits: np.ndarray) -> Exact:
        top = logits.max()
        weights = np.exp(logits - top)
        total = weights.sum(dtype=np.float64)
        probabilities = weights / np.float32(total)
        return Exact(logits, probabilities, float(top + np.log(total)), int(logits.argmax()))


@dataclasses.dataclass(frozen=True)
class Quality:
    """Means over the steps of one run. needle: None where the text asks nothing."""

    rows: int
    kl: float  # nats
    kl_late: float  # of the later half of the steps, where more had to be given up
    top1: float
    ppl: float
    ppl_full: float
    needle: float | None
    needle_full: float | None


class Scores:
    def __init__(self, runs: int, steps: int) -> None:
        self._kl = np.zeros((runs, steps))
        self._same = np.zeros((runs, steps), dtype=bool)
        self._nll = np.zeros((runs, steps))
        self._nll_full = np.zeros(steps)
        self._found = np.zeros(runs, dtype=np.int64)
        self._found_full = 0
        self._asked = 0
        self._predicted = 0  # steps whose next token is part of the text
        self._step = 0

    def add(self, exact: Exact, logits: np.ndarray, target: int | None, asked: bool) -> None:
        """logits [runs, vocab]. target: the token that follows, None at the end of the text;
        asked: it is part of an answer about something that the text said earlier."""
        if self._step >= self._kl.shape[1] or len(logits) != len(self._kl):
            raise ValueError(f"Scores: {len(logits)} runs in step {self._step} of {self._kl.shape}")
        top = logits.max(axis=1)
        weights = logits - top[:, None]
        np.exp(weights, out=weights)
        log_sum = top + np.log(weights.sum(axis=1, dtype=np.float64))
        difference = np.subtract(exact.logits, logits, out=weights)
        self._kl[:, self._step] = difference @ exact.probabilities - exact.log_sum + log_sum
        best = logits.argmax(axis=1)
        self._same[:, self._step] = best == exact.best
        if target is not None:
            self._nll[:, self._step] = log_sum - logits[:, target]
            self._nll_full[self._step] = exact.log_sum - exact.logits[target]
            self._predicted += 1
            if asked:
                self._asked += 1
                self._found += best == target
                self._found_full += exact.best == target
        self._step += 1

    def quality(self, run: int) -> Quality:
        steps = self._step
        if steps == 0 or self._predicted == 0:
            raise ValueError("Scores: nothing was added")
        predicted = self._predicted
        asked = self._asked
        return Quality(
            rows=steps,
            kl=float(self._kl[run, :steps].mean()),
            kl_late=float(self._kl[run, steps // 2 : steps].mean()),
            top1=float(self._same[run, :steps].mean()),
            ppl=float(np.exp(self._nll[run].sum() / predicted)),
            ppl_full=float(np.exp(self._nll_full.sum() / predicted)),
            needle=float(self._found[run] / asked) if asked else None,
            needle_full=self._found_full / asked if asked else None,
        )
