"""One engine process of the quickstart: model, sampler, and a sequence in the pool.

Reports JSON lines on stdout (event: phase, text, progress, result, closed, error). After the result
it holds its sequence until a line arrives on stdin, then closes cleanly; the quickstart kills one
of its two workers at that point instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import thinkv

from .caches import Cache, PoolCache, pool_model
from .generate import Generation, generate
from .gguf_weights import ModelFile, WeightsError, find_model
from .model import Model
from .prompts import ENGINES
from .quality import compare
from .sampling import Sampler, SamplingOptions
from .tokenizer import TextStream, Tokenizer

PROGRESS_S = 0.5


def report(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


class Reporter:
    """Streams text at once and the rate every half second."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = TextStream(tokenizer)
        self._tokens = 0
        self._started = time.monotonic()
        self._next = self._started + PROGRESS_S

    def token(self, token: int) -> None:
        self._tokens += 1
        text = self._stream.push(token)
        if text:
            report("text", text=text)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PROGRESS_S
            rate = self._tokens / (now - self._started)
            report("progress", tokens=self._tokens, tokens_per_s=rate)


def result_of(name: str, run: Generation, stats: dict[str, Any], text: str) -> dict[str, Any]:
    return {
        "name": name,
        "tokens": len(run.tokens),
        "tokens_per_s": run.tokens_per_s,
        "bytes_f16": stats["bytes_f16"],
        "bytes_held": stats["bytes_held"],
        "ratio": stats["bytes_f16"] / stats["bytes_held"],
        "live_tokens": stats["live_tokens"],
        "evicted_tokens": stats["evicted_tokens"],
        "slots_reused": stats["slots_reused"],
        "thoughts": stats["thoughts"],
        "text": text,
    }


def gpu_model(file: ModelFile) -> Any:
    from .torch_model import TorchModel  # torch is there on the GPU's side only

    return TorchModel(file)


def open_cache(client: thinkv.Client, model: Any, options: argparse.Namespace) -> Cache:
    if options.gpu:
        from .torch_model import TorchCache

        return TorchCache(model, client, options.policy, options.budget)
    sequence = {"policy": options.policy, "budget": options.budget, "name": options.name}
    return PoolCache(pool_model(client, model.config), sequence)


def run(options: argparse.Namespace) -> None:
    report("phase", phase="loading the model")
    file = ModelFile(find_model())
    tokenizer = Tokenizer(file.vocabulary())
    model: Any = Model(file.weights()) if not options.gpu else gpu_model(file)
    prompt = tokenizer.chat(ENGINES[options.name])
    sampling = SamplingOptions(temperature=options.temperature, seed=options.seed)
    # Without the control tokens a finished answer goes on, so every process reaches its count.
    sampler = Sampler(sampling, banned=tokenizer.control_ids)

    with thinkv.Client(socket=options.socket, name=options.name) as client:
        with open_cache(client, model, options) as cache:
            report("phase", phase="generating", prompt_tokens=len(prompt))
            reporter = Reporter(tokenizer)
            done = generate(model, cache, prompt, sampler, options.tokens, reporter.token, True)
            stats = cache.stats()
            report("phase", phase="comparing with the exact cache")
            text = prompt + done.tokens
            assert done.log_probs is not None
            quality = compare(
                model, text, model.hidden_states(text), len(prompt), done.log_probs
            )
            answer = tokenizer.decode(done.tokens)
            result = result_of(options.name, done, stats, answer)
            result.update(kl=quality.kl, top1=quality.top1)
            report("result", result=result, stats=stats, prompt_tokens=len(prompt))
            sys.stdin.readline()
    report("closed")


def main() -> int:
    parser = argparse.ArgumentParser(prog="engine.worker")
    parser.add_argument("--name", choices=sorted(ENGINES), required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--gpu", action="store_true", help="torch and transformers on the GPU")
    try:
        run(parser.parse_args())
    except (thinkv.Error, WeightsError, ValueError) as error:
        report("error", message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
