"""CUDA graphs over rotating buffers, and interleaved timing of several of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Callable, Sequence

import torch

LAUNCHES_MIN = 20
WARM_UPS = 10
REPLAYS = 30
PASSES = 3  # A/B/A: forward, backward, forward
ROTATED_L2 = 5

Launch = Callable[[], object]


def rotation(bytes_of_one: int, at_most: int = 512) -> int:
    """Copies of a buffer that together are more than five times the L2."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(at_most, -(-ROTATED_L2 * l2 // max(1, bytes_of_one))))


@dataclass
class Timed:
    """One kernel's graph and the microseconds a launch of its replays."""

    graph: torch.cuda.CUDAGraph
    launches: int
    times: list[float] = field(default_factory=list)

    def summary(self) -> tuple[float, float, float]:
        """Result: (median, p10, p90) in microseconds."""
        return summary(self.times)


def summary(times: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(times)
    last = len(ordered) - 1
    return (statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def capture(launches: Sequence[Launch], minimum: int = LAUNCHES_MIN) -> Timed:
    """One graph with every launch as often as needed for `minimum` in all. The first launch has
    run before: it may compile, allocate or tune."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for launch in launches[:3]:
            launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    rounds = max(1, -(-minimum // len(launches)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for launch in launches:
                launch()
    return Timed(graph, rounds * len(launches))


def replay(timed: Timed, warm_ups: int, replays: int) -> None:
    for _ in range(warm_ups):
        timed.graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
              for _ in range(replays)]
    for begin, end in events:
        begin.record()
        timed.graph.replay()
        end.record()
    torch.cuda.synchronize()
    timed.times += [begin.elapsed_time(end) * 1e3 / timed.launches for begin, end in events]


def interleaved(graphs: dict[str, Timed]) -> None:
    """Fills `times` of all: each pass runs all kernels, every second pass in reverse order."""
    names = list(graphs)
    for number in range(PASSES):
        for name in names if number % 2 == 0 else reversed(names):
            replay(graphs[name], WARM_UPS if number == 0 else 1, REPLAYS // PASSES)
