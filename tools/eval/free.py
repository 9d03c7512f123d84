"""Free generation: how long a compressed cache writes the same greedy text as the exact one, and
how much it repeats itself.

All policies generate as one batch, each at the setting that met a memory point in a table that
tools/eval/run wrote; the exact cache (full-f16) is the first of the batch.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

from engine.batch import TILE_ROWS, TiledCache, for_batches
from engine.caches import PoolCache
from engine.gguf_weights import ModelFile, find_model
from engine.model import Model
from engine.tokenizer import Tokenizer

from . import texts
from .policies import Run, discover
from .pools import fill, open_pool
from .reference import record

EXACT = "full-f16"
GRAM = 4  # tokens in a row that count as said before


def repetition(tokens: list[int]) -> float:
    """Share of the runs of GRAM tokens that occurred earlier in the text."""
    grams = [tuple(tokens[index : index + GRAM]) for index in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def agreement(exact: list[int], mine: list[int]) -> int:
    """Tokens before the first difference."""
    for index, (left, right) in enumerate(zip(exact, mine)):
        if left != right:
            return index
    return min(len(exact), len(mine))


def generate(
    model: Model, prompt: list[int], runs: list[Run], count: int, banned: frozenset[int]
) -> list[list[int]]:
    """`count` greedy tokens of every run after the same prompt."""
    # The last prompt token is stepped, so that every run's first token comes from its own cache.
    reference = record(model, prompt)
    refused = np.fromiter(sorted(banned), dtype=np.int64)
    options = [run.sequence() for run in runs]
    with open_pool(model.config, runs) as pool, PoolCache(pool, *options) as cache:
        fill(cache, reference, len(prompt) - 1)
        tiled = TiledCache(cache, len(runs))
        idle = [0] * (tiled.rows - len(runs))
        fresh = [prompt[-1]] * len(runs)
        rows: list[list[int]] = [[] for _ in runs]
        for _ in range(count):
            logits = model.step_batch(fresh + idle, tiled)[: len(runs)]
            logits[:, refused] = -np.inf
            fresh = [int(token) for token in logits.argmax(axis=1)]
            for row, token in zip(rows, fresh):
                row.append(token)
    return rows


def settings(table: list[dict[str, Any]], point: float) -> dict[str, float | None]:
    """The knob of each policy that met the point, of the first text in the table."""
    found: dict[str, float | None] = {}
    for row in table:
        if row["reached"] and row["memory_fraction"] == point and row["prompt"] == "short":
            found.setdefault(row["policy"], row["knob_value"])
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/engine/run eval.free", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=pathlib.Path, required=True, help="of tools/eval/run")
    parser.add_argument("--point", type=float, default=0.25, help="memory point (default 0.25)")
    parser.add_argument("--tokens", type=int, default=256, help="generated (default 256)")
    parser.add_argument("--text", type=pathlib.Path, help="its beginning is the prompt "
                        "(default held-out/prose.txt)")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    chosen = settings(json.loads(options.table.read_text(encoding="utf-8")), options.point)
    chosen.pop(EXACT, None)
    policies = {policy.name: policy for policy in discover([EXACT, *chosen])}
    runs = [Run(policies[EXACT])] + [Run(policies[name], value) for name, value in chosen.items()]
    file = ModelFile(find_model())
    model, tokenizer = Model(for_batches(file.weights())), Tokenizer(file.vocabulary())
    text = texts.read(options.text or texts.FOLDER / "held-out" / "prose.txt", tokenizer)
    prompt = text.tokens[: texts.SHORT_PROMPT]
    written: list[list[int]] = []
    for first in range(0, len(runs), TILE_ROWS):
        written += generate(model, prompt, runs[first : first + TILE_ROWS], options.tokens,
                            tokenizer.control_ids)
    rows = [{"policy": run.policy.name, "memory_fraction": options.point, "tokens": options.tokens,
             "knob_value": run.value, "agreement": agreement(written[0], tokens),
             "repetition": round(repetition(tokens), 4)}
            for run, tokens in zip(runs, written)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| policy | tokens before the first difference | repeated |\n|---|---|---|")
    for row in sorted(rows, key=lambda row: -row["agreement"]):
        print(f"| {row['policy']} | {row['agreement']} of {row['tokens']} |"
              f" {100 * row['repetition']:.0f} % |")
    return 0


if __name__ == "__main__":
    from .command import guarded

    sys.exit(guarded(main))
