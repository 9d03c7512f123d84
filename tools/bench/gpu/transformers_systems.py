"""The systems of `bench transformers`: one decode step of a Hugging Face model over a filled cache.

Each is made for a batch and a number of tokens, is stepped, and says what memory its cache holds.
Keys and values are random: they change no timing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

BUDGET = 1024
PROMPT = 32   # tokens of a sequence that then generates; never evicted
PERIOD = 128  # steps after which labels and evictions repeat
SYNC_STEPS = 8
HEADROOM = 64  # tokens that a static cache has beyond what it is filled with


def eight_billion(layers: int = 32) -> LlamaConfig:
    return LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                       num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
                       head_dim=128, max_position_embeddings=1 << 17, tie_word_embeddings=False)


def random_model(config: LlamaConfig, device: str) -> torch.nn.Module:
    """bf16 weights of a size that keeps activations finite."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device)
    for weights in model.parameters():
        weights.data.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model.eval()


class Peer:
    """transformers' own caches."""

    def __init__(self, model: torch.nn.Module, batch: int, tokens: int) -> None:
        self.model, self.batch = model, batch
        device = next(model.parameters()).device
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.positions = torch.full((batch, 1), tokens, dtype=torch.int64, device=device)
        config = model.config
        self.shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
        self.kind = dict(dtype=torch.bfloat16, device=device)
        self.cache: Any = self.filled(config, tokens)

    def filled(self, config: Any, tokens: int) -> Any:
        raise NotImplementedError

    def step(self) -> None:
        out = self.model(input_ids=self.ids, position_ids=self.positions, use_cache=True,
                         past_key_values=self.cache)
        self.ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        self.positions.add_(1)

    def bytes_held(self) -> int:
        return sum(2 * layer.keys.numel() * layer.keys.element_size()
                   for layer in self.cache.layers)

    def close(self) -> None:
        self.cache = None


class Dynamic(Peer):
    def filled(self, config: Any, tokens: int) -> DynamicCache:
        self.model.set_attn_implementation("sdpa")
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            kv = torch.empty(self.shape, **self.kind).normal_()
            cache.update(kv, torch.empty_like(kv).copy_(kv), layer)
        return cache


class StaticCompiled(Peer):
    def filled(self, config: Any, tokens: int) -> StaticCache:
        self.model.set_attn_implementation("sdpa")
        cache = StaticCache(config=config, max_cache_len=tokens + HEADROOM)
        empty = torch.empty(*self.shape[:2], 0, self.shape[3], **self.kind)
        for layer in cache.layers:
            layer.lazy_initialization(empty, empty)
            layer.keys[:, :, :tokens].normal_()
            layer.values[:, :, :tokens].normal_()
            if torch.is_tensor(layer.cumulative_length):
                layer.cumulative_length.fill_(tokens)
            else:
                layer.cumulative_length = tokens
        torch._dynamo.reset()  # else the second length is compiled for any length
        self.eager, self.model.forward = self.model.forward, torch.compile(
            self.model.forward, mode="reduce-overhead", fullgraph=True)
        return cache

    def close(self) -> None:
        self.model.forward = self.eager
        super().close()


class Ours:
    """ThinkvCache with rows, and the step as one graph."""

    def __init__(self, model: torch.nn.Module, client: Any, batch: int, tokens: int, policy: str,
                 graph: bool = True) -> None:
        import thinkv
        from thinkv.transformers import ThinkvCache

        model.set_attn_implementation("thinkv")
        self.batch, self.tokens, self.policy = batch, tokens, policy
        live = min(tokens, BUDGET + PROMPT + 2 * PERIOD) if policy == "thinkv" else tokens
        # The room is in 4-bit pages of 32 tokens; a 16-bit page has 8.
        room = 256 + live * (4 if policy == "full-f16" else 1)
        budget = BUDGET if policy == "thinkv" else None
        self.cache = ThinkvCache(model, policy, budget, client=client, rows=batch, tokens_max=room)
        self.graph = graph
        config = model.config
        self.layers, self.kv = config.num_hidden_layers, (config.num_key_value_heads,
                                                          config.head_dim)
        self.device = next(model.parameters()).device
        try:
            self.decode = thinkv.Step(model, self.cache, graph=graph)
            if policy == "thinkv":
                self._generate()
            else:
                for row in range(batch):
                    self._join(row, tokens)
        except BaseException:
            self.close()
            raise
        self.decode.positions.fill_(tokens)

    def _random(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, *self.kv, device=self.device, dtype=torch.bfloat16)

    def _join(self, row: int, tokens: int) -> None:
        """Without evictions what was a prompt holds what was generated does."""
        k, v = self._random(tokens), self._random(tokens)
        rows = self.cache._rows
        sequence = self.cache._pool.open(0)
        rows.sequences[0][row] = sequence  # closed with the cache from here on
        for layer in range(self.layers):
            sequence.prefill(layer, k, v)
        sequence.prefill_end()
        rows.batches[0].join(row, sequence)

    def _generate(self) -> None:
        """A policy that evicts must generate. Steps without model and attention do, on random keys
        and values; the rows join over the first PERIOD of them, so that flushes, labels and
        evictions fall evenly on the steps that are timed, as they do where requests come and go."""
        batch = self.cache._rows.batches[0]
        k, v = self._random(self.batch), self._random(self.batch)
        due = [row * PERIOD // self.batch for row in range(self.batch)]
        graph = None
        for token in range(max(PERIOD, self.tokens - PROMPT)):
            for row in range(self.batch):
                if due[row] == token:
                    self._join(row, PROMPT)
            if token % SYNC_STEPS == 0 and self.device.type == "cuda":
                torch.cuda.synchronize()  # so that little is promised to steps under way
            batch.reserve()
            if graph is not None:
                graph.replay()
                continue
            self._bare_step(batch, k, v)
            if self.graph:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._bare_step(batch, k, v)

    def _bare_step(self, batch: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        k.normal_()
        v.normal_()
        batch.begin()
        for layer in range(self.layers):
            batch.append(layer, k, v)
        batch.end()

    def step(self) -> None:
        self.decode()

    def bytes_held(self) -> int:
        sample = [self.cache._rows.sequences[0][row].stats()["bytes_held"]
                  for row in range(0, self.batch, max(1, self.batch // 16))]
        return int(sum(sample) / len(sample) * self.batch)

    def close(self) -> None:
        self.cache._rows.reset()
