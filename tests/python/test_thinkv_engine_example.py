"""client/examples/engine.c: the same answers however many rows run at once, and in a pool that is
too small for all of them."""

import os
import re
import subprocess
import unittest
from pathlib import Path

from thinkvd_case import ThinkvdCase

BINARY = Path(os.environ["THINKV_BIN_DIR"]).parent / "examples" / "thinkv_engine"


class EngineExample(ThinkvdCase):
    def run_engine(self, rows):
        """What it answered, and how often a sequence had to wait."""
        done = subprocess.run([BINARY, str(rows)], env={**os.environ, "THINKV_SOCKET": self.socket},
                              capture_output=True, text=True, timeout=120)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout, int(re.match(r"(\d+) times", done.stderr).group(1))

    def test_rows_change_no_answer(self):
        alone, waited = self.run_engine(1)
        self.assertEqual(waited, 0)
        lines = alone.splitlines()
        self.assertEqual([len(line.split()) for line in lines],
                         [2 + 3 * i + 60 + i for i in range(12)])
        self.assertGreater(len(set(alone.split())), 10)
        for rows in (3, 8):
            self.assertEqual(self.run_engine(rows), (alone, 0))


class ShortOfMemory(EngineExample):
    limit = "512KiB"

    def test_rows_change_no_answer(self):
        alone, waited = self.run_engine(1)
        self.assertEqual(waited, 0)
        together, waited = self.run_engine(8)
        self.assertGreater(waited, 0)
        self.assertEqual(together, alone)

    def test_wrong_arguments(self):
        done = subprocess.run([BINARY, "9"], capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 2)


if __name__ == "__main__":
    unittest.main()
