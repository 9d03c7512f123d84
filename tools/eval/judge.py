"""Judges cache policies at equal real bytes: KL, top-1, perplexity, needle recall and more.

Every policy file is a row without code. For each memory point (a share of the bytes of a 16-bit
cache, metadata included) the policy's knob is chosen so that the bytes it really holds at the end
of the text stay below the point. tools/eval/README.md says what makes the comparison fair.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import sys
import time
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from engine.batch import TILE_ROWS, for_batches
from engine.gguf_weights import ModelFile, find_model
from engine.model import Model
from engine.tokenizer import Tokenizer

from . import plots, table, texts
from .policies import Policy, discover
from .store import Store, library_digest
from .task import FULL, Judge, Task, points_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = ROOT / "build" / "eval" / "rows.jsonl"
POINTS = [FULL, 0.25, 0.12, 0.06]
BATCH = 32
QUICK_POLICIES = ["full-f16", "k4v4-only", "thinkv", "thinkv-paper"]
QUICK_TOKENS = 448
QUICK_POINTS = [FULL, 0.25]
PROGRESS_S = 5.0
# With more processes a first stage of one text leaves most of them idle.
PILOTED_JOBS_MAX = 8

# Set before the workers are forked: they share the weights' memory.
_model: Model
_done: Synchronized[int]


def _work(task: Task) -> list[dict[str, Any]]:
    def tick(steps: int) -> None:
        with _done.get_lock():
            _done.value += steps

    return Judge(_model, task, tick).rows()


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/eval/run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help=f"{', '.join(QUICK_POLICIES)} at 25 %% on {QUICK_TOKENS} tokens of "
                             "two texts: does everything hang together?")
    parser.add_argument("--policies", help="A,B,... (default: all in config/policies)")
    parser.add_argument("--points", help="shares of a 16-bit cache; 1: policies without a knob as "
                                         "they are (default 1,0.25,0.12,0.06)")
    parser.add_argument("--texts", nargs="+", type=pathlib.Path, metavar="FILE",
                        help="texts of your own; their folder's name is their split")
    parser.add_argument("--split", choices=texts.SPLITS, help="only this split of the texts")
    parser.add_argument("--prompts", default=",".join(texts.PROMPT_MODES),
                        help="short (64 tokens), long (75 %% of the text); default both")
    parser.add_argument("--tokens", type=int, help="only so many tokens of each text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--batch", type=int, default=BATCH, help="runs in one task, so many are "
                        "lost by a kill at most (default 32: one step's); 1: a task each point of "
                        "each policy, for dozens of cores")
    parser.add_argument("--tile", type=int, default=TILE_ROWS, help="rows of one product, idle "
                        f"ones included (default {TILE_ROWS}: the most tokens a second of CPU; 12 "
                        "ends sooner on dozens of cores; rows of two tiles differ in the last bit)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that still hold")
    parser.add_argument("--guesses", type=pathlib.Path, metavar="TABLE", help="an earlier table: "
                        "searches begin with its settings and end sooner")
    parser.add_argument("--rows", type=pathlib.Path, default=ROWS, help="the rows as they are "
                        "found (default build/eval/rows.jsonl)")
    parser.add_argument("--json", type=pathlib.Path, help="the table; Markdown and plots beside it")
    options = parser.parse_args(arguments)
    if options.jobs < 1 or options.batch < 1 or options.tile < 1:
        parser.error("--jobs, --batch and --tile must be at least 1")
    return options


def _chosen(options: argparse.Namespace) -> tuple[list[Policy], list[float], list[str]]:
    names = options.policies.split(",") if options.policies else None
    points = [float(each) for each in options.points.split(",")] if options.points else POINTS
    modes = options.prompts.split(",")
    if options.quick:
        names, modes = names or QUICK_POLICIES, ["short"]
        points = points if options.points else QUICK_POINTS
    if not all(0 < point <= FULL for point in points):
        raise ValueError("points are shares above 0, at most 1")
    return discover(names), points, modes


def _texts(options: argparse.Namespace, tokenizer: Tokenizer) -> list[texts.Text]:
    files = options.texts or texts.shipped()
    tokens = options.tokens
    if options.quick:
        files = options.texts or [texts.FOLDER / "tune" / name for name in ("prose.txt",
                                                                           "code.txt")]
        tokens = tokens or QUICK_TOKENS
    found = [texts.read(file, tokenizer, tokens) for file in files]
    return [text for text in found if options.split in (None, text.split)]


def plan(
    chosen: list[texts.Text], modes: list[str], policies: list[Policy], points: list[float],
    batch: int, store: Store, piloted: bool = True, tile: int = TILE_ROWS,
) -> list[list[Task]]:
    """Two stages of tasks without those whose rows are there: the first text finds the settings
    that the searches on the other texts begin with. piloted False: all texts at once. In a stage
    the longest tasks come first."""
    limits = max(1, len(points) - (FULL in points))
    size = max(1, batch // limits)
    # A batch below one policy's runs: a task a point, which is what dozens of cores want.
    groups = [points] if batch >= limits else [[point] for point in points]
    stages: list[list[Task]] = [[], []]
    for order, text in enumerate(chosen):
        for mode in modes:
            for group in groups:
                wanted = [policy for policy in policies if any(
                    key not in store
                    for key in Task(text, mode, [policy], group, library_digest(), tile).keys())]
                stages[min(order, 1) if piloted else 0] += [
                    Task(text, mode, wanted[first : first + size], group, library_digest(), tile)
                    for first in range(0, len(wanted), size)]
    return [sorted(stage, key=lambda task: -_steps(task, piloted)) for stage in stages]


def with_guesses(task: Task, pilot: texts.Text, store: Store) -> None:
    for policy in task.policies:
        own = Task(pilot, task.mode, [policy], task.points, task.library, task.tile)
        for point, key in zip(points_of(policy, task.points), own.keys()):
            row = store.get(key)
            if row is not None and row["reached"]:
                task.guesses[policy.name, point] = row["knob_share"]


def with_table(task: Task, rows: list[dict[str, Any]]) -> None:
    """Guesses of a task from rows of any text and prompt, those of its own before others."""
    def strangeness(row: dict[str, Any]) -> int:
        return (row["text"] != task.text.name) + (row["prompt"] != task.mode)

    for policy in task.policies:
        for point in points_of(policy, task.points):
            met = [row for row in rows if row["policy"] == policy.name and row["reached"]
                   and row["memory_fraction"] == point]
            if met:
                task.guesses[policy.name, point] = min(met, key=strangeness)["knob_share"]


def _steps(task: Task, piloted: bool) -> int:
    """Run-steps to expect: forced runs and replays."""
    runs = sum(len(points_of(policy, task.points)) for policy in task.policies)
    return (len(task.text.tokens) - task.text.prompt(task.mode)) * runs * (2 if piloted else 4)


class _Progress:
    def __init__(self, total: int) -> None:
        self._total = max(1, total)
        self._started = time.monotonic()
        self._next = 0.0

    def show(self, tasks_done: int, tasks: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + PROGRESS_S
        done, seconds = _done.value, max(1e-3, now - self._started)
        share = min(0.99, done / self._total)
        left = seconds / share - seconds if share > 0 else 0.0
        print(f"\r[eval] {tasks_done} of {tasks} tasks, about {100 * share:.0f} %, "
              f"{done / seconds:.0f} tokens/s, {left / 60:.0f} min left   ",
              end="", file=sys.stderr, flush=True)


def carry_out(stages: list[list[Task]], jobs: int, pilot: texts.Text, store: Store) -> None:
    tasks = sum(len(stage) for stage in stages)
    progress = _Progress(sum(_steps(task, index > 0)
                             for index, stage in enumerate(stages) for task in stage))
    done = 0
    for index, stage in enumerate(stages):
        if index > 0:
            for task in stage:
                with_guesses(task, pilot, store)
        if not stage:
            continue
        with multiprocessing.get_context("fork").Pool(min(jobs, len(stage)),
                                                      maxtasksperchild=1) as pool:
            waiting = [pool.apply_async(_work, (task,)) for task in stage]
            while waiting:
                ready = [each for each in waiting if each.ready()]
                for each in ready:
                    store.add(each.get())
                    waiting.remove(each)
                    done += 1
                progress.show(done, tasks)
                time.sleep(0.2)
    print(file=sys.stderr)


def main(arguments: list[str]) -> int:
    global _model, _done
    options = parse_arguments(arguments)
    policies, points, modes = _chosen(options)
    file = ModelFile(find_model())
    chosen = _texts(options, Tokenizer(file.vocabulary()))
    if not chosen:
        raise ValueError("no text is left")
    store = Store(options.rows, options.resume)
    piloted = not options.quick and options.jobs <= PILOTED_JOBS_MAX
    stages = plan(chosen, modes, policies, points, options.batch, store, piloted, options.tile)
    if options.guesses:
        earlier = json.loads(options.guesses.read_text(encoding="utf-8"))
        for task in (each for stage in stages for each in stage):
            with_table(task, earlier)
    _model = Model(for_batches(file.weights()))
    _done = multiprocessing.get_context("fork").Value("q", 0)
    carry_out(stages, options.jobs, chosen[0], store)
    rows = [store.get(key) for text in chosen for mode in modes
            for key in Task(text, mode, policies, points, library_digest(), options.tile).keys()]
    found = [row for row in rows if row is not None]
    print(table.markdown(found))
    if options.json:
        table.write(found, options.json)
        plots.write(found, options.json.parent)
    problems = table.failures(found)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    from .command import guarded

    sys.exit(guarded(main))
