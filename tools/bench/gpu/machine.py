"""The machine of a run: its names, its streaming read, and whether it can run this at all."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

SKIPPED = 77
STREAM_BYTES = 2 << 30
STREAM_LAUNCHES = 3


def missing() -> str | None:
    """Why nothing here can run, with what to install; or None."""
    try:
        import torch
    except ImportError:
        return (f"{sys.executable} has no torch: install torch 2.8 or newer with CUDA, or name "
                "the Python that has it (--python, THINKV_TORCH_PYTHON)")
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU: run this on a machine with one (sm_80 or newer)"
    return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit(tree: str) -> str:
    """The commit of the tree, with + where files differ; THINKV_COMMIT where there is no git."""
    told = os.environ.get("THINKV_COMMIT")
    if told:
        return told
    name = _output("git", "-C", tree, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", tree, "status", "--porcelain", "--untracked-files=no")
    return (name or "unknown") + ("+" if changed else "")


def query(what: str) -> str:
    text = _output("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "-i", "0")
    return text.splitlines()[0] if text else "unknown"


def state() -> str:
    """Clocks, power and heat at this moment."""
    return query("clocks.sm,clocks.mem,power.draw,temperature.gpu")


def header(tree: str, arguments: list[str]) -> dict[str, Any]:
    import torch

    return {"gpu": torch.cuda.get_device_name(0), "driver": query("driver_version"),
            "state_before": state(),
            "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit(tree),
            "command": " ".join(["tools/bench/bench", *arguments])}


class Stream:
    """The streaming read of this machine, timed as the kernels are, again with every case."""

    def __init__(self) -> None:
        import torch

        from . import timing
        from .library import load

        self._data = torch.randint(0, 2**31, (STREAM_BYTES // 4,), dtype=torch.int32,
                                   device="cuda")
        self._sink = torch.zeros(4, dtype=torch.int32, device="cuda")
        self._read = load("stream").thinkv_bench_stream_read
        import ctypes

        self._read.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p,
                               ctypes.c_void_p]
        self.timed = timing.capture([self._launch], STREAM_LAUNCHES)

    def _launch(self) -> None:
        import torch

        error = self._read(self._data.data_ptr(), STREAM_BYTES, self._sink.data_ptr(),
                           torch.cuda.current_stream().cuda_stream)
        if error:
            raise RuntimeError(f"stream_read: CUDA error {error}")

    def row(self) -> dict[str, Any]:
        """Over all replays of the run."""
        middle, low, high = self.timed.summary()
        return {"kernel": "stream-read", "gb_s": STREAM_BYTES / middle * 1e-3,
                "p10": STREAM_BYTES / high * 1e-3, "p90": STREAM_BYTES / low * 1e-3}
