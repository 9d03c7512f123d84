"""thinkv.transformers and thinkv.Step on a real GPU: the cases of
tests/python/transformers_cases.py with large ragged batches and CUDA graphs, and crashes.
smollm2_gpu.py has the real model.

    THINKV_BIN_DIR=... THINKV_LIBRARY=... \
    PYTHONPATH=client/python:tests/python python3 tests/gpu/transformers_gpu.py [TEST...]

Needs torch with CUDA and transformers. The exit status is the number of failures; 77: nothing can
run here.
"""

import signal
import subprocess
import sys
import time
import unittest

try:
    import torch
    import transformers
except ImportError as missing:
    print(f"skipped: {missing} (THINKV_TORCH_PYTHON names a Python that has it)")
    sys.exit(77)

import thinkv
import transformers_cases as cases
from tiny_models import VOCABULARY

torch.backends.cuda.matmul.allow_tf32 = False

CHILD = """
import sys, torch, thinkv
from thinkv.transformers import ThinkvCache
from tiny_models import tiny_model
model = tiny_model("llama", device="cuda")
model.set_attn_implementation("thinkv")
cache = ThinkvCache(model, "k4v4-only", socket=sys.argv[1], name="child")
class Streamer:
    count = 0
    def put(self, value):
        self.count += 1
        if self.count == 100:
            print("running", flush=True)
    def end(self):
        pass
ids = torch.randint(2, 160, (1, 30), device="cuda")
model.generate(input_ids=ids, max_new_tokens=3900, do_sample=False, streamer=Streamer(),
               past_key_values=cache)
"""


class OnTheGpu:
    device = "cuda"
    pool = "2GiB"
    batches = (1, 7, 32)


class GpuLogits(OnTheGpu, cases.Logits):
    pass


class GpuGenerate(OnTheGpu, cases.Generate):
    pass


class GpuRows(OnTheGpu, cases.Rows):
    pass


class GpuRefusals(OnTheGpu, cases.Refusals):
    pool = cases.Refusals.pool


class GpuShortPools(OnTheGpu, cases.ShortPools):
    pool = cases.ShortPools.pool


class GpuEngines(OnTheGpu, cases.Engines):
    graph = True


class GpuShortEngines(OnTheGpu, cases.ShortEngines):
    pool = cases.ShortEngines.pool
    graph = True


class Graphs(OnTheGpu, cases.TransformersCase):
    def test_a_replayed_step_is_the_eager_one_bit_for_bit(self):
        model = self.model("llama")
        prompts = [torch.randint(2, VOCABULARY, (10 + 5 * i,)) for i in range(5)]
        texts = []
        for graph in (False, True):
            cache = self.cache(model, "thinkv", budget=128, rows=8)
            step = thinkv.Step(model, cache, graph=graph)
            for row, prompt in enumerate(prompts):
                step.join(row, prompt)
            texts.append(torch.stack([step().clone() for _ in range(1000)])[:, :5].cpu())
            stats = cache.stats()
            self.assertGreater(stats[0]["evicted_slots"], 0)
            cache.close()
        self.assertTrue(torch.equal(texts[0], texts[1]))

    def test_a_step_waits_for_nothing(self):
        model = self.model("llama")
        cache = self.cache(model, "k4v4-only", rows=8)
        step = thinkv.Step(model, cache)
        step.join(0, torch.arange(2, 30))
        step()
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000_000)  # about 0.2 s of a busy GPU
        started = time.monotonic()
        step()
        launched = time.monotonic() - started
        torch.cuda.synchronize()
        waited = time.monotonic() - started
        print(f"    launched in {1e6 * launched:.0f} us on a GPU busy for {1e3 * waited:.0f} ms")
        self.assertLess(launched, 0.25 * waited)


class Crashes(OnTheGpu, cases.TransformersCase):
    def text_of(self, model, prompt):
        cache = self.cache(model, "k4v4-only")
        out = model.generate(input_ids=prompt, max_new_tokens=400, do_sample=False,
                             past_key_values=cache)
        cache.close()
        return out

    def test_a_killed_process_changes_no_text_and_its_memory_comes_back(self):
        model = self.model("llama")
        prompt = torch.randint(2, VOCABULARY, (2, 40), device="cuda")
        alone = self.text_of(model, prompt)
        child = subprocess.Popen([sys.executable, "-c", CHILD, self.socket], text=True,
                                 stdout=subprocess.PIPE)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        self.assertEqual(child.stdout.readline().strip(), "running")
        cache = self.cache(model, "k4v4-only")
        kill = [lambda: child.send_signal(signal.SIGKILL)]

        class Killer(transformers.LogitsProcessor):
            def __call__(self, input_ids, scores):
                if input_ids.shape[1] == 200 and kill:
                    kill.pop()()
                return scores

        beside = model.generate(input_ids=prompt, max_new_tokens=400, do_sample=False,
                                past_key_values=cache,
                                logits_processor=transformers.LogitsProcessorList([Killer()]))
        self.assertEqual(kill, [])
        self.assertTrue(torch.equal(beside, alone))
        child.wait()
        started = time.monotonic()
        while len(self.client.status()["clients"]) > 1:
            self.assertLess(time.monotonic() - started, 10, "the dead process is still listed")
            time.sleep(0.005)
        print(f"    the dead process was gone {1e3 * (time.monotonic() - started):.0f} ms after "
              "the parent saw its end")
        cache.close()
        self.assertEqual(self.pages_in_use(), 0)

    def test_a_killed_daemon_ends_generation_with_an_error_that_can_be_caught(self):
        model = self.model("llama")
        cache = self.cache(model, "k4v4-only")
        ids = torch.randint(2, VOCABULARY, (2, 40), device="cuda")
        model(input_ids=ids, past_key_values=cache)
        for _ in range(20):
            ids = model(input_ids=ids[:, -1:], past_key_values=cache).logits.argmax(-1)
        self.daemon.kill()
        self.daemon.wait()
        steps = 0
        with self.assertRaises((thinkv.UnavailableError, thinkv.StaleError)) as raised:
            for steps in range(3000):
                ids = model(input_ids=ids[:, -1:], past_key_values=cache).logits.argmax(-1)
        torch.cuda.synchronize()
        print(f"    {steps} more steps with what it held, then: {raised.exception}")
        self.assertGreater(steps, 0)


if __name__ == "__main__":
    cases.run_on_gpu()
