"""What every evaluation here needs: the model, a text, and a private thinkvd."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import thinkv
from engine.caches import pool_model
from engine.daemon import Daemon
from engine.gguf_weights import ModelFile, find_model
from engine.model import Model
from engine.tokenizer import Tokenizer

TEXTS = pathlib.Path(__file__).resolve().parent / "texts"
PROMPT_TOKENS = 16  # the first block of a text enters by prefill


@dataclasses.dataclass(frozen=True)
class Session:
    model: Model
    tokenizer: Tokenizer
    pool: Any  # thinkv model
    daemon: Daemon

    def text(self, tokens: int, path: pathlib.Path | None = None) -> list[int]:
        """The first `tokens` tokens of a text. Raises ValueError when it is shorter."""
        source = path or TEXTS / "tune" / "prose.txt"
        found = self.tokenizer.encode(source.read_text(encoding="utf-8"))
        if not PROMPT_TOKENS < tokens <= len(found):
            raise ValueError(
                f"{source.name} has {len(found)} tokens: choose {PROMPT_TOKENS + 1} to {len(found)}"
            )
        return found[:tokens]


@contextlib.contextmanager
def open_session(name: str) -> Iterator[Session]:
    file = ModelFile(find_model())
    model = Model(file.weights())
    with Daemon() as daemon, thinkv.Client(socket=str(daemon.socket), name=name) as client:
        yield Session(model, Tokenizer(file.vocabulary()), pool_model(client, model.config), daemon)
