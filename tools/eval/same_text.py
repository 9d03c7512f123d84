"""The policy full-f16 changes nothing: greedy text through the pool is the text of an in-process
cache of the same 16-bit values, token for token.

Greedy text of a small model runs into a loop, which hides small differences: so a repetition
penalty keeps it moving (1 switches it off). Every token is still the argmax of the penalised
logits.
"""

from __future__ import annotations

import argparse
import json
import sys

from engine.caches import ExactCache, PoolCache
from engine.generate import generate
from engine.prompts import ENGINES
from engine.sampling import Sampler, SamplingOptions

from .session import open_session


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/eval/same_text", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=800, help="generated (default 800)")
    parser.add_argument("--prompt", choices=sorted(ENGINES), default="engine-a")
    parser.add_argument("--policy", default="full-f16")
    parser.add_argument("--repetition-penalty", type=float, default=1.1, help="default 1.1")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with open_session("eval-same-text") as session:
        prompt = session.tokenizer.chat(ENGINES[options.prompt])
        banned = session.tokenizer.control_ids
        greedy = SamplingOptions(temperature=0, repetition_penalty=options.repetition_penalty)
        exact = ExactCache(session.model.config, dtype="float16")
        mine = generate(session.model, exact, prompt, Sampler(greedy, banned), options.tokens)
        with PoolCache(session.pool, {"policy": options.policy}) as cache:
            pool = generate(session.model, cache, prompt, Sampler(greedy, banned), options.tokens)
    differ = [index for index, pair in enumerate(zip(mine.tokens, pool.tokens))
              if pair[0] != pair[1]]
    result = {
        "tokens": options.tokens,
        "identical": not differ,
        "first_difference": differ[0] if differ else None,
        "distinct_tokens": len(set(mine.tokens)),
        "exact_tokens_per_s": mine.tokens_per_s,
        "pool_tokens_per_s": pool.tokens_per_s,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    elif differ:
        print(f"the texts part at token {differ[0]} of {options.tokens}")
    else:
        print(f"{options.tokens} greedy tokens are identical "
              f"({result['distinct_tokens']} distinct); "
              f"{mine.tokens_per_s:.1f} tokens/s in process, {pool.tokens_per_s:.1f} in the pool")
    return 1 if differ else 0


if __name__ == "__main__":
    from .command import guarded

    sys.exit(guarded(main))
