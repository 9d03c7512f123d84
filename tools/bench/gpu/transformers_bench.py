"""bench transformers: a Hugging Face model through the pool against transformers' own caches.

An 8B-shaped Llama with random bf16 weights. For each system and number of generated tokens: tokens
a second at one batch, where the step's time goes, and the largest batch whose cache and one step
fit this GPU. Ours run in one process, each of the others in one of its own, which is stopped at
--limit-s; what it had measured is kept."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import machine, transformers_run

OURS = ("full-f16", "k4v4-only", "thinkv")
SYSTEMS = (*OURS, *transformers_run.PEERS)
TELL_S = 1.0  # for the process to say where it is
STOP_S = 5.0  # between the request to end and the end
METHOD = ("tokens/s = batch / mean of 20 steps by events, the next token chosen in the step; ours: "
          "thinkv.Step (one CUDA graph); dynamic: eager, as generate() runs it; static-compile: "
          "torch.compile reduce-overhead. No cache is filled by generating token by token with the "
          "model: dynamic, static-compile, full-f16 and k4v4-only get random keys and values of "
          "that length at once, thinkv (budget 1024) generates that many by steps without matrix "
          "products and attention, its rows joining over the first 128. split_ms: kernels by name "
          "in 3 profiled steps, each moment once; idle: the timed step less its kernels. largest "
          "batch: found by trying (dynamic), from the bytes that a sequence holds, less 3 %, then "
          "tried (ours; thinkv at 1408 generated tokens, sized by the most it held); ours leave "
          "6 GiB outside the pool to activations")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="bench transformers", description=__doc__)
    parse.add_argument("--json", metavar="FILE", help="all rows, written after each process")
    parse.add_argument("--system", action="append", choices=SYSTEMS, default=[])
    parse.add_argument("--tokens", action="append", type=int, default=[],
                       help="in each sequence (4096 and 16384)")
    parse.add_argument("--batch", type=int, default=32, help="(32)")
    parse.add_argument("--layers", type=int, default=32, help="fewer for a quick run")
    parse.add_argument("--no-largest", action="store_true", help="leave the largest batch out")
    parse.add_argument("--limit-s", type=float, default=150.0, help="of each process (150)")
    parse.add_argument("--rows", help=argparse.SUPPRESS)  # of a process: where its rows go
    return parse


def groups(systems: list[str]) -> list[list[str]]:
    """Those that share a process: ours share a pool, and a compiled model shares nothing."""
    ours = [name for name in systems if name in OURS]
    return ([ours] if ours else []) + [[name] for name in systems if name not in OURS]


def arguments(options: argparse.Namespace, systems: list[str], rows: Path) -> list[str]:
    """Of the process that measures `systems`."""
    given = ["transformers", "--rows", str(rows), "--batch", str(options.batch),
             "--layers", str(options.layers), "--limit-s", str(options.limit_s)]
    given += ["--no-largest"] if options.no_largest else []
    for name in systems:
        given += ["--system", name]
    for tokens in options.tokens:
        given += ["--tokens", str(tokens)]
    return given


def run_process(command: list[str], limit_s: float) -> int | None:
    """Its exit status; None: it was stopped at the limit, with all that it had started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TELL_S)
        return None
    finally:
        stop_session(process)


def stop_session(process: subprocess.Popen[bytes]) -> None:
    """A thinkvd that outlives its bench would keep its pool from the next process."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def measure(options: argparse.Namespace, systems: list[str]) -> tuple[int, list[dict[str, Any]]]:
    """The status and the rows of one process."""
    with tempfile.TemporaryDirectory(prefix="thinkv-bench-") as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.touch()
        command = [sys.executable, "-m", "tools.bench.gpu", *arguments(options, systems, rows)]
        status = run_process(command, options.limit_s)
        found = transformers_run.read_rows(rows)
    if status is None or status not in (0, machine.SKIPPED):
        reason = f"stopped after {options.limit_s:.0f} s" if status is None else \
            f"ended with status {status}"
        print(f"bench: {', '.join(systems)} {reason}", file=sys.stderr)
        found.append({"system": systems[-1], "tokens": 0, "note": reason})
    return status or 0, found


def main(command: list[str]) -> int:
    options = parser().parse_args(command[1:])
    if options.rows:
        return transformers_run.main(options, command)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends its processes too
    rows: list[dict[str, Any]] = []
    for systems in groups(options.system or list(SYSTEMS)):
        status, found = measure(options, systems)
        if status == machine.SKIPPED and not rows:
            return machine.SKIPPED
        rows += found
        if options.json:
            write(Path(options.json), rows, command)
    print(markdown(rows))
    return 0 if any("step_ms" in row for row in rows) else 1


def write(path: Path, rows: list[dict[str, Any]], command: list[str]) -> None:
    """One header, that of the first process, and every row."""
    headers = [row for row in rows if row["system"] == "run"]
    header = {**(headers[0] if headers else {"system": "run"}), "method": METHOD,
              "command": " ".join(["tools/bench/bench", *command])}
    rest = [row for row in rows if row["system"] != "run"]
    path.write_text(json.dumps([header, *rest], indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """What is known of each system at each number of tokens."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        if row["system"] != "run":
            found.setdefault((row["system"], row["tokens"]), {}).update(row)
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| system | tokens | batch | tokens/s | step ms | matmul, attention, cache, copies, "
             "other, idle ms | MiB a sequence | largest batch | tokens/s there |",
             "|---|---|---|---|---|---|---|---|---|"]
    for (system, tokens), row in table(rows).items():
        held = f"{row['bytes_held'] / row['batch'] / 2**20:.1f}" if "bytes_held" in row else ""
        split = row.get("split_ms", {})
        parts = ", ".join(f"{split.get(part, 0.0):.2f}" for part in
                          ("matmul", "attention", "cache", "copies", "other", "idle"))
        cells = [system, tokens, row.get("batch", ""), row.get("tokens_per_s", ""),
                 row.get("step_ms", row.get("note", "")), parts if split else "", held,
                 row.get("largest_batch", ""), row.get("largest_tokens_per_s", "") or ""]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
