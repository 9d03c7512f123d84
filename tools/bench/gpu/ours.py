"""Our attention kernel over random pages, through lanes.cu."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, byref, c_float, c_uint8, c_uint32, c_uint64, c_void_p
from functools import partial

import torch

from . import library
from .cases import HELD_BYTES_MAX, Case
from .formats import FORMATS, MIXES, lane_bytes, mix_tokens
from .timing import Launch, rotation

EMIT_ALL = 3  # scores and the sparsity statistic


class _Case(Structure):
    """ThinkvBenchCase of lanes.cu."""

    _fields_ = [("kv_heads", c_uint32), ("group", c_uint32), ("head_dim", c_uint32),
                ("batch", c_uint32), ("formats", c_uint32), ("copies", c_uint32),
                ("emit", c_uint32), ("live", c_float), ("format", POINTER(c_uint8)),
                ("counts", POINTER(c_uint32)), ("seed", c_uint64)]


@functools.cache
def _library() -> ctypes.CDLL:
    lib = library.load("lanes")
    lib.thinkv_bench_error.restype = ctypes.c_char_p
    lib.thinkv_bench_lanes_make.argtypes = [POINTER(_Case)]
    lib.thinkv_bench_lanes_make.restype = c_void_p
    lib.thinkv_bench_lanes_launch.argtypes = [c_void_p, c_uint32, c_void_p, c_void_p, c_void_p,
                                              c_void_p]
    lib.thinkv_bench_lanes_bytes.argtypes = [c_void_p, POINTER(c_uint64)]
    lib.thinkv_bench_lanes_bytes.restype = None
    lib.thinkv_bench_lanes_free.argtypes = [c_void_p]
    lib.thinkv_bench_lanes_free.restype = None
    return lib


def parse(name: str) -> tuple[str, bool]:
    """thinkv-MIX or thinkv-MIX-emit. Result: (mix, emits)."""
    mix = name.removeprefix("thinkv-")
    return mix.removesuffix("-emit"), mix.endswith("-emit")


class Lanes:
    """Pages of one kernel on one case; freed with the object."""

    def __init__(self, name: str, case: Case, q: torch.Tensor) -> None:
        self._handle: int | None = None
        mix, emits = parse(name)
        held = lane_bytes(mix, case.head_dim, case.tokens)[1] * case.batch * case.kv_heads
        if held > HELD_BYTES_MAX:
            raise MemoryError(f"would hold {held / 1e9:.0f} GB")
        self.copies = rotation(held)
        self.q = q
        self.out = torch.full_like(q, float("nan"))
        self.lse = torch.empty(case.batch, case.q_heads, device="cuda")
        counts = [n for length in case.lengths() for n in mix_tokens(mix, length).values()]
        numbers = [FORMATS[part].number for part in MIXES[mix]]
        given = _Case(kv_heads=case.kv_heads, group=case.group, head_dim=case.head_dim,
                      batch=case.batch, formats=len(numbers), copies=self.copies,
                      emit=EMIT_ALL if emits else 0, live=case.live,
                      format=(c_uint8 * len(numbers))(*numbers),
                      counts=(c_uint32 * len(counts))(*counts), seed=11)
        self._lib = _library()
        handle = self._lib.thinkv_bench_lanes_make(byref(given))
        if not handle:
            raise RuntimeError(f"{name}: {self._lib.thinkv_bench_error().decode()}")
        self._handle = handle
        self._check(name)

    def launch(self, copy: int) -> None:
        error = self._lib.thinkv_bench_lanes_launch(
            self._handle, copy, self.q.data_ptr(), self.out.data_ptr(), self.lse.data_ptr(),
            torch.cuda.current_stream().cuda_stream)
        if error:
            raise RuntimeError(f"attend: {self._lib.thinkv_bench_error().decode()}")

    def _check(self, name: str) -> None:
        """Every element written, none of them NaN: dead slots and spare bytes are poisoned."""
        self.launch(0)
        torch.cuda.synchronize()
        if not bool(torch.isfinite(self.out).all()) or not bool(torch.isfinite(self.lse).all()):
            raise RuntimeError(f"{name}: the result is not finite")

    def launches(self) -> list[Launch]:
        return [partial(self.launch, i) for i in range(self.copies)]

    def bytes(self) -> tuple[int, int]:
        """(live, touched) of one launch."""
        out = (c_uint64 * 4)()
        self._lib.thinkv_bench_lanes_bytes(self._handle, out)
        return int(out[0]), int(out[1])

    def __del__(self) -> None:
        if self._handle is not None:
            self._lib.thinkv_bench_lanes_free(self._handle)
