"""Peers of torch alone: SDPA by backend, and what must be done before SDPA can run."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case
from .store import Store
from .timing import Launch

BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Attention = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _sdpa(backend: SDPBackend, case: Case, q: torch.Tensor, folded: bool) -> Attention:
    """folded: the query heads of a group as rows of one head, for backends without GQA. One query
    token sees every key, so the result is the same."""
    if folded:
        query = q.view(case.batch, case.kv_heads, case.group, case.head_dim)
    else:
        query = q.view(case.batch, case.q_heads, 1, case.head_dim)

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(query, k, v, enable_gqa=not folded)

    return attend


def best_sdpa(name: str, case: Case, store: Store) -> Attention:
    """With enable_gqa where the backend takes it, else folded."""
    k, v = store.contiguous()
    error: RuntimeError | None = None
    for folded in (False, True):
        attend = _sdpa(BACKENDS[name], case, store.q, folded)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # why a backend does not fit
                attend(k[0], v[0])
        except RuntimeError as reason:
            error = reason
            continue
        if folded:
            store.notes[name] = "takes no enable_gqa: query heads of a group as rows of one head"
        return attend
    raise RuntimeError(f"{name}: {str(error).splitlines()[0]}")


def sdpa(name: str, case: Case, store: Store) -> list[Launch]:
    attend = best_sdpa(name, case, store)
    k, v = store.contiguous()
    return [partial(attend, k[i], v[i]) for i in range(store.copies)]


def gather_sdpa(case: Case, store: Store) -> list[Launch]:
    """The live rows of the paged cache into contiguous tensors, then SDPA: what an engine does
    whose kernel knows neither pages nor dead slots."""
    attend = best_sdpa("sdpa-flash", case, store)
    k, v, rows = store.live_rows()
    live = rows.numel() // case.batch
    shape = (case.batch, live, case.kv_heads, case.head_dim)

    def launch(i: int) -> torch.Tensor:
        dense = [x[i].index_select(0, rows).view(shape).transpose(1, 2) for x in (k, v)]
        return attend(dense[0], dense[1])

    return [partial(launch, i) for i in range(store.copies)]
