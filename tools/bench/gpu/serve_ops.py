"""The small kernels of a decoder step that are no matrix product, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm(x, delta, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    here = at < WIDTH
    value = tl.load(x + row + at, mask=here, other=0.0).to(tl.float32)
    value += tl.load(delta + row + at, mask=here, other=0.0).to(tl.float32)
    tl.store(x + row + at, value.to(tl.bfloat16), mask=here)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + 1e-5)
    tl.store(out + row + at, (value * scale).to(tl.bfloat16), mask=here)


def add_norm(x: torch.Tensor, delta: torch.Tensor, out: torch.Tensor) -> None:
    """x += delta; out = rmsnorm(x)."""
    width = x.shape[1]
    _add_norm[(x.shape[0],)](x, delta, out, WIDTH=width, BLOCK=triton.next_power_of_2(width))


@triton.jit
def _split_rope(qkv, positions, q, k, v, Q: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, DIM // 2)
    source = qkv + (row * (Q + 2 * KV) + head) * DIM
    low = tl.load(source + half).to(tl.float32)
    high = tl.load(source + DIM // 2 + half).to(tl.float32)
    if head < Q + KV:
        angle = tl.load(positions + row) * tl.exp2(half.to(tl.float32) * (-37.86 / DIM))
        cos, sin = tl.cos(angle), tl.sin(angle)
        low, high = low * cos - high * sin, high * cos + low * sin
    if head < Q:
        target = q + (row * Q + head) * DIM
    elif head < Q + KV:
        target = k + (row * KV + head - Q) * DIM
    else:
        target = v + (row * KV + head - Q - KV) * DIM
    tl.store(target + half, low.to(tl.bfloat16))
    tl.store(target + DIM // 2 + half, high.to(tl.bfloat16))


def split_rope(qkv: torch.Tensor, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
               v: torch.Tensor) -> None:
    """Rotary embedding (base 500,000) of q and k; q, k, v as dense tensors."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    _split_rope[(q.shape[0], heads + 2 * kv_heads)](qkv, positions, q, k, v, Q=heads, KV=kv_heads,
                                                     DIM=dim, num_warps=1)


@triton.jit
def _silu_mul(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, (gate * tl.sigmoid(gate) * up).to(tl.bfloat16), mask=here)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    width = out.shape[1]
    _silu_mul[(out.shape[0], triton.cdiv(width, 2048))](gate_up, out, WIDTH=width, BLOCK=2048)
