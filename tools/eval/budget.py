"""With a token budget, held bytes stay flat while tokens grow, and evicted slots are reused.

Generates text through the pool and samples the sequence's statistics. Flat: after the warm-up
(the budget reached, and as many tokens again) the bytes held grow by less than the floor rule
explains: 4 tokens a finished segment stay for ever.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from engine.caches import PoolCache
from engine.generate import generate
from engine.prompts import WORKSHOP
from engine.sampling import Sampler, SamplingOptions

from .session import open_session

GROWTH_MAX = 1.10  # of held bytes over the second half of the samples, floor tokens included


def measure(policy: str, budget: int, tokens: int, every: int) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    with open_session("eval-budget") as session:
        prompt = session.tokenizer.chat(WORKSHOP)
        sampler = Sampler(SamplingOptions(), banned=session.tokenizer.control_ids)
        with PoolCache(session.pool, {"policy": policy, "budget": budget}) as cache:

            def sample(_: int) -> None:
                generated = cache.tokens - len(prompt)
                if generated % every == 0:
                    stats = cache.stats()
                    samples.append({
                        "generated": generated,
                        **{key: stats[key] for key in (
                            "live_tokens", "live_tokens_max", "bytes_held", "bytes_f16",
                            "evicted_tokens", "slots_reused", "gathered_bytes", "demotions")},
                    })

            generate(session.model, cache, prompt, sampler, tokens, sample)
    return samples


def failures(samples: list[dict[str, Any]], budget: int) -> list[str]:
    steady = [each for each in samples if each["generated"] >= 2 * budget]
    if len(steady) < 4:
        return [f"too few samples after {2 * budget} tokens: generate more"]
    problems = []
    last = steady[-1]
    half = len(steady) // 2
    early = max(each["bytes_held"] for each in steady[:half])
    late = max(each["bytes_held"] for each in steady[half:])
    if late > GROWTH_MAX * early:
        problems.append(f"held bytes grow from {early:,} to {late:,}")
    if last["slots_reused"] == 0:
        problems.append("no evicted slot was reused in place")
    if last["evicted_tokens"] == 0:
        problems.append("nothing was evicted")
    if any(each["gathered_bytes"] != 0 for each in samples):
        problems.append("bytes were gathered: compaction is not allowed")
    return problems


def render(samples: list[dict[str, Any]]) -> str:
    lines = [f"{'generated':>9} {'live/lane':>10} {'bytes held':>12} {'16-bit cache':>13} "
             f"{'ratio':>6}"
             f" {'evicted':>9} {'reused slots':>13} {'gathered':>9}"]
    for each in samples:
        ratio = each["bytes_f16"] / each["bytes_held"]
        lines.append(
            f"{each['generated']:9} {each['live_tokens']:10.1f} {each['bytes_held']:12,}"
            f" {each['bytes_f16']:13,} {ratio:6.1f} {each['evicted_tokens']:9.1f}"
            f" {each['slots_reused']:13,} {each['gathered_bytes']:9}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/eval/budget", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="thinkv")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1536, help="generated (default 1536)")
    parser.add_argument("--every", type=int, default=64, help="tokens between samples")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    samples = measure(options.policy, options.budget, options.tokens, options.every)
    problems = failures(samples, options.budget)
    if options.json:
        print(json.dumps({"samples": samples, "failures": problems}, indent=2))
    else:
        print(render(samples))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    from .command import guarded

    sys.exit(guarded(main))
