"""A host tier on the cuda backend: the answers and the statistics of the host backend, guesses, and
refusals that say why. On the emulated kernels and the fake driver, or on a GPU."""

import os
import unittest

import numpy as np
import thinkv
from test_thinkv_batch import DIM, KV_HEADS, LAYERS, Q_HEADS, SHAPE, rows
from test_thinkv_batch import CudaCase as _CudaCase
from thinkvd_case import SOURCE

PROMPT = 300
TIER_BYTES = KV_HEADS * ((PROMPT - 64) * DIM * 6 + DIM * 4)  # of layer 1; layer 0 is dense
SMALL = (SOURCE / "config/policies/tailorkv.yaml").read_text()


class Tier(_CudaCase):
    pool = "64MiB"

    def setUp(self):
        super().setUp()
        self.model = self.client.model(**SHAPE)

    def start_daemon(self):
        folder = self.folder / "policies"
        folder.mkdir(exist_ok=True)
        for name, size in (("tight", TIER_BYTES), ("too-tight", TIER_BYTES - 1)):
            text = SMALL.replace("name: tailorkv", f"name: {name}").replace("64GiB", f"{size}B")
            (folder / f"{name}.yaml").write_text(text)
        super(_CudaCase, self).start_daemon()

    @property
    def policies(self):
        return self.folder / "policies"

    def prefill(self, policy="tailorkv", tokens=PROMPT, text=0):
        sequence = self.model.sequence(policy=policy)
        for layer in range(LAYERS):
            k, v = (rows((text, kind, layer), tokens, KV_HEADS, DIM) for kind in range(2))
            sequence.prefill(layer, self.gpu.array(k), self.gpu.array(v))
        sequence.prefill_end()
        return sequence

    def step(self, batch, seed, guess=None, sequence=None):
        """What attention gives in the sparse layer; a new token that no query looks at much."""
        kv = self.gpu.array(np.zeros((batch.capacity, KV_HEADS, DIM), np.float32))
        out = self.gpu.empty((batch.capacity, Q_HEADS, DIM))
        q = rows(seed, 1, Q_HEADS, DIM).repeat(batch.capacity, axis=0)
        with batch.step():
            for layer in range(LAYERS):
                batch.append(layer, kv, kv)
                if guess is not None:
                    sequence.prefetch(layer, self.gpu.array(guess))
                batch.attend(layer, self.gpu.array(q), out=out)
        return out.numpy()

    def assert_rows(self, one, other, same=True):
        """Rows of a batch are cut differently between warps, so sums differ in their last bits."""
        error = np.abs(one - other).max()
        self.assertTrue(error < 1e-3 if same else error > 1e-2, error)

    def test_a_guess_chooses_for_one_step(self):
        hinted, plain = self.prefill(), self.prefill()
        batch = self.model.batch(2, tokens_max=4096)
        batch.join(0, hinted)
        batch.join(1, plain)
        for seed in range(3):
            q = rows(seed, 1, Q_HEADS, DIM)[0]
            guess = (q, rows(99, Q_HEADS, DIM), None)[seed]
            out = self.step(batch, seed, guess, hinted)
            self.assert_rows(out[0], out[1], seed != 1)

    def test_a_copy_has_rows_of_its_own(self):
        first, same = self.prefill(), self.prefill()
        second = first.copy()
        self.assertEqual(second.stats()["tier_bytes"], TIER_BYTES)
        batch = self.model.batch(3, tokens_max=4096)
        for row, sequence in enumerate((first, second, same)):
            batch.join(row, sequence)
        out = self.step(batch, 1)
        self.assert_rows(out[0], out[2])
        self.assert_rows(out[1], out[2])
        # The memory of the first one is another's now.
        first.close()
        batch.join(0, self.prefill(text=7))
        out = self.step(batch, 2)
        self.assert_rows(out[0], out[2], False)
        self.assert_rows(out[1], out[2])

    def test_host_bytes_bound_the_prompt(self):
        sequence = self.prefill("tight")
        self.assertEqual(sequence.stats()["tier_bytes"], TIER_BYTES)
        sequence.close()
        refused = self.model.sequence(policy="too-tight")
        kv = self.gpu.array(rows(1, PROMPT, KV_HEADS, DIM))
        refused.prefill(0, kv, kv)  # dense
        with self.assertRaisesRegex(thinkv.QuotaExceededError, "tier.host_bytes"):
            refused.prefill(1, kv, kv)
        self.assertEqual(refused.stats()["tier_bytes"], 0)
        refused.close()

    def test_what_it_holds_stays(self):
        sequence = self.prefill()
        for call in (lambda: sequence.evict([3, 8]), lambda: sequence.evict([243]),
                     lambda: sequence.trim(100)):
            with self.assertRaisesRegex(thinkv.Error, "host tier cannot be evicted"):
                call()
        with self.assertRaisesRegex(thinkv.Error, "chooses the formats itself"):
            sequence.quantize(0, 9, "k4v4")
        self.assertEqual(sequence.evict([3, 250]), 2 * LAYERS * KV_HEADS)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "in no step"):
            sequence.prefetch(1, self.gpu.array(rows(1, Q_HEADS, DIM)))

    def test_steps_launched_without_a_tier_refuse_it(self):
        batch = self.model.batch(2, tokens_max=4096)
        exact = self.model.sequence(policy="full-f16")
        batch.join(0, exact)
        self.step(batch, 1)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "host tier"):
            batch.join(1, self.prefill())
        batch.join(1, self.prefill(tokens=64))  # nothing of it is in the tier


if __name__ == "__main__":
    os.environ.setdefault("THINKV_SOURCE_DIR", str(SOURCE))
    unittest.main()
