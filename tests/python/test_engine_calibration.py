"""Modes, thresholds and labels on planted data; one class where there are no three modes."""

from __future__ import annotations

import unittest

import numpy as np
from engine_support import ROOT  # noqa: F401  (puts tools/ on the path)

from engine.calibration import calibrate, to_yaml
from engine.modes import find_modes
from engine.top_mass import dense_layers, describe, query_weights, top_mass_error

CENTRES = (0.55, 0.72, 0.90)  # execution, reasoning, transition
NAMES = ("execution", "reasoning", "transition")


def planted(seed: int, layers: int, tri_modal: list[int], steps: int = 600):
    """(trace [steps, layers], the thought of each step)."""
    random = np.random.default_rng(seed)
    thought = random.permutation(np.arange(steps) % 3)
    trace = 0.7 + 0.03 * random.standard_normal((steps, layers))
    for layer in tri_modal:
        trace[:, layer] = np.asarray(CENTRES)[thought] + 0.015 * random.standard_normal(steps)
    return trace.astype(np.float32), thought


class FindModes(unittest.TestCase):
    def setUp(self) -> None:
        self.random = np.random.default_rng(2)

    def normal(self, *centres: float, count: int = 300, width: float = 0.02) -> np.ndarray:
        return np.concatenate([centre + width * self.random.standard_normal(count)
                               for centre in centres])

    def test_three_planted_modes(self) -> None:
        found = find_modes(self.normal(*CENTRES))
        self.assertEqual(len(found.peaks), 3)
        np.testing.assert_allclose(found.peaks, CENTRES, atol=0.02)
        self.assertTrue(CENTRES[0] < found.valleys[0] < CENTRES[1] < found.valleys[1] < CENTRES[2])

    def test_fewer_and_more_modes_are_counted_as_they_are(self) -> None:
        for centres in ((0.5,), (0.4, 0.8), (0.1, 0.4, 0.7, 0.95)):
            self.assertEqual(len(find_modes(self.normal(*centres)).peaks), len(centres))

    def test_a_flat_density_is_not_tri_modal(self) -> None:
        for _ in range(20):
            self.assertNotEqual(len(find_modes(self.random.uniform(0, 1, 400)).peaks), 3)

    def test_one_broad_mode_with_ripples_is_one(self) -> None:
        for _ in range(20):
            self.assertEqual(len(find_modes(self.normal(0.6, count=400)).peaks), 1)

    def test_constant_samples_are_one_mode(self) -> None:
        self.assertEqual(find_modes(np.full(50, 0.25)).peaks, [0.25])

    def test_bad_samples_are_errors(self) -> None:
        for samples in (np.asarray([]), np.asarray([0.5]), np.asarray([0.5, np.nan, 0.6]),
                        np.zeros((4, 2))):
            with self.assertRaises(ValueError):
                find_modes(samples)


class Calibrate(unittest.TestCase):
    def test_planted_layers_and_labels_are_found(self) -> None:
        made = [planted(seed, 8, [1, 4, 6]) for seed in range(5)]
        found = calibrate([trace for trace, _ in made])
        self.assertEqual(found.classes, 3)
        self.assertEqual(found.layers, [1, 4, 6])
        self.assertTrue(CENTRES[0] < found.thresholds[0] < CENTRES[1])
        self.assertTrue(CENTRES[1] < found.thresholds[1] < CENTRES[2])
        trace, thought = planted(99, 8, [1, 4, 6])
        labels = [found.label(row) for row in trace]
        self.assertEqual(labels, [NAMES[index] for index in thought])

    def test_at_most_four_layers_are_kept(self) -> None:
        found = calibrate([planted(seed, 7, list(range(7)))[0] for seed in range(3)])
        self.assertEqual(len(found.layers), 4)

    def test_a_layer_that_is_tri_modal_on_few_prompts_is_not_kept(self) -> None:
        traces = [planted(seed, 3, [0, 2] if seed == 0 else [2])[0] for seed in range(4)]
        self.assertEqual(calibrate(traces).layers, [2])

    def test_two_modes_give_one_class(self) -> None:
        random = np.random.default_rng(0)
        traces = [np.where(random.random((500, 4)) < 0.5, 0.5, 0.8)
                  + 0.02 * random.standard_normal((500, 4)) for _ in range(4)]
        found = calibrate(traces)
        self.assertEqual((found.classes, found.layers, found.thresholds), (1, [], []))
        self.assertIn("One class only", found.note)
        self.assertEqual(found.label(traces[0][0]), "reasoning")

    def test_flat_data_give_one_class(self) -> None:
        random = np.random.default_rng(1)
        found = calibrate([random.uniform(0.3, 0.9, (400, 4)) for _ in range(4)])
        self.assertEqual(found.classes, 1)

    def test_no_traces_is_an_error(self) -> None:
        with self.assertRaises(ValueError):
            calibrate([])

    def test_nan_traces_are_an_error(self) -> None:
        trace = planted(0, 2, [0])[0]
        trace[3, 1] = np.nan  # a layer that the pool did not measure
        with self.assertRaises(ValueError):
            calibrate([trace])


class Yaml(unittest.TestCase):
    def test_three_classes(self) -> None:
        found = calibrate([planted(seed, 5, [0, 3])[0] for seed in range(4)])
        text = to_yaml(found, "tiny", 0.01, 128)
        self.assertIn("classes: 3\nlayers: [0, 3]\nthresholds: [0.", text)

    def test_one_class_names_no_layers(self) -> None:
        found = calibrate([planted(seed, 5, [])[0] for seed in range(4)])
        text = to_yaml(found, "tiny", 0.01, 128)
        self.assertIn("classes: 1\n", text)
        self.assertNotIn("layers:", text)
        self.assertNotIn("thresholds:", text)


class TopMass(unittest.TestCase):
    def test_the_error_falls_as_attention_peaks(self) -> None:
        random = np.random.default_rng(11)
        table = {0: 0.95, 1: 0.74, 2: 0.373, 3: 0.119, 4: 0.030}
        for sigma, expected in table.items():
            logits = sigma * random.standard_normal((64, 2000))
            weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
            self.assertAlmostEqual(top_mass_error(weights), expected, delta=0.015)

    def test_queries_see_what_came_before_them(self) -> None:
        random = np.random.default_rng(3)
        q = random.standard_normal((5, 4, 8), np.float32)
        k = random.standard_normal((40, 2, 8), np.float32)
        weights = query_weights(q, k)
        self.assertEqual(weights.shape, (4, 5, 40))
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-5)
        logits = k[:38, 1] @ q[2, 3] / np.sqrt(8)  # query row 2 of 5 is token 37
        np.testing.assert_allclose(weights[3, 2, :38],
                                   np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)
        self.assertEqual(weights[3, 2, 38:].max(), 0.0)

    def test_the_policy_line_names_the_layers_above_the_limit(self) -> None:
        errors = np.array([0.4, 0.2, 0.201, 0.01])
        self.assertEqual(dense_layers(errors), [0, 2])
        self.assertTrue(describe(errors).endswith("tier: {dense_layers: [0, 2]}"))


if __name__ == "__main__":
    unittest.main()
