"""Writes the chain-of-thought texts: the model's own worked answers, one file a split.

The committed files are what is measured; this shows where they come from, and makes such files
for other seeds. Sampling goes by the last bits of float32, so another machine or library may part
from them at some token.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from engine.caches import ExactCache
from engine.generate import generate
from engine.gguf_weights import ModelFile, find_model
from engine.model import Model
from engine.sampling import Sampler, SamplingOptions
from engine.tokenizer import Tokenizer

from .texts import FOLDER

TURN_TOKENS = 420
SAMPLING = {"temperature": 0.7, "repetition_penalty": 1.05}
SYSTEM = "You solve problems step by step and check every step."
QUESTIONS = {
    "tune": (11, [
        "A farmer has 17 rows of 12 apple trees. A storm fells 29 trees, and he plants 4 new trees "
        "for each 10 that are left, rounded down. How many trees does he have? Explain each step.",
        "A train leaves at 9:40 and drives 210 km at 84 km per hour. A second train leaves at "
        "10:10 and drives the same way at 105 km per hour. Which one arrives first? Show your "
        "reasoning.",
        "Find the sum of all numbers from 1 to 60 that 4 or 6 divides. Think step by step.",
        "A tank of 480 litres is filled by two pipes, of 12 and 8 litres a minute, and a leak "
        "loses 4 litres a minute. After how long is it full? Check your answer in a second way.",
    ]),
    "held-out": (23, [
        "A baker sells 35 loaves a day at 3 coins and 52 rolls at half a coin. Flour costs her 48 "
        "coins a day. How much does she earn in 14 days? Explain each step.",
        "Anna is 4 years older than Ben, and Ben is twice as old as Carl. Together they are 64. "
        "How old is each of them? Show your reasoning and check it.",
        "How many ways are there to give change of 50 cents with coins of 5, 10 and 20 cents? "
        "Think step by step.",
        "A rectangle is 8 cm longer than wide and has an area of 240 square cm. Find its sides in "
        "two different ways.",
    ]),
}


def answer(model: Model, tokenizer: Tokenizer, prompt: str, seed: int) -> str:
    """What the model says: TURN_TOKENS tokens, control tokens left out."""
    tokens = tokenizer.encode(prompt)
    cache = ExactCache(model.config, capacity=len(tokens) + TURN_TOKENS)
    sampler = Sampler(SamplingOptions(seed=seed, **SAMPLING), banned=tokenizer.control_ids)
    return tokenizer.decode(generate(model, cache, tokens, sampler, TURN_TOKENS).tokens)


def conversation(model: Model, tokenizer: Tokenizer, seed: int, questions: list[str]) -> str:
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for index, question in enumerate(questions):
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        text += answer(model, tokenizer, text, seed + index) + "<|im_end|>\n"
        print(f"{index + 1} of {len(questions)}", flush=True)
    return text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/engine/run eval.make_cot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER,
                        help="for tune/cot.txt and held-out/cot.txt (default: the texts')")
    parser.add_argument("--seed-offset", type=int, default=0, help="added to the seeds")
    options = parser.parse_args(arguments)
    file = ModelFile(find_model())
    model, tokenizer = Model(file.weights()), Tokenizer(file.vocabulary())
    for split, (seed, questions) in QUESTIONS.items():
        text = conversation(model, tokenizer, seed + options.seed_offset, questions)
        target = options.folder / split / "cot.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(f"{target}: {len(tokenizer.encode(text))} tokens")
    return 0


if __name__ == "__main__":
    from .command import guarded

    sys.exit(guarded(main))
