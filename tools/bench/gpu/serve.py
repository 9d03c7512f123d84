"""bench serve: tokens a second of an 8B-shaped decoder at the largest batch that a memory cap
holds, generation length 32K. Weights are random bf16, which changes no timing."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Callable

from . import machine, report
from .library import TREE, Unavailable
from .roofline import Machine, Step, bound_by, floors_ms

SYSTEMS = ("full-bf16", "rkv-gather", "thinkv-1024", "thinkv-2048")
MATRIX = 8192
WARM_UPS = 10
REPLAYS = 20
ASSUMPTION = ("steady state: sequences evenly spread over 0 .. 32768 generated tokens, the same "
              "for all; full-bf16 holds 16384 tokens a sequence on average, in pages of 16; the "
              "others hold their budget")
METHOD = ("each step is one CUDA graph, matrix products by cuBLAS through torch; parts are events "
          "between the parts inside a second such graph, the step is the first one's time; "
          "rkv-gather compacts all sequences at once ('eviction') and a step bears 1/128 of it; "
          "'eviction' of thinkv is the end of a step: flush, labels and refresh, budget and "
          "evictions, averaged over steps in all phases. Random weights and tokens change no "
          "timing")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="bench serve", description=__doc__)
    parse.add_argument("--json", metavar="FILE", help="all rows")
    parse.add_argument("--cap-gb", action="append", default=[], metavar="80|whole",
                       help="memory cap in 10^9 bytes, or the whole card; may be given again "
                            "(80, and whole where the card has more)")
    parse.add_argument("--system", action="append", choices=SYSTEMS, default=[],
                       help="all of them where not given")
    parse.add_argument("--socket", help="a running thinkvd with backend cuda; without it one is "
                                        "started for this run")
    parse.add_argument("--age", type=int, default=0, metavar="TOKENS",
                       help="generated tokens before thinkv is timed (the budget and 384)")
    return parse


def caps(given: list[str]) -> list[int]:
    """Bytes. The whole card is what is free, less what CUDA contexts and libraries take."""
    import torch

    free = torch.cuda.mem_get_info()[0] - (2 << 30)
    wanted = given or (["80", "whole"] if free > 90e9 else ["80"])
    found = [free if text == "whole" else int(float(text) * 1e9) for text in wanted]
    for cap in found:
        if cap > free:
            raise Unavailable(f"a cap of {cap / 1e9:.0f} GB, but {free / 1e9:.1f} GB are free")
    return found


def measure_machine() -> Machine:
    import torch

    from . import timing

    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timed = timing.capture([lambda: torch.mm(a, b)])
    timing.replay(timed, 2, 10)
    stream = machine.Stream()
    timing.replay(stream.timed, 2, 10)
    return Machine(bytes_per_s=stream.row()["gb_s"] * 1e9,
                   flops_per_s=2 * MATRIX**3 / (timed.summary()[0] * 1e-6))


class Bench:
    def __init__(self, command: list[str]) -> None:
        import torch

        from .serve_model import Decoder

        self.machine = measure_machine()
        torch.cuda.empty_cache()
        self.decoder = Decoder()
        self.header = {"system": "run", **machine.header(str(TREE), command),
                       "assumption": ASSUMPTION, "method": METHOD,
                       "stream_gb_s": self.machine.bytes_per_s * 1e-9,
                       "gemm_tflops": self.machine.flops_per_s * 1e-12, "notes": {}}
        self.rows: list[report.Row] = []
        self.state = ""

    def captured(self, cache: Any, before: Callable[[], None]) -> Any:
        """The step as one graph, after one eager run that compiles what there is to compile."""
        import torch

        before()
        self.decoder.parts.enabled, marked = False, self.decoder.parts.enabled
        self.decoder.step(cache)
        torch.cuda.synchronize()
        self.decoder.parts.enabled = marked
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.decoder.step(cache)
        return graph

    def graph_ms(self, cache: Any, replays: int, before: Callable[[], None]) -> float:
        """From the first replay's begin to the last one's end, by replay: what is rare counts as
        often as it comes, and host work counts where the GPU waits for it."""
        import torch

        graph = self.captured(cache, before)
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        for number in range(WARM_UPS + replays):
            before()
            if number == WARM_UPS:
                begin.record()
            graph.replay()
        end.record()
        self.state = machine.state()  # while the replays run
        torch.cuda.synchronize()
        graph.reset()
        return begin.elapsed_time(end) / replays

    def parts_ms(self, cache: Any, replays: int, before: Callable[[], None]) -> dict[str, float]:
        """From a second graph, with events between the parts."""
        import torch

        parts = self.decoder.parts
        parts.enabled = True
        graph = self.captured(cache, before)
        for _ in range(replays):
            before()
            graph.replay()
            torch.cuda.synchronize()
            parts.add_replay()
        graph.reset()
        parts.enabled = False
        return parts.take(replays)

    def add(self, name: str, cap: int, cache: Any, step_ms: dict[str, float]) -> None:
        shape = self.decoder.shape
        step = Step(weight_bytes=2 * shape.read_weights, kv_bytes=cache.kv_bytes,
                    flops=2.0 * shape.read_weights * cache.batch)
        held = shape.weight_bytes + cache.bytes_held
        row = {"system": name, "budget": cache.budget, "cap_bytes": cap, "batch": cache.batch,
               "tokens_per_s": cache.batch / step_ms["step"] * 1e3,
               "step_ms": {part: round(ms, 4) for part, ms in step_ms.items()},
               "bytes_held": held, "bound_by": bound_by(step, self.machine),
               "floors_ms": {k: round(v, 3) for k, v in floors_ms(step, self.machine).items()},
               "attention": cache.attention, "gpu_state": self.state}
        self.rows.append(row)
        print(f"{name:14} cap {cap / 1e9:5.1f} GB  batch {cache.batch:5}  "
              f"{row['tokens_per_s']:9.1f} tokens/s  {row['bound_by']:9}  {row['step_ms']}",
              file=sys.stderr, flush=True)

    def peer(self, name: str, cap: int) -> None:
        from .serve_full import FullCache
        from .serve_rkv import BUFFER, RkvCache

        shape = self.decoder.shape
        cache = FullCache(shape, cap) if name == "full-bf16" else RkvCache(shape, cap, 1024)
        self.decoder.buffers(cache.batch)
        nothing: Callable[[], None] = lambda: None  # noqa: E731 - nothing to reserve
        step = self.graph_ms(cache, REPLAYS, nothing)
        parts = self.parts_ms(cache, REPLAYS, nothing)
        del parts["begin"], parts["end"]  # nothing of theirs is there
        if isinstance(cache, RkvCache):
            parts["eviction"] = cache.compaction_ms() / BUFFER
            step += parts["eviction"]
        self.add(name, cap, cache, parts | {"step": step})
        cache.close()

    def ours(self, budget: int, cap: int, options: argparse.Namespace) -> None:
        from .serve_ours import PERIOD, OurCache, Ours

        shape = self.decoder.shape
        system = Ours(shape, cap, options.socket)
        try:
            batch = system.batch_that_fits(budget)
            cache: Any = OurCache(shape, system.model, batch, budget)
            self.decoder.buffers(batch)
            cache.steady(options.age)
            cache.kv_bytes = cache.bytes_held = cache.bytes_now()
            step = self.graph_ms(cache, PERIOD, cache.reserve)
            parts = self.parts_ms(cache, PERIOD, cache.reserve)
            parts["append"] += parts.pop("begin")
            parts["eviction"] = parts.pop("end")
            self.add("thinkv", cap, cache, parts | {"step": step})
            self.rows[-1]["pool"] = system.client.stats()["pool"]
            self.rows[-1]["sequence"] = cache.stats()
            cache.close()
        finally:
            system.close()

    def run(self, name: str, cap: int, options: argparse.Namespace) -> None:
        import torch

        try:
            if name.startswith("thinkv-"):
                self.ours(int(name.removeprefix("thinkv-")), cap, options)
            else:
                self.peer(name, cap)
        except Exception as reason:  # noqa: BLE001 - the rows of other systems are kept
            self.header["notes"][f"{name} at {cap / 1e9:.0f} GB"] = str(reason)[:500]
            print(f"bench: {name}: {reason}", file=sys.stderr)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main(command: list[str]) -> int:
    arguments = parser().parse_args(command[1:])
    reason = machine.missing()
    if reason is not None:
        print(f"bench: {reason}", file=sys.stderr)
        return machine.SKIPPED
    try:
        wanted = caps(arguments.cap_gb)
        bench = Bench(command)
    except Unavailable as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return machine.SKIPPED
    for cap in wanted:
        for name in arguments.system or SYSTEMS:
            bench.run(name, cap, arguments)
    rows = [bench.header, *bench.rows]
    report.check_serve(rows)
    if arguments.json:
        report.write_json(arguments.json, rows)
    print(report.serve_markdown(rows))
    return 0 if bench.rows else 1
