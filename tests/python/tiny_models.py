"""Small random-weight decoders of the families that the pool must serve, and their inputs."""

import torch

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt_oss")
VOCABULARY = 160
WINDOW = 24
_COMMON = dict(vocab_size=VOCABULARY, hidden_size=96, intermediate_size=128, num_hidden_layers=2,
               num_attention_heads=4, num_key_value_heads=2, head_dim=64, bos_token_id=1,
               eos_token_id=None, pad_token_id=0, max_position_embeddings=4096)
_SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW)


def tiny_config(family):
    import transformers as t

    if family == "gemma3":
        return t.Gemma3TextConfig(**{**_COMMON, "head_dim": 256, **_SLIDING,
                                     "query_pre_attn_scalar": 256})
    if family == "gpt_oss":
        # Every expert for every token: a choice among random ones flips at the last bit.
        return t.GptOssConfig(**_COMMON, **_SLIDING, num_local_experts=4, num_experts_per_tok=4)
    if family == "mistral":
        return t.MistralConfig(**_COMMON, sliding_window=WINDOW)
    kind = {"llama": t.LlamaConfig, "qwen2": t.Qwen2Config, "qwen3": t.Qwen3Config}[family]
    return kind(**_COMMON)


def tiny_model(family, dtype=torch.float32, device="cpu", seed=0, attention="eager", **changes):
    """Weights large enough that attention is not flat."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim >= 2:
                weights.normal_(0, 1.6 / weights.shape[-1] ** 0.5)
            elif name.endswith("sinks"):
                weights.normal_(0, 1.0)
    return model.to(device=device, dtype=dtype).eval()


def ragged_prompt(batch, longest, device="cpu", seed=1):
    """input_ids and attention_mask [batch, longest], padded on the left, lengths 1..longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (batch, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest)[None] >= longest - lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, torch.zeros_like(ids))
    return ids.to(device), mask.to(device)
