"""What each format costs: KL, top-1 and perplexity by teacher forcing through the real pool.

One policy a format, nothing evicted; the newest tokens (up to 16) are read at 16 bits, everything
older through the format. All formats run as one batch over the same text.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from engine.caches import PoolCache
from engine.quality import force

from .session import PROMPT_TOKENS, open_session

# Best first: the order that a correct implementation shows (all with rotation).
ORDER = ["full-f16", "k8v8-only", "k8v4-only", "k4v4-only", "nvfp4-only", "k4v2-only", "k2v2-only",
         "ternary-only"]
KL_MAX = {"k4v4-only": 0.03}
TOP1_MIN = {"k4v4-only": 0.87}


def measure(policies: list[str], tokens: int, text: pathlib.Path | None) -> list[dict[str, Any]]:
    with open_session("eval-formats") as session:
        words = session.text(tokens, text)
        options = [{"policy": name, "name": name} for name in policies]
        with PoolCache(session.pool, *options) as cache:
            found = force(session.model, cache, len(policies), words, PROMPT_TOKENS)
            stats = [cache.stats(index) for index in range(len(policies))]
    config = session.model.config
    values = 2 * config.layers * config.kv_heads * config.head_dim
    return [
        {
            "policy": name,
            "tokens": each["tokens"],
            "kl": quality.kl,
            "top1": quality.top1,
            "perplexity": quality.perplexity,
            "exact_perplexity": quality.exact_perplexity,
            # Whole pages, the 16-bit buffer and metadata included.
            "bits_held": 8 * each["bytes_held"] / (values * each["tokens"]),
        }
        for name, quality, each in zip(policies, found, stats)
    ]


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What the table must show and does not; empty when everything holds."""
    by_name = {row["policy"]: row for row in rows}
    problems = []
    known = [name for name in ORDER if name in by_name]
    for better, worse in zip(known, known[1:]):
        if not by_name[better]["kl"] < by_name[worse]["kl"]:
            problems.append(f"{better} should have a lower KL than {worse}")
    for name, limit in KL_MAX.items():
        if name in by_name and by_name[name]["kl"] > limit:
            problems.append(f"{name}: KL {by_name[name]['kl']:.4f} is above {limit}")
    for name, limit in TOP1_MIN.items():
        if name in by_name and by_name[name]["top1"] < limit:
            problems.append(f"{name}: top-1 {by_name[name]['top1']:.3f} is below {limit}")
    return problems


def render(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'policy':14} {'KL':>8} {'top-1':>7} {'perplexity':>11} {'bits held':>10}"]
    for row in rows:
        lines.append(
            f"{row['policy']:14} {row['kl']:8.4f} {row['top1']:7.3f} {row['perplexity']:11.2f}"
            f" {row['bits_held']:10.2f}"
        )
    exact = rows[0]["exact_perplexity"]
    lines.append(f"(exact cache: perplexity {exact:.2f}; bits held: bytes of the pool a value,")
    lines.append(" buffer, partly filled pages and metadata included)")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/eval/formats", description=__doc__)
    parser.add_argument("--policies", default=",".join(ORDER), metavar="A,B,...",
                        help="default: all formats")
    parser.add_argument("--tokens", type=int, default=768, help="default 768")
    parser.add_argument("--text", type=pathlib.Path,
                        help="default: tune/prose.txt of tools/eval/texts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    rows = measure(options.policies.split(","), options.tokens, options.text)
    problems = failures(rows)
    if options.json:
        print(json.dumps({"formats": rows, "failures": problems}, indent=2))
    else:
        print(render(rows))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    from .command import guarded

    sys.exit(guarded(main))
