"""What engines do with rows beside stepping: windows, second queries, copies, taking back, growing.

The CUDA kernels on the CPU, or on a GPU, as in test_thinkv_batch.
"""

import os
import unittest

import numpy as np
import thinkv
from test_thinkv_batch import DIM, KV_HEADS, LAYERS, Q_HEADS, SHAPE, CudaCase, rows
from thinkvd_case import SOURCE

GROUP = Q_HEADS // KV_HEADS


class RowsCase(CudaCase):
    pool = "64MiB"

    def setUp(self):
        super().setUp()
        self.model = self.client.model(**SHAPE)
        self.keys = {}  # (sequence, layer): what was appended

    def array(self, values):
        return self.gpu.array(values)

    def prompt(self, tokens, policy="full-f16", seed=0, budget=None):
        sequence = self.model.sequence(policy=policy, budget=budget)
        for layer in range(LAYERS if tokens else 0):
            k, v = rows((seed, layer, 0), tokens, KV_HEADS, DIM), rows((seed, layer, 1), tokens,
                                                                       KV_HEADS, DIM)
            sequence.prefill(layer, self.array(k), self.array(v))
            self.keys[sequence, layer] = (k, v)
        if tokens:
            sequence.prefill_end()
        return sequence

    def remember(self, batch, layer, k, v):
        for row, sequence in enumerate(batch.rows):
            if sequence is None:
                continue
            old = self.keys.get((sequence, layer), (k[:0], v[:0]))
            self.keys[sequence, layer] = (np.concatenate([old[0], k[row:row + 1]]),
                                          np.concatenate([old[1], v[row:row + 1]]))

    def step(self, batch, seed, **options):
        """One step of random tokens. Result: out [layers, capacity, q_heads, dim], and the q."""
        capacity, outs, queries = batch.capacity, [], []
        with batch.step():
            for layer in range(LAYERS):
                k = rows((9, seed, layer, 0), capacity, KV_HEADS, DIM)
                v = rows((9, seed, layer, 1), capacity, KV_HEADS, DIM)
                q = rows((9, seed, layer, 2), capacity, Q_HEADS, DIM)
                batch.append(layer, self.array(k), self.array(v))
                self.remember(batch, layer, k, v)
                out = self.gpu.empty((capacity, Q_HEADS, DIM))
                batch.attend(layer, self.array(q), out=out, **options)
                outs.append(out.numpy())
                queries.append(q)
        return outs, queries

    def expected(self, sequence, layer, q, window=0, sinks=0):
        k, v = self.keys[sequence, layer]
        tokens = len(k)
        seen = np.ones(tokens, bool)
        if window:
            seen = np.arange(tokens) >= tokens - window
            seen[:sinks] = True
        k, v = np.repeat(k[seen], GROUP, 1), np.repeat(v[seen], GROUP, 1)
        scores = np.einsum("hd,thd->ht", q, k) / np.sqrt(DIM)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return np.einsum("ht,thd->hd", weights / weights.sum(1, keepdims=True), v)

    def check(self, batch, outs, queries, **options):
        for row, sequence in enumerate(batch.rows):
            for layer in range(LAYERS if sequence is not None else 0):
                want = self.expected(sequence, layer, queries[layer][row], **options)
                np.testing.assert_allclose(outs[layer][row], want, rtol=5e-3, atol=5e-3)


class Windows(RowsCase):
    def test_a_window_is_exact_and_trimming_changes_nothing_in_it(self):
        batch = self.model.batch(3)
        for row, tokens in enumerate((40, 5, 0)):
            batch.join(row, self.prompt(tokens, seed=row))
        for token in range(60):
            window = dict(window=20, sinks=2 if token < 15 else 0)
            self.check(batch, *self.step(batch, token, **window), **window)
            if token % 16 == 15:
                for sequence in batch.rows:
                    sequence.trim(20)
        live = [sequence.stats()["live_tokens_max"] for sequence in batch.rows]
        self.assertLessEqual(max(live), 20 + 16 + 16)
        self.assertGreater(batch.rows[0].stats()["slots_reused"], 0)

    def test_trim_keeps_what_it_is_told(self):
        sequence = self.prompt(100)
        sequence.trim(30)
        stats = sequence.stats()
        self.assertEqual((stats["live_tokens"], stats["tokens"]), (30, 100))
        sequence.trim(1000)
        self.assertEqual(sequence.stats()["live_tokens"], 30)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "at least 1"):
            sequence.trim(0)

    def test_unknown_options_are_refused(self):
        batch = self.model.batch(1)
        batch.join(0, self.prompt(3))
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "contradict"):
            self.step(batch, 1, silent=True, measure_only=True)


class SecondQueries(RowsCase):
    def scores_of_a_run(self, silent, measure_only):
        """Which tokens survive under small-attention, with further queries in every step."""
        batch = self.model.batch(1)
        sequence = self.prompt(0, policy="small-attention")
        batch.join(0, sequence)
        for token in range(90):
            with batch.step():
                for layer in range(LAYERS):
                    kv = self.array(rows((token, layer), 1, KV_HEADS, DIM))
                    batch.append(layer, kv, kv)
                    q = rows((token, layer, 5), 1, Q_HEADS, DIM) * 4
                    out = self.gpu.empty((1, Q_HEADS, DIM))
                    batch.attend(layer, self.array(q), out=out, measure_only=measure_only)
                    if silent is not None:
                        batch.attend(layer, self.array(-3 * q), out=out, silent=silent)
        probe = self.gpu.empty((1, Q_HEADS, DIM))
        with batch.step():
            for layer in range(LAYERS):
                kv = self.array(rows((999, layer), 1, KV_HEADS, DIM))
                batch.append(layer, kv, kv)
                batch.attend(layer, self.array(rows((998, layer), 1, Q_HEADS, DIM)), out=probe)
        self.assertGreater(sequence.stats()["evicted_slots"], 0)
        return probe.numpy()

    def test_a_silent_query_changes_no_choice_of_the_policy(self):
        alone = self.scores_of_a_run(None, False)
        np.testing.assert_array_equal(self.scores_of_a_run(True, False), alone)
        self.assertGreater(np.abs(self.scores_of_a_run(False, False) - alone).max(), 1e-3)

    def test_a_measuring_query_is_what_the_policy_saw(self):
        np.testing.assert_array_equal(self.scores_of_a_run(None, True),
                                      self.scores_of_a_run(None, False))

    def test_measuring_leaves_layers_out_that_no_policy_measures(self):
        batch = self.model.batch(1)
        batch.join(0, self.prompt(5, policy="full-f16"))
        outs, _ = self.step(batch, 0, measure_only=True)
        self.assertTrue(np.isnan(outs[0]).all())


class Copies(RowsCase):
    def test_a_copy_goes_on_as_its_source_does_and_apart_from_it(self):
        for policy in ("full-f16", "small-attention", "small-medoids"):
            with self.subTest(policy):
                batch = self.model.batch(3)
                source = self.prompt(37, policy=policy)
                batch.join(0, source)
                for token in range(45):
                    self.step(batch, token)
                copy = source.copy()
                self.assertEqual(copy.stats(), source.stats())
                batch.join(1, copy)
                third = source.copy()
                source_stats = None
                for token in range(45, 85):
                    capacity = batch.capacity
                    with batch.step():
                        for layer in range(LAYERS):
                            kv = np.repeat(rows((token, layer), 1, KV_HEADS, DIM), capacity, 0)
                            q = np.repeat(rows((token, layer, 1), 1, Q_HEADS, DIM), capacity, 0)
                            batch.append(layer, self.array(kv), self.array(kv))
                            out = self.gpu.empty((capacity, Q_HEADS, DIM))
                            batch.attend(layer, self.array(q), out=out)
                            values = out.numpy()
                            np.testing.assert_array_equal(values[0], values[1])
                    source_stats = source.stats()
                self.assertEqual(copy.stats(), source_stats)
                # What neither of them did after it changed the third one.
                self.assertEqual(third.stats()["tokens"], 37 + 45)
                source.close()
                batch.join(2, third)
                self.step(batch, 500)
                batch.close()
                copy.close()
                third.close()
                held = self.client.stats()
                self.assertEqual(held["client_granted_bytes"], held["client_leased_bytes"])

    def test_a_copy_that_does_not_fit_leaves_everything_as_it_was(self):
        batch = self.model.batch(1)
        big = self.prompt(2000)
        copies = []
        with self.assertRaises((thinkv.ExhaustedError, thinkv.QuotaExceededError)):
            for _ in range(200):
                copies.append(big.copy())
        copies.clear()
        batch.join(0, big)
        self.check(batch, *self.step(batch, 1))


class TakingBack(RowsCase):
    def test_a_reserve_that_is_taken_back_leaves_no_trace(self):
        batch = self.model.batch(2)
        for row in range(2):
            batch.join(row, self.prompt(14 + row, policy="k4v4-only", seed=row))
        for token in range(50):
            # Beside steps that flush and steps that do not.
            batch.reserve()
            batch.unreserve()
            self.step(batch, token)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "not run"):
            batch.unreserve()
        self.assertEqual([s.stats()["tokens"] for s in batch.rows], [64, 65])


class Growing(RowsCase):
    def test_a_batch_that_grows_takes_what_another_refuses(self):
        sequence = self.prompt(600)
        small = self.model.batch(1, tokens_max=32)
        small.join(0, sequence)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "raise tokens_max"):
            small.reserve()
        small.leave(0)
        batch = self.model.batch(1, tokens_max=32, grows=True)
        batch.join(0, sequence)
        for token in range(40):
            self.check(batch, *self.step(batch, token))

    def test_it_grows_in_the_middle_while_the_policy_measures(self):
        batch = self.model.batch(2, tokens_max=32, grows=True)
        batch.join(0, self.prompt(3, policy="small-attention"))
        for token in range(20):
            self.step(batch, token)
        batch.join(1, self.prompt(900, policy="small-attention", seed=3))
        for token in range(20, 90):
            outs, _ = self.step(batch, token)
            self.assertTrue(np.isfinite(outs).all())
        self.assertGreater(batch.rows[1].stats()["evicted_slots"], 0)

    def test_a_long_prompt_that_joins_later_is_counted(self):
        # The numbers of the last step do not know it.
        batch = self.model.batch(2, tokens_max=32)
        batch.join(0, self.prompt(4))
        self.step(batch, 0)
        batch.join(1, self.prompt(200))
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "raise tokens_max"):
            batch.reserve()


if __name__ == "__main__":
    os.environ.setdefault("THINKV_SOURCE_DIR", str(SOURCE))
    unittest.main()
