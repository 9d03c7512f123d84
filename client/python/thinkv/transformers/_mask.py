"""Masks that are made only where someone reads them.

A decode step over the pool needs no mask: padding was never written there, and a window is the
kernel's. But transformers asks for masks before it knows who attends, so what it gets is an empty
tensor that remembers how to make the mask: for prompts, and for layers with another cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_ATTRIBUTE = "_thinkv_mask"


class _Recipe:
    def __init__(self, make: Callable[[], torch.Tensor | None], padding: torch.Tensor | None):
        self.make = make
        # [batch, tokens so far], true where there is a token; None: everywhere.
        self.padding = padding
        self.made: torch.Tensor | None = None
        self.is_made = False


def deferred_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What AttentionMaskInterface calls under "thinkv"; late 4.x and 5.x differ in the arguments,
    all of which go on to the mask of "sdpa"."""

    def make() -> torch.Tensor | None:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    padding = kwargs.get("attention_mask")
    device = padding.device if padding is not None else kwargs.get("device")
    if device is None and (position := kwargs.get("cache_position")) is not None:
        device = position.device
    marker = torch.empty(0, dtype=torch.bool, device=device)
    setattr(marker, _ATTRIBUTE, _Recipe(make, padding))
    return marker


def real_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask that a layer was given: as it is, or made now and kept for the next layer."""
    recipe = getattr(mask, _ATTRIBUTE, None)
    if recipe is None:
        return mask
    if not recipe.is_made:
        recipe.made = recipe.make()
        recipe.is_made = True
    return recipe.made


def padding_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[batch, tokens], true where there is a token; None: everywhere.
    A mask of the caller's own, [batch, 1, queries, keys], is read by what its last query sees."""
    recipe = getattr(mask, _ATTRIBUTE, None)
    if recipe is not None:
        return None if recipe.padding is None else recipe.padding.bool()
    if mask is None:
        return None
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2


def left_padding(mask: torch.Tensor | None, batch: int, length: int) -> list[int]:
    """Tokens of padding before each row. Reads the mask on the host: prompts only."""
    padding = padding_of(mask)
    if padding is None:
        return [0] * batch
    padding = padding[:, :length].to(torch.int64)
    if padding.shape[-1] < length:
        raise ValueError(f"the attention mask covers {padding.shape[-1]} of {length} tokens")
    tokens = padding.sum(-1)
    # All tokens of a row are at its end, or some are followed by padding.
    at_end = (padding.flip(-1).cumprod(-1).sum(-1) == tokens).all()
    counts = torch.cat([tokens, at_end[None].to(torch.int64)]).tolist()
    if not counts.pop():
        raise ValueError(
            "the attention mask has padding after or between tokens: use padding_side='left'"
        )
    counts = counts if len(counts) == batch else counts * batch  # a mask for all rows
    return [length - count for count in counts]
