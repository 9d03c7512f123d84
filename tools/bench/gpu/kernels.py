"""bench kernels: decode attention of one layer, ours and the peers, in one run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any, Callable

from . import cases as shapes
from . import machine, report
from .formats import lane_bytes
from .library import TREE, Unavailable


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="bench kernels", description=__doc__)
    parse.add_argument("--json", metavar="FILE", help="all rows")
    parse.add_argument("--markdown", metavar="FILE", help="a table by case; - for the terminal")
    parse.add_argument("--plot", metavar="FILE.png", help="bars by case")
    parse.add_argument("--quick", action="store_true", help="20 cases, about a minute")
    parse.add_argument("--only", metavar="PREFIX", action="append", default=[],
                       help="kernels that begin so; may be given again")
    parse.add_argument("--case", metavar="TEXT", action="append", default=[],
                       help="cases whose title holds this, such as '128 x 4096'")
    parse.add_argument("--seconds", type=float, default=480.0,
                       help="no case is begun after this many (480)")
    parse.add_argument("--resources", action="store_true",
                       help="registers, local and shared bytes and instruction counts of each "
                            "kernel of the tree; needs no GPU")
    parse.add_argument("--arch", metavar="80|90|100",
                       help="architecture of --resources: the GPU's, 90 where there is none")
    return parse


def chosen(arguments: argparse.Namespace) -> list[tuple[shapes.Case, list[str]]]:
    result = []
    for case in shapes.cases(arguments.quick):
        if arguments.case and not any(text in case.label() for text in arguments.case):
            continue
        names = [name for name in shapes.kernels_of(case, arguments.quick)
                 if not arguments.only or name.startswith(tuple(arguments.only))]
        if names:
            result.append((case, names))
    return result


def bytes_of(name: str, case: shapes.Case) -> tuple[float, int]:
    """(live, touched) bytes of a peer; ours count their own pages (lanes.cu)."""
    if name == "dequant-sdpa":
        each, _ = lane_bytes("k4v4", case.head_dim, case.tokens)
        codes = each * case.batch * case.kv_heads
        return codes * case.live, codes + 2 * case.bf16_bytes()
    held = case.bf16_bytes() // (2 if "fp8" in name else 1)
    if name == "gather-sdpa":
        return held * case.live, int(3 * held * case.live)
    return held * case.live, held


def launches_of(name: str, case: shapes.Case, store: Any) -> tuple[list[Callable[[], object]],
                                                                   tuple[float, int]]:
    if name.startswith("thinkv-"):
        from .ours import Lanes

        lanes = Lanes(name, case, store.q)
        store.keep.append(lanes)
        return lanes.launches(), lanes.bytes()
    from . import flashinfer_peer, flex, peers, triton_paged

    if name.startswith("flashinfer-"):
        made = flashinfer_peer.flashinfer_decode(name, case, store)
    elif name in peers.BACKENDS:
        made = peers.sdpa(name, case, store)
    else:
        makers = {"gather-sdpa": peers.gather_sdpa, "triton-paged": triton_paged.triton_paged,
                  "dequant-sdpa": triton_paged.dequantise_sdpa, "flex-live": flex.flex_live}
        made = makers[name](case, store)
    return made, bytes_of(name, case)


class DeviceLost(Exception):
    """A launch failed in a way that ends this process's use of the GPU; the text names it."""


class Run:
    def __init__(self, arguments: argparse.Namespace, command: list[str]) -> None:
        self.arguments = arguments
        self.begin = time.monotonic()
        self.notes: dict[str, str] = {}
        self.header = {"kernel": "run", **machine.header(str(TREE), command)}
        self.rows: list[report.Row] = []
        self.stream = machine.Stream()

    def note(self, name: str, text: str) -> None:
        if name not in self.notes:
            print(f"{name}: {text}", file=sys.stderr)
            self.notes[name] = text

    def prepare(self, case: shapes.Case, names: list[str], store: Any) -> dict[str, Any]:
        """One graph for each kernel that this machine can run."""
        import torch

        from . import timing

        graphs = {}
        for name in names:
            try:
                launches, counted = launches_of(name, case, store)
                store.keep.append(launches)  # their tensors live as long as the graph
                launches[0]()
                graphs[name] = (timing.capture(launches), counted)
            except Unavailable as reason:
                self.note(name.split("-")[0], str(reason))
            except (RuntimeError, MemoryError, ValueError, AssertionError) as reason:
                text = (str(reason).strip() or type(reason).__name__).splitlines()[0]
                shape = f"{case.q_heads}/{case.kv_heads}/{case.head_dim}"
                # Without the paths of the peer's own source files.
                self.note(f"{name} at {shape}", text.rsplit(".cu:", 1)[-1])
                try:
                    torch.cuda.synchronize()
                except RuntimeError as lost:
                    raise DeviceLost(f"{name} at {case.label()}: {text}") from lost
        return graphs

    def measure(self, case: shapes.Case, names: list[str]) -> None:
        import torch

        from . import timing
        from .store import Store

        store = Store(case, self.notes)
        graphs = self.prepare(case, names, store)
        timing.interleaved({name: timed for name, (timed, _) in graphs.items()}
                           | {"stream-read": self.stream.timed})
        for name, (timed, counted) in graphs.items():
            self.rows.append(row(name, case, timed.summary(), counted))
            print(f"{time.monotonic() - self.begin:6.1f} s  {case.label():32} {name:20} "
                  f"{self.rows[-1]['us']:9.1f} us", file=sys.stderr, flush=True)
        for timed, _ in graphs.values():
            timed.graph.reset()
        graphs.clear()
        store.free()
        torch.cuda.empty_cache()

    def result(self) -> list[report.Row]:
        stream = self.stream.row()
        for each in self.rows:
            each["stream_fraction"] = each["live_bytes"] / each["us"] * 1e-3 / stream["gb_s"]
        self.header["notes"] = self.notes
        self.header["state_after"] = machine.state()
        self.header["seconds"] = round(time.monotonic() - self.begin, 1)
        return [self.header, stream, *self.rows]


def row(name: str, case: shapes.Case, times: tuple[float, float, float],
        counted: tuple[float, int]) -> report.Row:
    """live_tokens: slots that a lane holds, of which live_fraction is live."""
    return {"kernel": name, "q_heads": case.q_heads, "kv_heads": case.kv_heads,
            "head_dim": case.head_dim, "batch": case.batch, "live_tokens": case.tokens,
            "live_fraction": case.live, "ragged": case.ragged, "us": times[0],
            "live_bytes": int(counted[0]), "touched_bytes": int(counted[1]),
            "stream_fraction": 0.0, "p10": times[1], "p90": times[2]}


def build_peers(run: Run, plan: list[tuple[shapes.Case, list[str]]]) -> None:
    from . import flashinfer_peer

    wanted = {name for _, names in plan for name in names if name.startswith("flashinfer-")}
    reason = flashinfer_peer.missing() if wanted else None
    if reason is not None:
        run.note("flashinfer", reason)
        for _, names in plan:
            names[:] = [name for name in names if name not in wanted]
        return
    for name, text in flashinfer_peer.build_all(sorted(
            {(name, case.head_dim) for case, names in plan for name in names
             if name in wanted})).items():
        run.note(name, text)


def write(arguments: argparse.Namespace, rows: list[report.Row]) -> None:
    report.check_rows(rows)
    if arguments.json:
        report.write_json(arguments.json, rows)
    table = report.markdown(rows)
    if arguments.markdown and arguments.markdown != "-":
        with open(arguments.markdown, "w", encoding="utf-8") as file:
            file.write(table)
    else:
        print(table)
    if arguments.plot:
        problem = report.plot(rows, arguments.plot)
        if problem:
            print(f"bench: {problem}", file=sys.stderr)


def main(command: list[str]) -> int:
    arguments = parser().parse_args(command[1:])
    if arguments.resources:
        from . import resources

        return resources.main(arguments.json, arguments.arch)
    reason = machine.missing()
    if reason is not None:
        print(f"bench: {reason}", file=sys.stderr)
        return machine.SKIPPED
    plan = chosen(arguments)
    try:
        run = Run(arguments, command)
    except Unavailable as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return machine.SKIPPED
    build_peers(run, plan)
    for case, names in plan:
        if time.monotonic() - run.begin > arguments.seconds:
            run.note("time", f"cases from {case.label()} on were not begun (--seconds)")
            break
        try:
            run.measure(case, names)
        except DeviceLost as lost:
            print(f"bench: the GPU was lost: {lost}; what was measured before is kept",
                  file=sys.stderr)
            write(arguments, run.result())
            sys.stdout.flush()
            os._exit(1)  # destructors would only fail on the lost context
    write(arguments, run.result())
    return 0
