"""Runs a C consumer against a private thinkvd."""

import os
import subprocess
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
from thinkvd_case import ThinkvdCase  # noqa: E402

CONSUMER = sys.argv.pop()


class Consumer(ThinkvdCase):
    def test_runs_through(self):
        done = subprocess.run([CONSUMER], env={**os.environ, "THINKV_SOCKET": self.socket},
                              capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stdout), (0, "ok\n"), done.stderr)


if __name__ == "__main__":
    unittest.main()
