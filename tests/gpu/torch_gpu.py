"""The cuda backend under PyTorch on a real GPU: graphs, streams, two processes, crashes.

    THINKV_BIN_DIR=... THINKV_LIBRARY=... PYTHONPATH=client/python:tests/python python3 torch_gpu.py

Needs torch with CUDA, thinkvd and a libthinkv with the kernels. The exit status is the number of
failures.
"""

import os
import signal
import subprocess
import sys
import time
import unittest

try:
    import torch
except ImportError:
    print("skipped: this Python has no torch (THINKV_TORCH_PYTHON names another)")
    sys.exit(77)

import thinkv
from thinkvd_case import ThinkvdCase

SHAPE = dict(layers=4, q_heads=8, kv_heads=2, head_dim=128, dtype="bfloat16")
CUDA = dict(device="cuda", dtype=torch.bfloat16)

CHILD = """
import sys, time, torch, thinkv
client = thinkv.Client(sys.argv[1], name="child")
model = client.model(layers=4, q_heads=8, kv_heads=2, head_dim=128, dtype="bfloat16")
batch = model.batch(4)
for row in range(4):
    batch.join(row, model.sequence(policy="k4v4-only"))
kv = torch.randn(4, 2, 128, device="cuda", dtype=torch.bfloat16)
q = torch.randn(4, 8, 128, device="cuda", dtype=torch.bfloat16)
for token in range(100000):
    with batch.step():
        for layer in range(4):
            batch.append(layer, kv, kv)
            batch.attend(layer, q)
    if token == 200:
        torch.cuda.synchronize()
        print("running", flush=True)
"""


class OnTheGpu(ThinkvdCase):
    pool = "2GiB"

    def config_text(self):
        return super().config_text().replace("pool: {", "pool: {backend: cuda, ")

    def setUp(self):
        super().setUp()
        self.wait_until(lambda: os.path.exists(self.socket) or self.daemon.poll() is not None, 30)
        self.client = thinkv.Client(self.socket, name="torch", timeout=60)
        self.addCleanup(self.client.close)
        self.model = self.client.model(**SHAPE)
        torch.manual_seed(1)

    def inputs(self, steps, rows):
        shape = (steps, SHAPE["layers"], rows)
        kv = torch.randn(2, *shape, SHAPE["kv_heads"], 128, **CUDA)
        return kv[0], kv[1], torch.randn(*shape, SHAPE["q_heads"], 128, **CUDA)

    def open(self, rows, policy, budget, prompt):
        batch = self.model.batch(rows, tokens_max=4096)
        generator = torch.Generator("cuda").manual_seed(7)
        sequences = []
        for row in range(rows):
            sequence = self.model.sequence(policy=policy, budget=budget)
            for layer in range(SHAPE["layers"]):
                k = torch.randn(prompt + row, SHAPE["kv_heads"], 128, generator=generator, **CUDA)
                sequence.prefill(layer, k, -k)
            sequence.prefill_end()
            batch.join(row, sequence)
            sequences.append(sequence)
        return batch, sequences

    @staticmethod
    def step(batch, k, v, q, out):
        batch.begin()
        for layer in range(SHAPE["layers"]):
            batch.append(layer, k[layer], v[layer])
            batch.attend(layer, q[layer], out=out[layer])
        batch.end()

    def eager(self, steps, rows, policy, budget, prompt):
        k, v, q = self.inputs(steps, rows)
        batch, sequences = self.open(rows, policy, budget, prompt)
        outs = torch.empty_like(q)
        moved = 0  # bytes, when the prompt's rules have run: they wait for 64 steps
        for step in range(steps):
            batch.reserve(1)
            self.step(batch, k[step], v[step], q[step], outs[step])
            if step == 128:
                moved = sequences[0].stats()["gathered_bytes"]
        torch.cuda.synchronize()
        stats = [sequence.stats() for sequence in sequences]
        return (k, v, q), outs, stats, moved

    def replayed(self, inputs, policy, budget, prompt):
        k, v, q = inputs
        rows = k.shape[2]
        batch, sequences = self.open(rows, policy, budget, prompt)
        static = [torch.empty_like(x[0]) for x in (k, v, q)]
        out = torch.empty_like(q[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(batch, *static, out)
        outs = torch.empty_like(q)
        for step in range(k.shape[0]):
            for place, values in zip(static, (k, v, q)):
                place.copy_(values[step])
            batch.reserve(1)
            graph.replay()
            outs[step].copy_(out)
        torch.cuda.synchronize()
        return outs, [sequence.stats() for sequence in sequences]

    def test_one_graph_replayed_for_thousands_of_steps(self):
        steps = 2500
        for policy, budget in (("thinkv", 256), ("k4v4-only", 0), ("full-f16", 0)):
            count = steps if policy == "thinkv" else 300
            inputs, outs, stats, moved = self.eager(count, 5, policy, budget, 40)
            again, replayed = self.replayed(inputs, policy, budget, 40)
            for name in ("tokens", "live_tokens", "evicted_slots", "slots_reused", "demotions",
                         "pages"):
                self.assertEqual([s[name] for s in stats], [s[name] for s in replayed], name)
            # The split of the work does not depend on the run, so neither does a bit.
            self.assertTrue(torch.equal(outs, again), f"{policy}: graph and eager differ")
            self.assertTrue(torch.isfinite(outs).all())
            if policy == "thinkv":
                self.assertGreater(stats[0]["slots_reused"], 0)
                self.assertLess(stats[0]["live_tokens_max"], 40 + 256 + 200)
                self.assertEqual(stats[0]["gathered_bytes"], moved, "nothing moves in decoding")

    def test_bytes_stay_flat_under_a_budget(self):
        batch, sequences = self.open(2, "thinkv", 256, 16)
        k, v, q = (x[0] for x in self.inputs(1, 2))
        out = torch.empty_like(q)
        held = []
        for step in range(2048):
            batch.reserve(1)
            self.step(batch, k, v, q, out)
            if step in (1024, 2047):
                held.append(sequences[0].stats()["bytes_held"])
        self.assertLess(held[1], held[0] * 1.1)

    def test_attention_equals_torchs_on_16_bit_pages(self):
        (k, v, q), outs, *_ = self.eager(40, 3, "full-f16", 0, 1)
        batch, _ = self.open(3, "full-f16", 0, 1)
        del batch
        generator = torch.Generator("cuda").manual_seed(7)
        for row in range(3):
            prompts = [torch.randn(1 + row, 2, 128, generator=generator, **CUDA)
                       for _ in range(SHAPE["layers"])]
            for layer in range(SHAPE["layers"]):
                keys = torch.cat([prompts[layer], k[:, layer, row]]).transpose(0, 1)
                values = torch.cat([-prompts[layer], v[:, layer, row]]).transpose(0, 1)
                want = torch.nn.functional.scaled_dot_product_attention(
                    q[-1, layer, row][None, :, None].float(), keys[None].float(),
                    values[None].float(), enable_gqa=True)[0, :, 0]
                torch.testing.assert_close(outs[-1, layer, row].float(), want, rtol=2e-2, atol=2e-2)

    def test_a_killed_engine_costs_the_others_nothing(self):
        # What this engine computes alone ...
        (k, v, q), alone, *_ = self.eager(200, 2, "k4v4-only", 0, 20)
        child = subprocess.Popen([sys.executable, "-c", CHILD, self.socket], stdout=subprocess.PIPE,
                                 text=True)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        self.assertEqual(child.stdout.readline().strip(), "running")
        # ... it computes beside another one that is killed in the middle.
        batch, _ = self.open(2, "k4v4-only", 0, 20)
        outs = torch.empty_like(alone)
        for step in range(200):
            batch.reserve(1)
            self.step(batch, k[step], v[step], q[step], outs[step])
            if step == 100:
                child.send_signal(signal.SIGKILL)
        torch.cuda.synchronize()
        self.assertTrue(torch.equal(outs, alone))
        child.wait()
        deadline = time.monotonic() + 10
        while len(self.client.status()["clients"]) > 1:
            self.assertLess(time.monotonic(), deadline, "the dead engine is still listed")
            time.sleep(0.01)

    def test_a_killed_daemon_leaves_what_is_held(self):
        batch, sequences = self.open(2, "k4v4-only", 0, 20)
        k, v, q = (x[0] for x in self.inputs(1, 2))
        out = torch.empty_like(q)
        batch.reserve(1)
        self.step(batch, k, v, q, out)
        torch.cuda.synchronize()
        self.daemon.kill()
        self.daemon.wait()
        with self.assertRaises((thinkv.UnavailableError, thinkv.StaleError)):
            for _ in range(20000):
                batch.reserve(1)
                self.step(batch, k, v, q, out)
        torch.cuda.synchronize()
        self.assertTrue(torch.isfinite(out).all())
        self.assertGreater(sequences[0].stats()["tokens"], 21)


if __name__ == "__main__":
    program = unittest.main(exit=False, verbosity=2)
    sys.exit(len(program.result.failures) + len(program.result.errors))
