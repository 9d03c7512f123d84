"""Two real GPUs, two pools of one daemon, engines of PyTorch on both at once.

    THINKV_BIN_DIR=... THINKV_LIBRARY=... PYTHONPATH=client/python:tests/python python3 pools_gpu.py

Needs torch with CUDA and two GPUs, thinkvd and a libthinkv with the kernels. The exit status is the
number of failures, 77 where there are fewer GPUs. test_thinkv_pools.py tests the same daemon with
the driver alone.
"""

import os
import signal
import subprocess
import sys
import threading
import unittest

try:
    import torch
except ImportError:
    print("skipped: this Python has no torch (THINKV_TORCH_PYTHON names another)")
    sys.exit(77)
if torch.cuda.device_count() < 2:
    print("skipped: two GPUs are needed")
    sys.exit(77)

import thinkv
from gpu_arrays import Gpu
from thinkvd_case import ThinkvdCase

LAYERS, Q_HEADS, KV_HEADS, DIM, ROWS = 4, 8, 2, 128, 4

POOLS = """\
pools:
  - {{name: first, backend: cuda, device: {0}, bytes: 2GiB, extent_bytes: 64MiB}}
  - {{name: second, backend: cuda, device: {1}, bytes: 1GiB, extent_bytes: 64MiB}}
"""

CHILD = """
import sys, torch
torch.cuda.set_device(1)
from pools_gpu import Engine
engine = Engine(1, sys.argv[1], 9)
for _ in range(50):
    engine.step()
torch.cuda.synchronize()
print(engine.client.pool, flush=True)
while True:
    engine.step()
"""


def uuid_of(number):
    """In the order of this process, as the driver says it."""
    gpu = Gpu(number)
    gpu.__exit__()
    return gpu.uuid


class Engine:
    """A batch of sequences on one GPU, by the pool that the current device chooses."""

    def __init__(self, number, socket, seed, policy="k8v8-only"):
        self.device = torch.device("cuda", number)
        self.token = 0
        with torch.cuda.device(self.device):
            torch.zeros(1, device=self.device)  # its context exists and is current
            self.client = thinkv.Client(socket, name=f"engine-{number}", timeout=60)
            self.model = self.client.model(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS,
                                           head_dim=DIM, dtype="bfloat16")
            self.batch = self.model.batch(ROWS, tokens_max=4096)
            self.sequences = [self.model.sequence(policy=policy) for _ in range(ROWS)]
            for row, sequence in enumerate(self.sequences):
                self.batch.join(row, sequence)
        # The same numbers on every GPU: made on the CPU.
        generator = torch.Generator().manual_seed(seed)
        shape = (64, LAYERS, ROWS)
        self.k, self.v, self.q = (
            torch.randn(*shape, heads, DIM, generator=generator).to(self.device, torch.bfloat16)
            for heads in (KV_HEADS, KV_HEADS, Q_HEADS))

    def step(self):
        """Outputs [layers, rows, q_heads, dim], on the GPU."""
        at = self.token % len(self.q)
        out = torch.empty_like(self.q[at])
        with torch.cuda.device(self.device), self.batch.step():
            for layer in range(LAYERS):
                self.batch.append(layer, self.k[at, layer], self.v[at, layer])
                self.batch.attend(layer, self.q[at, layer], out=out[layer])
        self.token += 1
        return out

    def expected(self):
        """Exact attention for the last step() of a run shorter than the inputs."""
        end = self.token
        group = Q_HEADS // KV_HEADS
        k, v = (x[:end].float().repeat_interleave(group, 3) for x in (self.k, self.v))
        q = self.q[end - 1].float()
        logits = torch.einsum("lrhd,tlrhd->lrht", q, k) / DIM ** 0.5
        return torch.einsum("lrht,tlrhd->lrhd", logits.softmax(-1), v)


class TwoGpus(ThinkvdCase):
    def setUp(self):
        super().setUp()
        self.wait_until(lambda: os.path.exists(self.socket) or self.daemon.poll() is not None, 60)

    def config_text(self):
        text = super().config_text()
        pool = text[:text.index("\n") + 1]
        return text.replace(pool, POOLS.format(uuid_of(0), uuid_of(1)))

    def open(self, number, seed=3):
        engine = Engine(number, self.socket, seed)
        self.addCleanup(engine.client.close)
        return engine

    def used(self, client):
        return {pool["name"]: pool["bytes_used"] for pool in client.status()["pools"]}

    def test_the_current_device_chooses_the_pool(self):
        second, first = self.open(1), self.open(0)
        self.assertEqual((first.client.pool, second.client.pool), ("first", "second"))
        self.assertEqual(second.client.stats()["bytes_total"], 1 << 30)
        self.assertEqual(second.client.stats()["device"], uuid_of(1))

    def test_each_gpu_gives_the_right_answers(self):
        engines = [self.open(0), self.open(1)]
        for _ in range(50):
            outs = [engine.step() for engine in engines]
        for engine, out in zip(engines, outs):
            torch.testing.assert_close(out.float(), engine.expected(), atol=0.05, rtol=0.05)
        self.assertTrue(torch.equal(outs[0].cpu(), outs[1].cpu()), "equal cards, equal bits")
        used = self.used(engines[0].client)
        self.assertTrue(used["first"] > 0 and used["second"] > 0, used)

    def test_both_run_at_once_from_threads(self):
        alone = self.open(1)
        for _ in range(60):
            wanted = alone.step()
        engines, outs = [self.open(0), self.open(1)], [None, None]

        def run(number):
            for _ in range(60):
                outs[number] = engines[number].step()
            torch.cuda.synchronize(engines[number].device)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for out in outs:
            self.assertIsNotNone(out)
            self.assertTrue(torch.equal(out.cpu(), wanted.cpu()))

    def test_a_graph_on_the_second_gpu(self):
        eager, graphed = self.open(1), self.open(1)
        k, v, q = (torch.empty_like(x[0]) for x in (graphed.k, graphed.v, graphed.q))
        out, graph = torch.empty_like(q), torch.cuda.CUDAGraph()
        with torch.cuda.device(1):
            with torch.cuda.graph(graph):
                graphed.batch.begin()
                for layer in range(LAYERS):
                    graphed.batch.append(layer, k[layer], v[layer])
                    graphed.batch.attend(layer, q[layer], out=out[layer])
                graphed.batch.end()
            for at in range(60):
                for into, source in ((k, graphed.k), (v, graphed.v), (q, graphed.q)):
                    into.copy_(source[at])
                graphed.batch.reserve()
                graph.replay()
                wanted = eager.step()
            torch.cuda.synchronize()
        self.assertTrue(torch.equal(out.cpu(), wanted.cpu()))

    def test_tensors_of_the_other_gpu_are_refused(self):
        engine = self.open(1)
        wrong = torch.zeros(ROWS, KV_HEADS, DIM, device="cuda:0", dtype=torch.bfloat16)
        engine.batch.reserve()
        engine.batch.begin()
        with self.assertRaisesRegex(thinkv.InvalidArgumentError, "k is on GPU 0 .* is on GPU 1"):
            engine.batch.append(0, wrong, wrong)

    def test_a_killed_engine_gives_its_gpu_back_and_the_other_goes_on(self):
        engine = self.open(0)
        engine.step()
        child = subprocess.Popen([sys.executable, "-c", CHILD, self.socket], text=True,
                                 stdout=subprocess.PIPE,
                                 env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        self.assertEqual(child.stdout.readline(), "second\n")
        held = self.used(engine.client)
        self.assertGreater(held["second"], 0)
        child.send_signal(signal.SIGKILL)
        self.wait_until(lambda: self.used(engine.client)["second"] == 0)
        self.assertEqual(self.used(engine.client)["first"], held["first"])
        for _ in range(20):
            out = engine.step()
        torch.testing.assert_close(out.float(), engine.expected(), atol=0.05, rtol=0.05)


if __name__ == "__main__":
    program = unittest.main(exit=False, verbosity=2)
    sys.exit(len(program.result.failures) + len(program.result.errors))
