"""Where a decode step's time goes, by the names of its kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

STEPS = 3
# The first class with a word of the kernel's name. "cache" is what keeps a cache: appending,
# flushing, labelling, evicting (ours), concatenating and scattering (transformers').
CLASSES = (
    ("attention", ("attend", "attention", "combine_kernel", "emission", "fmha", "flash", "sdpa",
                   "softmax")),
    ("matmul", ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "xmma")),
    ("cache", ("thinkv", "catarray", "index_put", "index_copy", "scatter")),
    ("copies", ("copy", "memcpy")),
)


def classify(kernel: str) -> str:
    name = kernel.lower()
    for kind, words in CLASSES:
        if any(word in name for word in words):
            return kind
    return "other"


class Ran(NamedTuple):
    """A kernel of a trace; microseconds."""

    kernel: str
    start: float
    end: float


def alone(trace: list[Ran]) -> dict[str, float]:
    """Microseconds by kernel, each moment counted once, for the kernel that began first: one that
    is launched early and waits on the GPU counts from the end of the kernel it waits for."""
    times: dict[str, float] = defaultdict(float)
    until = float("-inf")
    for ran in sorted(trace, key=lambda ran: ran.start):
        times[ran.kernel] += max(0.0, ran.end - max(ran.start, until))
        until = max(until, ran.end)
    return dict(times)


def sums(times: dict[str, float], steps: int, step_ms: float) -> dict[str, float]:
    """Milliseconds a step by class, from the microseconds of kernels over `steps` steps. idle is
    what the step takes beyond its kernels."""
    split: dict[str, float] = defaultdict(float)
    for kernel, microseconds in times.items():
        split[classify(kernel)] += microseconds / 1e3 / steps
    split["idle"] = max(0.0, step_ms - sum(split.values()))
    return {kind: round(value, 3) for kind, value in sorted(split.items())}


def measure(step: Callable[[], None], step_ms: float) -> tuple[dict[str, float], list[str]]:
    """Of a step that was timed without the profiler; and its five longest kernels."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    times = alone([Ran(event.name, event.time_range.start, event.time_range.end)
                   for event in trace.events() if event.device_type == DeviceType.CUDA])
    longest = sorted(times.items(), key=lambda each: -each[1])[:5]
    return (sums(times, STEPS, step_ms),
            [f"{time / 1e3 / STEPS:.3f} {name[:100]}" for name, time in longest])
