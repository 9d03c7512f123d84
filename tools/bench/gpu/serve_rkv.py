"""R-KV at a budget: every 128 tokens the cache is scored and gathered into its first slots.

As Zefan-Cai/R-KV does it (window 8, max-pool 7, threshold 0.5, lambda 0.07), but faster: its
[n, n] cosine matrix is never written. The matrix is symmetric, so the mean over rows is a row sum
less what the rows forgive, and both come from one pass of tensor-core products (_redundancy).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from .serve_model import Shape
from .timing import capture, replay

WINDOW = 8
BUFFER = 128
POOL = 7
LAMBDA = 0.07
THRESHOLD = 0.5


@triton.jit
def _redundancy(keys, row_sum, forgiven, forgiven_value, N: tl.constexpr, D: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr):
    """Of unit keys [lanes, N, D]: for each row the sum of its cosines without itself, and the last
    column above the threshold (column 0 where none is) with its cosine."""
    lane, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    row, dims = at + tl.arange(0, ROWS), tl.arange(0, D)
    base = keys + lane * N * D
    mine = tl.load(base + row[:, None] * D + dims[None, :])
    total = tl.zeros([ROWS], tl.float32)
    last = tl.full([ROWS], -1, tl.int32)
    value = tl.zeros([ROWS], tl.float32)
    first = tl.zeros([ROWS], tl.float32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        other = tl.load(base + column[None, :] * D + dims[:, None])
        cosine = tl.where(row[:, None] == column[None, :], 0.0, tl.dot(mine, other))
        total += tl.sum(cosine, 1)
        near = tl.max(tl.where(cosine > THRESHOLD, column[None, :], -1), 1)
        there = tl.sum(tl.where(column[None, :] == near[:, None], cosine, 0.0), 1)
        value = tl.where(near >= 0, there, value)
        last = tl.where(near >= 0, near, last)
        first += tl.sum(tl.where(column[None, :] == 0, cosine, 0.0), 1)
    out = lane * N + row
    tl.store(row_sum + out, total)
    tl.store(forgiven + out, tl.maximum(last, 0).to(tl.int64))
    tl.store(forgiven_value + out, tl.where(last >= 0, value, first))


def redundancy(k: torch.Tensor) -> torch.Tensor:
    """k: [batch, heads, n, D], n a multiple of 128. Result: [batch, heads, n], softmax over n."""
    batch, heads, n, dim = k.shape
    unit = F.normalize(k, dim=-1).contiguous()
    sums, values = (torch.empty(batch, heads, n, device=k.device) for _ in range(2))
    index = torch.empty(batch, heads, n, device=k.device, dtype=torch.int64)
    _redundancy[(n // 128, batch * heads)](unit, sums, index, values, N=n, D=dim, ROWS=128,
                                           BLOCK=64, THRESHOLD=THRESHOLD, num_warps=8)
    mean = sums.scatter_add(2, index, -values) / n
    return mean.softmax(-1)


def importance(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q: [batch, heads, group, WINDOW, D]. Result: [batch, heads, n - WINDOW]."""
    batch, heads, group, window, dim = q.shape
    logits = q.reshape(batch, heads, group * window, dim) @ k.transpose(2, 3)
    highest = logits.view(batch, heads, group, window, -1).amax(2).float() * dim ** -0.5
    mean = highest[..., :-WINDOW].softmax(-1).mean(2)
    return F.max_pool1d(mean, POOL, stride=1, padding=POOL // 2)


def keep(q: torch.Tensor, k: torch.Tensor, budget: int) -> torch.Tensor:
    """Indices [batch, heads, budget - WINDOW] of what stays besides the window."""
    score = (LAMBDA * importance(q, k)
             - (1 - LAMBDA) * redundancy(k)[..., :-WINDOW])
    return score.topk(budget - WINDOW, dim=-1, sorted=False).indices


class RkvCache:
    def __init__(self, shape: Shape, cap_bytes: int, budget: int) -> None:
        self.shape, self.budget, self.slots = shape, budget, budget + BUFFER
        self.batch = self.batch_that_fits(shape, cap_bytes, self.slots)
        size = (shape.layers, self.batch, shape.kv_heads, self.slots, shape.head_dim)
        self.k, self.v = (torch.empty(size, device="cuda", dtype=torch.bfloat16)
                          for _ in range(2))
        for layer in range(shape.layers):
            self.k[layer].normal_()
            self.v[layer].normal_()
        # Mean of a period: between budget + 1 and budget + BUFFER tokens.
        self.length = budget + BUFFER // 2
        self.queries = torch.randn(shape.layers, self.batch, shape.kv_heads,
                                   shape.q_heads // shape.kv_heads, WINDOW, shape.head_dim,
                                   device="cuda", dtype=torch.bfloat16)
        self.positions = torch.randint(0, 32768, (self.batch,), dtype=torch.int32, device="cuda")
        self.kv_bytes = self.batch * self.length * shape.token_bytes
        self.bytes_held = self.k.nbytes + self.v.nbytes + self.queries.nbytes
        self.backend = SDPBackend.FLASH_ATTENTION
        self.attention = self._fastest()

    @staticmethod
    def batch_that_fits(shape: Shape, cap_bytes: int, slots: int) -> int:
        """One layer's unit keys and gathered rows are working memory of a compaction."""
        layer = slots * shape.token_bytes // shape.layers
        each = slots * shape.token_bytes + 3 * layer // 2
        each += shape.layers * WINDOW * 2 * shape.q_heads * shape.head_dim
        batch = (cap_bytes - shape.weight_bytes) // each
        while batch and (shape.weight_bytes + shape.activation_bytes(batch) + batch * each
                         > cap_bytes):
            batch -= 1
        return batch

    def _fastest(self) -> str:
        shape, times = self.shape, {}
        q = torch.randn(self.batch, shape.q_heads, shape.head_dim, device="cuda",
                        dtype=torch.bfloat16)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            self.backend = backend
            try:
                timed = capture([partial(self.attend, i, q) for i in range(4)])
            except RuntimeError:
                continue
            replay(timed, 2, 5)
            times[backend] = timed.summary()[0]
        self.backend = min(times, key=lambda backend: times[backend])
        text = ", ".join(f"{backend.name} {us:.0f} us" for backend, us in times.items())
        return f"sdpa {self.backend.name} (a layer: {text})"

    def begin(self) -> None:
        pass

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k[layer, :, :, self.length - 1] = k
        self.v[layer, :, :, self.length - 1] = v

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        self.queries[layer, :, :, :, 0] = q.view(self.batch, self.shape.kv_heads, -1,
                                                 self.shape.head_dim)
        k, v = self.k[layer, :, :, :self.length], self.v[layer, :, :, :self.length]
        with sdpa_kernel([self.backend]):
            return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)

    def end(self) -> None:
        pass

    def compact(self, layer: int) -> None:
        """All sequences at once, which is the cheapest way to do it."""
        k, v = self.k[layer], self.v[layer]
        kept = keep(self.queries[layer], k, self.budget).unsqueeze(-1)
        index = kept.expand(-1, -1, -1, self.shape.head_dim)
        for cache in (k, v):
            gathered = cache.gather(2, index)
            newest = cache[:, :, -WINDOW:].clone()
            cache[:, :, :self.budget - WINDOW] = gathered
            cache[:, :, self.budget - WINDOW:self.budget] = newest

    def compaction_ms(self) -> float:
        """Of all layers, once; a step bears a share of 1 / BUFFER."""
        timed = capture([partial(self.compact, i) for i in range(self.shape.layers)],
                        minimum=self.shape.layers)
        replay(timed, 1, 5)
        return timed.summary()[0] * timed.launches * 1e-3

    def close(self) -> None:
        del self.k, self.v, self.queries
