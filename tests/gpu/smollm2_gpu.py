"""SmolLM2-135M through the pool against DynamicCache: greedy text, the choice of tokens under four
bits, and bytes under a budget.

    THINKV_MODEL=... THINKV_BIN_DIR=... THINKV_LIBRARY=... \
    PYTHONPATH=client/python:tests/python python3 tests/gpu/smollm2_gpu.py [TEST...]

Needs torch with CUDA, transformers and gguf; the GGUF is found as tools/engine finds it. The exit
status is the number of failures; 77: nothing can run here.

A text that parts from another one once goes its own way, so texts are compared up to the first
token that differs, and there by the two logits, from the model in float32 over the common text.
Two pictures of one number in bf16 are at most one step apart; whoever chooses another token
although the logits are further apart than that has another cache, not another rounding.
"""

import math
import sys
import unittest

try:
    import torch
    from transformers import DynamicCache
except ImportError as missing:
    print(f"skipped: {missing} (THINKV_TORCH_PYTHON names a Python that has it)")
    sys.exit(77)

import thinkv
import transformers_cases as cases

torch.backends.cuda.matmul.allow_tf32 = False


def bf16_step(value):
    """Between neighbouring bf16 numbers of this size: they keep eight bits."""
    return 2.0 ** (math.frexp(value)[1] - 8)


class HalfCache(DynamicCache):
    """A control: keys and values rounded to 16 bits, and nothing else of the pool."""

    def update(self, key_states, value_states, *args, **kwargs):
        rounded = (x.half().to(x.dtype) for x in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)


class SmolLM2(cases.TransformersCase):
    device = "cuda"
    pool = "1GiB"
    graph = True
    texts = 10
    tokens = 512
    coarse_tokens = 256  # of texts in bf16, most of which have parted by then
    flat_tokens = 4000

    @classmethod
    def setUpClass(cls):
        try:
            from engine import prompts
            from engine.gguf_weights import ModelFile, find_model
            from engine.tokenizer import Tokenizer
            from engine.torch_model import llama_of
            file = ModelFile(find_model())
        except Exception as error:
            raise unittest.SkipTest(f"no SmolLM2 here: {error}") from None
        torch.set_grad_enabled(False)
        tokenizer, weights = Tokenizer(file.vocabulary()), file.weights()
        cls.exact = llama_of(weights, torch.float32, cls.device)
        cls.coarse = llama_of(weights, torch.bfloat16, cls.device)
        questions = [*prompts.ENGINES.values(), *prompts.CALIBRATION][:cls.texts]
        cls.prompts = [tokenizer.chat(question) for question in questions]
        longest = max(map(len, cls.prompts))
        pad = [longest - len(prompt) for prompt in cls.prompts]
        cls.ids = torch.tensor([[0] * n + p for n, p in zip(pad, cls.prompts)], device=cls.device)
        cls.mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(pad, cls.prompts)],
                                device=cls.device)
        cls.ends = torch.tensor(sorted(tokenizer.control_ids), device=cls.device)
        cls.reference = None

    def choose(self, logits):
        """The likeliest token that does not end the answer: all texts get their length."""
        return logits.index_fill(-1, self.ends, -torch.inf).argmax(-1)

    def greedy(self, model, attention, cache, tokens):
        """The answers [texts, tokens] with one of transformers' caches."""
        model.set_attn_implementation(attention)
        feed, mask, chosen = self.ids, self.mask, []
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        for _ in range(tokens):
            out = model(input_ids=feed, attention_mask=mask, position_ids=position,
                        past_key_values=cache, logits_to_keep=1)
            chosen.append(self.choose(out.logits[:, -1]))
            feed, mask = chosen[-1][:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = mask.sum(-1, keepdim=True) - 1
        return torch.stack(chosen, 1)

    def want(self):
        """DynamicCache's answers in float32; made once."""
        if self.reference is None:
            cache = DynamicCache(config=self.exact.config)
            type(self).reference = self.greedy(self.exact, "sdpa", cache, self.tokens)
        return self.reference

    def through_pool(self, model, policy, tokens, forced=None):
        """What is chosen after every token of its own answers, or of those that are forced."""
        cache = self.cache(model, policy, rows=len(self.prompts), tokens_max=4096)
        step = thinkv.Step(model, cache, choose=self.choose, graph=self.graph)
        for row, prompt in enumerate(self.prompts):
            step.join(row, prompt)
        chosen = [step.tokens.clone()]
        for at in range(tokens - 1):
            if forced is not None:
                step.tokens.copy_(forced[:, at])
            chosen.append(step().clone())
        cache.close()
        return torch.stack(chosen, 1)

    def logits(self, model, answers):
        """[tokens, vocabulary] of each text in turn: of every token, before it is chosen."""
        model.set_attn_implementation("sdpa")
        for prompt, answer in zip(self.prompts, answers):
            text = torch.cat([answer.new_tensor(prompt), answer[:-1]])
            out = model(input_ids=text[None], logits_to_keep=len(answer))
            yield out.logits[0].float().index_fill_(-1, self.ends, -torch.inf)

    def partings(self, name, got, want):
        """(gap, larger logit) of each text that differs, and how many are equal."""
        found = []
        for row, exact in enumerate(self.logits(self.exact, want)):
            differs = (got[row] != want[row]).nonzero()
            if len(differs) == 0:
                continue
            at = int(differs[0])
            one, other = float(exact[at, want[row, at]]), float(exact[at, got[row, at]])
            print(f"    {name}: text {row} parts at token {at}, logits {one:.4f} and {other:.4f}, "
                  f"{abs(one - other):.4f} apart; a bf16 step is {bf16_step(one):.4f}")
            found.append((abs(one - other), max(one, other)))
        print(f"    {name}: {len(want) - len(found)} of {len(want)} texts of {want.shape[1]} "
              "tokens are equal to the last one")
        return found

    def test_greedy_text_is_dynamic_caches(self):
        want = self.want()
        half = self.greedy(self.exact, "sdpa", HalfCache(config=self.exact.config), self.tokens)
        self.partings("control, float32: DynamicCache with K, V in 16 bits", half, want)
        got = self.through_pool(self.exact, "full-f16", self.tokens)
        for gap, logit in self.partings("float32: full-f16", got, want):
            self.assertLess(gap, bf16_step(logit))

    def test_greedy_text_in_bf16_parts_as_dynamic_caches_parts_from_itself(self):
        """In bf16 two runs of one cache part too. What moves a logit is measured: a choice between
        two can only turn where they are nearer than both of them move."""
        def greedy(attention):
            cache = DynamicCache(config=self.coarse.config)
            return self.greedy(self.coarse, attention, cache, self.coarse_tokens)

        want = greedy("sdpa")
        self.partings("control, bf16: DynamicCache under eager attention", greedy("eager"), want)
        moves = self.rounding(want)
        print(f"    bf16 moves the likeliest tokens' logits by {moves:.4f} at most")
        got = self.through_pool(self.coarse, "full-f16", self.coarse_tokens)
        found = self.partings("bf16: full-f16", got, want)
        for gap, _ in found:
            self.assertLess(gap, 2 * moves)

    def rounding(self, answers):
        """The most that bf16 moves a logit of the two likeliest tokens, over all texts."""
        most = 0.0
        pairs = zip(self.logits(self.exact, answers), self.logits(self.coarse, answers))
        for exact, coarse in pairs:
            two = exact.topk(2, -1).indices
            moved = (exact.gather(-1, two) - coarse.gather(-1, two)).abs()
            most = max(most, float(moved.max()))
        return most

    def test_four_bits_choose_the_same_token(self):
        text = self.want()
        for name, model, sixteen_bits in (("float32", self.exact, 0.99),
                                          ("bf16", self.coarse, 0.95)):
            exact = torch.stack([logits.argmax(-1) for logits in self.logits(model, text)])
            for policy, least in (("full-f16", sixteen_bits), ("k4v4-only", 0.87)):
                got = self.through_pool(model, policy, self.tokens, text)
                same = float((got == exact).float().mean())
                print(f"    {name}, {policy}: top-1 {same:.4f} over {text.numel()} forced tokens")
                self.assertGreaterEqual(same, least)

    def test_bytes_stay_flat_over_4000_tokens(self):
        cache = self.cache(self.coarse, "thinkv", budget=512, rows=1, tokens_max=2048)
        step = thinkv.Step(self.coarse, cache, graph=self.graph)
        step.join(0, self.prompts[0])
        held = {}
        for token in range(1, self.flat_tokens + 1):
            step()
            if token % (self.flat_tokens // 8) == 0:
                held[token] = cache.stats()[0]
        for token, stats in held.items():
            print(f"    {token:5} tokens: {stats['bytes_held'] / 2**20:6.2f} MiB held, "
                  f"{stats['bytes_f16'] / 2**20:7.2f} MiB in 16 bits, "
                  f"{stats['live_tokens']:.0f} live")
        sizes = [stats["bytes_held"] for stats in held.values()]
        self.assertLess(sizes[-1], 1.1 * sizes[2])


if __name__ == "__main__":
    cases.run_on_gpu()
