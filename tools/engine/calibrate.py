"""Finds the layers and thresholds by which a model's thoughts are labelled; see tools/calibrate.

Runs prompts on the real model, records the attention sparsity of every layer at every generated
token, and looks for three modes. A model that shows none gets `classes: 1`: everything is one
thought type, and the eviction schedule still works.

With --dense-layers TEXT it prints instead which layers a policy with a host tier keeps dense.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from .caches import ExactCache, PoolCache, pool_model
from .calibration import Calibration, calibrate, to_yaml
from .daemon import ROOT, Daemon, DaemonError
from .gguf_weights import ModelFile, WeightsError, find_model
from .model import Model
from .prompts import CALIBRATION
from .sampling import Sampler, SamplingOptions
from .tokenizer import Tokenizer
from .top_mass import describe as describe_layers
from .top_mass import layer_errors

NEAR_ZERO = 0.01
TAU = 128
SKIPPED = 16  # first steps of an answer: a row of few tokens has few values of sparsity


@contextlib.contextmanager
def caches(model: Model, policy: str | None) -> Iterator[Any]:
    """A function that gives a fresh cache: exact in this process, or a pool sequence."""
    if policy is None:
        yield lambda: contextlib.nullcontext(ExactCache(model.config, trace_sparsity=True))
        return
    import thinkv  # only --policy needs libthinkv and the daemon

    try:
        with Daemon() as daemon, thinkv.Client(str(daemon.socket), "calibrate") as client:
            pool = pool_model(client, model.config)
            yield lambda: PoolCache(pool, {"policy": policy, "trace_sparsity": True})
    except thinkv.Error as error:
        raise DaemonError(str(error)) from error


def trace(model: Model, cache: Any, prompt: list[int], sampler: Sampler, steps: int) -> np.ndarray:
    """Sparsities [steps - SKIPPED, layers] of one generated answer."""
    logits = model.prefill(prompt, cache)
    rows = []
    for _ in range(steps):
        logits = model.step(sampler.draw(logits), cache)
        rows.append(cache.sparsity())
    return np.stack(rows[SKIPPED:])


def describe(found: Calibration) -> str:
    lines = ["prompts with 1, 2, 3 or more modes, by layer:"]
    for layer, counts in enumerate(found.mode_counts.T):
        numbers = [int((counts == 1).sum()), int((counts == 2).sum()), int((counts == 3).sum()),
                   int((counts > 3).sum())]
        lines.append(f"  layer {layer:3}: " + "  ".join(f"{number:3}" for number in numbers))
    lines.append(found.note)
    if found.classes == 3:
        lines.append(f"layers {found.layers}, thresholds {found.thresholds}")
    return "\n".join(lines)


def run_dense_layers(text: pathlib.Path) -> int:
    file = ModelFile(find_model())
    model, tokenizer = Model(file.weights()), Tokenizer(file.vocabulary())
    tokens = tokenizer.encode(text.read_text(encoding="utf-8"))
    print(describe_layers(layer_errors(model, tokens[: model.config.context])))
    return 0


def run(options: argparse.Namespace) -> int:
    path = find_model()
    file = ModelFile(path)
    model, tokenizer = Model(file.weights()), Tokenizer(file.vocabulary())
    name = path.name.split(".")[0]
    prompts = CALIBRATION
    if options.prompts:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{options.prompts} has no prompts")
    traces = []
    with caches(model, options.policy) as fresh:
        for index, text in enumerate(prompts):
            sampler = Sampler(SamplingOptions(seed=index + 1), banned=tokenizer.control_ids)
            with fresh() as cache:
                traces.append(trace(model, cache, tokenizer.chat(text), sampler, options.tokens))
            print(f"[calibrate] prompt {index + 1} of {len(prompts)}: mean sparsity "
                  f"{float(traces[-1].mean()):.3f}", file=sys.stderr, flush=True)
    found = calibrate(traces)
    print(describe(found))
    output = options.output or ROOT / "config" / "calibration" / f"{name.lower()}.yaml"
    output.parent.mkdir(exist_ok=True)
    output.write_text(to_yaml(found, name, NEAR_ZERO, TAU), encoding="utf-8")
    print(f"written: {output}")
    if options.save_traces:
        np.savez_compressed(options.save_traces, *traces)
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/calibrate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=pathlib.Path, metavar="FILE", help="one prompt a line")
    parser.add_argument("--tokens", type=int, default=384, metavar="N",
                        help="generated tokens a prompt (default 384)")
    parser.add_argument("--policy", metavar="NAME",
                        help="trace through the pool under this policy, not the exact cache")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE",
                        help="default: config/calibration/MODEL.yaml")
    parser.add_argument("--save-traces", type=pathlib.Path, metavar="FILE",
                        help="also keep the traces (.npz)")
    parser.add_argument("--dense-layers", type=pathlib.Path, metavar="TEXT",
                        help="print the layers whose attention over this text is spread out, for "
                             "a policy's tier.dense_layers; nothing is written")
    options = parser.parse_args(arguments)
    if options.tokens <= 2 * SKIPPED:
        parser.error(f"--tokens must be more than {2 * SKIPPED}")
    try:
        if options.dense_layers:
            return run_dense_layers(options.dense_layers)
        return run(options)
    except (DaemonError, WeightsError, ValueError, OSError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
