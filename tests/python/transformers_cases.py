"""thinkv.transformers against transformers' own caches, on small random models.

Without a GPU the library is libthinkv_emulated and CPU tensors stand for the GPU's
(test_thinkv_transformers.py); tests/gpu/transformers_gpu.py runs the same cases on a GPU.
"""

import sys
import unittest

import thinkv
import torch
import transformers
from thinkv.transformers import ThinkvCache
from thinkvd_case import SOURCE, ThinkvdCase
from tiny_models import FAMILIES, VOCABULARY, WINDOW, ragged_prompt, tiny_model
from transformers import DynamicCache

sys.path.insert(0, str(SOURCE / "tools"))

# Pages hold 16 bits where the models have 32: keys and values are off by 2^-12 of themselves, and
# two layers of random weights with logits of about 1.6 make at most some hundredths of it.
TOLERANCE = 0.05


def run_on_gpu():
    """The caller's tests, where torch sees a GPU. Ends the process: failures, or 77 without one."""
    if not torch.cuda.is_available():
        print("skipped: torch sees no GPU")
        sys.exit(77)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.cuda.get_device_name()}")
    program = unittest.main(exit=False, verbosity=2)
    sys.exit(len(program.result.failures) + len(program.result.errors))


class TransformersCase(ThinkvdCase):
    device = "cpu"
    pool = "128MiB"
    batches = (1, 3)

    def config_text(self):
        return super().config_text().replace("pool: {", "pool: {backend: cuda, ")

    def setUp(self):
        super().setUp()
        torch.set_grad_enabled(False)
        self.wait_until(lambda: self.daemon.poll() is not None
                        or (self.folder / "s").exists(), 30)
        self.client = thinkv.Client(self.socket, name="transformers", timeout=60)
        self.addCleanup(self.client.close)

    def model(self, family, **changes):
        return tiny_model(family, device=self.device, **changes)

    def cache(self, model, policy="full-f16", **options):
        model.set_attn_implementation("thinkv")
        cache = ThinkvCache(model, policy, client=self.client, **options)
        self.addCleanup(cache.close)
        return cache

    def pages_in_use(self):
        stats = self.client.stats()
        return stats["client_granted_bytes"] - stats["client_leased_bytes"]

    def check_text(self, model, got, want, padding=None):
        """Equal, but for tokens whose two logits are nearer than the tolerance."""
        for row in range(len(want)):
            length = min(got.shape[1], want.shape[1])
            differs = (got[row, :length] != want[row, :length]).nonzero()
            if len(differs) == 0:
                continue
            at = int(differs[0])
            mask = None if padding is None else torch.cat(
                [padding[row], padding.new_ones(at - len(padding[row]))])[None]
            model.set_attn_implementation("eager")
            logits = model(input_ids=want[row:row + 1, :at], attention_mask=mask).logits[0, -1]
            model.set_attn_implementation("thinkv")
            gap = float(logits[want[row, at]] - logits[got[row, at]])
            print(f"    row {row} differs at token {at}, logits by {gap:.5f}")
            self.assertLess(abs(gap), TOLERANCE)


class Logits(TransformersCase):
    steps = 40

    def run_of(self, model, cache, ids, mask, feed):
        """Logits after the prompt and after each fed token [1 + steps, batch, vocabulary]."""
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = [model(input_ids=ids, attention_mask=mask, position_ids=position,
                        past_key_values=cache).logits[:, -1]]
        for tokens in feed:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits.append(model(input_ids=tokens[:, None], attention_mask=mask,
                                position_ids=mask.sum(-1, keepdim=True) - 1,
                                past_key_values=cache).logits[:, -1])
        return torch.stack(logits)

    def compare(self, family, batch):
        model = self.model(family)
        ids, mask = ragged_prompt(batch, 40, self.device, seed=batch)
        feed = torch.randint(2, VOCABULARY, (self.steps, batch), device=self.device)
        want = self.run_of(model, DynamicCache(config=model.config), ids, mask, feed)
        cache = self.cache(model)
        got = self.run_of(model, cache, ids, mask, feed)
        worst = float((got - want).abs().max())
        same = float((got.argmax(-1) == want.argmax(-1)).float().mean())
        print(f"    {family:8} batch {batch:2}: worst logit {worst:.5f} of "
              f"{float(want.std()):.2f}, likeliest token equal in {100 * same:.2f} %")
        self.assertLess(worst, TOLERANCE)
        self.assertEqual(cache.get_seq_length(), 40 + self.steps)
        # Another cache under the same attention is not ours to touch.
        other = self.run_of(model, DynamicCache(config=model.config), ids, mask, feed[:3])
        self.assertLess(float((other - want[:4]).abs().max()), 1e-3)
        cache.close()
        self.assertEqual(self.pages_in_use(), 0)

    def test_all_families_equal_eager_attention(self):
        for family in FAMILIES:
            for batch in self.batches:
                with self.subTest(family=family, batch=batch):
                    self.compare(family, batch)

    def test_rules_of_the_prompts_end_see_its_queries(self):
        model = self.model("llama")
        ids, mask = ragged_prompt(2, 100, self.device)
        for past_recording in (False, True):
            with self.subTest(past_recording=past_recording):
                cache = self.cache(model, "snapkv", budget=40)
                if past_recording:
                    cache.activate_past_recording()
                self.run_of(model, cache, ids, mask, [])
                tokens = [row["tokens"] for row in cache.stats()]
                self.assertGreater(max(tokens), 40)
                for row in cache.stats():
                    self.assertEqual(row["live_tokens_max"], min(row["tokens"], 40))
                cache.close()

    def test_sliding_layers_hold_their_window_and_no_more(self):
        model = self.model("mistral")
        cache = self.cache(model)
        ids, mask = ragged_prompt(2, 100, self.device)
        self.run_of(model, cache, ids, mask, torch.full((200, 2), 7, device=self.device))
        for row in cache.stats():
            self.assertLessEqual(row["live_tokens_max"], WINDOW + 64 + 16)


class Generate(TransformersCase):
    families = ("llama", "gpt_oss")

    def compare(self, family, batch=3, **options):
        model = self.model(family)
        ids, mask = ragged_prompt(batch, 20, self.device)
        options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=30,
                       **{"do_sample": False, **options})
        torch.manual_seed(11)
        want = model.generate(**options)
        cache = self.cache(model)
        cache.activate_past_recording()  # 4.x does not ask for it before it speculates
        torch.manual_seed(11)
        got = model.generate(**options, past_key_values=cache)
        self.assertEqual(got.shape, want.shape)
        self.check_text(model, got, want, mask)
        cache.close()
        self.assertEqual(self.pages_in_use(), 0)

    def test_greedy(self):
        for family in self.families:
            self.compare(family)

    def test_sampling(self):
        self.compare("llama", do_sample=True, temperature=0.7)

    def test_beams_part_and_end(self):
        for family in self.families:
            self.compare(family, num_beams=3)

    def test_speculative_tokens_are_rolled_back(self):
        # Late 4.x cannot crop its own sliding caches, so there is nothing to compare with.
        families = self.families if transformers.__version__ >= "5" else self.families[:1]
        other = self.model("llama", seed=5)
        self.compare("llama", batch=1, assistant_model=other)
        for family in families:
            self.compare(family, batch=1, prompt_lookup_num_tokens=4, eos_token_id=1)

    def test_several_answers_to_one_prompt(self):
        self.compare("llama", batch=2, do_sample=True, num_return_sequences=3)

    def test_a_streamer_sees_every_token_and_a_stop_condition_ends(self):
        model = self.model("llama")
        ids, mask = ragged_prompt(1, 20, self.device)
        want = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=30,
                              do_sample=False)
        seen = []

        class Streamer(transformers.generation.streamers.BaseStreamer):
            def put(self, value):
                seen.extend(value.flatten().tolist())

            def end(self):
                seen.append("end")

        stop = int(want[0, 30])
        got = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=30,
                             do_sample=False, eos_token_id=stop, streamer=Streamer(),
                             past_key_values=self.cache(model))
        self.assertEqual(seen, got[0].tolist() + ["end"])
        self.assertEqual(int(got[0, -1]), stop)
        self.assertEqual(got[0].tolist(), want[0, :got.shape[1]].tolist())

    def test_the_next_turn_of_a_conversation_goes_on_in_the_pool(self):
        for family in self.families:
            model = self.model(family)
            ids, mask = ragged_prompt(1, 20, self.device)

            def turns(cache):
                text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10,
                                      do_sample=False, past_key_values=cache)
                more = torch.randint(2, VOCABULARY, (1, 40), device=self.device,
                                     generator=torch.Generator(self.device).manual_seed(5))
                text = torch.cat([text, more], 1)
                return model.generate(input_ids=text, attention_mask=torch.ones_like(text),
                                      max_new_tokens=20, do_sample=False, past_key_values=cache)

            want = turns(DynamicCache(config=model.config))
            cache = self.cache(model)
            self.check_text(model, turns(cache), want)
            self.assertEqual(cache.stats()[0]["tokens"], 20 + 10 + 40 + 20 - 1)

    def test_bytes_stay_flat_under_a_budget(self):
        model = self.model("llama")
        cache = self.cache(model, "thinkv", budget=128)
        ids, mask = ragged_prompt(2, 20, self.device)
        held = []
        for _ in range(3):
            ids = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids) if held else
                                 mask, max_new_tokens=250, do_sample=False, past_key_values=cache)
            held.append(cache.stats()[0])
        self.assertGreater(held[2]["evicted_slots"], held[1]["evicted_slots"])
        self.assertGreater(held[2]["slots_reused"], 0)
        self.assertLess(held[2]["bytes_held"], 1.15 * held[1]["bytes_held"])


class Rows(TransformersCase):
    """What beam search and others ask of a cache, asked directly."""

    def after_prompt(self, family="llama", batch=3):
        model = self.model(family)
        cache = self.cache(model)
        ids = torch.randint(2, VOCABULARY, (batch, 12), device=self.device)
        model(input_ids=ids, past_key_values=cache)
        reference = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=reference)
        return model, cache, reference

    def check_next(self, model, cache, reference, batch, tokens=1):
        ids = torch.randint(2, VOCABULARY, (batch, tokens), device=self.device)
        got = model(input_ids=ids, past_key_values=cache).logits
        want = model(input_ids=ids, past_key_values=reference).logits
        self.assertLess(float((got - want).abs().max()), TOLERANCE)

    def test_rows_are_chosen_repeated_and_reordered(self):
        model, cache, reference = self.after_prompt()
        self.check_next(model, cache, reference, 3)
        for name, argument, batch in (
            ("batch_select_indices", torch.tensor([2, 0]), 2),
            ("batch_repeat_interleave", 3, 6),
            ("reorder_cache", torch.tensor([5, 5, 0, 3, 4, 1]), 6),
        ):
            for each in (cache, reference):
                given = argument.to(self.device) if torch.is_tensor(argument) else argument
                getattr(each, name)(given)
            for _ in range(18):
                self.check_next(model, cache, reference, batch)

    def test_blocks_of_tokens_can_be_cropped_but_for_their_first(self):
        # Against the whole text without a cache: transformers' own sliding caches cannot do this in
        # every version.
        for family in ("llama", "gpt_oss", "gemma3"):
            model = self.model(family)
            cache = self.cache(model)
            text = torch.randint(2, VOCABULARY, (2, 12), device=self.device)
            model(input_ids=text, past_key_values=cache)
            for removed, tokens in ((3, 5), (0, 5), (4, 5), (0, 1), (29, 30), (2, 5), (1, 40)):
                block = torch.randint(2, VOCABULARY, (2, tokens), device=self.device)
                text = torch.cat([text, block], 1)
                got = model(input_ids=block, past_key_values=cache).logits
                want = model(input_ids=text, use_cache=False).logits[:, -tokens:]
                self.assertLess(float((got - want).abs().max()), TOLERANCE, f"{family} {tokens}")
                cache.crop(-removed)
                text = text[:, : text.shape[1] - removed]
                self.assertEqual(cache.get_seq_length(), text.shape[1])
            self.assertEqual(cache.stats()[0]["tokens"], text.shape[1])

    def test_what_cannot_be_cropped_says_what_to_do(self):
        model, cache, _ = self.after_prompt()
        with self.assertRaisesRegex(NotImplementedError, "Start a new ThinkvCache"):
            cache.crop(-1)
        cache.crop(-12)  # all of it
        self.assertEqual((cache.get_seq_length(), self.pages_in_use()), (0, 0))


class Refusals(TransformersCase):
    pool = "16MiB"

    def test_the_wrong_attention_is_noticed(self):
        model = self.model("llama", attention="sdpa")
        cache = ThinkvCache(model, client=self.client)
        with self.assertRaisesRegex(RuntimeError, r"set_attn_implementation\('thinkv'\)"):
            model(input_ids=torch.ones(1, 4, dtype=torch.int64, device=self.device),
                  past_key_values=cache)

    def test_padding_on_the_right_is_refused_and_costs_nothing(self):
        model = self.model("llama")
        cache = self.cache(model)
        ids, mask = ragged_prompt(3, 10, self.device)
        with self.assertRaisesRegex(ValueError, "padding_side='left'"):
            model(input_ids=ids, attention_mask=mask.flip(-1), past_key_values=cache)
        self.assertEqual((cache.get_seq_length(), self.pages_in_use()), (0, 0))

    def test_layers_that_the_pool_cannot_hold(self):
        with self.assertRaisesRegex(NotImplementedError, "head_dim is 32"):
            ThinkvCache(self.model("llama", head_dim=32), client=self.client)
        with self.assertRaisesRegex(thinkv.NotFoundError, "no-such-policy"):
            ThinkvCache(self.model("llama"), "no-such-policy", client=self.client)

    def test_a_pass_that_stopped_in_the_middle_is_noticed(self):
        model = self.model("llama")
        cache = self.cache(model)
        ids = torch.ones(1, 4, dtype=torch.int64, device=self.device)
        model(input_ids=ids, past_key_values=cache)

        def fail(*_):
            raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with self.assertRaises(KeyboardInterrupt):
            model(input_ids=ids[:, :1], past_key_values=cache)
        hook.remove()
        with self.assertRaisesRegex(RuntimeError, "cache.reset"):
            model(input_ids=ids[:, :1], past_key_values=cache)
        cache.reset()
        model(input_ids=ids, past_key_values=cache)

    def test_groups_of_layers_get_their_pages_together_or_not_at_all(self):
        model = self.model("gpt_oss")
        cache = self.cache(model)
        ids = torch.ones(2, 14, dtype=torch.int64, device=self.device)
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids[:, :1], past_key_values=cache)
        first, second = cache._rows.batches

        def refuse():
            raise thinkv.ExhaustedError("no room in the second group")

        second.reserve = refuse
        with self.assertRaisesRegex(thinkv.ExhaustedError, "second group"):
            model(input_ids=ids[:, :1], past_key_values=cache)
        del second.reserve
        # Nothing is left reserved in the first group.
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "not run"):
            first.unreserve()
        model(input_ids=ids[:, :1], past_key_values=cache)
        self.assertEqual(cache.stats()[0]["tokens"], 16)

    def test_a_full_pool_stops_the_pass_and_nothing_else(self):
        model = self.model("gpt_oss")  # two groups of layers: both or none
        cache = self.cache(model)
        filler = ThinkvCache(model, "full-f16", client=self.client, rows=64)
        self.addCleanup(filler.close)
        ids = torch.randint(2, VOCABULARY, (2, 14), device=self.device)
        model(input_ids=ids, past_key_values=cache)
        with self.assertRaises((thinkv.ExhaustedError, thinkv.QuotaExceededError)):
            for row in range(64):
                prompt = filler.prompt()
                model(input_ids=ids[:1].repeat(1, 50), past_key_values=prompt)
                filler.join(row, prompt)
        before = cache.get_seq_length()
        with self.assertRaises((thinkv.ExhaustedError, thinkv.QuotaExceededError)):
            for _ in range(4000):
                before = cache.get_seq_length()
                model(input_ids=ids[:, :1], past_key_values=cache)
        self.assertEqual(cache.get_seq_length(), before)
        for row in range(64):
            filler.leave(row)
        model(input_ids=ids[:, :1], past_key_values=cache)  # the same step, now with room
        self.assertEqual(cache.stats()[0]["tokens"], before + 1)


class ShortPools(TransformersCase):
    """What fails for want of pages has changed nothing."""

    pool = "4MiB"

    def after_prompt(self, rows, tokens, hold=False):
        model = self.model("llama")
        cache = self.cache(model)
        if hold:
            cache.activate_past_recording()
        ids = torch.randint(2, VOCABULARY, (rows, tokens), device=self.device)
        model(input_ids=ids, past_key_values=cache)
        return model, cache, ids

    def check_next(self, model, cache, ids):
        token = torch.full((len(ids), 1), 7, device=self.device)
        got = model(input_ids=token, past_key_values=cache).logits[:, -1]
        text = torch.cat([ids, token], 1)
        want = model(input_ids=text, use_cache=False).logits[:, -1]
        self.assertLess(float((got - want).abs().max()), TOLERANCE)
        self.assertEqual(cache.stats()[0]["tokens"], text.shape[1])

    def test_a_prompt_that_can_be_cropped_is_written_when_there_is_room(self):
        model, cache, ids = self.after_prompt(2, 200, hold=True)
        filler = ThinkvCache(model, "full-f16", client=self.client, rows=64)
        self.addCleanup(filler.close)
        with self.assertRaises((thinkv.ExhaustedError, thinkv.QuotaExceededError)):
            for row in range(64):
                prompt = filler.prompt()
                model(input_ids=ids[:1], past_key_values=prompt)
                filler.join(row, prompt)
        before = self.pages_in_use()
        for _ in range(2):
            with self.assertRaises((thinkv.ExhaustedError, thinkv.QuotaExceededError)):
                model(input_ids=ids[:, :1], past_key_values=cache)
            self.assertEqual((cache.get_seq_length(), self.pages_in_use()), (200, before))
        for row in range(64):
            filler.leave(row)
        cache.crop(-3)
        self.check_next(model, cache, ids[:, :-3])

    def test_copies_are_all_made_or_none(self):
        model, cache, ids = self.after_prompt(3, 200)
        self.check_next(model, cache, ids)
        ids = torch.cat([ids, torch.full((3, 1), 7, device=self.device)], 1)
        before = self.pages_in_use()
        with self.assertRaises((thinkv.ExhaustedError, thinkv.QuotaExceededError)):
            # Rows that go are not missed by who fails: only the first one is chosen, forty times.
            cache.batch_select_indices(torch.tensor([0] * 40))
        self.assertEqual(self.pages_in_use(), before)
        self.check_next(model, cache, ids)


class Engines(TransformersCase):
    graph = False

    def answers(self, engine, prompts, count):
        from engine.torch_engine import Request

        order = []
        requests = [engine.submit(Request(prompt, count + i, lambda r, t: order.append((id(r), t))))
                    for i, prompt in enumerate(prompts)]
        engine.run()
        for request in requests:
            seen = [token for key, token in order if key == id(request)]
            self.assertEqual(seen, request.answer)
        return requests

    def compare(self, family, prompts, count, rows, **options):
        from engine.torch_engine import Engine

        model = self.model(family)
        wants = [model.generate(input_ids=torch.tensor([p], device=self.device),
                                max_new_tokens=count + i, do_sample=False)
                 for i, p in enumerate(prompts)]
        engine = Engine(model, rows, policy="full-f16", socket=self.socket, graph=self.graph,
                        **options)
        for prompt, request, want in zip(prompts, self.answers(engine, prompts, count), wants):
            self.assertIsNone(request.error)
            got = torch.tensor([prompt + request.answer], device=self.device)
            self.assertEqual(got.shape, want.shape)
            self.check_text(model, got, want)
        preempted = engine.preempted
        engine.close()
        self.assertEqual(self.pages_in_use(), 0)
        return preempted

    def test_sequences_join_and_leave_between_steps(self):
        prompts = [torch.randint(2, VOCABULARY, (5 + 7 * i,)).tolist() for i in range(7)]
        for family in ("llama", "gpt_oss") if not self.graph else ("llama", "qwen3", "gemma3"):
            self.compare(family, prompts, 20, 3)


class ShortEngines(Engines):
    pool = "2MiB"

    def test_sequences_join_and_leave_between_steps(self):
        """Too little for all rows at once: the youngest wait, and every answer is the same."""
        prompts = [torch.randint(2, VOCABULARY, (40,)).tolist() for _ in range(6)]
        self.assertGreater(self.compare("llama", prompts, 260, 6), 0)

    def test_one_that_fits_nowhere_gets_the_error(self):
        from engine.torch_engine import Engine

        engine = Engine(self.model("llama"), 2, policy="full-f16", socket=self.socket,
                        graph=self.graph)
        prompts = [torch.randint(2, VOCABULARY, (size,)).tolist() for size in (3000, 10)]
        long, short = self.answers(engine, prompts, 5)
        self.assertIsInstance(long.error, (thinkv.ExhaustedError, thinkv.QuotaExceededError))
        self.assertEqual((short.error, len(short.answer)), (None, 6))
        engine.close()
