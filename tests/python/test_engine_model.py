"""The numpy engine: block and step forms agree, caches keep what they are given."""

from __future__ import annotations

import unittest

import numpy as np
from engine_support import TINY, FakePoolModel, tiny_model

from engine.attention import causal_attention, step_attention, step_sparsity
from engine.caches import ExactCache, PoolCache
from engine.generate import generate
from engine.quality import Meter, compare, force
from engine.sampling import Sampler, SamplingOptions

TEXT = [int(token) for token in np.random.default_rng(5).integers(0, TINY.vocab, 60)]


class Forward(unittest.TestCase):
    def setUp(self) -> None:
        self.model = tiny_model()

    def stepped(self, cache, prompt: int) -> np.ndarray:
        rows = [self.model.prefill(TEXT[:prompt], cache)]
        rows += [self.model.step(token, cache) for token in TEXT[prompt:]]
        return np.stack(rows)

    def block(self, prompt: int) -> np.ndarray:
        return self.model.log_probs(self.model.hidden_states(TEXT)[prompt - 1 :])

    def test_steps_equal_the_block_form(self) -> None:
        for prompt in (1, 17, 59):
            rows = self.stepped(ExactCache(TINY, capacity=4), prompt)
            log_probs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
            # Products in another order: a few units in the last place of values around 10, through
            # two layers. A wrong position or mask changes the numbers by more than 0.1.
            np.testing.assert_allclose(log_probs, self.block(prompt), atol=2e-4)

    def test_everything_stays_float32(self) -> None:
        cache = ExactCache(TINY)
        self.assertEqual(self.model.prefill(TEXT[:5], cache).dtype, np.float32)
        self.assertEqual(self.model.step(TEXT[5], cache).dtype, np.float32)
        self.assertEqual(self.model.hidden_states(TEXT).dtype, np.float32)

    def test_float16_cache_differs_but_little(self) -> None:
        exact = self.stepped(ExactCache(TINY), 20)
        rounded = self.stepped(ExactCache(TINY, dtype="float16"), 20)
        self.assertFalse(np.array_equal(exact, rounded))
        np.testing.assert_allclose(exact, rounded, atol=0.05)

    def test_pool_cache_equals_exact_cache(self) -> None:
        exact = self.stepped(ExactCache(TINY), 20)
        with PoolCache(FakePoolModel(TINY), {}) as cache:
            np.testing.assert_allclose(self.stepped(cache, 20), exact, atol=1e-5)
            self.assertEqual(cache.tokens, len(TEXT))
            self.assertEqual(cache.stats()["tokens"], len(TEXT))

    def test_context_end_is_an_error(self) -> None:
        with self.assertRaisesRegex(ValueError, "context is 256"):
            self.model.hidden_states([1] * 257)

    def test_unknown_cache_type_is_an_error(self) -> None:
        with self.assertRaisesRegex(ValueError, "float32 or float16"):
            ExactCache(TINY, dtype="int8")

    def test_pool_cache_without_sequences_is_an_error(self) -> None:
        with self.assertRaises(ValueError):
            PoolCache(FakePoolModel(TINY))

    def test_failed_open_closes_what_was_opened(self) -> None:
        pool = FakePoolModel(TINY)
        with self.assertRaises(LookupError):
            PoolCache(pool, {}, {}, {"policy": "broken"})
        self.assertEqual([sequence.closed for sequence in pool.opened], [True, True])


class Attention(unittest.TestCase):
    def setUp(self) -> None:
        random = np.random.default_rng(1)
        self.q, self.k, self.v = (random.standard_normal((9, heads, 16)).astype(np.float32)
                                  for heads in (6, 2, 2))

    def test_against_plain_loops(self) -> None:
        out = causal_attention(self.q, self.k, self.v)
        for token in range(9):
            for head in range(6):
                scores = self.k[: token + 1, head // 3] @ self.q[token, head] / 4.0
                probs = np.exp(scores) / np.exp(scores).sum()
                np.testing.assert_allclose(out[token, head], probs @ self.v[: token + 1, head // 3],
                                           atol=1e-5)

    def test_last_row_equals_a_step(self) -> None:
        step = step_attention(self.q[-1], self.k.transpose(1, 0, 2), self.v.transpose(1, 0, 2))
        np.testing.assert_allclose(step, causal_attention(self.q, self.k, self.v)[-1], atol=1e-6)

    def test_sparsity_counts_entries_below_the_share_of_the_maximum(self) -> None:
        # One kv head, four keys with logits 0, -1, -5, -9: two are below 1 % of the maximum.
        q = np.zeros((1, 16), dtype=np.float32)
        q[0, 0] = 4.0  # the softmax scale is 1/4
        k = np.zeros((1, 4, 16), dtype=np.float32)
        k[0, :, 0] = [0, -1, -5, -9]
        self.assertEqual(step_sparsity(q, k), 0.5)
        self.assertEqual(step_sparsity(q, k, near_zero=1e-3), 0.25)
        self.assertEqual(step_sparsity(q, k[:, :1]), 0.0)

    def test_sparsity_takes_the_largest_logit_of_a_group_and_the_mean_over_groups(self) -> None:
        # Group 0: its second query head lifts key 1 to the maximum, so nothing is near zero there.
        q = np.zeros((4, 16), dtype=np.float32)
        q[0, 0], q[1, 1], q[2, 0], q[3, 0] = 4.0, 4.0, 4.0, 4.0
        k = np.zeros((2, 2, 16), dtype=np.float32)
        k[:, 0, 0], k[:, 1, 1] = 9.0, 9.0
        self.assertEqual(step_sparsity(q, k), 0.25)


class QualityMeasures(unittest.TestCase):
    def setUp(self) -> None:
        self.model = tiny_model()

    def test_exact_sequence_has_no_loss_and_a_damaged_one_has(self) -> None:
        pool = FakePoolModel(TINY)
        with PoolCache(pool, {}, {"damage": 0.5}) as cache:
            exact, damaged = force(self.model, cache, 2, TEXT, 16)
        self.assertEqual(exact.rows, len(TEXT) - 16)
        self.assertLess(abs(exact.kl), 1e-6)
        self.assertEqual(exact.top1, 1.0)
        self.assertLess(abs(exact.perplexity / exact.exact_perplexity - 1), 1e-5)
        self.assertGreater(damaged.kl, 1e-3)
        self.assertLess(damaged.top1, 1.0)

    def test_generation_compared_with_itself(self) -> None:
        sampler = Sampler(SamplingOptions(seed=3), banned=frozenset({2}))
        run = generate(self.model, ExactCache(TINY), TEXT[:9], sampler, 30, keep_log_probs=True)
        self.assertEqual(len(run.tokens), 30)
        self.assertNotIn(2, run.tokens)
        text = TEXT[:9] + run.tokens
        quality = compare(self.model, text, self.model.hidden_states(text), 9, run.log_probs)
        self.assertEqual(quality.rows, 30)
        self.assertLess(abs(quality.kl), 1e-6)

    def test_kl_and_top1_of_known_distributions(self) -> None:
        meter = Meter()
        exact = np.log(np.asarray([[0.5, 0.5 - 1e-6, 1e-6], [0.2, 0.7, 0.1]]))
        mine = np.log(np.asarray([[0.25, 0.75 - 1e-6, 1e-6], [0.2, 0.7, 0.1]]))
        meter.add(exact, mine, np.asarray([1, -1]))
        found = meter.quality()
        self.assertAlmostEqual(found.kl, 0.5 * 0.5 * np.log(0.5 / 0.25 * 0.5 / 0.75), places=5)
        self.assertEqual(found.top1, 0.5)
        self.assertAlmostEqual(found.perplexity, 1 / 0.75, places=4)
        self.assertAlmostEqual(found.exact_perplexity, 1 / 0.5, places=4)

    def test_wrong_sizes_are_errors(self) -> None:
        hidden = self.model.hidden_states(TEXT)
        with self.assertRaises(ValueError):
            compare(self.model, TEXT, hidden, 40, np.zeros((21, TINY.vocab), np.float32))
        with self.assertRaises(ValueError):
            compare(self.model, TEXT, hidden[:-1], 0, np.zeros((2, TINY.vocab), np.float32))
        with self.assertRaises(ValueError):
            Meter().add(np.zeros((2, 3)), np.zeros((2, 4)), np.zeros(2, dtype=int))
        with self.assertRaises(ValueError):
            Meter().quality()
        with PoolCache(FakePoolModel(TINY), {}) as cache, self.assertRaises(ValueError):
            force(self.model, cache, 1, TEXT, len(TEXT))


class Sampling(unittest.TestCase):
    LOGITS = np.random.default_rng(0).standard_normal(600).astype(np.float32)

    def test_same_seed_same_tokens(self) -> None:
        draws = [[sampler.draw(self.LOGITS) for _ in range(20)]
                 for sampler in (Sampler(SamplingOptions(seed=4)) for _ in range(2))]
        self.assertEqual(draws[0], draws[1])
        other = Sampler(SamplingOptions(seed=5))
        self.assertNotEqual(draws[0], [other.draw(self.LOGITS) for _ in range(20)])

    def test_banned_token_is_never_drawn(self) -> None:
        best = int(self.LOGITS.argmax())
        greedy = SamplingOptions(temperature=0, repetition_penalty=1)
        self.assertEqual(Sampler(greedy).draw(self.LOGITS), best)
        self.assertNotEqual(Sampler(greedy, frozenset({best})).draw(self.LOGITS), best)

    def test_penalty_lowers_recent_tokens_only(self) -> None:
        logits = np.full(600, -9.0, dtype=np.float32)
        logits[7], logits[8] = 2.0, 1.9
        sampler = Sampler(SamplingOptions(temperature=0, repetition_penalty=1.2,
                                          repetition_window=1))
        self.assertEqual([sampler.draw(logits) for _ in range(4)], [7, 8, 7, 8])

    def test_small_top_p_is_greedy(self) -> None:
        sampler = Sampler(SamplingOptions(temperature=2.0, top_p=1e-6, repetition_penalty=1))
        self.assertEqual({sampler.draw(self.LOGITS) for _ in range(20)},
                         {int(self.LOGITS.argmax())})

    def test_logits_are_not_changed(self) -> None:
        before = self.LOGITS.copy()
        sampler = Sampler(SamplingOptions(), frozenset({1}))
        sampler.draw(self.LOGITS), sampler.draw(self.LOGITS)
        np.testing.assert_array_equal(before, self.LOGITS)


if __name__ == "__main__":
    unittest.main()
