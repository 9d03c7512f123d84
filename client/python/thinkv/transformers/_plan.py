"""What a model's layers need of a pool: groups of layers with one shape and one window.

A model of the pool has one shape, and a batch one policy; sliding layers must keep their window and
no more. So each group of like layers becomes a model of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

FULL, SLIDING = "full_attention", "sliding_attention"
# Layers with a state of their own, which stays with transformers.
STATEFUL = ("conv", "linear_attention", "moe", "mlp")


@dataclass(frozen=True)
class Shape:
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int  # 0: none


@dataclass
class Group:
    shape: Shape
    layers: list[int] = field(default_factory=list)  # of the model, ascending

    def index(self, layer: int) -> int:
        """A layer's number in the pool's model."""
        return self.layers.index(layer)


@dataclass
class Plan:
    layer_types: list[str]
    groups: list[Group]
    dtype: torch.dtype
    config: Any

    def group_of(self, layer: int) -> Group:
        return next(group for group in self.groups if layer in group.layers)


def plan_of(model: torch.nn.Module) -> Plan:
    """Reads the model's configuration and its attention modules. Raises NotImplementedError for
    layers that the pool cannot hold."""
    config = model.config.get_text_config(decoder=True)
    types = _layer_types(config)
    modules = _attention_modules(model, len(types))
    groups: dict[Shape, Group] = {}
    for layer, kind in enumerate(types):
        if kind in STATEFUL:
            continue
        shape = _shape(config, modules.get(layer), kind == SLIDING)
        groups.setdefault(shape, Group(shape)).layers.append(layer)
    if not groups:
        raise NotImplementedError(f"{type(model).__name__} has no attention layer")
    dtype = next(model.parameters()).dtype
    return Plan(types, list(groups.values()), dtype, config)


def _layer_types(config: Any) -> list[str]:
    types = getattr(config, "layer_types", None)
    if types is None:
        sliding = getattr(config, "sliding_window", None) is not None
        if getattr(config, "use_sliding_window", True) is False:
            sliding = False
        kind = SLIDING if sliding else FULL
        if getattr(config, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        types = [kind] * config.num_hidden_layers
    unknown = sorted(set(types) - {FULL, SLIDING, *STATEFUL})
    if unknown:
        raise NotImplementedError(
            f"layers of type {', '.join(unknown)} cannot lie in the pool; full_attention and "
            "sliding_attention can"
        )
    if getattr(config, "num_kv_shared_layers", None):
        raise NotImplementedError("layers that read another layer's cache are not supported")
    return list(types)


def _attention_modules(model: torch.nn.Module, layers: int) -> dict[int, torch.nn.Module]:
    """By layer: the decoder's modules that say how many query heads share a kv head."""
    found: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if hasattr(module, "num_key_value_groups") and isinstance(layer, int) and layer < layers:
            found.setdefault(layer, module)
    return found


def _shape(config: Any, module: torch.nn.Module | None, sliding: bool) -> Shape:
    q_heads = config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // q_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or q_heads
    groups = getattr(module, "num_key_value_groups", None)
    if groups:
        kv_heads = q_heads // groups
    scale = getattr(module, "scaling", None) or head_dim**-0.5
    if head_dim not in (64, 128, 256):
        raise NotImplementedError(f"head_dim is {head_dim}; the pool has 64, 128 and 256")
    if q_heads > 16 * kv_heads:
        raise NotImplementedError(f"{q_heads} query heads on {kv_heads} kv heads, at most 16 each")
    window = int(config.sliding_window) if sliding else 0
    return Shape(q_heads, kv_heads, head_dim, float(scale), window)
