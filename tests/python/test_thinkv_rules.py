"""Policies with rules through a real thinkvd: the kept tokens are those of a dense reference, and
the hints that rules read (queries of the prompt, token classes) are checked and take effect."""

import unittest

from thinkvd_case import ThinkvdCase

import thinkv

try:
    import numpy as np
except ImportError:
    raise unittest.SkipTest("numpy is not installed") from None

LAYERS, GROUP, KV_HEADS, DIM = 2, 3, 2, 64
Q_HEADS = GROUP * KV_HEADS
PROMPT, WINDOW, BUDGET = 150, 32, 64


def rows(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def half(x):
    return x.astype(np.float16).astype(np.float32)


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def snapkv(keys, queries):
    """SnapKV's choice for one kv head: keys [n, dim], queries [window, group, dim]."""
    logits = np.einsum("wgd,nd->wgn", queries, keys) / np.sqrt(DIM)
    for row in range(WINDOW):
        logits[row, :, PROMPT - WINDOW + row + 1:] = -np.inf
    score = softmax(logits).mean(axis=(0, 1))[:PROMPT - WINDOW]
    padded = np.pad(score, 2)
    pooled = np.array([padded[i:i + 5].mean() for i in range(len(score))])
    best = np.argsort(pooled)[len(pooled) - (BUDGET - WINDOW):]
    return np.concatenate([np.sort(best), np.arange(PROMPT - WINDOW, PROMPT)])


def affine(x, axis, bits=2):
    """KIVI's codes of groups along an axis, decoded again."""
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    levels = 2**bits - 1
    codes = np.minimum(np.floor((x - low) * (levels / (high - low)) + 0.5), levels)
    return half(low) + codes * half((high - low) / levels)


def kivi(keys, values, tokens):
    """The first tokens of one kv head in blocks of 44; [n, dim] each."""
    keys, values = keys.copy(), values.copy()
    for first in range(0, tokens, 44):
        block = slice(first, first + 44)
        keys[block] = affine(keys[block], axis=0)
        values[block] = affine(values[block].reshape(44, 2, 32), axis=2).reshape(44, DIM)
    return keys, values


def think(keys, queries, tokens):
    """The first tokens of one kv head without the 24 channels of the least energy."""
    energy = (keys[:PROMPT]**2).sum(axis=0) * (queries**2).sum(axis=(0, 1))
    keys = keys.copy()
    keys[:tokens, np.argsort(energy)[:24]] = 0.0
    return keys


class Rules(ThinkvdCase):
    def setUp(self):
        super().setUp()
        self.client = thinkv.Client(self.socket, name="rules")
        self.addCleanup(self.client.close)
        self.model = self.client.model(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS,
                                       head_dim=DIM)
        self.keys = [rows((1, layer), PROMPT, KV_HEADS, DIM) for layer in range(LAYERS)]
        self.values = [rows((2, layer), PROMPT, KV_HEADS, DIM) for layer in range(LAYERS)]
        self.queries = [rows((3, layer), WINDOW, Q_HEADS, DIM) for layer in range(LAYERS)]

    def prompt(self, sequence, queries=True):
        for layer in range(LAYERS):
            sequence.prefill(layer, self.keys[layer], self.values[layer])
            if queries:
                sequence.prefill_queries(layer, self.queries[layer])
        sequence.prefill_end()

    def step(self, sequence, token):
        """One step; the outputs of all layers and what went in."""
        results = []
        with self.model.step([sequence]) as step:
            for layer in range(LAYERS):
                k, v = (rows((kind, token, layer), 1, KV_HEADS, DIM) for kind in (4, 5))
                q = rows((6, token, layer), 1, Q_HEADS, DIM)
                step.append(layer, k, v)
                results.append((k, v, q, step.attend(layer, q)))
        return results

    def attends_to(self, policy, dense, budget=None):
        """A step after the prompt is the dense attention over what `dense` makes of the rows."""
        sequence = self.model.sequence(policy=policy, budget=budget)
        self.prompt(sequence)
        if budget is not None:
            self.assertEqual(sequence.stats()["live_tokens"], budget)
        for layer, (k, v, q, out) in enumerate(self.step(sequence, 0)):
            for head in range(KV_HEADS):
                group = slice(head * GROUP, (head + 1) * GROUP)
                keys = half(np.concatenate([self.keys[layer][:, head], k[:, head]]))
                values = half(np.concatenate([self.values[layer][:, head], v[:, head]]))
                keys, values = dense(keys, values, self.queries[layer][:, group])
                exact = softmax(q[0, group] @ keys.T / np.sqrt(DIM)) @ values
                np.testing.assert_allclose(out[0, group], exact, rtol=2e-4, atol=2e-5)
        return sequence.stats()

    def test_snapkv_keeps_what_a_dense_reference_keeps(self):
        def kept(keys, values, queries):
            rows = np.append(snapkv(keys[:PROMPT], queries), PROMPT)
            return keys[rows], values[rows]

        self.attends_to("snapkv", kept, BUDGET)

    def test_kivi_attends_to_the_codes_of_a_dense_reference(self):
        held = self.attends_to("kivi", lambda k, v, q: kivi(k, v, (PROMPT - 32) // 44 * 44))
        self.assertEqual(held["live_tokens"], PROMPT + 1)
        full = self.attends_to("full-f16", lambda k, v, q: (k, v))
        self.assertLess(held["bytes_held"], full["bytes_held"])

    def test_think_attends_without_the_channels_of_a_dense_reference(self):
        self.attends_to("think", lambda k, v, q: (think(k, q, (PROMPT - 32) // 10 * 10), v))

    def test_without_queries_the_prompt_is_cut_after_the_first_steps(self):
        sequence = self.model.sequence(policy="snapkv", budget=BUDGET)
        self.prompt(sequence, queries=False)
        self.assertEqual(sequence.stats()["live_tokens"], PROMPT)
        for token in range(WINDOW):
            self.step(sequence, token)
        self.assertEqual(sequence.stats()["live_tokens"], BUDGET)

    def test_token_classes_protect_tokens(self):
        kept = []
        for classes in ([], [0] * 40 + [1] * 30):
            sequence = self.model.sequence(policy="fastgen", budget=5)
            sequence.token_classes(classes)
            for layer in range(LAYERS):
                keys = self.keys[layer] * 0.0
                keys[:4] = 4.0  # the first four tokens take all attention
                sequence.prefill(layer, keys, self.values[layer])
                sequence.prefill_queries(layer, np.abs(self.queries[layer]))
            sequence.prefill_end()
            kept.append(sequence.stats()["live_tokens"])
        self.assertEqual(kept[1] - kept[0], 30 - (kept[0] - 4))

    def test_a_budget_of_all_tokens_changes_no_bit(self):
        exact = self.model.sequence(policy="full")
        ruled = self.model.sequence(policy="r-kv", budget=4096)
        self.prompt(exact)
        self.prompt(ruled)
        for token in range(140):
            pairs = zip(self.step(exact, token), self.step(ruled, token), strict=True)
            for (*_, wanted), (*_, got) in pairs:
                np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))

    def test_hints_are_checked(self):
        sequence = self.model.sequence(policy="snapkv", budget=BUDGET)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "between prefill"):
            sequence.prefill_queries(0, self.queries[0])
        sequence.prefill(0, self.keys[0], self.values[0])
        with self.assertRaisesRegex(ValueError, "q"):
            sequence.prefill_queries(0, self.queries[0][:, :2])
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "at least 1, at most all"):
            sequence.prefill_queries(0, rows(9, PROMPT + 1, Q_HEADS, DIM))
        sequence.prefill_queries(0, self.queries[0].astype(np.float16))
        with self.assertRaises(thinkv.InvalidArgumentError):
            sequence.prefill_queries(0, self.queries[0])
        sequence.prefill(1, self.keys[1], self.values[1])
        with self.assertRaises(thinkv.InvalidArgumentError):
            sequence.prefill_end()  # the queries of layer 1 are missing
        sequence.prefill_queries(1, self.queries[1].astype(np.float16))
        sequence.prefill_end()
        with self.assertRaises(ValueError):
            sequence.token_classes([256])
        with self.assertRaises(thinkv.InvalidArgumentError):
            sequence.token_classes([1], first=0xFFFFFFFF)

    def test_other_policies_ignore_the_hints(self):
        sequence = self.model.sequence(policy="full")
        sequence.token_classes([1, 2, 3])
        self.prompt(sequence)
        self.assertEqual(sequence.stats()["live_tokens"], PROMPT)


if __name__ == "__main__":
    unittest.main()
