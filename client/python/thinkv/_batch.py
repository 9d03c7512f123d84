"""Batch: the rows of a decode step on the GPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref
from typing import TYPE_CHECKING, Any

from . import _library as c
from ._arrays import as_device
from ._handle import Handle
from ._library import call, lib

if TYPE_CHECKING:
    from ._client import Model, Sequence


def current_stream() -> int:
    """The stream that PyTorch, else CuPy, uses now in this thread; 0 without either."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.current_stream().cuda_stream)
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        return int(cupy.cuda.get_current_stream().ptr)
    return 0


class Batch(Handle):
    """Rows that sequences join and leave; made by Model.batch(). Arrays are tensors in GPU memory
    (anything with __dlpack__), used in place; all work goes to the current stream of PyTorch (or
    CuPy). begin, append, attend and end only launch kernels and can be captured in a CUDA graph;
    call reserve() before each replay. Calls on one batch must not overlap."""

    _what = "batch"

    def __init__(self, handle: int, model: Model, capacity: int) -> None:
        self.model = model
        self.capacity = capacity
        self.rows: list[Sequence | None] = [None] * capacity
        super().__init__(handle, lib.thinkv_batch_close)

    def join(self, row: int, sequence: Sequence) -> None:
        """Puts a sequence into a free row, between steps."""
        self.model.use_current_stream()
        call("thinkv_batch_set", self._handle, row, sequence._handle)
        self.rows[row] = sequence

    def leave(self, row: int) -> None:
        """Takes the sequence of a row out; it stays open."""
        self.model.use_current_stream()
        call("thinkv_batch_set", self._handle, row, None)
        self.rows[row] = None

    def reserve(self, steps: int = 1) -> None:
        """Reserves the pages of the next steps without waiting for the GPU, and counts them as
        done: before each run of a step, launched or replayed. Raises ExhaustedError or
        QuotaExceededError, and then nothing has changed."""
        self.model.use_current_stream()
        call("thinkv_batch_reserve", self._handle, steps)

    def begin(self) -> None:
        self.model.use_current_stream()
        call("thinkv_batch_begin", self._handle)

    def append(self, layer: int, k: Any, v: Any) -> None:
        """k, v: [capacity, kv_heads, head_dim]; rows without a sequence are not read."""
        shape = (self.capacity, self.model.kv_heads, self.model.head_dim)
        keys, values = as_device("k", k, shape), as_device("v", v, shape)
        call("thinkv_batch_append", self._handle, layer, byref(keys.tensor), byref(values.tensor))

    def unreserve(self) -> None:
        """Takes the newest reserve() back, whose steps will not run."""
        call("thinkv_batch_unreserve", self._handle)

    def attend(
        self,
        layer: int,
        q: Any,
        out: Any = None,
        lse: Any = None,
        *,
        window: int = 0,
        sinks: int = 0,
        silent: bool = False,
        measure_only: bool = False,
    ) -> Any:
        """q, out: [capacity, q_heads, head_dim]; lse: None or float32 [capacity, q_heads], the
        natural log-sum-exp. Result: out; where it is None, a new PyTorch tensor like q.

        window: only the newest tokens, this step's included, and the first `sinks` ones; 0: all.
        silent: the policy does not see this query. measure_only: it is asked for the policy's
        sake alone, and out is written only in layers that the policy measures."""
        shape = (self.capacity, self.model.q_heads, self.model.head_dim)
        query = as_device("q", q, shape)
        if out is None:
            out = sys.modules["torch"].empty_like(q)
        target = as_device("out", out, shape)
        sums = None if lse is None else byref(as_device("lse", lse, shape[:2]).tensor)
        if window == 0 and not silent and not measure_only:
            call("thinkv_batch_attend", self._handle, layer, byref(query.tensor),
                 byref(target.tensor), sums)
            return out
        options = c.AttendOptions(
            struct_size=ctypes.sizeof(c.AttendOptions),
            window=window,
            sinks=sinks,
            flags=(c.ATTEND_SILENT if silent else 0)
            | (c.ATTEND_MEASURE_ONLY if measure_only else 0),
        )
        call("thinkv_batch_attend_with", self._handle, layer, byref(options),
             byref(query.tensor), byref(target.tensor), sums)
        return out

    def end(self) -> None:
        """Flushes, labels, budget, evictions: on the device."""
        call("thinkv_batch_end", self._handle)

    @contextmanager
    def step(self) -> Iterator[Batch]:
        """One eager step: `with batch.step(): ...` reserves, begins and ends it."""
        self.reserve(1)
        self.begin()
        yield self
        self.end()


def open_batch(model: Model, capacity: int, tokens_max: int, grows: bool) -> Batch:
    options = c.BatchOptions(
        struct_size=ctypes.sizeof(c.BatchOptions),
        capacity=capacity,
        tokens_max=tokens_max,
        flags=c.BATCH_GROWS if grows else 0,
    )
    handle = ctypes.c_void_p()
    model.use_current_stream()
    call("thinkv_batch_open", model._handle, byref(options), byref(handle))
    return Batch(handle.value or 0, model, capacity)
