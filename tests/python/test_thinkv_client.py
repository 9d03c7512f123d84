"""The package `thinkv` against a real thinkvd: the main path, and every error a caller can make."""

import array
import gc
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import unittest
from pathlib import Path

from thinkvd_case import SOURCE, ThinkvdCase

import thinkv

try:
    import numpy as np
except ImportError:
    raise unittest.SkipTest("numpy is not installed") from None

SHAPE = {"layers": 2, "q_heads": 6, "kv_heads": 2, "head_dim": 64}


def rows(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def decode(model, sequences, steps, seed=0):
    """Random steps of a batch; returns the last attention of layer 0."""
    out = None
    for token in range(steps):
        with model.step(sequences) as step:
            for layer in range(model.layers):
                k = rows((seed, token, layer, 1), len(sequences), model.kv_heads, model.head_dim)
                v = rows((seed, token, layer, 2), len(sequences), model.kv_heads, model.head_dim)
                q = rows((seed, token, layer, 3), len(sequences), model.q_heads, model.head_dim)
                step.append(layer, k, v)
                got = step.attend(layer, q)
                out = got if layer == 0 else out
    return out


class MainPath(ThinkvdCase):
    def setUp(self):
        super().setUp()
        self.client = thinkv.Client(self.socket, name="main path")
        self.addCleanup(self.client.close)
        self.model = self.client.model(**SHAPE)

    def test_attention_equals_exact_attention_over_16_bit_values(self):
        sequence = self.model.sequence(policy="full-f16", budget=0)
        keys = [rows((1, layer), 33, 2, 64) for layer in range(2)]
        values = [rows((2, layer), 33, 2, 64) for layer in range(2)]
        for layer in range(2):
            sequence.prefill(layer, keys[layer], values[layer])
        sequence.prefill_end()
        for token in range(40):
            with self.model.step([sequence]) as step:
                for layer in range(2):
                    k, v = rows((3, token, layer), 1, 2, 64), rows((4, token, layer), 1, 2, 64)
                    keys[layer] = np.concatenate([keys[layer], k])
                    values[layer] = np.concatenate([values[layer], v])
                    step.append(layer, k, v)
                    q = rows((5, token, layer), 1, 6, 64)
                    out, lse = step.attend(layer, q, lse=True)
                    for head in range(6):
                        k16 = keys[layer][:, head // 3].astype(np.float16).astype(np.float32)
                        v16 = values[layer][:, head // 3].astype(np.float16).astype(np.float32)
                        logits = k16 @ q[0, head] / 8.0
                        weights = np.exp(logits - logits.max())
                        exact = weights @ v16 / weights.sum()
                        np.testing.assert_allclose(out[0, head], exact, rtol=2e-4, atol=2e-5)
                        want = logits.max() + math.log(weights.sum())
                        self.assertAlmostEqual(float(lse[0, head]), want, places=3)
        stats = sequence.stats()
        self.assertEqual((stats["tokens"], stats["prompt_tokens"]), (73, 33))
        self.assertEqual(stats["live_tokens"], 73.0)

    def test_batch_gives_the_same_bits_as_single_sequences(self):
        batch = [self.model.sequence() for _ in range(3)]
        together = decode(self.model, batch, 40)
        for i in range(3):
            alone = self.model.sequence()
            out = None
            for token in range(40):
                with self.model.step([alone]) as step:
                    for layer in range(2):
                        k, v, q = (
                            rows((0, token, layer, which), 3, heads, 64)[i : i + 1]
                            for which, heads in ((1, 2), (2, 2), (3, 6))
                        )
                        step.append(layer, k, v)
                        got = step.attend(layer, q)
                        out = got if layer == 0 else out
            np.testing.assert_array_equal(out[0], together[i])

    def test_half_precision_and_dlpack_inputs_agree_with_float32(self):
        class OnlyDlpack:
            def __init__(self, inner):
                self.inner = inner

            def __dlpack__(self, **keywords):
                return self.inner.__dlpack__(**keywords)

            def __dlpack_device__(self):
                return self.inner.__dlpack_device__()

        outs = []
        for convert in (lambda a: a.astype(np.float16),
                        lambda a: a.astype(np.float16).astype(np.float32),
                        lambda a: OnlyDlpack(a.astype(np.float16).astype(np.float32)),
                        lambda a: memoryview(a.astype(np.float16).astype(np.float32))):
            sequence = self.model.sequence(policy="full-f16")
            with self.model.step([sequence]) as step:
                for layer in range(2):
                    step.append(layer, convert(rows(1, 1, 2, 64)), convert(rows(2, 1, 2, 64)))
                    outs.append(step.attend(layer, convert(rows(3, 1, 6, 64))))
        for out in outs[1:]:
            np.testing.assert_array_equal(out, outs[0])

    def test_budget_keeps_held_bytes_flat_and_reuses_slots(self):
        sequence = self.model.sequence(policy="thinkv", budget=256)
        decode(self.model, [sequence], 1024)
        middle = sequence.stats()
        decode(self.model, [sequence], 1024, seed=1)
        end = sequence.stats()
        self.assertEqual(end["tokens"], 2048)
        self.assertGreater(end["slots_reused"], 0)
        self.assertEqual(end["gathered_bytes"], 0)
        self.assertLessEqual(end["bytes_held"], 1.25 * middle["bytes_held"])
        self.assertLess(end["bytes_held"], end["bytes_f16"] / 4)
        self.assertEqual(sum(end["thoughts"].values()), 2048 // 128)

    def test_counters_reach_the_daemons_status(self):
        sequence = self.model.sequence()
        decode(self.model, [sequence], 20)
        stats = self.client.stats()
        self.assertEqual(stats["backend"], "host")
        self.assertEqual(stats["bytes_total"], 64 << 20)
        self.assertGreater(stats["client_granted_bytes"], sequence.stats()["bytes_held"] - 1)
        mine = [c for c in stats["clients"] if c["pid"] == os.getpid()]
        self.assertEqual(len(mine), 1)
        self.assertIn("20", str(mine[0]))  # tokens, wherever the daemon puts them

    def test_evict_quantize_and_budget(self):
        sequence = self.model.sequence(policy="k4v4-only", budget=0)
        decode(self.model, [sequence], 100)
        self.assertEqual(sequence.evict([3, 5, 7, 3, 99, 5000]), 3 * 4)
        self.assertEqual(sequence.stats()["evicted_slots"], 12)
        self.assertEqual(sequence.quantize(0, 20, "k2v2"), (21 - 3) * 4)
        sequence = self.model.sequence(policy="thinkv", budget=512)
        self.assertEqual(sequence.stats()["budget_tokens"], 512)
        sequence.set_budget(256)
        self.assertEqual(sequence.stats()["budget_tokens"], 256)
        sequence.set_budget(0)
        self.assertEqual(sequence.stats()["budget_tokens"], 0)

    def test_sparsity_is_measured_where_it_is_traced(self):
        traced = self.model.sequence(policy="full-f16", trace_sparsity=True)
        plain = self.model.sequence(policy="full-f16")
        decode(self.model, [traced, plain], 30)
        self.assertTrue(np.all(np.isfinite(traced.sparsity())))
        self.assertTrue(np.all(np.isnan(plain.sparsity())))
        self.assertEqual(len(traced.stats()["sparsity"]), 2)
        self.assertIsNone(plain.stats()["sparsity"])

    def test_cancelled_step_leaves_the_sequence_as_it_was(self):
        sequence = self.model.sequence(policy="full-f16")
        decode(self.model, [sequence], 20)
        before = sequence.stats()
        with self.assertRaises(RuntimeError):
            with self.model.step([sequence]) as step:
                step.append(0, rows(1, 1, 2, 64), rows(2, 1, 2, 64))
                raise RuntimeError("the engine failed")
        self.assertEqual(sequence.stats()["tokens"], before["tokens"])
        decode(self.model, [sequence], 1, seed=9)
        self.assertEqual(sequence.stats()["tokens"], 21)

    def test_closing_everything_gives_every_page_back(self):
        for _ in range(3):
            with thinkv.Client(self.socket) as client:
                model = client.model(**SHAPE)
                decode(model, [model.sequence() for _ in range(4)], 64)
        self.client.close()
        watcher = thinkv.Client(self.socket)
        self.addCleanup(watcher.close)
        self.wait_until(lambda: watcher.stats()["bytes_free"] == 64 << 20)

    def test_threads_decode_their_own_sequences_at_once(self):
        results = {}

        def work(seed):
            sequence = self.model.sequence(policy="k4v4-only")
            results[seed] = decode(self.model, [sequence], 60, seed=seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed in range(4):
            alone = self.model.sequence(policy="k4v4-only")
            np.testing.assert_array_equal(
                decode(self.model, [alone], 60, seed=seed), results[seed])


class CallersErrors(ThinkvdCase):
    def setUp(self):
        super().setUp()
        self.client = thinkv.Client(self.socket, name="errors")
        self.addCleanup(self.client.close)
        self.model = self.client.model(**SHAPE)

    def test_unknown_policy_names_the_known_ones(self):
        with self.assertRaisesRegex(thinkv.NotFoundError, "there are: .*h2o"):
            self.model.sequence(policy="no-such-policy")

    def test_unsupported_head_dim_and_bad_geometry(self):
        with self.assertRaisesRegex(thinkv.UnsupportedError, "64, 128 or 256.*head_dim 80"):
            self.client.model(layers=1, q_heads=1, kv_heads=1, head_dim=80)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "q_heads 7, kv_heads 2"):
            self.client.model(layers=1, q_heads=7, kv_heads=2, head_dim=64)
        with self.assertRaises(thinkv.InvalidArgumentError):
            self.client.model(layers=0, q_heads=1, kv_heads=1, head_dim=64)
        with self.assertRaisesRegex(ValueError, "expected 'float16' or 'bfloat16'"):
            self.client.model(**SHAPE, dtype="float64")

    def test_wrong_shapes_and_types_say_expected_and_given(self):
        sequence = self.model.sequence()
        good = rows(0, 1, 2, 64)
        with self.model.step([sequence]) as step:
            for bad in (rows(0, 2, 2, 64), rows(0, 1, 3, 64), rows(0, 1, 2, 65), rows(0, 2, 64)):
                with self.assertRaisesRegex(ValueError, r"k: shape is .*expected \[1, 2, 64\]"):
                    step.append(0, bad, good)
            with self.assertRaisesRegex(ValueError, r"v: shape"):
                step.append(0, good, rows(0, 1, 2, 63))
            with self.assertRaisesRegex(TypeError, "k: data type is float64"):
                step.append(0, good.astype(np.float64), good)
            with self.assertRaisesRegex(TypeError, "k: data type is >f4"):
                step.append(0, good.astype(">f4"), good)
            with self.assertRaisesRegex(ValueError, "not contiguous"):
                step.append(0, rows(0, 1, 64, 2).transpose(0, 2, 1), good)
            with self.assertRaisesRegex(TypeError, "list is not an array"):
                step.append(0, [1.0], good)
            with self.assertRaisesRegex(TypeError, "buffer format is 'd'"):
                step.append(0, memoryview(array.array("d", [0.0] * 128)), good)
            step.append(0, good, good)
            with self.assertRaisesRegex(ValueError, r"q: shape is .*expected \[1, 6, 64\]"):
                step.attend(0, good)
            step.append(1, good, good)
        with self.assertRaisesRegex(ValueError, r"k: shape is \[2, 64\], expected \[n, 2, 64\]"):
            self.model.sequence().prefill(0, rows(0, 2, 64), rows(0, 2, 64))
        with self.assertRaisesRegex(ValueError, "v: shape"):
            self.model.sequence().prefill(0, rows(0, 5, 2, 64), rows(0, 4, 2, 64))

    def test_calls_out_of_order_change_nothing(self):
        sequence = self.model.sequence()
        k = rows(0, 1, 2, 64)
        q = rows(0, 1, 6, 64)
        step = self.model.step([sequence])
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "layer 0 was not appended"):
            step.attend(0, q)
        step.append(0, k, k)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "layer 0 was appended"):
            step.append(0, k, k)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "layer 2 of a model with 2"):
            step.append(2, k, k)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "is in another step"):
            self.model.step([sequence])
        with self.assertRaises(thinkv.InvalidArgumentError):
            sequence.evict([1])
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "layer 1 was not appended"):
            step.end()
        self.assertEqual(sequence.stats()["tokens"], 0)
        decode(self.model, [sequence], 3)
        with self.assertRaises(thinkv.InvalidArgumentError):
            sequence.prefill(0, k, k)
        self.assertEqual(sequence.stats()["tokens"], 3)

    def test_bad_batches(self):
        sequence = self.model.sequence()
        other = self.client.model(**{**SHAPE, "layers": 3})
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "1 to 4096 sequences, not 0"):
            self.model.step([])
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, r"sequences\[1\]"):
            self.model.step([sequence, sequence])
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, r"sequences\[1\].*another model"):
            self.model.step([sequence, other.sequence()])
        decode(self.model, [sequence], 1)  # it is still free

    def test_bad_requests_on_a_sequence(self):
        sequence = self.model.sequence()
        decode(self.model, [sequence], 40)
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "unknown format 'k3v3'"):
            sequence.quantize(0, 5, "k3v3")
        with self.assertRaisesRegex(thinkv.UnsupportedError, "'kivi2' by a rule"):
            sequence.quantize(0, 5, "kivi2")
        with self.assertRaises(ValueError):
            sequence.set_budget(-1)
        with self.assertRaises(thinkv.InvalidArgumentError):
            sequence.quantize(5, 0, "k2v2")

    def test_use_after_close_is_stale_for_the_handle_and_its_children(self):
        sequence = self.model.sequence()
        decode(self.model, [sequence], 2)
        step = self.model.step([sequence])
        sequence.close()
        sequence.close()
        for call in (sequence.stats, lambda: sequence.evict([0]),
                     lambda: self.model.step([sequence]),
                     lambda: step.append(0, rows(0, 1, 2, 64), rows(0, 1, 2, 64)), step.end):
            self.assertRaises(thinkv.StaleError, call)
        survivor = self.model.sequence()
        self.client.close()
        for call in (survivor.stats, self.model.sequence, self.client.ping, self.client.stats):
            self.assertRaises(thinkv.StaleError, call)
        gc.collect()

    def test_absent_daemon_says_what_to_do(self):
        with self.assertRaisesRegex(thinkv.UnavailableError,
                                    "is it running. Start thinkvd or set THINKV_SOCKET"):
            thinkv.Client("/nonexistent/control.sock")

    def test_dead_daemon_is_unavailable_and_closing_still_works(self):
        sequence = self.model.sequence()
        self.daemon.send_signal(signal.SIGKILL)
        self.daemon.wait()
        self.assertRaises(thinkv.UnavailableError, self.client.ping)
        self.assertRaises(thinkv.UnavailableError, self.model.sequence)
        self.assertEqual(sequence.stats()["tokens"], 0)
        self.client.close()

    def test_stopped_daemon_says_goodbye(self):
        self.stop_daemon()
        with self.assertRaises(thinkv.UnavailableError):
            self.client.ping()

    def test_forked_child_must_open_its_own_client(self):
        sequence = self.model.sequence()

        def child(queue):
            try:
                sequence.stats()
                queue.put("no error")
            except thinkv.StaleError as error:
                with thinkv.Client(self.socket) as own:
                    own.ping()
                queue.put(str(error))

        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        self.assertIn("forked process: open a new client", queue.get(timeout=20))
        process.join(20)
        self.assertEqual(process.exitcode, 0)
        decode(self.model, [sequence], 3)  # the parent is unharmed


class ScarcePages(ThinkvdCase):
    # Half of the pool is promised to somebody else, so it is full before the limit is reached.
    pool = "16MiB"
    tenants = "{name: other, users: [65533], reserve: 50%}"

    def test_full_pool_fails_the_step_whole_and_recovers(self):
        client = thinkv.Client(self.socket)
        self.addCleanup(client.close)
        model = client.model(**SHAPE)
        sequences = []
        with self.assertRaisesRegex(thinkv.ExhaustedError, "the pool is full.*KiB"):
            while True:
                sequence = model.sequence(policy="full-f16", budget=0)
                sequences.append(sequence)
                decode(model, [sequence], 200)
        tokens = sequences[0].stats()["tokens"]
        self.assertEqual(tokens, 200)
        sequences.pop().close()
        sequences.pop().close()
        decode(model, [sequences[0]], 10)
        self.assertEqual(sequences[0].stats()["tokens"], tokens + 10)


class LimitedTenant(ThinkvdCase):
    pool = "64MiB"
    limit = "8MiB"

    def test_quota_says_limit_used_and_needed(self):
        client = thinkv.Client(self.socket)
        self.addCleanup(client.close)
        model = client.model(**SHAPE)
        sequence = model.sequence(policy="full-f16", budget=0)
        with self.assertRaisesRegex(thinkv.QuotaExceededError, "of 8192 KiB are used"):
            decode(model, [sequence], 10_000)
        self.assertEqual(client.stats()["tenant_limit_bytes"], 8 << 20)


class KilledClient(ThinkvdCase):
    def test_sigkill_gives_everything_back(self):
        script = (
            "import sys, time, numpy, thinkv\n"
            "client = thinkv.Client(sys.argv[1], name='victim')\n"
            "model = client.model(layers=2, q_heads=6, kv_heads=2, head_dim=64)\n"
            "sequence = model.sequence(policy='full-f16')\n"
            "zeros = numpy.zeros((500, 2, 64), numpy.float32)\n"
            "for layer in range(2): sequence.prefill(layer, zeros, zeros)\n"
            "sequence.prefill_end()\n"
            "print('ready', flush=True)\n"
            "time.sleep(60)\n"
        )
        victim = subprocess.Popen([sys.executable, "-c", script, self.socket],
                                  stdout=subprocess.PIPE)
        self.addCleanup(victim.stdout.close)
        self.assertEqual(victim.stdout.readline(), b"ready\n")
        watcher = thinkv.Client(self.socket)
        self.addCleanup(watcher.close)
        self.assertLess(watcher.stats()["bytes_free"], 64 << 20)
        victim.kill()
        victim.wait()
        self.wait_until(lambda: watcher.stats()["bytes_free"] == 64 << 20)


class Examples(ThinkvdCase):
    def run_example(self, command):
        done = subprocess.run(command, env={**os.environ, "THINKV_SOCKET": self.socket},
                              capture_output=True, text=True, timeout=120)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_minimal_python(self):
        text = self.run_example([sys.executable, SOURCE / "client/examples/minimal.py"])
        self.assertRegex(text, r"^1020 tokens, \d+ live, \d+ bytes held")

    def test_minimal_c(self):
        binary = Path(os.environ["THINKV_BIN_DIR"]).parent / "examples" / "thinkv_minimal"
        text = self.run_example([binary])
        self.assertRegex(text, r"^2000 tokens, attention 1\.0\d, \d+ bytes held")


if __name__ == "__main__":
    unittest.main()
