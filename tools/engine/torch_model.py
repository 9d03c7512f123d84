"""SmolLM2 from its GGUF as a transformers model, and the model of the quickstart on a GPU.

TorchModel and TorchCache have the calls of model.Model and caches.PoolCache, so that generate() and
compare() are the same code on either backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import thinkv
from thinkv.transformers import ThinkvCache

from .gguf_weights import Config, ModelFile, Weights


def llama_of(weights: Weights, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A LlamaForCausalLM with these weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = weights.config
    config = LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.ffn_width,
        num_hidden_layers=c.layers, num_attention_heads=c.q_heads, num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim, rms_norm_eps=c.norm_eps, max_position_embeddings=c.context,
        rope_theta=c.rope_base, tie_word_embeddings=True, attention_bias=False, bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    )
    # 5.x keeps the rotary base in a dictionary.
    if isinstance(getattr(config, "rope_parameters", None), dict):
        config.rope_parameters["rope_theta"] = c.rope_base
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    model.load_state_dict(_state(weights), strict=False)
    model.tie_weights()
    _make_rotary(model, config)
    return model.to(device=device, dtype=dtype).eval()


def _make_rotary(model: torch.nn.Module, config: Any) -> None:
    """Its buffers are computed, not loaded."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)


def _state(weights: Weights) -> dict[str, torch.Tensor]:
    c = weights.config
    q_rows, kv_rows = c.q_heads * c.head_dim, c.kv_heads * c.head_dim
    state = {"model.embed_tokens.weight": weights.embedding,
             "model.norm.weight": weights.output_norm, "lm_head.weight": weights.output}
    for i, layer in enumerate(weights.layers):
        at = f"model.layers.{i}."
        q, k, v = np.split(layer.qkv, [q_rows, q_rows + kv_rows])
        gate, up = np.split(layer.gate_up, 2)
        state |= {
            at + "input_layernorm.weight": layer.attn_norm,
            at + "self_attn.q_proj.weight": _halves(q, c),
            at + "self_attn.k_proj.weight": _halves(k, c),
            at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": layer.attn_out,
            at + "post_attention_layernorm.weight": layer.ffn_norm,
            at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up,
            at + "mlp.down_proj.weight": layer.down,
        }
    return {name: torch.tensor(array) for name, array in state.items()}


def _halves(matrix: np.ndarray, c: Config) -> np.ndarray:
    """GGUF turns neighbouring numbers of a head together, transformers one of each half."""
    heads = matrix.reshape(-1, c.head_dim // 2, 2, matrix.shape[-1])
    return heads.transpose(0, 2, 1, 3).reshape(matrix.shape)


class TorchModel:
    """As model.Model, on the GPU."""

    def __init__(self, file: ModelFile, device: str = "cuda") -> None:
        self.config = file.config()
        self.device = device
        self.torch_model = llama_of(file.weights(), torch.bfloat16, device)
        self.torch_model.set_attn_implementation("thinkv")

    @torch.no_grad()
    def prefill(self, tokens: list[int], cache: TorchCache) -> np.ndarray:
        return self._run(tokens, cache)

    @torch.no_grad()
    def step(self, token: int, cache: TorchCache) -> np.ndarray:
        return self._run([token], cache)

    def _run(self, tokens: list[int], cache: TorchCache) -> np.ndarray:
        ids = torch.tensor([tokens], device=self.device)
        out = self.torch_model(input_ids=ids, past_key_values=cache.cache, use_cache=True,
                               logits_to_keep=1)
        return out.logits[0, -1].float().cpu().numpy()

    @torch.no_grad()
    def hidden_states(self, tokens: list[int]) -> np.ndarray:
        ids = torch.tensor([tokens], device=self.device)
        return self.torch_model.model(input_ids=ids, use_cache=False)[0][0].float().cpu().numpy()

    @torch.no_grad()
    def log_probs(self, hidden: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(hidden).to(self.device, self.torch_model.dtype)
        logits = self.torch_model.lm_head(rows).float()
        return torch.log_softmax(logits, -1).cpu().numpy()


class TorchCache:
    """As caches.PoolCache: one sequence in the pool."""

    def __init__(self, model: TorchModel, client: thinkv.Client, policy: str,
                 budget: int | None) -> None:
        self.cache = ThinkvCache(model.torch_model, policy, budget, client=client)

    def __enter__(self) -> TorchCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cache.close()

    def stats(self) -> dict[str, Any]:
        return self.cache.stats()[0]
