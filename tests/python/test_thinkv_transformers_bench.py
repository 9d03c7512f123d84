"""The filled caches of `bench transformers`, on the emulated kernels."""

import os
import sys
import unittest
from unittest import mock

try:
    import torch
    import transformers  # noqa: F401
except ImportError as missing:
    raise unittest.SkipTest(f"needs torch and transformers: {missing}") from None

from thinkv import _arrays

# As in test_thinkv_transformers.py: CPU tensors stand for the GPU's.
os.environ["THINKV_FAKE_CUDA_ADOPTS"] = "1"
_arrays.lies_on_gpu = lambda tensor: True

from transformers_cases import SOURCE, TransformersCase  # noqa: E402

sys.path.insert(0, str(SOURCE))

from tools.bench.gpu import transformers_systems as systems  # noqa: E402


class FilledCaches(TransformersCase):
    pool = "16MiB"

    def setUp(self):
        super().setUp()
        self.llama = self.model("llama", dtype=torch.bfloat16)

    def ours(self, policy, batch, tokens):
        return systems.Ours(self.llama, self.client, batch, tokens, policy, graph=False)

    def test_rows_hold_their_tokens_and_are_stepped(self):
        held = {}
        for policy in ("full-f16", "k4v4-only"):
            system = self.ours(policy, 3, 200)
            held[policy] = system.bytes_held()
            system.step()
            self.assertEqual([201] * 3, [row["tokens"] for row in system.cache.stats()])
            self.assertTrue(bool(system.decode.logits.isfinite().all()))
            system.close()
            self.assertEqual(0, self.pages_in_use())
        self.assertGreater(held["full-f16"], 2.5 * held["k4v4-only"])

    def test_a_budget_is_reached_by_generating_and_rows_are_in_all_phases(self):
        with mock.patch.object(systems, "BUDGET", 128):
            system = self.ours("thinkv", 4, 700)
            system.step()
        rows = system.cache.stats()
        # The first row joined at once; each next one a quarter of a period later.
        self.assertEqual([701 - 32 * row for row in range(4)], [row["tokens"] for row in rows])
        for row in rows:
            self.assertGreater(row["evicted_slots"], 0)
            self.assertLessEqual(row["live_tokens"], systems.PROMPT + 128 + systems.PERIOD)
        system.close()

    def test_what_does_not_fit_leaves_nothing_behind(self):
        with self.assertRaises(MemoryError):
            self.ours("full-f16", 8, 3000)
        self.assertEqual(0, self.pages_in_use())
        self.ours("full-f16", 2, 100).close()


class Peers(unittest.TestCase):
    """Transformers' caches are filled to where they say that they are."""

    def test_lengths(self):
        from tiny_models import tiny_model

        torch.set_grad_enabled(False)
        model = tiny_model("llama", dtype=torch.bfloat16)
        system = systems.Dynamic(model, 2, 50)
        system.step()
        self.assertEqual(51, system.cache.get_seq_length())
        self.assertEqual(2 * 2 * 51 * 2 * 64 * 2 * 2, system.bytes_held())
        with mock.patch("torch.compile", lambda forward, **_: forward):
            system = systems.StaticCompiled(model, 2, 50)
        system.step()
        self.assertEqual(51, int(system.cache.get_seq_length()))
        self.assertEqual([[51], [51]], system.positions.tolist())


if __name__ == "__main__":
    unittest.main()
