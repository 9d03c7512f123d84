"""The texts to judge on: kinds, splits, and where a needle text asks for what it said.

A text's folder is its split: what is tuned looks at `tune` alone, what is reported at `held-out`.
In a needle text the answers stand between U+27E6 and U+27E7; the marks are not part of the text.
"""

from __future__ import annotations

import dataclasses
import pathlib

from engine.tokenizer import Tokenizer

FOLDER = pathlib.Path(__file__).resolve().parent / "texts"
SPLITS = ("tune", "held-out")
OPEN, CLOSE = "\u27e6", "\u27e7"
SHORT_PROMPT = 64
LONG_SHARE = 0.75  # of the text that is prompt in the mode `long`
PROMPT_MODES = ("short", "long")
TOKENS_MIN = 2 * SHORT_PROMPT


@dataclasses.dataclass(frozen=True)
class Text:
    name: str  # of the file, without its ending
    split: str  # tune, held-out, or the folder's name for a text of one's own
    tokens: list[int]
    answers: frozenset[int]  # indices of the tokens that answer a question about the text

    def prompt(self, mode: str) -> int:
        """Tokens that enter by prefill."""
        if mode == "short":
            return SHORT_PROMPT
        if mode == "long":
            return int(LONG_SHARE * len(self.tokens)) // 16 * 16
        raise ValueError(f"prompt mode {mode!r}: expected {' or '.join(PROMPT_MODES)}")


def pieces(text: str) -> list[tuple[str, bool]]:
    """Runs of text, and whether each is an answer. Raises ValueError on marks that do not pair."""
    found: list[tuple[str, bool]] = []
    head, *rest = text.split(OPEN)
    if CLOSE in head:
        raise ValueError(f"{CLOSE} without {OPEN}")
    found.append((head, False))
    for part in rest:
        answer, mark, after = part.partition(CLOSE)
        if not mark or CLOSE in after or not answer:
            raise ValueError(f"{OPEN} without {CLOSE}, or nothing between them")
        found += [(answer, True), (after, False)]
    return [each for each in found if each[0]]


def encode(text: str, tokenizer: Tokenizer) -> tuple[list[int], frozenset[int]]:
    tokens: list[int] = []
    answers: set[int] = set()
    for piece, is_answer in pieces(text):
        ids = tokenizer.encode(piece)
        if is_answer:
            answers.update(range(len(tokens), len(tokens) + len(ids)))
        tokens += ids
    return tokens, frozenset(answers)


def read(file: pathlib.Path, tokenizer: Tokenizer, tokens_max: int | None = None) -> Text:
    """tokens_max: only so many from the beginning. Raises ValueError on a text that is too short
    or wrongly marked."""
    try:
        tokens, answers = encode(file.read_text(encoding="utf-8"), tokenizer)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    tokens = tokens[:tokens_max]
    if len(tokens) < TOKENS_MIN:
        raise ValueError(f"{file} has {len(tokens)} tokens; {TOKENS_MIN} are needed")
    answers = frozenset(index for index in answers if index < len(tokens))
    return Text(file.stem, file.resolve().parent.name, tokens, answers)


def shipped() -> list[pathlib.Path]:
    """tune first; in a split by name."""
    return [file for split in SPLITS for file in sorted((FOLDER / split).glob("*.txt"))]
