"""Page formats as include/thinkv/internal/page_format.h lays them out: slots and bytes.

The library that is measured counts its own bytes (lanes.cu); this is what the tables and the
roofline need where no GPU is, and a test compares the two sources' constants.
"""

from __future__ import annotations

from dataclasses import dataclass

SCALE_GROUP = 16  # values under one e4m3 scale
SLOTS_MAX = 64
POSITION_BYTES = 4


@dataclass(frozen=True)
class Format:
    name: str
    number: int
    k_bits: int
    v_bits: int
    group_scaled: bool = False

    def scale_bytes(self, bits: int, head_dim: int) -> int:
        if bits == 16:
            return 0
        return head_dim // SCALE_GROUP if self.group_scaled else 2

    def slot_payload(self, head_dim: int) -> int:
        """Codes and scales of one token of one kv head: what live bytes count."""
        codes = head_dim * (self.k_bits + self.v_bits) // 8
        return codes + sum(self.scale_bytes(b, head_dim) for b in (self.k_bits, self.v_bits))

    def slots(self, head_dim: int) -> int:
        """Tokens of one page: the largest even number that fits."""
        for slots in range(SLOTS_MAX, 0, -2):
            if self._bytes_used(head_dim, slots) <= page_bytes(head_dim):
                return slots
        raise ValueError(f"{self.name}: no slot fits a page of head_dim {head_dim}")

    def _bytes_used(self, head_dim: int, slots: int) -> int:
        used = sum(_code_bytes(bits, slots, head_dim, is_k)
                   for bits, is_k in ((self.k_bits, True), (self.v_bits, False)))
        for bits in (self.k_bits, self.v_bits):
            used += slots * self.scale_bytes(bits, head_dim)
        return (used + 3) // 4 * 4 + slots * POSITION_BYTES


def page_bytes(head_dim: int) -> int:
    return 36 * head_dim


def _code_bytes(bits: int, slots: int, head_dim: int, is_k: bool) -> int:
    """Codes of one side of a page; the last tile is cut to whole words."""
    word_slots = (1 if is_k else 2) if bits == 16 else (2 if is_k else 4)
    wide = 128 // (bits * word_slots) * (4 if is_k else 8)
    block = min(wide, head_dim)
    word_bytes = 16 * block // wide
    tile_slots = 8 if bits == 16 else 16

    def tile(rows_of: int) -> int:
        rows = -(-rows_of // word_slots)
        return head_dim // block * rows * (4 if is_k else 8) * word_bytes

    tiles = -(-slots // tile_slots)
    last = slots - (tiles - 1) * tile_slots
    return (tiles - 1) * tile(tile_slots) + tile(last)


FORMATS = {f.name: f for f in (
    Format("bf16", 2, 16, 16),
    Format("k8v8", 3, 8, 8),
    Format("k8v4", 4, 8, 4),
    Format("k4v4", 5, 4, 4),
    Format("k4v2", 6, 4, 2),
    Format("k2v2", 7, 2, 2),
    Format("nvfp4", 8, 4, 4, group_scaled=True),
    Format("ternary", 9, 2, 2, group_scaled=True),
)}

# Shares by tokens of each kernel of ours.
MIXES: dict[str, dict[str, float]] = {name: {name: 1.0} for name in FORMATS}
MIXES["mixed"] = {"k4v4": 0.6, "k4v2": 0.3, "bf16": 0.1}


def mix_tokens(mix: str, tokens: int) -> dict[str, int]:
    """Tokens of a lane by format: shares rounded down, the first format takes what is left."""
    shares = MIXES[mix]
    counts = {name: int(tokens * share) for name, share in shares.items()}
    counts[next(iter(shares))] += tokens - sum(counts.values())
    return counts


def lane_bytes(mix: str, head_dim: int, tokens: int) -> tuple[int, int]:
    """Result: (payload of the slots, bytes of the pages that hold them) of one lane."""
    payload = pages = 0
    for name, count in mix_tokens(mix, tokens).items():
        form = FORMATS[name]
        payload += count * form.slot_payload(head_dim)
        pages += -(-count // form.slots(head_dim))
    return payload, pages * page_bytes(head_dim)
