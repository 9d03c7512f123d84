"""Engines on the two GPUs of one daemon with two pools.

Without GPUs on the emulated kernels and the fake driver of tests/support, which has two; on a
machine with two GPUs on the real ones.
"""

import os
import signal
import subprocess
import sys
import unittest

import numpy as np
import thinkv
from gpu_arrays import Gpu
from thinkvd_case import SOURCE, ThinkvdCase

LAYERS, KV_HEADS, Q_HEADS, DIM = 2, 2, 4, 64
SHAPE = dict(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=DIM)

POOLS = """\
pools:
  - {{name: gpu0, backend: cuda, device: {0}, bytes: 8MiB, extent_bytes: 2MiB}}
  - {{name: gpu1, backend: cuda, device: {1}, bytes: 16MiB, extent_bytes: 2MiB}}
"""

CHILD = """
import sys, thinkv
from gpu_arrays import Gpu
gpu = Gpu(1)
client = thinkv.Client(sys.argv[1], name="child")
model = client.model(layers=2, q_heads=4, kv_heads=2, head_dim=64)
sequences = [model.sequence(policy="full-f16") for _ in range(4)]
print(client.pool, flush=True)
sys.stdin.read()
"""


def rows(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def attention(q, keys, values):
    """q [q_heads, dim] over keys, values [tokens, kv_heads, dim], in float64."""
    out = np.empty(q.shape)
    for head in range(Q_HEADS):
        kv_head = head // (Q_HEADS // KV_HEADS)
        logits = keys[:, kv_head].astype(np.float64) @ q[head] / np.sqrt(DIM)
        weights = np.exp(logits - logits.max())
        out[head] = weights @ values[:, kv_head] / weights.sum()
    return out


class Engine:
    """One sequence that decodes in the pool of a GPU."""

    def __init__(self, gpu, socket, seed, **options):
        self.gpu, self.seed, self.tokens = gpu, seed, 0
        with gpu:
            self.client = thinkv.Client(socket, name=f"engine-{seed}", **options)
        self.model = self.client.model(**SHAPE)
        self.batch = self.model.batch(1, tokens_max=1024)
        self.sequence = self.model.sequence(policy="k8v8-only")
        self.batch.join(0, self.sequence)

    def inputs(self, token, layer):
        return (rows((kind, self.seed, token, layer), 1, heads, DIM)
                for kind, heads in enumerate((KV_HEADS, KV_HEADS, Q_HEADS)))

    def step(self):
        """The outputs [layers, q_heads, dim] of one token."""
        outs = []
        with self.gpu, self.batch.step():
            for layer in range(LAYERS):
                k, v, q = (self.gpu.array(x) for x in self.inputs(self.tokens, layer))
                self.batch.append(layer, k, v)
                out = self.gpu.empty((1, Q_HEADS, DIM))
                self.batch.attend(layer, q, out=out)
                outs.append(out.numpy()[0])
        self.tokens += 1
        return np.stack(outs)

    def expected(self):
        """What exact attention says to the last step()."""
        outs = []
        for layer in range(LAYERS):
            keys, values, queries = zip(*(self.inputs(t, layer) for t in range(self.tokens)))
            outs.append(attention(queries[-1][0], np.concatenate(keys), np.concatenate(values)))
        return np.stack(outs)


@unittest.skipIf(Gpu.count() < 2, "two GPUs are needed")
class TwoGpus(ThinkvdCase):
    def setUp(self):
        self.gpus = [Gpu(0), Gpu(1)]
        for gpu in self.gpus:
            self.addCleanup(gpu.__exit__)
        super().setUp()
        # The daemon makes its contexts before it listens: with real GPUs that takes seconds.
        self.wait_until(lambda: os.path.exists(self.socket) or self.daemon.poll() is not None, 60)

    def config_text(self):
        text = super().config_text()
        pool = text[:text.index("\n") + 1]
        return text.replace(pool, POOLS.format(*(gpu.uuid for gpu in self.gpus)))

    def open(self, number, **options):
        engine = Engine(self.gpus[number], self.socket, number, **options)
        self.addCleanup(engine.client.close)
        return engine

    def used(self):
        status = thinkv.Client(self.socket, pool="gpu0").status()
        return {pool["name"]: pool["bytes_used"] for pool in status["pools"]}

    def test_each_engine_gets_the_pool_of_its_current_gpu(self):
        for number in (1, 0):
            engine = self.open(number)
            self.assertEqual(engine.client.pool, f"gpu{number}")
            stats = engine.client.stats()
            self.assertEqual(stats["bytes_total"], (16 if number else 8) << 20)
            self.assertEqual(stats["device"], self.gpus[number].uuid)

    def test_a_pool_by_name_uuid_and_environment(self):
        with self.gpus[0]:
            self.assertEqual(thinkv.Client(self.socket, pool="gpu1").pool, "gpu1")
            self.assertEqual(thinkv.Client(self.socket, pool=self.gpus[1].uuid).pool, "gpu1")
            os.environ["THINKV_POOL"] = "gpu1"
            self.addCleanup(os.environ.pop, "THINKV_POOL", None)
            self.assertEqual(thinkv.Client(self.socket).pool, "gpu1")
            self.assertEqual(thinkv.Client(self.socket, pool="gpu0").pool, "gpu0")
        with self.assertRaisesRegex(thinkv.NotFoundError,
                                    r"no pool 'gpu7'; there are: gpu0 \(cuda"):
            thinkv.Client(self.socket, pool="gpu7")

    def test_both_decode_in_turns_and_are_right(self):
        engines = [self.open(0), self.open(1)]
        for _ in range(40):
            for engine in engines:
                out = engine.step()
                np.testing.assert_allclose(out, engine.expected(), atol=0.03)
        used = self.used()
        self.assertTrue(used["gpu0"] > 0 and used["gpu1"] > 0, used)

    def test_tensors_of_the_other_gpu_are_refused(self):
        engine = self.open(1)
        engine.step()
        wrong = self.gpus[0].array(rows(1, 1, KV_HEADS, DIM))
        with self.gpus[0], self.assertRaisesRegex(
                thinkv.InvalidArgumentError,
                "k is on GPU 0 of this process, and the pool 'gpu1' is on GPU 1"):
            engine.batch.reserve()
            engine.batch.begin()
            engine.batch.append(0, wrong, wrong)

    def test_a_full_pool_leaves_the_other_decoding(self):
        first, second = self.open(0), self.open(1)
        second.step()
        before = self.used()["gpu1"]
        fillers = []
        with self.gpus[0], self.assertRaises((thinkv.ExhaustedError, thinkv.QuotaExceededError)):
            for _ in range(100):
                kv = self.gpus[0].array(rows(2, 2000, KV_HEADS, DIM))
                fillers.append(first.model.sequence(policy="full-f16"))
                for layer in range(LAYERS):
                    fillers[-1].prefill(layer, kv, kv)
        self.assertEqual(self.used()["gpu1"], before)
        for _ in range(20):
            np.testing.assert_allclose(second.step(), second.expected(), atol=0.03)

    def test_a_killed_engine_gives_its_gpu_back_and_no_other(self):
        engine = self.open(0)
        engine.step()
        child = subprocess.Popen([sys.executable, "-c", CHILD, self.socket], text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for done in (child.stdin.close, child.stdout.close, child.wait, child.kill):
            self.addCleanup(done)
        self.assertEqual(child.stdout.readline(), "gpu1\n")
        held = self.used()
        self.assertGreater(held["gpu1"], 0)
        child.send_signal(signal.SIGKILL)
        self.wait_until(lambda: self.used()["gpu1"] == 0)
        self.assertEqual(self.used()["gpu0"], held["gpu0"])
        np.testing.assert_allclose(engine.step(), engine.expected(), atol=0.03)


if __name__ == "__main__":
    os.environ.setdefault("THINKV_SOURCE_DIR", str(SOURCE))
    program = unittest.main(exit=False, verbosity=2)
    skipped = len(program.result.skipped) == program.result.testsRun
    sys.exit(77 if skipped else len(program.result.failures) + len(program.result.errors))
