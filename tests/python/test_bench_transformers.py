"""bench transformers where no GPU is: its processes, its search, its table."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest
from functools import partial
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench.gpu import kernel_split, machine  # noqa: E402
from tools.bench.gpu import transformers_bench as bench  # noqa: E402
from tools.bench.gpu import transformers_run as run  # noqa: E402

MEASURED = {"system": "thinkv", "tokens": 4096, "batch": 32, "step_ms": 5.0, "tokens_per_s": 6400.0,
            "bytes_held": 32 * 44 * 2**20}
# Starts a process of its own, says which, and hangs.
HANGS = ("import subprocess, sys, time; "
         "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
         "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(60)")


def alive(pid: int) -> bool:
    """A zombie whose parent is gone may wait for init a moment: it holds nothing."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Processes(unittest.TestCase):
    def test_ours_share_one_and_the_others_have_their_own(self) -> None:
        self.assertEqual([["full-f16", "k4v4-only", "thinkv"], ["dynamic"], ["static-compile"]],
                         bench.groups(list(bench.SYSTEMS)))
        self.assertEqual([["dynamic"]], bench.groups(["dynamic"]))

    def test_a_process_is_told_everything(self) -> None:
        options = bench.parser().parse_args(["--tokens", "64", "--batch", "7", "--no-largest",
                                             "--limit-s", "9"])
        told = bench.arguments(options, ["thinkv"], pathlib.Path("/rows"))
        again = bench.parser().parse_args(told[1:])
        self.assertEqual((["thinkv"], [64], 7, True, 9.0, "/rows", 32),
                         (again.system, again.tokens, again.batch, again.no_largest,
                          again.limit_s, again.rows, again.layers))

    def test_what_hangs_is_stopped_with_what_it_started(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "pid"
            self.assertIsNone(bench.run_process([sys.executable, "-c", HANGS, str(file)], 2.0))
            pid = int(file.read_text())
        deadline = time.monotonic() + 5
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertFalse(alive(pid))

    def test_what_hangs_says_where(self) -> None:
        with tempfile.TemporaryFile() as errors:
            waits = "def hangs_here(): import time; time.sleep(60)"
            script = f"{waits}\nfrom tools.bench.gpu import transformers_run as run\n" \
                "run.tell_on_request()\nhangs_here()"
            code = f"import os; os.dup2({errors.fileno()}, 2)\n{script}"
            command = [sys.executable, "-c", code]
            with mock.patch.object(bench.subprocess, "Popen", partial(
                    subprocess.Popen, pass_fds=[errors.fileno()], cwd=ROOT)):
                self.assertIsNone(bench.run_process(command, 3.0))
            errors.seek(0)
            self.assertIn("in hangs_here", errors.read().decode())

    def test_a_status_is_the_process_own(self) -> None:
        self.assertEqual(5, bench.run_process([sys.executable, "-c", "raise SystemExit(5)"], 30.0))

    def test_a_stopped_process_keeps_its_rows(self) -> None:
        def hang(command: list[str], limit_s: float) -> None:
            rows = pathlib.Path(command[command.index("--rows") + 1])
            rows.write_text(json.dumps(MEASURED) + "\n" + '{"system": "thin')

        options = bench.parser().parse_args(["--limit-s", "3"])
        with mock.patch.object(bench, "run_process", hang), \
                contextlib.redirect_stderr(io.StringIO()):
            status, rows = bench.measure(options, ["k4v4-only", "thinkv"])
        self.assertEqual(0, status)
        self.assertEqual([MEASURED, {"system": "thinkv", "tokens": 0,
                                     "note": "stopped after 3 s"}], rows)

    def test_without_torch_nothing_runs(self) -> None:
        with mock.patch.object(bench, "run_process", lambda *_: machine.SKIPPED):
            self.assertEqual(machine.SKIPPED, bench.main(["transformers"]))


class Search(unittest.TestCase):
    def found(self, capacity: int, guess: int, tries: int = 99) -> tuple[int, int]:
        seen: list[int] = []

        def fits(batch: int) -> bool:
            seen.append(batch)
            return batch <= capacity

        return run.search(fits, guess, lambda: len(seen) < tries), len(seen)

    def test_it_ends_within_two_percent_below(self) -> None:
        for capacity in (1, 2, 7, 50, 213, 1000):
            for guess in (capacity, capacity + capacity // 20, 3 * capacity + 1):
                batch, tries = self.found(capacity, guess)
                self.assertLessEqual(batch, capacity)
                if guess < 2 * capacity:
                    self.assertGreaterEqual(batch, capacity - max(1, capacity // 40))
                    self.assertLessEqual(tries, 6)

    def test_without_time_it_is_what_was_seen_to_fit(self) -> None:
        self.assertEqual((0, 1), self.found(capacity=100, guess=200, tries=1))
        batch, tries = self.found(capacity=100, guess=200, tries=3)
        self.assertTrue(batch <= 100 and tries == 3)

    def test_nothing_fits(self) -> None:
        self.assertEqual(0, self.found(capacity=0, guess=8)[0])


class Split(unittest.TestCase):
    def test_kernels_are_known_by_name(self) -> None:
        names = {
            "nvjet_sm90_tst_64x8_64x16_2x1_v_bz_TNT": "matmul",
            "void gemv2T_kernel_val<int, int, __nv_bfloat16>": "matmul",
            "void pytorch_flash::flash_fwd_splitkv_kernel<cutlass::bfloat16_t>": "attention",
            "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": "attention",
            "void thinkv::cuda::attend_kernel<4>(thinkv::cuda::AttendParams)": "attention",
            "void thinkv::cuda::append_kernel<128>(thinkv::cuda::BatchView)": "cache",
            "void at::native::CatArrayBatchedCopy_contig<at::native::OpaqueType<2u>>": "cache",
            "void at::native::elementwise_kernel<at::native::direct_copy_kernel_cuda>": "copies",
            "void at::native::vectorized_elementwise_kernel<4, silu_kernel>": "other",
        }
        for name, kind in names.items():
            self.assertEqual(kind, kernel_split.classify(name), name)

    def test_what_no_kernel_explains_is_idle(self) -> None:
        split = kernel_split.sums({"a gemm": 4000.0, "another gemm": 2000.0,
                                   "attend_kernel": 1000.0}, steps=2, step_ms=5.0)
        self.assertEqual({"matmul": 3.0, "attention": 0.5, "idle": 1.5}, split)
        self.assertEqual(0.0, kernel_split.sums({"gemm": 9e3}, 1, 5.0)["idle"])

    def test_kernels_that_overlap_are_not_counted_twice(self) -> None:
        trace = [kernel_split.Ran("combine", 2.0, 11.0), kernel_split.Ran("attend", 0.0, 10.0),
                 kernel_split.Ran("inside", 3.0, 9.0), kernel_split.Ran("attend", 20.0, 30.0)]
        self.assertEqual({"attend": 20.0, "combine": 1.0, "inside": 0.0},
                         kernel_split.alone(trace))


class Table(unittest.TestCase):
    ROWS = [{"system": "run", "gpu": "H200"}, MEASURED,
            {"system": "thinkv", "tokens": 4096, "split_ms": {"matmul": 3.5, "idle": 0.25}},
            {"system": "thinkv", "tokens": 4096, "largest_batch": 2400,
             "largest_tokens_per_s": 25000.0},
            {"system": "dynamic", "tokens": 16384, "note": "OutOfMemoryError: no"},
            {"system": "run", "gpu": "another process"}]

    def test_one_line_has_all_that_is_known_of_a_system(self) -> None:
        lines = bench.markdown(self.ROWS).splitlines()[2:]
        self.assertEqual("| thinkv | 4096 | 32 | 6400.0 | 5.0 | 3.50, 0.00, 0.00, 0.00, 0.00, 0.25 "
                         "| 44.0 | 2400 | 25000.0 |", lines[0])
        self.assertIn("| OutOfMemoryError: no |", lines[1])
        self.assertEqual(2, len(lines))

    def test_the_file_has_one_header(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "out.json"
            bench.write(file, self.ROWS, ["transformers", "--json", "out.json"])
            header, *rows = json.loads(file.read_text())
        self.assertEqual(("H200", "tools/bench/bench transformers --json out.json", bench.METHOD),
                         (header["gpu"], header["command"], header["method"]))
        self.assertEqual(self.ROWS[1:5], rows)


if __name__ == "__main__":
    unittest.main()
