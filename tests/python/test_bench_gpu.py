"""The benchmarks of the GPU where none is: cases, bytes, results, what a step is bound by."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench.gpu import cases, formats, kernels, library, machine, report  # noqa: E402
from tools.bench.gpu import resources, roofline, serve  # noqa: E402

BENCH = ROOT / "tools" / "bench" / "bench"


def result_row(kernel: str, us: float, **other: object) -> report.Row:
    case = cases.Case(32, 8, 128, 128, 4096)
    return {**kernels.row(kernel, case, (us, us * 0.98, us * 1.02), (553648128.0, 603979776)),
            "stream_fraction": 0.8, **other}


RESULT: list[report.Row] = [
    {"kernel": "run", "gpu": "Test GPU", "driver": "1.2", "commit": "abc", "command": "bench",
     "notes": {"flex-live": "not run"}},
    {"kernel": "stream-read", "gb_s": 4000.0},
    result_row("thinkv-k4v4", 150.0),
    result_row("sdpa-flash", 450.0),
    result_row("thinkv-k4v4", 151.0, live_fraction=0.5),
]
SERVED: list[report.Row] = [
    {"system": "run", "gpu": "Test GPU", "driver": "1.2", "commit": "abc", "stream_gb_s": 4000.0,
     "gemm_tflops": 700.0, "assumption": "spread", "method": "graphs", "notes": {}},
    {"system": "full-bf16", "budget": 0, "cap_bytes": 80_000_000_000, "batch": 29,
     "tokens_per_s": 1450.0, "step_ms": {"gemm": 5.0, "attention": 14.0, "step": 20.0},
     "bytes_held": 78_000_000_000, "bound_by": "kv bytes"},
]


class Formats(unittest.TestCase):
    def test_slots_are_those_that_the_header_proves(self) -> None:
        header = (ROOT / "include/thinkv/internal/page_format.h").read_text()
        proven = re.findall(r"slots_are\(Format::k(\w+), (\d+), (\d+), (\d+)\)", header)
        found = {name.lower(): tuple(map(int, slots)) for name, *slots in proven}
        for name, form in formats.FORMATS.items():
            self.assertEqual(found[name], tuple(form.slots(d) for d in (64, 128, 256)), name)

    def test_numbers_and_bits_are_those_of_the_header(self) -> None:
        header = (ROOT / "include/thinkv/internal/format.h").read_text()
        numbers = dict(re.findall(r"  k(\w+) = (\d+),", header))
        rows = re.findall(r'Format::k(\w+), "(\w+)", \{Coding::\w+, (\d+)\}, '
                          r"\{Coding::\w+, (\d+)\}", header)
        by_name = {name: (int(numbers[enum]), int(k), int(v)) for enum, name, k, v in rows}
        for name, form in formats.FORMATS.items():
            self.assertEqual(by_name[name], (form.number, form.k_bits, form.v_bits))

    def test_payload_of_a_token_counts_codes_and_scales(self) -> None:
        expected = {"bf16": 512, "k8v8": 260, "k8v4": 196, "k4v4": 132, "k4v2": 100, "k2v2": 68,
                    "nvfp4": 144, "ternary": 80}
        self.assertEqual(
            expected, {name: form.slot_payload(128) for name, form in formats.FORMATS.items()})

    def test_lane_bytes_of_whole_and_of_cut_pages(self) -> None:
        self.assertEqual((64 * 132, 2 * 4608), formats.lane_bytes("k4v4", 128, 64))
        self.assertEqual((65 * 132, 3 * 4608), formats.lane_bytes("k4v4", 128, 65))

    def test_a_mix_keeps_every_token(self) -> None:
        for tokens in (1, 7, 100, 4095):
            self.assertEqual(tokens, sum(formats.mix_tokens("mixed", tokens).values()))
        self.assertEqual({"k4v4": 60, "k4v2": 30, "bf16": 10}, formats.mix_tokens("mixed", 100))


class Cases(unittest.TestCase):
    def test_the_full_run_has_every_shape_and_quick_is_a_part(self) -> None:
        full = cases.cases(quick=False)
        shapes = {(c.q_heads, c.kv_heads, c.head_dim) for c in full}
        self.assertEqual(set(cases.SHAPES), shapes)
        self.assertEqual({1.0, 0.75, 0.5}, {c.live for c in full})
        self.assertTrue(set(cases.cases(quick=True)) <= set(full))
        self.assertLessEqual(len(cases.cases(quick=True)), 20)

    def test_ragged_lengths_have_the_same_sum_and_differ(self) -> None:
        even = cases.Case(32, 8, 128, 128, 4096)
        ragged = cases.Case(32, 8, 128, 128, 4096, ragged=True)
        self.assertEqual(sum(even.lengths()), sum(ragged.lengths()))
        self.assertEqual(128, len(ragged.lengths()))
        self.assertGreater(max(ragged.lengths()), 4 * min(ragged.lengths()))

    def test_peers_that_pad_do_not_run_on_ragged_lengths(self) -> None:
        names = kernels.chosen(kernels.parser().parse_args(["--case", "ragged"]))[0][1]
        self.assertIn("thinkv-k4v4", names)
        self.assertIn("triton-paged", names)
        self.assertFalse(set(cases.PADDED) & set(names))

    def test_options_choose_cases_and_kernels(self) -> None:
        arguments = kernels.parser().parse_args(
            ["--quick", "--case", "28/4/128 128 x 4096", "--only", "thinkv-k"])
        self.assertEqual([["thinkv-k4v4", "thinkv-k4v2", "thinkv-k2v2"]],
                         [names for _, names in kernels.chosen(arguments)])

    def test_bytes_of_peers(self) -> None:
        case = cases.Case(32, 8, 128, 128, 4096, live=0.5)
        held = 128 * 4096 * 8 * 512
        self.assertEqual((held / 2, held), kernels.bytes_of("flex-live", case))
        self.assertEqual((held / 4, held // 2), kernels.bytes_of("flashinfer-fp8", case))
        self.assertEqual((held / 2, 3 * held // 2), kernels.bytes_of("gather-sdpa", case))


class Results(unittest.TestCase):
    def test_a_result_of_the_documented_form_passes(self) -> None:
        report.check_rows(RESULT)
        report.check_serve(SERVED)

    def test_a_row_without_a_key_is_named(self) -> None:
        for row, key in ((2, "us"), (2, "stream_fraction"), (0, "driver"), (1, "gb_s")):
            broken = [dict(r) for r in RESULT]
            del broken[row][key]
            with self.assertRaisesRegex(ValueError, key):
                report.check_rows(broken)
        with self.assertRaisesRegex(ValueError, "stream-read"):
            report.check_rows([r for r in RESULT if r["kernel"] != "stream-read"])
        with self.assertRaisesRegex(ValueError, "bound_by"):
            report.check_serve([{k: v for k, v in SERVED[1].items() if k != "bound_by"}])

    def test_json_is_one_row_a_line(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "rows.json")
            report.write_json(path, RESULT)
            text = pathlib.Path(path).read_text()
        self.assertEqual(RESULT, json.loads(text))
        self.assertEqual(len(RESULT) + 2, len(text.splitlines()))

    def test_the_table_compares_within_a_case_only(self) -> None:
        table = report.markdown(RESULT)
        self.assertIn("## 32/8/128, batch 128 x 4096\n", table)
        self.assertIn("## 32/8/128, batch 128 x 4096, 50% live\n", table)
        self.assertIn("| thinkv-k4v4 | 150.0 (147.0, 153.0) | 80.0% | 100.7% | 3.00x |", table)
        self.assertIn("Test GPU", table)
        self.assertIn("- flex-live: not run", table)
        half = table.split("50% live")[1]
        self.assertNotIn("x |", half)

    def test_the_table_of_served_systems(self) -> None:
        table = report.serve_markdown(SERVED)
        self.assertIn("| full-bf16 | - | 80 | 29 | 1450 | 78.0 | kv bytes | 20.00 | "
                      "gemm 5.00, attention 14.00 |", table)

    def test_the_plot_is_a_picture_or_says_what_is_missing(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "plot.png")
            problem = report.plot(RESULT, path)
            if importlib.util.find_spec("matplotlib") is None:
                self.assertIn("matplotlib", problem or "")
            else:
                self.assertIsNone(problem)
                self.assertEqual(b"\x89PNG", pathlib.Path(path).read_bytes()[:4])

    def test_without_matplotlib_the_plot_says_so(self) -> None:
        with mock.patch.dict(sys.modules, {"matplotlib": None}):
            self.assertIn("matplotlib", report.plot(RESULT, "unused.png") or "")


class Roofline(unittest.TestCase):
    GPU = roofline.Machine(bytes_per_s=4e12, flops_per_s=7e14)

    def test_each_term_can_bound(self) -> None:
        self.assertEqual("weights", roofline.bound_by(roofline.Step(16e9, 1e9, 1e12), self.GPU))
        self.assertEqual("kv bytes", roofline.bound_by(roofline.Step(16e9, 6e10, 1e12), self.GPU))
        self.assertEqual("gemm", roofline.bound_by(roofline.Step(16e9, 4e10, 2e13), self.GPU))

    def test_floors(self) -> None:
        floors = roofline.floors_ms(roofline.Step(16e9, 4e9, 7e12), self.GPU)
        self.assertEqual({"weights": 4.0, "kv bytes": 1.0, "gemm": 10.0}, floors)


class Resources(unittest.TestCase):
    USAGE = ["Resource usage:", " Common:", "  GLOBAL:0", " Function _Zattend:",
             "  REG:128 STACK:16 SHARED:1040 LOCAL:0 CONSTANT[0]:640 TEXTURE:0"]
    SASS = ["\t\tFunction : _Zattend", "\t.headerflags\t@\"EF_CUDA_SM90\"",
            "        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */",
            "                                                          /* 0x000fe20000000800 */",
            "        /*0010*/              @!P0 LDS.128 R4, [R2] ;      /* 0x00000000 */",
            "        /*0020*/             @!UP0 UBLKCP [UR4] ;          /* 0x00000000 */",
            "        /*0030*/                   HMMA.16816.F32 R4, R4, R8, R4 ; /* 0x0 */",
            "        /*0040*/                   HMMA.16816.F32 R8, R4, R8, R8 ; /* 0x0 */"]

    def test_usage(self) -> None:
        self.assertEqual({"_Zattend": {"registers": 128, "stack": 16, "shared": 1040, "local": 0}},
                         resources.parse_usage(self.USAGE))

    def test_instructions(self) -> None:
        counts = resources.parse_sass(self.SASS)["_Zattend"]
        self.assertEqual({"LDC": 1, "LDS": 1, "UBLKCP": 1, "HMMA": 2}, dict(counts))


class Command(unittest.TestCase):
    def run_bench(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True,
                              text=True, timeout=120)

    def test_help_of_each(self) -> None:
        for name in ("kernels", "serve"):
            done = self.run_bench(name, "--help")
            self.assertEqual(0, done.returncode, done.stderr)
            self.assertIn("--json", done.stdout)

    def test_unknown_command_prints_usage(self) -> None:
        done = self.run_bench("unknown")
        self.assertEqual(2, done.returncode)
        self.assertIn("bench kernels", done.stderr)

    def test_a_missing_python_is_named(self) -> None:
        done = self.run_bench("kernels", "--python", "no-such-python")
        self.assertEqual(machine.SKIPPED, done.returncode)
        self.assertIn("no-such-python", done.stderr)

    def test_without_a_gpu_it_says_what_to_install(self) -> None:
        if machine.missing() is None:
            self.skipTest("this machine can run the benchmarks")
        for name in ("kernels", "serve"):
            done = self.run_bench(name, "--python", sys.executable)
            self.assertEqual(machine.SKIPPED, done.returncode)
            self.assertRegex(done.stderr, "torch")

    def test_serve_takes_caps_and_systems(self) -> None:
        given = serve.parser().parse_args(["--cap-gb", "80", "--cap-gb", "whole", "--system",
                                           "thinkv-1024"])
        self.assertEqual((["80", "whole"], ["thinkv-1024"]), (given.cap_gb, given.system))

    def test_the_struct_that_python_gives_is_the_one_that_lanes_take(self) -> None:
        folder = ROOT / "tools" / "bench" / "gpu"
        struct = (folder / "lane_pages.cuh").read_text().split("struct ThinkvBenchCase {")[1]
        lines = re.sub(r"//[^\n]*", "", struct.split("};")[0])
        declared = [name.strip(" *") for line in lines.split(";")
                    for name in re.sub(r"^\s*(const )?\w+", "", line).split(",") if name.strip()]
        given = (folder / "ours.py").read_text().split("_fields_ = [")[1].split("]\n")[0]
        self.assertEqual(declared, re.findall(r'\("(\w+)"', given))

    def test_sources_of_the_libraries_exist(self) -> None:
        for sources in library.SOURCES.values():
            for source in sources:
                self.assertTrue(source.exists(), source)


if __name__ == "__main__":
    unittest.main()
