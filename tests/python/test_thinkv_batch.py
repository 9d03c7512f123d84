"""Batches of the cuda backend against steps of the host backend: the same tokens, the same answers.

Without a GPU the library is libthinkv_emulated (the CUDA kernels on the CPU) and the driver the
fake one of tests/support; on a GPU both are the real ones.
"""

import math
import os
import unittest

import numpy as np
import thinkv
from gpu_arrays import Gpu
from thinkvd_case import SOURCE, ThinkvdCase

LAYERS, KV_HEADS, Q_HEADS, DIM = 2, 2, 6, 64
SHAPE = dict(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=DIM)
COUNTS = ("tokens", "prompt_tokens", "live_tokens", "live_tokens_max", "evicted_slots",
          "slots_reused", "demotions", "thoughts", "budget_tokens", "over_budget_steps",
          "tier_bytes")

POLICY = """\
name: small-tbe
description: short segments, so that a test sees demotions
formats:
  prompt: k4v4
  sinks: f16
  thoughts: {{reasoning: k4v4, execution: k4v4, transition: k4v2}}
rotation: hadamard
sinks: {{tokens: 4}}
segment: {{tokens: 32}}
labels: one class
evict: {{rule: tbe, schedule: [16, 8, 4], budget: 48, select: {select}}}
scores: {{decay: 0.9, every: 1, reduce: mean-probability}}
"""


# What is protected does not depend on attention, of which both sides have other last bits.
CLASSES = """\
name: small-classes
description: the newest tokens and those of two classes
formats:
  prompt: f16
  thoughts: {reasoning: f16, execution: f16, transition: f16}
rotation: none
labels: one class
evict: {rule: rank, budget: 40, grain: kv_head}
rules:
  - trigger: {prompt_end: true, every: 16}
    signal: {position: 1.0}
    budget: {rule: fixed}
    select: {rule: topk}
    protect: {classes: [0, 2]}
"""


def rows(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def tell(sequence, index, prompt, queries, array):
    """The prompt of a sequence, with so many of its queries, and classes of all tokens."""
    sequence.token_classes(np.random.default_rng((5, index)).integers(0, 8, prompt + 20).tolist())
    for layer in range(LAYERS if prompt else 0):
        sequence.prefill(layer, array(rows((0, index, layer), prompt, KV_HEADS, DIM)),
                         array(rows((1, index, layer), prompt, KV_HEADS, DIM)))
        if queries:
            sequence.prefill_queries(layer, array(rows((6, index, layer), min(queries, prompt),
                                                       Q_HEADS, DIM)))
    if prompt:
        sequence.prefill_end()


def on_host(model, policy, prompt, steps, index, queries, budget):
    """One sequence on the host backend. Result: its outputs [steps, layers] and statistics."""
    sequence = model.sequence(policy=policy, budget=budget)
    tell(sequence, index, prompt, queries, lambda x: x)
    outs = []
    for token in range(steps):
        with model.step([sequence]) as step:
            for layer in range(LAYERS):
                step.append(layer, rows((2, index, token, layer), 1, KV_HEADS, DIM),
                            rows((3, index, token, layer), 1, KV_HEADS, DIM))
                outs.append(step.attend(layer, rows((4, index, token, layer), 1, Q_HEADS, DIM),
                                        lse=True))
    return outs, sequence.stats()


class CudaCase(ThinkvdCase):
    backend = "cuda"

    def setUp(self):
        super().setUp()
        self.gpu = Gpu()
        self.client = thinkv.Client(self.socket, name="batch")
        self.addCleanup(self.client.close)

    def start_daemon(self):
        self.policies = self.folder / "policies"
        self.policies.mkdir()
        for select in ("attention", "medoids"):
            text = POLICY.format(select=select).replace("small-tbe", f"small-{select}")
            (self.policies / f"small-{select}.yaml").write_text(text)
        (self.policies / "small-classes.yaml").write_text(CLASSES)
        super().start_daemon()

    def config_text(self):
        text = super().config_text()
        text = text.replace("pool: {", f"pool: {{backend: {self.backend}, ")
        return text.replace("directories: [", f"directories: [{self.policies}, ")


class HostDaemon(CudaCase):
    backend = "host"


class SameAsHost(CudaCase):
    pool = "64MiB"

    def setUp(self):
        super().setUp()
        self.host = HostDaemon("setUp")
        self.host.setUp()
        self.addCleanup(self.host.doCleanups)

    def rows_of_batch(self, kind, token, layer, heads, indices):
        return np.concatenate([rows((kind, i, token, layer), 1, heads, DIM) for i in indices])

    def compare(self, policy, prompts, steps, tolerance=3e-3, queries=0, budget=None):
        model = self.client.model(**SHAPE)
        self.assertEqual(self.client.backend, "cuda")
        capacity = len(prompts) + 1  # a row stays empty
        batch = model.batch(capacity, tokens_max=1024)
        sequences = []
        for index, prompt in enumerate(prompts):
            sequence = model.sequence(policy=policy, budget=budget)
            tell(sequence, index, prompt, queries, self.gpu.array)
            batch.join(index, sequence)
            sequences.append(sequence)
        indices = range(capacity)
        outs = [[] for _ in prompts]
        for token in range(steps):
            with batch.step():
                for layer in range(LAYERS):
                    batch.append(
                        layer,
                        self.gpu.array(self.rows_of_batch(2, token, layer, KV_HEADS, indices)),
                        self.gpu.array(self.rows_of_batch(3, token, layer, KV_HEADS, indices)))
                    out = self.gpu.empty((capacity, Q_HEADS, DIM))
                    lse = self.gpu.empty((capacity, Q_HEADS))
                    q = self.gpu.array(self.rows_of_batch(4, token, layer, Q_HEADS, indices))
                    batch.attend(layer, q, out=out, lse=lse)
                    values, sums = out.numpy(), lse.numpy()
                    for index in range(len(prompts)):
                        outs[index].append((values[index], sums[index]))
                    np.testing.assert_array_equal(values[-1], 0)
                    self.assertTrue(np.all(sums[-1] == -math.inf))
        host_model = self.host.client.model(**SHAPE)
        for index, prompt in enumerate(prompts):
            want, stats = on_host(host_model, policy, prompt, steps, index, queries, budget)
            for (out, lse), (host_out, host_lse) in zip(outs[index], want):
                np.testing.assert_allclose(out, host_out[0], rtol=tolerance, atol=tolerance)
                np.testing.assert_allclose(lse, host_lse[0], rtol=1e-3, atol=1e-3)
            mine = sequences[index].stats()
            for name in COUNTS:
                self.assertEqual(mine[name], stats[name], f"{name} of sequence {index}")
            self.assertGreater(mine["bytes_held"], 0)
        for sequence in sequences:
            sequence.close()
        batch.close()
        model.close()
        self.assertEqual(self.client.stats()["client_granted_bytes"]
                         - self.client.stats()["client_leased_bytes"], 0)

    def test_16_bit_pages(self):
        self.compare("full-f16", [0, 1, 33], 20)

    def test_4_bit_pages(self):
        self.compare("k4v4-only", [17, 40], 36)

    def test_evictions_by_attention(self):
        self.compare("small-attention", [0, 20], 120)

    def test_evictions_by_medoids(self):
        self.compare("small-medoids", [5], 130)

    def test_the_papers_formats(self):
        self.compare("nvfp4-only", [20], 20)

    def test_coded_streams(self):
        # Both flush and code in the steps; the first is too short for a codebook of its prompt.
        self.compare("kvcomp", [100, 330], 70)

    def test_blocks_of_tokens(self):
        for policy in ("kivi", "think", "xquant"):
            with self.subTest(policy):
                self.compare(policy, [0, 210], 66)

    def test_rules_that_are_told_the_queries(self):
        for policy in ("snapkv", "uncomp", "think"):
            with self.subTest(policy):
                self.compare(policy, [12, 140], 20, queries=40, budget=48)

    def test_rules_that_are_told_the_classes(self):
        self.compare("small-classes", [0, 90, 150], 40)

    def test_a_host_tier(self):
        self.compare("tailorkv", [0, 300, 65, 12], 36)


class CodedStreams(CudaCase):
    pool = "16MiB"

    def test_a_prompt_holds_less_than_half_of_its_16_bits_and_blocks_go_whole(self):
        model = self.client.model(**SHAPE)
        sequence = model.sequence(policy="kvcomp")
        for layer in range(LAYERS):
            sequence.prefill(layer, self.gpu.array(rows((0, layer), 1024, KV_HEADS, DIM)),
                             self.gpu.array(rows((1, layer), 1024, KV_HEADS, DIM)))
        sequence.prefill_end()
        stats = sequence.stats()
        self.assertEqual(stats["live_tokens"], 1024)
        self.assertLess(stats["bytes_held"], 0.45 * stats["bytes_f16"])
        # What was promised for 16-bit rows is not kept.
        granted = self.client.stats()["client_granted_bytes"]
        self.assertLess(granted, 0.75 * stats["bytes_f16"])
        self.assertEqual(sequence.evict(range(64)), 64 * LAYERS * KV_HEADS)
        self.assertLess(sequence.stats()["bytes_held"], stats["bytes_held"])
        with self.assertRaisesRegex(thinkv.UnsupportedError, "name all 64"):
            sequence.evict([70])
        with self.assertRaisesRegex(thinkv.UnsupportedError, "chooses the formats itself"):
            sequence.quantize(0, 5, "k2v2")
        with self.assertRaisesRegex(thinkv.UnsupportedError, "whole coded blocks"):
            sequence.trim(100)


class Errors(CudaCase):
    pool = "8MiB"

    def setUp(self):
        super().setUp()
        self.model = self.client.model(**SHAPE)

    def step(self, batch, token=0):
        capacity = batch.capacity
        with batch.step():
            for layer in range(LAYERS):
                kv = self.gpu.array(rows(token, capacity, KV_HEADS, DIM))
                batch.append(layer, kv, kv)
                batch.attend(layer, self.gpu.array(rows(token, capacity, Q_HEADS, DIM)),
                             out=self.gpu.empty((capacity, Q_HEADS, DIM)))

    def test_wrong_tensors_say_what_is_expected(self):
        batch = self.model.batch(2)
        kv = self.gpu.array(rows(1, 2, KV_HEADS, DIM))
        with self.assertRaisesRegex(TypeError, "k: lies on device .*expected memory of the pool"):
            batch.append(0, rows(1, 2, KV_HEADS, DIM), kv)
        with self.assertRaisesRegex(ValueError, r"v: shape is \[3, 2, 64\], expected \[2, 2, 64\]"):
            batch.append(0, kv, self.gpu.array(rows(1, 3, KV_HEADS, DIM)))
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "layer 2 of a model with 2"):
            batch.append(2, kv, kv)

    def test_rows_are_taken_once(self):
        batch, other = self.model.batch(2), self.model.batch(1)
        first, second = self.model.sequence(), self.model.sequence()
        batch.join(0, first)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "row 0 is taken"):
            batch.join(0, second)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "in a batch already"):
            other.join(0, first)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "row 2 of a batch with 2 rows"):
            batch.join(2, second)
        batch.leave(0)
        other.join(0, first)
        self.step(other)
        self.assertEqual(first.stats()["tokens"], 1)

    def test_steps_and_batches_are_of_their_backends(self):
        with self.assertRaisesRegex(thinkv.UnsupportedError, "thinkv_batch_open"):
            self.model.step([self.model.sequence()])

    def test_a_closed_sequence_leaves_its_row_and_pages_go_back(self):
        batch = self.model.batch(1)
        for _ in range(3):
            sequence = self.model.sequence(policy="k4v4-only")
            batch.join(0, sequence)
            for token in range(20):
                self.step(batch, token)
            sequence.close()
        batch.close()
        stats = self.client.stats()
        self.assertEqual(stats["client_granted_bytes"], stats["client_leased_bytes"])

    def test_full_pool_refuses_the_step_and_recovers(self):
        batch = self.model.batch(2, tokens_max=100_000)
        hog, small = (self.model.sequence(policy="full-f16") for _ in range(2))
        batch.join(0, hog)
        with self.assertRaises((thinkv.ExhaustedError, thinkv.QuotaExceededError)):
            for _ in range(1000):
                tokens = 4000
                kv = self.gpu.array(rows(1, tokens, KV_HEADS, DIM))
                filler = self.model.sequence(policy="full-f16")
                self.fillers = getattr(self, "fillers", [])
                self.fillers.append(filler)
                for layer in range(LAYERS):
                    filler.prefill(layer, kv, kv)
        self.fillers.clear()
        self.step(batch)
        self.assertEqual(hog.stats()["tokens"], 1)
        self.assertEqual(small.stats()["tokens"], 0)

    def test_a_list_too_small_is_refused_before_anything_runs(self):
        batch = self.model.batch(1, tokens_max=32)
        sequence = self.model.sequence(policy="full-f16")
        kv = self.gpu.array(rows(1, 200, KV_HEADS, DIM))
        for layer in range(LAYERS):
            sequence.prefill(layer, kv, kv)
        sequence.prefill_end()
        batch.join(0, sequence)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "raise tokens_max"):
            batch.reserve()
        self.assertEqual(sequence.stats()["tokens"], 200)


if __name__ == "__main__":
    os.environ.setdefault("THINKV_SOURCE_DIR", str(SOURCE))
    unittest.main()
