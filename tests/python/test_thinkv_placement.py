"""Policies with streams or a host tier through a real thinkvd: exact attention over what they keep,
real bytes, and refusals that say why."""

import unittest

from thinkvd_case import ThinkvdCase

import thinkv

try:
    import numpy as np
except ImportError:
    raise unittest.SkipTest("numpy is not installed") from None

LAYERS, GROUP, KV_HEADS, DIM = 2, 2, 2, 64
Q_HEADS = GROUP * KV_HEADS


def rows(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def attention(q, k, v):
    """q [heads, d], k and v [tokens, kv_heads, d]: exact, in double."""
    out = np.empty(q.shape)
    for head in range(Q_HEADS):
        keys, values = k[:, head // GROUP].astype(float), v[:, head // GROUP].astype(float)
        logits = keys @ q[head].astype(float) / np.sqrt(DIM)
        weights = np.exp(logits - logits.max())
        out[head] = weights @ values / weights.sum()
    return out


class Placement(ThinkvdCase):
    def setUp(self):
        super().setUp()
        self.client = thinkv.Client(self.socket, name="placement")
        self.addCleanup(self.client.close)
        self.model = self.client.model(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS,
                                       head_dim=DIM)

    def prompt(self, sequence, k, v):
        for layer in range(LAYERS):
            sequence.prefill(layer, k, v)
        sequence.prefill_end()

    def step(self, sequence, seed, hint=False):
        """One step: what attention gave in the last layer, and its query, key and value."""
        k, v, q = rows(seed, 1, KV_HEADS, DIM), rows(seed + 1, 1, KV_HEADS, DIM), rows(
            seed + 2, 1, Q_HEADS, DIM)
        with self.model.step([sequence]) as step:
            for layer in range(LAYERS):
                step.append(layer, k, v)
                if hint:
                    sequence.prefetch(layer, q[0])
                out = step.attend(layer, q)
        return np.asarray(out)[0].copy(), q[0], k, v

    def test_kvcomp_is_near_the_exact_cache_in_a_third_of_its_bytes(self):
        k, v = rows(1, 2048, KV_HEADS, DIM), rows(2, 2048, KV_HEADS, DIM)
        with self.model.sequence(policy="kvcomp") as sequence:
            self.prompt(sequence, k, v)
            for index in range(80):
                out, q, new_k, new_v = self.step(sequence, 10 + 3 * index)
                k, v = np.concatenate([k, new_k]), np.concatenate([v, new_v])
            exact = attention(q, k, v)
            # Steps of a tenth of the range: errors of about 0.15 a value, averaged by attention.
            self.assertLess(np.abs(out - exact).max(), 0.03)
            self.assertGreater(np.abs(out - exact).max(), 0.0)
            stats = sequence.stats()
            self.assertLess(stats["bytes_held"], 0.40 * stats["bytes_f16"])
            self.assertEqual(stats["live_tokens"], 2128)
            self.assertEqual(sequence.evict(range(64)), 64 * LAYERS * KV_HEADS)
            with self.assertRaisesRegex(thinkv.Error, "name all 64"):
                sequence.evict([70])
            with self.assertRaisesRegex(thinkv.Error, "chooses the formats itself"):
                sequence.quantize(0, 5, "k2v2")

    def test_tailorkv_attends_the_rows_that_its_choice_names(self):
        n = 600
        k, v = rows(1, n, KV_HEADS, DIM), rows(2, n, KV_HEADS, DIM)
        half_k, half_v = (x.astype(np.float16).astype(np.float32) for x in (k, v))
        for hint in (False, True):
            with self.model.sequence(policy="tailorkv") as sequence:
                self.prompt(sequence, k, v)
                out, q, new_k, new_v = self.step(sequence, 5, hint)
                for kv_head in range(KV_HEADS):
                    heads = slice(kv_head * GROUP, (kv_head + 1) * GROUP)
                    mean = q[heads].mean(axis=0)
                    middle = half_k[8:n - 56, kv_head]
                    channels = np.argsort(-np.abs(mean) * np.abs(middle).max(axis=0))[:8]
                    best = 8 + np.argsort(-(middle[:, channels] @ mean[channels]))[:128]
                    kept = np.concatenate([np.arange(8), best, np.arange(n - 56, n)])
                    seen_k = np.concatenate([half_k[kept], new_k])
                    seen_v = np.concatenate([half_v[kept], new_v])
                    exact = attention(q, seen_k, seen_v)[heads]
                    self.assertLess(np.abs(out[heads] - exact).max(), 2e-3)
                stats = sequence.stats()
                self.assertEqual(stats["tier_bytes"], KV_HEADS * ((n - 64) * DIM * 6 + DIM * 4))
                self.assertLess(stats["bytes_held"], 0.5 * stats["bytes_f16"])
                with self.assertRaisesRegex(thinkv.Error, "host tier cannot be evicted"):
                    sequence.evict([100])
                with self.assertRaisesRegex(thinkv.Error, "no step"):
                    sequence.prefetch(1, q)


if __name__ == "__main__":
    unittest.main()
