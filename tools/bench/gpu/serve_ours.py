"""ThinKV through the Python package, on a thinkvd of its own with backend cuda."""

from __future__ import annotations

import importlib
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .library import TREE, Unavailable
from .serve_model import Shape

BIN = Path(os.environ.get("THINKV_BIN_DIR", TREE / "build" / "bin"))
EXTENT = 64 << 20
PERIOD = 128        # tokens of a thought segment: labels and evictions repeat with it
SYNC_STEPS = 8      # so that what is promised to steps under way stays small
PROMPT = 32         # tokens; kept as a whole, so the budget is the generated part
SAMPLE = 64         # sequences whose own numbers are read
PILOT = 64          # sequences whose bytes at the budget size the batch
SHARE = 0.97        # of the pool: the rest is what is promised to the steps under way
CONFIG = """\
pool: {{backend: cuda, bytes: {bytes}B, extent_bytes: {extent}B}}
policies: {{directories: [{policies}]}}
metrics: {{port: off}}
log: {{level: warning}}
"""


def package() -> Any:
    """The Python package, with what this needs of it."""
    try:
        thinkv = importlib.import_module("thinkv")
    except (ImportError, OSError) as error:
        raise Unavailable(f"the Python package thinkv cannot be loaded ({error}): build the tree "
                          "with THINKV_CUDA=ON and set THINKV_LIBRARY or PYTHONPATH") from error
    if not hasattr(thinkv.Model, "batch"):
        raise Unavailable("this thinkv has no Model.batch: it was built before the CUDA backend")
    return thinkv


class Daemon:
    """A thinkvd of this run alone; ended with it."""

    def __init__(self, pool_bytes: int) -> None:
        program = BIN / "thinkvd"
        if not program.exists():
            raise Unavailable(f"{program} is not built (THINKV_BIN_DIR); run tools/dev build")
        self._folder = tempfile.TemporaryDirectory(prefix="thinkv-serve-")
        config = Path(self._folder.name) / "thinkvd.yaml"
        self.socket = Path(self._folder.name) / "control.sock"
        config.write_text(CONFIG.format(bytes=pool_bytes // EXTENT * EXTENT, extent=EXTENT,
                                        policies=TREE / "config" / "policies"))
        self._process = subprocess.Popen([program, "--config", config, "--socket", self.socket])
        deadline = time.monotonic() + 30
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise Unavailable("thinkvd did not start with backend cuda; its log is above")
            time.sleep(0.02)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        self._folder.cleanup()


class OurCache:
    """A batch of sequences at their budget. See steady() for how they come there."""

    def __init__(self, shape: Shape, model: Any, batch: int, budget: int) -> None:
        self.shape, self.model, self.batch, self.budget = shape, model, batch, budget
        self.rows = model.batch(batch, tokens_max=budget + PROMPT + 2 * PERIOD)
        self.sequences: list[Any] = []
        self.positions = torch.full((batch,), budget, dtype=torch.int32, device="cuda")
        self.out = torch.empty(batch, shape.q_heads, shape.head_dim, device="cuda",
                               dtype=torch.bfloat16)
        self.attention = "thinkv"

    def _tensor(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, self.shape.kv_heads, self.shape.head_dim, device="cuda",
                           dtype=torch.bfloat16)

    def _join(self, row: int) -> None:
        sequence = self.model.sequence(policy="thinkv", budget=self.budget)
        k, v = self._tensor(PROMPT), self._tensor(PROMPT)
        for layer in range(self.shape.layers):
            sequence.prefill(layer, k, v)
        sequence.prefill_end()
        self.rows.join(row, sequence)
        self.sequences.append(sequence)

    def steady(self, age: int = 0) -> None:
        """Sequences join one after another over the first PERIOD steps, so that flushes, labels
        and evictions fall evenly on the steps; then steps without attention and matrix products
        (a graph of append and end on random K and V) run until the first has generated `age`
        tokens, and at least until the last is over its budget by a whole period. What the cache
        holds then does not depend on what ran beside."""
        k, v = self._tensor(self.batch), self._tensor(self.batch)
        due = [row * PERIOD // self.batch for row in range(self.batch)]
        graph: torch.cuda.CUDAGraph | None = None
        for step in range(max(age, self.budget + 3 * PERIOD)):
            for row in range(self.batch):
                if due[row] == step:
                    self._join(row)
            if step % SYNC_STEPS == 0:
                torch.cuda.synchronize()
            self.reserve()
            if graph is None:
                self._bare_step(k, v)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._bare_step(k, v)
                continue
            graph.replay()
        torch.cuda.synchronize()
        if graph is not None:
            graph.reset()

    def _bare_step(self, k: torch.Tensor, v: torch.Tensor) -> None:
        k.normal_()
        v.normal_()
        self.begin()
        for layer in range(self.shape.layers):
            self.append(layer, k, v)
        self.end()

    def reserve(self) -> None:
        """Host only: pages for the next step."""
        self.rows.reserve(steps=1)

    def begin(self) -> None:
        self.rows.begin()

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.rows.append(layer, k, v)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        self.rows.attend(layer, q, out=self.out)
        return self.out

    def end(self) -> None:
        self.rows.end()

    def bytes_now(self) -> int:
        """Of all sequences, with metadata, from a sample of them in all phases."""
        sample = self.sequences[::max(1, self.batch // SAMPLE)]
        held = sum(sequence.stats()["bytes_held"] for sequence in sample)
        return held * self.batch // len(sample)

    def stats(self) -> dict[str, Any]:
        """Of the first sequence; all are alike but for their phase."""
        return {key: value for key, value in self.sequences[0].stats().items()
                if isinstance(value, (int, float, dict))}

    def close(self) -> None:
        self.rows.close()
        for sequence in self.sequences:
            sequence.close()


class Ours:
    """Daemon, client and model of one cap."""

    def __init__(self, shape: Shape, cap_bytes: int, socket: str | None) -> None:
        thinkv = package()
        self.shape, self.cap_bytes = shape, cap_bytes
        # What the weights leave; the batch takes its activations out of it.
        self.pool_bytes = cap_bytes - shape.weight_bytes
        self._daemon = None if socket else Daemon(self.pool_bytes)
        self.client = thinkv.Client(socket or str(self._daemon.socket if self._daemon else ""))
        if self.client.backend != "cuda":
            raise Unavailable(f"thinkvd serves backend {self.client.backend}, expected cuda")
        self.model = self.client.model(layers=shape.layers, q_heads=shape.q_heads,
                                       kv_heads=shape.kv_heads, head_dim=shape.head_dim,
                                       dtype="bfloat16")

    def used_bytes(self) -> int:
        return int(self.client.stats()["client_leased_bytes"])

    def batch_that_fits(self, budget: int) -> int:
        """By the bytes that PILOT sequences in all phases hold at their budget."""
        pilot = OurCache(self.shape, self.model, PILOT, budget)
        pilot.steady()
        each = pilot.bytes_now() / PILOT
        pilot.close()
        room = self.pool_bytes - EXTENT - self.shape.activation_bytes(0)
        return int(SHARE * room / (each + self.shape.activation_bytes(1)
                           - self.shape.activation_bytes(0)))

    def close(self) -> None:
        self.client.close()
        if self._daemon is not None:
            self._daemon.close()
