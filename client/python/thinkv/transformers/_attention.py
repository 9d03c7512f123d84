"""The attention function that transformers calls under the name "thinkv"."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ._exact import exact_attention, with_sinks
from ._mask import real_mask

_CARRIER = "_thinkv_carrier"


def carry(key: torch.Tensor, rows: Any, layer: int) -> torch.Tensor:
    """Marks fresh keys on their way from the cache to the attention function."""
    setattr(key, _CARRIER, (rows, layer))
    return key


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query: [batch, q_heads, tokens, head_dim]; result: [batch, tokens, q_heads, head_dim]."""
    carrier = getattr(key, _CARRIER, None)
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} caps or biases its attention scores, which the pool's kernel "
            "does not do: use another attention implementation for this model"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = kwargs.get("s_aux")
    if carrier is None:  # training, another cache, an encoder
        mask = real_mask(attention_mask)
        return fresh_attention(module, query, key, value, mask, scale, sinks, dropout, kwargs), None
    rows, layer = carrier
    window = kwargs.get("sliding_window") or 0
    return rows.attend(layer, module, query, key, value, attention_mask, scale, window, sinks), None


def fresh_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None,
    dropout: float = 0.0,
    extra: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Exact attention over tensors. mask None: causal."""
    if sinks is None:
        known = {k: v for k, v in (extra or {}).items() if k == "is_causal"}
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scale, **known
        )[0]
    if dropout:
        raise NotImplementedError("dropout with learned sinks is not supported")
    out, lse = exact_attention(query, key, value, scale, mask)
    out = with_sinks(out.transpose(1, 2), lse.transpose(1, 2), sinks)
    return out.to(query.dtype).contiguous()
