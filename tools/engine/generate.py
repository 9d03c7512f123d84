"""Generation of one sequence: prefill, then one token a step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from .caches import Cache
from .model import Model, log_softmax
from .sampling import Sampler


@dataclasses.dataclass(frozen=True)
class Generation:
    prompt: list[int]
    tokens: list[int]  # generated
    prefill_s: float
    decode_s: float
    log_probs: np.ndarray | None  # row i: the distribution after tokens[i]; [tokens, vocab]

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.decode_s if self.decode_s > 0 else 0.0


def generate(
    model: Model,
    cache: Cache,
    prompt: list[int],
    sampler: Sampler,
    count: int,
    on_token: Callable[[int], None] = lambda token: None,
    keep_log_probs: bool = False,
) -> Generation:
    """Generates exactly `count` tokens; what must not be drawn is the sampler's matter."""
    started = time.monotonic()
    logits = model.prefill(prompt, cache)
    decode_started = time.monotonic()
    tokens: list[int] = []
    rows = np.empty((count, model.config.vocab), dtype=np.float32) if keep_log_probs else None
    for index in range(count):
        token = sampler.draw(logits)
        tokens.append(token)
        logits = model.step(token, cache)
        if rows is not None:
            rows[index] = log_softmax(logits)
        on_token(token)
    return Generation(
        prompt=prompt,
        tokens=tokens,
        prefill_s=decode_started - started,
        decode_s=time.monotonic() - decode_started,
        log_probs=rows,
    )
