"""The shapes of the kernel benchmark, and which kernels run on which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

# (q heads, kv heads, head_dim)
SHAPES = ((32, 8, 128), (28, 4, 128), (12, 2, 128), (64, 8, 128), (16, 8, 256), (64, 8, 64))
BATCHES = (1, 8, 32, 128, 256)
TOKENS = (512, 1024, 4096, 32768)
HELD_BYTES_MAX = 40 * 10**9
# A case whose bf16 cache alone takes longer than about 2 ms to read leaves the full run's time.
BF16_BYTES_MAX = 9 * 10**9


@dataclass(frozen=True)
class Case:
    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    tokens: int  # slots that a lane holds; of them `live` is live
    live: float = 1.0
    ragged: bool = False

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def bf16_token_bytes(self) -> int:
        return 4 * self.kv_heads * self.head_dim

    def lengths(self) -> list[int]:
        """Slots of each sequence. Ragged: Zipf-like, one long and many short, the same sum."""
        if not self.ragged:
            return [self.tokens] * self.batch
        weights = [1.0 / (1 + i) ** 0.7 for i in range(self.batch)]
        unit = self.tokens * self.batch / sum(weights)
        lengths = [max(1, int(w * unit)) for w in weights]
        lengths[0] += self.tokens * self.batch - sum(lengths)
        # A fixed stride spreads the long ones over the batch.
        return [lengths[i * 37 % self.batch] if self.batch % 37 else lengths[i]
                for i in range(self.batch)]

    def slots(self) -> int:
        return self.batch * self.tokens

    def bf16_bytes(self) -> int:
        return self.slots() * self.bf16_token_bytes

    def label(self) -> str:
        text = f"{self.q_heads}/{self.kv_heads}/{self.head_dim} {self.batch} x {self.tokens}"
        if self.live < 1.0:
            text += f" {self.live:.0%} live"
        return text + (" ragged" if self.ragged else "")


OURS = ("k4v4", "k4v2", "k2v2", "bf16")
OURS_MORE = ("k8v4", "k8v8", "nvfp4", "ternary", "mixed")
PEERS = ("sdpa-flash", "sdpa-cudnn", "triton-paged", "flashinfer-bf16", "flashinfer-bf16-tc",
         "flashinfer-fp8", "flashinfer-fp8-tc")
PEERS_MORE = ("sdpa-efficient", "flex-live", "dequant-sdpa", "gather-sdpa")
PADDED = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "dequant-sdpa", "flex-live",
          "gather-sdpa")
# Each takes FlashInfer minutes of nvcc for every head_dim.
COSTLY = ("flashinfer-bf16-tc", "flashinfer-fp8", "flashinfer-fp8-tc")
MAIN = (32, 8, 128)


def is_anchor(case: Case) -> bool:
    """Cases on which every kernel runs."""
    shape = (case.q_heads, case.kv_heads, case.head_dim)
    return shape == MAIN and (case.batch, case.tokens) in ((128, 4096), (32, 1024))


def kernels_of(case: Case, quick: bool) -> list[str]:
    """Names of the kernels of one case. Peers that cannot skip dead slots read them all, so only
    those that can are shown where slots are dead or lengths differ."""
    names = [f"thinkv-{mix}" for mix in OURS]
    if is_anchor(case):
        names += [f"thinkv-{mix}" for mix in OURS_MORE] + ["thinkv-k4v4-emit"]
    if case.live < 1.0:
        return names + (["flex-live", "gather-sdpa"] if is_anchor(case) else ["gather-sdpa"])
    peers = PEERS + (PEERS_MORE if is_anchor(case) else ())
    if quick and not is_anchor(case):
        peers = ("sdpa-flash", "triton-paged", "flashinfer-bf16-tc", "flashinfer-fp8-tc")
    if case.ragged:
        peers = tuple(p for p in peers if p not in PADDED)
    if case.head_dim != MAIN[2]:
        peers = tuple(p for p in peers if p not in COSTLY)
    return names + list(peers)


def quick_cases() -> list[Case]:
    cases = [Case(*MAIN, b, t) for b, t in
             ((128, 4096), (32, 4096), (256, 1024), (32, 1024), (8, 1024), (1, 32768))]
    cases += [Case(*shape, 128, 4096) for shape in SHAPES if shape != MAIN]
    cases += [Case(*shape, 32, 1024) for shape in SHAPES if shape != MAIN]
    cases += [Case(*MAIN, 128, 4096, live=0.5),
              Case(*MAIN, 32, 1024, live=0.5), Case(*MAIN, 128, 4096, ragged=True)]
    return cases


def full_cases() -> Iterator[Case]:
    """Every shape of the issue whose tensors fit; dead slots and ragged lengths on the middle."""
    for shape in SHAPES:
        for batch in BATCHES:
            for tokens in TOKENS:
                case = Case(*shape, batch, tokens)
                if case.bf16_bytes() <= BF16_BYTES_MAX:
                    yield case
        for live in (0.75, 0.5):
            yield Case(*shape, 128, 4096, live=live)
            yield Case(*shape, 32, 1024, live=live)
        yield Case(*shape, 128, 4096, ragged=True)
        yield Case(*shape, 32, 1024, ragged=True)


def cases(quick: bool) -> list[Case]:
    return quick_cases() if quick else list(full_cases())
