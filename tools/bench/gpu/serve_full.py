"""The whole cache in bf16 pages, with the fastest peer attention at its shape."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

import torch

from . import flashinfer_peer
from .cases import Case
from .serve_model import GENERATED, Shape
from .store import PAGE
from .timing import capture, replay
from .triton_paged import tuned

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def spread_lengths(batch: int) -> list[int]:
    """Steady state: lengths evenly spread over 1 .. GENERATED, as of sequences that each run from
    nothing to GENERATED tokens and are then replaced."""
    return [max(1, int((i + 0.5) / batch * GENERATED)) for i in range(batch)]


def batch_that_fits(shape: Shape, cap_bytes: int) -> int:
    batch = 0
    while True:
        pages = sum(-(-n // PAGE) for n in spread_lengths(batch + 1))
        held = shape.weight_bytes + shape.activation_bytes(batch + 1)
        if held + pages * PAGE * shape.token_bytes > cap_bytes:
            return batch
        batch += 1


def _run_planned(wrapper: Any, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
                 v: torch.Tensor) -> torch.Tensor:
    """A planned FlashInfer wrapper called as the other peers are."""
    return wrapper.run(q, (k, v), out=out)


class FullCache:
    budget = 0

    def __init__(self, shape: Shape, cap_bytes: int) -> None:
        self.batch = batch_that_fits(shape, cap_bytes)
        self.lengths = spread_lengths(self.batch)
        self.case = Case(shape.q_heads, shape.kv_heads, shape.head_dim, self.batch,
                         sum(self.lengths) // self.batch)
        counts = [-(-n // PAGE) for n in self.lengths]
        size = (shape.layers, sum(counts), PAGE, shape.kv_heads, shape.head_dim)
        self.k, self.v = (torch.empty(size, device="cuda", dtype=torch.bfloat16)
                          for _ in range(2))
        for layer in range(shape.layers):  # by layer: normal_ needs no large temporary
            self.k[layer].normal_()
            self.v[layer].normal_()
        self.order = torch.randperm(sum(counts), dtype=torch.int32)
        self.positions = torch.tensor(self.lengths, dtype=torch.int32, device="cuda") - 1
        self.rows = self._rows(counts)
        self.kv_bytes = sum(self.lengths) * shape.token_bytes
        self.bytes_held = self.k.nbytes + self.v.nbytes
        self.attention, self._attend = self._fastest(counts)

    def _rows(self, counts: list[int]) -> torch.Tensor:
        """The row of each sequence's newest token in the pages of a layer."""
        parts = self.order.split(counts)
        rows = [int(part[-1]) * PAGE + (n - 1) % PAGE for part, n in zip(parts, self.lengths)]
        return torch.tensor(rows, dtype=torch.int64, device="cuda")

    def _table(self, counts: list[int]) -> torch.Tensor:
        table = torch.zeros(self.batch, max(counts), dtype=torch.int32)
        for row, part in enumerate(self.order.split(counts)):
            table[row, :len(part)] = part
        return table.cuda()

    def _fastest(self, counts: list[int]) -> tuple[str, Attention]:
        """Paged attention of the benchmark's peers, timed on these very lengths."""
        q = torch.randn(self.batch, self.case.q_heads, self.case.head_dim, device="cuda",
                        dtype=torch.bfloat16)
        decode = tuned(self.case, q, self._table(counts), self.lengths, (self.k, self.v))
        found: dict[str, Attention] = {"triton-paged": decode}
        if flashinfer_peer.missing() is None:
            names = ("flashinfer-bf16-tc", "flashinfer-bf16")
            failed = flashinfer_peer.build_all([(name, self.case.head_dim) for name in names])
            for name in names if not failed else ():
                wrapper = flashinfer_peer.plan(self.case, self.lengths, self.order, False,
                                               name.endswith("-tc"))
                found[name] = partial(_run_planned, wrapper, torch.empty_like(q))
        times = {}
        for name, attend in found.items():
            timed = capture([partial(attend, q, self.k[i], self.v[i]) for i in range(4)])
            replay(timed, 2, 5)
            times[name] = timed.summary()[0]
        best = min(times, key=lambda name: times[name])
        text = ", ".join(f"{name} {us:.0f} us" for name, us in times.items())
        return f"{best} (a layer: {text})", found[best]

    def begin(self) -> None:
        pass

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        for cache, new in ((self.k, k), (self.v, v)):
            flat = cache[layer].view(-1, self.case.kv_heads, self.case.head_dim)
            flat.index_copy_(0, self.rows, new)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return self._attend(q, self.k[layer], self.v[layer])

    def end(self) -> None:
        pass

    def close(self) -> None:
        del self.k, self.v, self._attend
