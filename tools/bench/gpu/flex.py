"""flex_attention with a block mask over live bits: a peer that knows dead slots."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .cases import Case
from .store import Store
from .timing import Launch

_compiled = torch.compile(flex_attention, dynamic=False)


def flex_live(case: Case, store: Store) -> list[Launch]:
    bits = store.live_bits()

    def live(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        del h, q
        return bits[b, kv]

    mask = create_block_mask(live, case.batch, None, 1, case.tokens, device="cuda")
    query = store.q.view(case.batch, case.q_heads, 1, case.head_dim)
    k, v = store.contiguous()
    return [partial(_compiled, query, k[i], v[i], block_mask=mask, enable_gqa=True)
            for i in range(store.copies)]
