"""The quickstart's screen, table and arguments, and the verdicts of tools/eval."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

from engine_support import ROOT

from engine import daemon, gpu, quickstart, report
from engine.screen import Screen

RESULT = {
    "name": "engine-a", "tokens": 800, "tokens_per_s": 21.5, "bytes_f16": 20 * 2**20,
    "bytes_held": 4 * 2**20, "ratio": 5.0, "live_tokens": 300.25, "evicted_tokens": 512.0,
    "slots_reused": 40_000, "thoughts": {"reasoning": 6, "execution": 0, "transition": 0},
    "kl": 0.0312, "top1": 0.914, "text": "Step 1", "private": "not for the file",
}
POOL = {"backend": "host", "bytes_total": 2**30, "bytes_peak": 9 * 2**20, "bytes_held_after": 0,
        "bytes_used": 0}


class ScreenLines(unittest.TestCase):
    def lines(self, *pieces: tuple[str, str], columns: int = 60) -> list[str]:
        out = io.StringIO()
        with mock.patch.dict(os.environ, {"COLUMNS": str(columns)}):
            screen = Screen(["a", "bb"], out)
            for name, piece in pieces:
                screen.text(name, piece)
            for name in ("a", "bb"):
                screen.end_text(name)
        return out.getvalue().splitlines()

    def test_lines_of_two_streams_are_not_mixed(self) -> None:
        found = self.lines(("a", "one "), ("bb", "two\n"), ("a", "three\n"))
        self.assertEqual(found, ["bb | two", "a  | one three"])

    def test_long_lines_break_at_spaces_and_fit(self) -> None:
        text = "word " * 60
        found = self.lines(("a", text))
        self.assertTrue(all(len(line) <= 60 for line in found))
        self.assertEqual(" ".join(line[5:] for line in found).split(), text.split())

    def test_a_word_longer_than_the_line_is_cut(self) -> None:
        found = self.lines(("a", "x" * 200))
        self.assertEqual(sum(line.count("x") for line in found), 200)
        self.assertTrue(all(len(line) <= 60 for line in found))

    def test_control_characters_do_not_reach_the_terminal(self) -> None:
        self.assertEqual(self.lines(("a", "\x1b[2Jred\x07")), ["a  |  [2Jred "])


class Report(unittest.TestCase):
    def test_json_has_exactly_the_keys_of_the_schema(self) -> None:
        found = report.as_json([RESULT], POOL)
        self.assertEqual(set(found), {"processes", "pool"})
        self.assertEqual(set(found["processes"][0]), {
            "name", "tokens", "tokens_per_s", "bytes_f16", "bytes_held", "ratio", "live_tokens",
            "evicted_tokens", "slots_reused", "thoughts", "kl", "top1", "text"})
        self.assertEqual(set(found["pool"]), {
            "backend", "bytes_total", "bytes_peak", "bytes_held_after"})

    def test_table_shows_the_numbers(self) -> None:
        text = report.render([RESULT, {**RESULT, "name": "engine-b"}], POOL)
        for part in ("engine-b", "5.0 x", "40,000", "0.0312", "91.4 %", "4.00 MiB", "host", "0 B"):
            self.assertIn(part, text)

    def test_a_missing_number_is_an_error_and_not_a_blank(self) -> None:
        with self.assertRaises(KeyError):
            report.as_json([{"name": "engine-a"}], POOL)


class Arguments(unittest.TestCase):
    def refused(self, *arguments: str) -> str:
        text = io.StringIO()
        with contextlib.redirect_stderr(text), self.assertRaises(SystemExit) as stop:
            quickstart.parse_arguments(list(arguments))
        self.assertEqual(stop.exception.code, 2)
        return text.getvalue()

    def test_defaults(self) -> None:
        found = quickstart.parse_arguments([])
        self.assertEqual((found.tokens, found.policy, found.budget, found.keep_running),
                         (800, "thinkv", 256, False))
        self.assertIsNone(quickstart.parse_arguments(["--budget", "policy"]).budget)

    def test_bad_values_are_refused_with_their_reason(self) -> None:
        self.assertIn("at least 1", self.refused("--tokens", "0"))
        self.assertIn("at most 7000", self.refused("--tokens", "7001"))
        self.assertIn("invalid", self.refused("--tokens", "many"))
        self.assertIn("at least 1", self.refused("--budget", "-4"))
        self.assertIn("between 0 and 2", self.refused("--temperature", "nan"))
        self.assertIn("does not exist", self.refused("--json", "/nonexistent/folder/x.json"))
        self.assertIn("unrecognized", self.refused("--speed"))

    def test_a_pool_that_is_not_empty_fails(self) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            file = pathlib.Path(folder) / "out.json"
            options = quickstart.parse_arguments(["--json", str(file)])
            self.assertEqual(quickstart.finish(options, [RESULT], POOL, 0.01), 0)
            self.assertEqual(json.loads(file.read_text())["processes"][0]["text"], "Step 1")
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                held = {**POOL, "bytes_held_after": 4096}
                self.assertEqual(quickstart.finish(options, [RESULT], held, 5.0), 1)
            self.assertIn("still holds 4,096 bytes", errors.getvalue())


class DaemonStart(unittest.TestCase):
    def test_missing_binary_says_what_to_do(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.dict(os.environ, {"THINKV_BIN_DIR": folder, "XDG_RUNTIME_DIR": folder}):
                with self.assertRaisesRegex(daemon.DaemonError, "tools/setup"):
                    daemon.Daemon()
            self.assertEqual(os.listdir(folder), [])  # the private directory is gone

    def test_daemon_that_ends_at_once_is_reported_with_its_log(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            fake = pathlib.Path(folder) / "thinkvd"
            fake.write_text("#!/bin/sh\necho cannot bind >&2\nexit 3\n")
            fake.chmod(0o755)
            with mock.patch.dict(os.environ, {"THINKV_BIN_DIR": folder}):
                with self.assertRaisesRegex(daemon.DaemonError, "(?s)status 3.*cannot bind"):
                    daemon.Daemon()

    def test_private_configuration_differs_in_port_and_folders_only(self) -> None:
        text = daemon.CONFIG.read_text()
        made = daemon._config_without_metrics(text, daemon.CONFIG.parent)
        changed = [pair for pair in zip(text.splitlines(), made.splitlines()) if pair[0] != pair[1]]
        self.assertEqual(len(changed), 2)
        self.assertIn("port: off", made)
        self.assertIn(f"[{daemon.CONFIG.parent}/policies, ", made)

    def test_configuration_without_a_port_is_an_error(self) -> None:
        with self.assertRaises(daemon.DaemonError):
            daemon._config_without_metrics("pool:\n  bytes: 1GiB\n", daemon.CONFIG.parent)


class OnAGpu(unittest.TestCase):
    def test_a_worker_finds_our_packages_first_and_then_what_the_user_names(self) -> None:
        engine = gpu.GpuEngine("python3", pathlib.Path("bin"), pathlib.Path("lib/libthinkv.so"),
                               pathlib.Path("model.gguf"))
        for named, rest in ({"PYTHONPATH": "/opt/torch"}, ["/opt/torch"]), ({}, []):
            with mock.patch.dict(os.environ, named, clear=True):
                made = engine.environment()
            ours = [str(ROOT / "tools"), str(ROOT / "client" / "python")]
            self.assertEqual(ours + rest, made["PYTHONPATH"].split(os.pathsep))
            self.assertEqual("model.gguf", made["THINKV_MODEL"])


class QuickstartScript(unittest.TestCase):
    def test_help_works_without_the_virtual_environment(self) -> None:
        done = subprocess.run([ROOT / "tools" / "quickstart", "--help"], capture_output=True,
                              text=True, timeout=60, check=False,
                              env={"PATH": os.environ["PATH"]})
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("--keep-running", done.stdout)

    def test_absent_interpreter_is_a_clear_error(self) -> None:
        done = subprocess.run([ROOT / "tools" / "engine" / "run", "engine.quickstart"],
                              capture_output=True, text=True, timeout=60, check=False,
                              env={"PATH": os.environ["PATH"], "THINKV_PYTHON": "/nonexistent/py"})
        self.assertEqual(done.returncode, 1)
        self.assertIn("run tools/setup", done.stderr)


if __name__ == "__main__":
    sys.exit(unittest.main())
