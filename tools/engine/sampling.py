"""Choice of the next token."""

from __future__ import annotations

import dataclasses

import numpy as np

CANDIDATES = 512  # most likely tokens that a draw considers: sorting the whole vocabulary is slow


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    temperature: float = 0.7  # 0 = greedy
    top_p: float = 0.95
    repetition_penalty: float = 1.1  # 1 = off
    repetition_window: int = 64  # tokens that the penalty looks back on
    seed: int = 1


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, options: SamplingOptions, banned: frozenset[int] = frozenset()) -> None:
        """`banned` tokens are never drawn: the quickstart bans the end of text so that a
        generation reaches its length."""
        self._options = options
        self._banned = np.fromiter(sorted(banned), dtype=np.int64)
        self._random = np.random.default_rng(options.seed)
        self._recent: list[int] = []

    def draw(self, logits: np.ndarray) -> int:
        scores = logits.astype(np.float32, copy=True)
        scores[self._banned] = -np.inf
        self._penalise(scores)
        token = self._greedy(scores) if self._options.temperature == 0 else self._random_one(scores)
        self._recent.append(token)
        del self._recent[: -self._options.repetition_window]
        return token

    def _penalise(self, scores: np.ndarray) -> None:
        if self._options.repetition_penalty == 1 or not self._recent:
            return
        seen = np.unique(np.asarray(self._recent))
        penalty = np.float32(self._options.repetition_penalty)
        values = scores[seen]
        scores[seen] = np.where(values > 0, values / penalty, values * penalty)

    def _greedy(self, scores: np.ndarray) -> int:
        return int(scores.argmax())

    def _random_one(self, scores: np.ndarray) -> int:
        count = min(CANDIDATES, len(scores))
        top = np.argpartition(scores, -count)[-count:]
        top = top[np.argsort(-scores[top], kind="stable")]
        probs = np.exp((scores[top] - scores[top[0]]) / np.float32(self._options.temperature))
        probs /= probs.sum()
        inside = np.cumsum(probs) - probs < self._options.top_p
        kept = probs[inside].astype(np.float64)
        return int(top[inside][self._random.choice(len(kept), p=kept / kept.sum())])
