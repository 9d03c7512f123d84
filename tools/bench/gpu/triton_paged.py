"""A split-KV decode kernel over pages in Triton, and dequantisation for the dequant-sdpa peer.

What an engine without CUDA sources would write: query heads padded to 16 for tl.dot, online
softmax, splits merged by a second kernel. Tile, stages and splits are tuned for each case.
"""

from __future__ import annotations

import itertools
import time
from functools import partial

import torch
import triton
import triton.language as tl

from .cases import Case
from .peers import best_sdpa
from .store import PAGE, Store
from .timing import Launch, rotation


@triton.jit
def _attend(q, k, v, table, lengths, part, lse, scale, table_stride, splits,
            GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
            PAGE: tl.constexpr, BLOCK: tl.constexpr):
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, dims = tl.arange(0, 16), tl.arange(0, HEAD_DIM)
    q_row = (row * KV_HEADS + head) * GROUP
    used = heads < GROUP
    query = tl.load(q + (q_row + heads)[:, None] * HEAD_DIM + dims[None, :],
                    mask=used[:, None], other=0.0)
    length = tl.load(lengths + row)
    each = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    first = split * each
    end = tl.minimum(first + each, length)
    top = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    sums = tl.zeros([16, HEAD_DIM], tl.float32)
    for at in range(first, end, BLOCK):
        token = at + tl.arange(0, BLOCK)
        here = token < end
        page = tl.load(table + row * table_stride + token // PAGE, mask=here, other=0)
        base = ((page.to(tl.int64) * PAGE + token % PAGE) * KV_HEADS + head) * HEAD_DIM
        keys = tl.load(k + base[None, :] + dims[:, None], mask=here[None, :], other=0.0)
        scores = tl.where(here[None, :], tl.dot(query, keys) * scale, -1e30)
        highest = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        fade = tl.exp2(top - highest)
        values = tl.load(v + base[:, None] + dims[None, :], mask=here[:, None], other=0.0)
        sums = sums * fade[:, None] + tl.dot(weights.to(tl.bfloat16), values)
        total = total * fade + tl.sum(weights, 1)
        top = highest
    out = (q_row + heads) * splits + split
    tl.store(part + out[:, None] * HEAD_DIM + dims[None, :],
             sums / tl.maximum(total, 1e-30)[:, None], mask=used[:, None])
    tl.store(lse + out, top + tl.log2(tl.maximum(total, 1e-30)), mask=used)


@triton.jit
def _merge(part, lse, out, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    logs = tl.load(lse + row * SPLITS + splits)
    weights = tl.exp2(logs - tl.max(logs, 0))
    values = tl.load(part + (row * SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :])
    merged = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * HEAD_DIM + dims, merged.to(tl.bfloat16))


class PagedDecode:
    """Launches for one batch; `splits` is a power of two."""

    def __init__(self, case: Case, table: torch.Tensor, lengths: torch.Tensor,
                 config: tuple[int, int, int]) -> None:
        self.case, self.table, self.lengths = case, table, lengths
        self.block, self.stages, self.splits = config
        rows = case.batch * case.q_heads
        self.part = torch.empty(rows, self.splits, case.head_dim, device="cuda")
        self.lse = torch.empty(rows, self.splits, device="cuda")
        self.out = torch.empty(case.batch, case.q_heads, case.head_dim, device="cuda",
                               dtype=torch.bfloat16)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        case = self.case
        scale = case.head_dim ** -0.5 * 1.4426950408889634
        _attend[(case.batch, case.kv_heads, self.splits)](
            q, k, v, self.table, self.lengths, self.part, self.lse, scale,
            self.table.stride(0), self.splits, GROUP=case.group, KV_HEADS=case.kv_heads,
            HEAD_DIM=case.head_dim, PAGE=PAGE, BLOCK=self.block, num_warps=4,
            num_stages=self.stages)
        _merge[(case.batch * case.q_heads,)](self.part, self.lse, self.out,
                                             HEAD_DIM=case.head_dim, SPLITS=self.splits,
                                             num_warps=4)
        return self.out


def candidates(case: Case, longest: int) -> list[tuple[int, int, int]]:
    """(block, stages, splits): from one wave of CTAs to many, which ragged lengths need."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    lanes = case.batch * case.kv_heads
    splits = {1 << max(0, (fill * processors // lanes).bit_length() - 1) for fill in (1, 4, 16, 64)}
    fitting = sorted({min(s, 1 << max(0, (longest // 64).bit_length() - 1), 128) for s in splits})
    tiles = ((64, 3), (32, 4)) if case.head_dim < 256 else ((32, 3), (32, 2))
    return [(block, stages, s) for (block, stages), s in itertools.product(tiles, fitting)]


def _probe(decode: PagedDecode, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    decode(q, k[0], v[0])
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for i in range(8):
        decode(q, k[i % len(k)], v[i % len(v)])
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def tuned(case: Case, q: torch.Tensor, table: torch.Tensor, lengths: list[int],
          caches: tuple[torch.Tensor, torch.Tensor]) -> PagedDecode:
    """The fastest configuration on K and V of [copies, pages, PAGE, kv heads, head_dim]."""
    on_device = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    decodes = [PagedDecode(case, table, on_device, config)
               for config in candidates(case, max(lengths))]
    return min(decodes, key=lambda decode: _probe(decode, q, *caches))


def triton_paged(case: Case, store: Store) -> list[Launch]:
    k, v = store.paged()
    decode = tuned(case, store.q, store.table(), store.lengths, (k, v))
    return [partial(decode, store.q, k[i], v[i]) for i in range(store.copies)]


@triton.jit
def _dequantise(codes, scales, out, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = tl.arange(0, HEAD_DIM // 2)
    packed = tl.load(codes + row[:, None] * (HEAD_DIM // 2) + byte[None, :])
    scale = tl.load(scales + row).to(tl.float32)[:, None]
    low = ((packed & 15).to(tl.float32) - 7.5) * scale
    high = ((packed >> 4).to(tl.float32) - 7.5) * scale
    dim = tl.arange(0, HEAD_DIM)
    tl.store(out + row[:, None] * HEAD_DIM + dim[None, :],
             tl.interleave(low, high).to(tl.bfloat16))


def dequantise_sdpa(case: Case, store: Store) -> list[Launch]:
    """4-bit codes with a scale a vector, to bf16 in memory, then SDPA on that."""
    attend = best_sdpa("sdpa-flash", case, store)
    rows = case.batch * case.kv_heads * case.tokens
    copies = rotation(rows * (case.head_dim + 4))
    shape = (case.batch, case.kv_heads, case.tokens, case.head_dim)
    dense = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    sides = [[(torch.randint(0, 256, (rows, case.head_dim // 2), device="cuda",
                             dtype=torch.uint8),
               torch.rand(rows, device="cuda", dtype=torch.float16))
              for _ in range(2)] for _ in range(copies)]

    def launch(i: int) -> torch.Tensor:
        for (codes, scales), out in zip(sides[i], dense):
            _dequantise[(rows // 16,)](codes, scales, out, HEAD_DIM=case.head_dim, ROWS=16,
                                       num_warps=4)
        return attend(dense[0], dense[1])

    return [partial(launch, i) for i in range(copies)]
