"""The judge: its search, its scores, its texts, its rows, and that a killed run goes on."""

from __future__ import annotations

import json
import pathlib
import tempfile
import unittest
from unittest import mock

import numpy as np
from engine_support import TINY, FakePoolModel, tiny_model  # puts tools/ on the path

from engine.batch import TILE_ROWS, TiledCache, for_batches
from engine.caches import PoolCache
from eval import free, judge, policies, reference, scores, search, table, task, texts
from eval.store import Store, key_of

EVICTING = "name: p\nevict: {rule: tbe, budget: 64}\n"


def policy(name: str = "p", text: str = EVICTING) -> policies.Policy:
    return policies.Policy(name, text, policies.Knob("budget"))


def settle(size, count: int, targets: list[float], guesses: list[int] | None = None):
    """Runs a search against bytes given by a function; result: it, and how many were measured."""
    found, measured = search.Search(count, targets, guesses), 0
    while wanted := found.wanted():
        measured += len(wanted)
        found.add({index: size(index) for index in wanted})
    return found, measured


class PointSearch(unittest.TestCase):
    def test_it_is_within_the_point_and_near_it(self) -> None:
        for size in (lambda i: 5000 + 90 * i, lambda i: 2000 + 1024 * (i // 7),
                     lambda i: 3000 + 0.4 * i * i):
            targets = [12_000, 24_000, 50_000]
            found, measured = settle(size, 400, targets)
            for target in targets:
                index = found.found(target)
                self.assertLessEqual(size(index), target)
                if size(index) < search.TIGHT * target and index < 399:
                    self.assertGreater(size(index + 1), target)
            self.assertLess(measured, 25)

    def test_a_point_below_every_setting_is_not_reached(self) -> None:
        found, _ = settle(lambda i: 5000 + i, 400, [4000.0])
        self.assertIsNone(found.found(4000.0))
        self.assertEqual(found.least(), 5000)

    def test_a_point_above_every_setting_takes_the_last(self) -> None:
        found, _ = settle(lambda i: 10 * i, 100, [1e9])
        self.assertEqual(found.found(1e9), 99)

    def test_a_good_guess_ends_soon(self) -> None:
        found, measured = settle(lambda i: 100 * i, 400, [10_000.0], [99])
        self.assertLess(measured, 6)
        self.assertGreaterEqual(found.found(10_000.0), 99)

    def test_of_equal_bytes_the_last_setting_is_taken(self) -> None:
        size = lambda i: 1000 * (i // 20)  # noqa: E731
        found, _ = settle(size, 400, [5_000.0], [101])
        self.assertGreaterEqual(found.found(5_000.0), 119 - 400 * search.EDGE)

    def test_a_knob_without_effect_ends(self) -> None:
        found, measured = settle(lambda i: 7000, 400, [6000.0, 8000.0])
        self.assertIsNone(found.found(6000.0))
        self.assertEqual(found.found(8000.0), 399)
        self.assertLess(measured, 30)

    def test_it_is_deterministic(self) -> None:
        size = lambda i: 2000 + 1024 * ((i * 7) // 50)  # noqa: E731
        self.assertEqual(settle(size, 300, [9000.0])[0].found(9000.0),
                         settle(size, 300, [9000.0])[0].found(9000.0))


class Divergence(unittest.TestCase):
    def test_it_is_the_sum_over_the_vocabulary(self) -> None:
        random = np.random.default_rng(3)
        steps, runs, vocab = 6, 4, 300
        exact = random.normal(0, 4, (steps, vocab)).astype(np.float32)
        mine = exact[:, None] + random.normal(0, [[[1e-3], [0.1], [1], [3]]], (steps, runs, vocab))
        mine = mine.astype(np.float32)
        meter = scores.Scores(runs, steps)
        for step in range(steps):
            target = int(random.integers(vocab)) if step < steps - 1 else None
            meter.add(scores.Exact.of(exact[step]), mine[step], target, False)

        def log_softmax(rows: np.ndarray) -> np.ndarray:
            wide = rows.astype(np.float64)
            return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))

        p = log_softmax(exact)[:, None]
        q = log_softmax(mine)
        expected = (np.exp(p) * (p - q)).sum(axis=-1)
        for run in range(runs):
            found = meter.quality(run)
            self.assertAlmostEqual(found.kl, expected[:, run].mean(), delta=2e-6)
            self.assertAlmostEqual(found.kl_late, expected[3:, run].mean(), delta=2e-6)
            self.assertEqual(found.top1, np.mean(exact.argmax(1) == mine[:, run].argmax(1)))

    def test_needles_and_perplexity_count_the_tokens_that_follow(self) -> None:
        exact, mine = np.log([[0.7, 0.2, 0.1]]), np.log([[0.2, 0.5, 0.3]])
        meter = scores.Scores(1, 3)
        for target, asked in ((0, True), (1, True), (None, False)):
            meter.add(scores.Exact.of(exact[0].astype(np.float32)), mine.astype(np.float32),
                      target, asked)
        found = meter.quality(0)
        self.assertEqual((found.needle, found.needle_full), (0.5, 0.5))
        self.assertAlmostEqual(found.ppl, (0.2 * 0.5) ** -0.5, places=4)
        self.assertAlmostEqual(found.ppl_full, (0.7 * 0.2) ** -0.5, places=4)


class Texts(unittest.TestCase):
    def test_both_splits_have_the_same_kinds_and_no_file_in_common(self) -> None:
        files = texts.shipped()
        kinds = {split: {file.stem for file in files if file.parent.name == split}
                 for split in texts.SPLITS}
        self.assertEqual(kinds["tune"], {"prose", "code", "cot", "needle"})
        self.assertEqual(kinds["tune"], kinds["held-out"])
        lines = [{line for line in file.read_text().splitlines() if len(line) > 100}
                 for split in texts.SPLITS for file in files if file.parent.name == split]
        for tune in lines[:4]:
            for held_out in lines[4:]:
                self.assertFalse(tune & held_out)

    def test_answers_are_marked_and_the_marks_are_gone(self) -> None:
        class Letters:
            def encode(self, text: str) -> list[int]:
                return [ord(letter) for letter in text]

        tokens, answers = texts.encode("ab\u27e6cd\u27e7e", Letters())
        self.assertEqual((tokens, answers), ([97, 98, 99, 100, 101], {2, 3}))
        for wrong in ("a\u27e6b", "a\u27e7b", "\u27e6a\u27e6b\u27e7", "\u27e6\u27e7"):
            with self.assertRaises(ValueError):
                texts.pieces(wrong)


class Knobs(unittest.TestCase):
    def read(self, text: str) -> policies.Policy:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "p.yaml"
            file.write_text(text)
            return policies.read(file)

    def test_a_new_file_is_a_new_row(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "p.yaml").write_text(EVICTING)
            found = policies.discover(folders=[pathlib.Path(folder)])
        self.assertEqual([each.name for each in found], ["p"])
        self.assertEqual(policies.Run(found[0], 64.0).sequence(), {"policy": "p", "budget": 64})

    def test_every_shipped_policy_is_known(self) -> None:
        names = {each.name for each in policies.discover()}
        self.assertLessEqual({"thinkv", "thinkv-paper", "full-f16", "k2v2-only"}, names)

    def test_a_declared_knob_is_written_into_a_file_of_its_own(self) -> None:
        found = self.read("# eval: knob a.0.t from 2 to 0.5\nname: p\na: [{t: 1.0}]\n")
        values = found.knob.values(100)
        self.assertEqual((values[0], values[-1]), (2.0, 0.5))
        rough = self.read("# eval: knob a.0.t from 0.35 to 0.02\nname: p\na: [{t: 0.1}]\n")
        self.assertTrue(all(len(str(value)) <= 9 for value in rough.knob.values(100)))
        name, text = policies.Run(found, 1.25).file()
        self.assertIn("t: 1.25", text)
        self.assertIn(f"name: {name}", text)

    def test_wrong_files_name_what_is_wrong(self) -> None:
        with self.assertRaisesRegex(policies.PolicyError, "there is no 'b'"):
            self.read("# eval: knob a.b from 1 to 2\nname: p\na: {}\n")
        with self.assertRaisesRegex(policies.PolicyError, "name"):
            self.read("name: q\n")
        with self.assertRaisesRegex(policies.PolicyError, "nowhere"):
            policies.discover(["nowhere"])


class Rows(unittest.TestCase):
    text = texts.Text("prose", "tune", list(range(200)), frozenset())

    def key(self, **changes) -> str:
        values = {"policy": policy(), "text": self.text, "mode": "short", "point": 0.25,
                  "library": "a", "tile": 32, **changes}
        return key_of(**values)

    def test_what_decides_a_row_is_in_its_key(self) -> None:
        keys = [self.key(), self.key(policy=policy(text=EVICTING + "# other\n")),
                self.key(point=0.12), self.key(mode="long"), self.key(library="b"),
                self.key(tile=12),
                self.key(text=texts.Text("prose", "held-out", list(range(200)), frozenset()))]
        self.assertEqual(len(set(keys)), len(keys))
        self.assertEqual(self.key(), self.key())

    def test_a_killed_run_goes_on_after_its_last_whole_row(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "rows.jsonl"
            Store(file, resume=False).add([{"key": "a", "kl": 1.0}, {"key": "b", "kl": 2.0}])
            with open(file, "a") as half:
                half.write('{"key": "c", "k')
            again = Store(file, resume=True)
            self.assertTrue("a" in again and "b" in again and "c" not in again)
            again.add([{"key": "c", "kl": 3.0}])
            self.assertEqual([json.loads(line)["key"] for line in open(file)], ["a", "b", "c"])
            self.assertNotIn("a", Store(file, resume=False))


class Tiles(unittest.TestCase):
    def test_a_rows_logits_do_not_depend_on_the_others(self) -> None:
        model = tiny_model()
        fast = type(model)(for_batches(model._weights))
        pool = FakePoolModel(TINY)
        damages = [0.0, 0.02, 0.3]

        def logits(chosen: list[float]) -> np.ndarray:
            with PoolCache(pool, *[{"damage": damage} for damage in chosen]) as cache:
                for layer in range(TINY.layers):
                    k = np.ones((4, TINY.kv_heads, TINY.head_dim), np.float32)
                    cache.prefill(layer, k, k)
                cache.prefill_end()
                tiled = TiledCache(cache, len(chosen))
                self.assertEqual(tiled.rows, TILE_ROWS)
                return fast.step_batch([7] * tiled.rows, tiled)[: len(chosen)]

        together = logits(damages)
        for index, damage in enumerate(damages):
            np.testing.assert_array_equal(logits([damage])[0], together[index])
        self.assertGreater(np.abs(together[0] - together[2]).max(), 1e-3)


class Task(unittest.TestCase):
    """A task on stand-ins for the pool: bytes of a run are 1000 + 100 a token of budget."""

    def judge(self, over: float = 1.0) -> list[dict]:
        model = tiny_model()
        text = texts.Text("t", "tune", [3] * 200, frozenset())
        fixed = policies.Policy("full-f16", "", None)
        work = task.Task(text, "short", [policy(), fixed], [1.0, 0.25], "lib")

        def size(run: policies.Run) -> float:
            return 100_000 if run.value is None else 5000 + 100 * run.value

        def replay(config, found, prompt, runs, tick):
            return [task.Replayed(int(size(run)), np.ones(2), 5.0) for run in runs]

        def force(model, found, answers, prompt, runs, tick, tile):
            quality = scores.Quality(10, 0.5, 0.6, 0.9, 3.0, 2.0, None, None)
            stats = {"live_tokens": 9.0, "evicted_tokens": 1.0}
            return [task.Forced(quality, int(over * size(run)), 1, 1.0, stats) for run in runs]

        with mock.patch.object(task, "replay", replay), mock.patch.object(task, "force", force):
            return task.Judge(model, work, lambda steps: None).rows()

    def test_rows_have_the_schema_and_are_within_their_point(self) -> None:
        rows = self.judge()
        self.assertEqual([(row["policy"], row["memory_fraction"], row["reached"]) for row in rows],
                         [("p", 0.25, True), ("full-f16", 1.0, True), ("full-f16", 0.25, False)])
        for row in rows:
            self.assertLessEqual(set(table.KEYS), set(row))
        self.assertLessEqual(rows[0]["bytes"], rows[0]["bytes_target"])
        self.assertGreater(rows[0]["bytes"], 0.9 * rows[0]["bytes_target"])
        self.assertIsNone(rows[2]["kl"])
        self.assertEqual(table.failures([{**row, "kl": row["kl"] and 0.0} for row in rows]), [])

    def test_a_run_that_ends_over_its_point_is_done_again_smaller(self) -> None:
        near, again = self.judge()[0], self.judge(over=1.02)[0]
        self.assertTrue(again["reached"])
        self.assertLess(again["knob_value"], near["knob_value"])
        self.assertLessEqual(again["bytes"], again["bytes_target"])

    def test_one_that_never_fits_has_no_quality(self) -> None:
        row = self.judge(over=3.0)[0]
        self.assertFalse(row["reached"])
        self.assertIsNone(row["kl"])


class Table(unittest.TestCase):
    def row(self, name: str, kl: float | None, text: str = "a", **more) -> dict:
        return {"policy": name, "text": text, "split": "tune", "prompt": "short", "kl": kl,
                "memory_fraction": 0.25, "reached": kl is not None, "bytes": 20, "bytes_f16": 100,
                "bytes_target": 25, "top1": kl, "ppl": kl, "needle": None, **more}

    def test_the_lowest_divergence_is_first_and_missed_points_have_no_mean(self) -> None:
        rows = [self.row("x", 0.5), self.row("x", None, "b"), self.row("y", 0.9),
                self.row("z", 0.2)]
        found = table.summary(rows, "tune", "short", 0.25)
        self.assertEqual([line["policy"] for line in found], ["z", "y", "x"])
        self.assertIsNone(found[2]["kl"])

    def test_rows_over_their_point_fail(self) -> None:
        self.assertEqual(table.failures([self.row("x", 0.5)]), [])
        self.assertIn("over", table.failures([self.row("x", 0.5, bytes=26)])[0])
        self.assertIn("KL", table.failures([self.row("x", float("nan"))])[0])

    def test_the_list_that_is_written_is_the_rows(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "table.json"
            table.write([self.row("x", 0.5, attention_error_by_layer=[0.1, 0.2])], file)
            written = json.loads(file.read_text())
            self.assertNotIn("attention_error_by_layer", written[0])
            self.assertEqual(written[0]["kl"], 0.5)
            layers = json.loads(file.with_name("layers.json").read_text())
            self.assertEqual(layers[0]["attention_error"], [0.1, 0.2])
            self.assertIn("| x | 0.5000 |", file.with_suffix(".md").read_text())


class Plan(unittest.TestCase):
    def plan(self, store: Store, batch: int = 4) -> list[list[task.Task]]:
        chosen = [texts.Text(name, "tune", list(range(200)), frozenset()) for name in "abc"]
        several = [policy(name) for name in "wxyz"]
        with mock.patch.object(judge, "library_digest", lambda: "lib"):
            return judge.plan(chosen, ["short", "long"], several, [1.0, 0.25, 0.12], batch, store)

    def test_every_policy_meets_every_text_once_and_the_first_text_comes_first(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            stages = self.plan(Store(pathlib.Path(folder) / "rows", False))
        self.assertEqual({each.text.name for each in stages[0]}, {"a"})
        self.assertEqual({each.text.name for each in stages[1]}, {"b", "c"})
        every = [(each.text.name, each.mode, one.name)
                 for stage in stages for each in stage for one in each.policies]
        self.assertEqual(len(every), len(set(every)))
        self.assertEqual(len(every), 3 * 2 * 4)
        self.assertTrue(all(len(each.policies) == 2 for stage in stages for each in stage))

    def test_a_batch_of_one_run_is_a_task_a_point(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            stages = self.plan(Store(pathlib.Path(folder) / "rows", False), batch=1)
        every = [(each.text.name, each.mode, each.policies[0].name, *each.points)
                 for stage in stages for each in stage]
        self.assertEqual(len(every), len(set(every)))
        self.assertTrue(all(len(each.policies) == len(each.points) == 1
                            for stage in stages for each in stage))
        self.assertEqual({point for *_, point in every if point != 1.0}, {0.25, 0.12})

    def test_rows_that_are_there_are_not_done_again(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(pathlib.Path(folder) / "rows", False)
            keys = [key for each in self.plan(store)[0] for key in each.keys()]
            store.add([{"key": key} for key in keys[:-1]])
            left = self.plan(store)
        self.assertEqual([[one.name for one in each.policies] for each in left[0]], [["z"]])
        self.assertEqual(len(left[1]), 8)

    def test_settings_of_the_first_text_are_where_the_others_begin(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(pathlib.Path(folder) / "rows", False)
            stages = self.plan(store)
            first = stages[0][0]
            store.add([{"key": key, "reached": order != 1, "knob_share": 0.1 * order}
                       for order, key in enumerate(first.keys())])
            other = next(each for each in stages[1] if each.mode == first.mode
                         and each.policies[0].name == first.policies[0].name)
            judge.with_guesses(other, first.text, store)
        self.assertEqual(other.guesses, {("w", 0.25): 0.0, ("x", 0.25): 0.2,
                                         ("x", 0.12): 0.1 * 3})

    def test_settings_of_an_earlier_table_are_where_searches_begin(self) -> None:
        text = texts.Text("a", "tune", list(range(200)), frozenset())
        own = task.Task(text, "long", [policy("w"), policy("x")], [0.25], "lib")
        shares = {("b", "short"): 0.1, ("b", "long"): 0.2, ("a", "long"): 0.3}
        rows = [{"policy": "w", "text": name, "prompt": mode, "memory_fraction": 0.25,
                 "reached": True, "knob_share": share} for (name, mode), share in shares.items()]
        missed = {**rows[0], "policy": "x", "reached": False}
        judge.with_table(own, [*rows, missed])
        self.assertEqual(own.guesses, {("w", 0.25): 0.3})
        judge.with_table(own, rows[:2])
        self.assertEqual(own.guesses, {("w", 0.25): 0.2})


class FreeText(unittest.TestCase):
    def test_agreement_ends_at_the_first_difference(self) -> None:
        self.assertEqual(free.agreement([1, 2, 3, 4], [1, 2, 9, 4]), 2)
        self.assertEqual(free.agreement([1, 2], [1, 2]), 2)

    def test_repetition_is_the_share_of_runs_that_were_there_before(self) -> None:
        self.assertEqual(free.repetition(list(range(50))), 0.0)
        self.assertEqual(free.repetition([1, 2, 3, 4] * 2), 1 - 4 / 5)
        self.assertGreater(free.repetition([7] * 100), 0.98)

    def test_settings_are_those_that_met_the_point(self) -> None:
        rows = [{"policy": name, "reached": reached, "memory_fraction": point, "prompt": "short",
                 "knob_value": value}
                for name, reached, point, value in (
                    ("x", True, 0.25, 64.0), ("x", True, 0.12, 32.0), ("y", False, 0.25, None))]
        self.assertEqual(free.settings(rows, 0.25), {"x": 64.0})


class Recording(unittest.TestCase):
    def test_it_is_the_pass_that_the_model_makes(self) -> None:
        model = tiny_model()
        found = reference.record(model, [1, 5, 9, 2])
        np.testing.assert_array_equal(found.hidden, model.hidden_states([1, 5, 9, 2]))
        exact = reference.ExactLogits(model, found)
        np.testing.assert_allclose(exact.row(2), model.logits(found.hidden)[2], atol=1e-5)


if __name__ == "__main__":
    unittest.main()
