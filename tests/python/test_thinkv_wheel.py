"""The wheel: installed into a fresh environment without the network, it runs by itself."""

import os
import subprocess
import sys
import unittest
import venv
import zipfile
from pathlib import Path

from thinkvd_case import LIB, SOURCE, ThinkvdCase

SCRIPT = """
import os, sys, thinkv
from array import array
assert "numpy" not in sys.modules
assert os.path.dirname(thinkv.__file__).startswith(sys.prefix), thinkv.__file__
with thinkv.Client() as client:
    model = client.model(layers=1, q_heads=2, kv_heads=1, head_dim=64)
    sequence = model.sequence(policy="full-f16")
    one = memoryview(array("f", [1.0] * 64)).cast("B").cast("f", (1, 1, 64))
    query = memoryview(array("f", [0.5] * 128)).cast("B").cast("f", (1, 2, 64))
    for token in range(20):
        with model.step([sequence]) as step:
            step.append(0, one, one)
            out, lse = step.attend(0, query, lse=True)
    assert out.shape == (1, 2, 64) and abs(out[0, 1, 63] - 1.0) < 1e-3, out[0, 1, 63]
    assert sequence.stats()["tokens"] == 20
    maps = open("/proc/self/maps").read()
    print([line.split()[-1] for line in maps.splitlines() if "libthinkv" in line][0])
"""


class Wheel(ThinkvdCase):
    def build(self):
        out = subprocess.run(
            [sys.executable, SOURCE / "client" / "python" / "build_wheel.py",
             "--library", LIB / "libthinkv.so", "--out", self.folder / "wheel"],
            check=True, capture_output=True, text=True)
        return Path(out.stdout.strip())

    def test_installs_and_decodes_without_numpy(self):
        wheel = self.build()
        home = self.folder / "venv"
        venv.create(home, with_pip=True)
        environment = {k: v for k, v in os.environ.items()
                       if not k.startswith(("THINKV", "PYTHON"))}
        subprocess.run([home / "bin" / "python", "-m", "pip", "install", "--no-index", "--quiet",
                        wheel], check=True, env=environment)
        done = subprocess.run([home / "bin" / "python", "-c", SCRIPT], cwd=self.folder,
                              env={**environment, "THINKV_SOCKET": self.socket},
                              capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(done.stdout.startswith(str(home)), done.stdout)

    def test_same_input_gives_the_same_bytes_and_a_library_inside(self):
        first = self.build().read_bytes()
        wheel = self.build()
        self.assertEqual(wheel.read_bytes(), first)
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        self.assertIn("thinkv/libthinkv.so", names)
        self.assertIn("thinkv/py.typed", names)
        here = {str(path.relative_to(SOURCE / "client" / "python"))
                for path in (SOURCE / "client" / "python" / "thinkv").rglob("*.py")}
        self.assertIn("thinkv/transformers/__init__.py", here)
        self.assertEqual(here - set(names), set())

    def test_missing_library_is_an_error(self):
        done = subprocess.run(
            [sys.executable, SOURCE / "client" / "python" / "build_wheel.py",
             "--library", self.folder / "none.so", "--out", self.folder],
            capture_output=True, text=True)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("build the library first", done.stderr)


if __name__ == "__main__":
    unittest.main()
