"""Byte-level BPE of the model, built from the tables inside its GGUF."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from .gguf_weights import Vocabulary

CONTROL_TYPE = 3  # GGUF token type of special tokens
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Tokenizer:
    def __init__(self, vocabulary: Vocabulary) -> None:
        ids = {token: index for index, token in enumerate(vocabulary.tokens)}
        pairs = [tuple(merge.split(" ", 1)) for merge in vocabulary.merges]
        self._impl = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
        self._impl.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ])
        self._impl.decoder = decoders.ByteLevel()
        control = [
            token
            for token, kind in zip(vocabulary.tokens, vocabulary.types)
            if kind == CONTROL_TYPE
        ]
        self._impl.add_special_tokens(control)
        self.control_ids = frozenset(ids[token] for token in control)
        self.eos = vocabulary.eos

    def encode(self, text: str) -> list[int]:
        return self._impl.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        """Text of the tokens; control tokens are left out, cut UTF-8 shows as U+FFFD."""
        return self._impl.decode(tokens, skip_special_tokens=True)

    def chat(self, user: str, system: str = SYSTEM_PROMPT) -> list[int]:
        """Tokens of one user turn in the model's chat template, ready for the answer."""
        return self.encode(
            f"<|im_start|>system\n{system}<|im_end|>\n"
            f"<|im_start|>user\n{user}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


class TextStream:
    """Turns a growing token list into text pieces, holding back a half-finished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith("\ufffd") and len(self._pending) < 8:
            return ""
        self._pending.clear()
        return text
