"""One process of `bench transformers`: the systems that are given, measured one after another."""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import kernel_split, machine
from .library import TREE

PEERS = ("dynamic", "static-compile")
WARM_UPS, STEPS = 3, 20
LARGEST_STEPS = 6   # at the largest batch, where steps are long
BATCH_MAX = 4096
AGE = 1024 + 384    # generated tokens after which thinkv's budget holds
RESERVE = 6 << 30   # of GPU memory outside the pool: activations, working memory of batches
SHARES = (0.97, 0.93, 0.88)  # of what the bytes of a sequence promise, tried one after another
LARGEST_S = 25.0    # less time than that: no search for the largest batch


class Bench:
    def __init__(self, options: argparse.Namespace, command: list[str]) -> None:
        from .transformers_systems import eight_billion, random_model

        import torch

        self.torch = torch
        torch.set_grad_enabled(False)
        self.options = options
        self.started = time.monotonic()
        self.file = open(options.rows, "a", encoding="utf-8")
        self.emit({"system": "run", **machine.header(str(TREE), command)})
        self.model = random_model(eight_billion(options.layers), "cuda")
        self.daemon: Any = None
        self.client: Any = None
        self.measured: list[dict[str, Any]] = []
        self.say("the model is made")

    def emit(self, row: dict[str, Any]) -> None:
        """At once: the process may be stopped at any moment."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.say(json.dumps(row)[:300])

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def left_s(self) -> float:
        return float(self.options.limit_s) - (time.monotonic() - self.started)

    def make(self, name: str, batch: int, tokens: int) -> Any:
        from . import transformers_systems as systems

        if name == "dynamic":
            return systems.Dynamic(self.model, batch, tokens)
        if name == "static-compile":
            return systems.StaticCompiled(self.model, batch, tokens)
        return systems.Ours(self.model, self.client, batch, tokens, name)

    def step_ms(self, system: Any, steps: int = STEPS) -> float:
        torch = self.torch
        for _ in range(WARM_UPS):
            system.step()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            system.step()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / steps

    def empty(self) -> None:
        import gc

        gc.collect()
        self.torch.cuda.synchronize()
        self.torch.cuda.empty_cache()

    def measure(self, name: str, batch: int, tokens: int) -> dict[str, Any]:
        started = time.monotonic()
        system = self.make(name, batch, tokens)
        self.torch.cuda.synchronize()
        filled = time.monotonic() - started
        self.say(f"{name}: {batch} sequences of {tokens} tokens are there")
        try:
            ms = self.step_ms(system)
            row = {"system": name, "tokens": tokens, "batch": batch, "step_ms": round(ms, 3),
                   "tokens_per_s": round(batch / ms * 1e3, 1),
                   "bytes_held": system.bytes_held(), "filled_s": round(filled, 1),
                   "gpu_state": machine.state()}
            self.emit(row)
            self.measured.append(row)
            if name in PEERS:
                self.emit_split(name, tokens, system, ms)
        finally:
            system.close()
            del system
            self.empty()
        return row

    def emit_split(self, name: str, tokens: int, system: Any, ms: float) -> None:
        row: dict[str, Any] = {"system": name, "tokens": tokens}
        try:
            row["split_ms"], row["longest"] = kernel_split.measure(system.step, ms)
        except (AssertionError, RuntimeError) as error:  # no profiler here: the rest is as good
            row["split_error"] = str(error)[:200]
        self.emit(row)

    def split(self, name: str) -> None:
        """Of ours, made again: a profiler that breaks the process must not cost other rows."""
        measured = [row for row in self.measured if row["system"] == name]
        if not measured or self.left_s() < LARGEST_S:
            return
        row = measured[0]
        system = self.make(name, row["batch"], row["tokens"])
        try:
            self.emit_split(name, row["tokens"], system, self.step_ms(system))
        finally:
            system.close()
            del system
            self.empty()

    def attempt(self, name: str, batch: int, tokens: int, steps: int) -> float | None:
        """Milliseconds of a step; None: it does not fit."""
        self.say(f"{name}: trying {batch} sequences")
        system = None
        try:
            system = self.make(name, batch, tokens)
            return self.step_ms(system, steps)
        except (self.torch.OutOfMemoryError, MemoryError) as error:
            self.say(f"{name}: {batch} do not fit: {str(error)[:100]}")
            return None
        finally:
            if system is not None:
                system.close()
            del system
            self.empty()

    def largest(self, name: str, rows: list[dict[str, Any]]) -> None:
        """The largest batch of the last row's number of tokens; it holds for the others too."""
        row = rows[-1]
        each = max(row["bytes_held"] / row["batch"] for row in rows)
        tokens = row["tokens"]
        free = self.torch.cuda.mem_get_info()[0]
        if name not in PEERS:
            free = self.room()
        guess = max(1, min(int(free / each), BATCH_MAX))
        if name in PEERS:
            batch = search(lambda b: self.attempt(name, b, tokens, 1) is not None, guess,
                           lambda: self.left_s() > LARGEST_S / 2)
            ms = self.attempt(name, batch, tokens, LARGEST_STEPS) if batch else None
        else:
            tokens = min(tokens, AGE) if name == "thinkv" else tokens
            batch, ms = self.largest_of_ours(name, guess, tokens)
        found = {"largest_batch": batch, "tried_at_tokens": tokens,
                 "largest_step_ms": ms and round(ms, 3),
                 "largest_tokens_per_s": ms and round(batch / ms * 1e3, 1)}
        for row in rows:
            self.emit({"system": name, "tokens": row["tokens"], **found})

    def room(self) -> int:
        """Bytes that sequences can have: of the pool, and what was closed and is still leased."""
        stats = self.client.stats()
        return int(stats["bytes_free"] + stats["client_leased_bytes"])

    def largest_of_ours(self, name: str, guess: int, tokens: int) -> tuple[int, float | None]:
        for share in SHARES:
            batch = max(1, int(share * guess))
            ms = self.attempt(name, batch, tokens, LARGEST_STEPS)
            if ms is not None or self.left_s() < LARGEST_S:
                return (batch, ms) if ms is not None else (0, None)
        return 0, None

    def run(self, name: str) -> None:
        if name not in PEERS and self.client is None:
            self._start()
        batch = self.options.batch
        rows: list[dict[str, Any]] = []
        for tokens in self.options.tokens or [4096, 16384]:
            try:
                rows.append(self.measure(name, batch, tokens))
            except (self.torch.OutOfMemoryError, MemoryError) as error:
                self.note(name, tokens, error)
        # Compiling for every batch that is tried would take minutes.
        if self.options.no_largest or name == "static-compile":
            return
        # What thinkv holds does not grow with the tokens: one search is for all of them.
        for group in [rows] if name == "thinkv" else [[row] for row in rows]:
            if group and self.left_s() > LARGEST_S:
                self.largest(name, group)

    def note(self, name: str, tokens: int, error: Exception) -> None:
        self.empty()
        text = f"{type(error).__name__}: {error}"
        self.emit({"system": name, "tokens": tokens, "note": text[:600]})

    def _start(self) -> None:
        from .serve_ours import Daemon, package

        self.empty()
        free = self.torch.cuda.mem_get_info()[0]
        self.daemon = Daemon(free - RESERVE)
        self.say(f"thinkvd has a pool of {(free - RESERVE) / 1e9:.1f} GB")
        self.client = package().Client(str(self.daemon.socket), name="bench", timeout=60)
        self.say("thinkvd answers")

    def close(self) -> None:
        if self.client is not None:
            self.client.close()
        if self.daemon is not None:
            self.daemon.close()
        self.file.close()


def search(fits: Callable[[int], bool], guess: int, time_left: Callable[[], bool]) -> int:
    """The largest batch that fits, to 2 %: from a guess that is most likely a little too large.
    Once there is no time left: the largest that was seen to fit."""
    low, high = 0, guess + max(1, guess // 50)
    batch = guess
    while high - low > max(1, high // 50) and time_left():
        if fits(batch):
            low = batch
        else:
            high = batch
        step = max(1, high // 32)
        batch = high - step if low == 0 and high - step > 0 else (low + high) // 2
        if batch in (low, high):
            break
    return low


def tell_on_request() -> None:
    """SIGUSR1: who is about to be stopped says where it is."""
    faulthandler.register(signal.SIGUSR1)


def main(options: argparse.Namespace, command: list[str]) -> int:
    """Rows go to options.rows as they come."""
    tell_on_request()
    if reason := machine.missing():
        print(f"bench: {reason}", file=sys.stderr)
        return machine.SKIPPED
    bench = Bench(options, command)
    work = [(bench.run, name) for name in options.system]
    work += [(bench.split, name) for name in options.system if name not in PEERS]
    try:
        for do, name in work:
            try:
                do(name)
            except Exception as error:  # noqa: BLE001 - the other systems still run
                bench.note(name, 0, error)
    finally:
        bench.close()
    return 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that a stopped process may have left in the middle of one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
