"""A private thinkvd for each test case, and the package `thinkv` with the library under test."""

import os
import shutil
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

SOURCE = Path(os.environ.get("THINKV_SOURCE_DIR", Path(__file__).resolve().parents[2]))
BIN = Path(os.environ.get("THINKV_BIN_DIR", SOURCE / "build" / "bin"))
LIB = Path(os.environ.get("THINKV_LIB_DIR", SOURCE / "build" / "lib"))
os.environ.setdefault("THINKV_LIBRARY", str(LIB / "libthinkv.so"))

CONFIG = """\
pool: {{bytes: {pool}, extent_bytes: 2MiB}}
tenants: [{{name: default, limit: {limit}}}, {tenants}]
default_tenant: default
policies: {{directories: [{policies}, {policies}/formats]}}
metrics: {{port: off}}
log: {{level: warning}}
"""


class ThinkvdCase(unittest.TestCase):
    pool = "64MiB"
    limit = "100%"
    tenants = ""  # more of them

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="thinkv-py-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.socket = str(self.folder / "s")
        self.start_daemon()

    def start_daemon(self):
        config = self.folder / "thinkvd.yaml"
        config.write_text(self.config_text())
        self.log = (self.folder / "log").open("wb")
        self.addCleanup(self.log.close)
        self.daemon = subprocess.Popen(
            [BIN / "thinkvd", "--config", config, "--socket", self.socket],
            stdout=self.log, stderr=self.log,
            env={k: v for k, v in os.environ.items() if k != "THINKV_SOCKET"})
        self.addCleanup(self.stop_daemon)
        self.wait_until(lambda: os.path.exists(self.socket) or self.daemon.poll() is not None)
        if self.daemon.poll() is not None:
            self.fail("thinkvd did not start: " + (self.folder / "log").read_text())

    def config_text(self):
        return CONFIG.format(pool=self.pool, limit=self.limit, tenants=self.tenants,
                             policies=SOURCE / "config" / "policies")

    def stop_daemon(self):
        if self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(10)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
                self.daemon.wait()
                self.fail("thinkvd did not stop on SIGTERM")

    def wait_until(self, condition, seconds=10.0):
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.fail("the condition did not become true")
            time.sleep(0.01)
