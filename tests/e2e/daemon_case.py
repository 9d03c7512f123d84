"""A real thinkvd on a private socket for each test."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest

import raw_client

BIN = pathlib.Path(os.environ["THINKV_BIN_DIR"])
SOURCE = pathlib.Path(os.environ["THINKV_SOURCE_DIR"])

CONFIG = """\
pool: {{bytes: {pool}, extent_bytes: 2MiB}}
tenants:
  - {{name: default, limit: {limit}}}
policies: {{directories: [{policies}]}}
metrics: {{port: {metrics}}}
log: {{level: debug}}
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class DaemonCase(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="thinkv-e2e-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.socket = str(self.folder / "control.sock")
        self.config = self.folder / "thinkvd.yaml"
        self.log = self.folder / "log"
        self.daemon = None

    def write_config(self, pool="16MiB", limit="100%", metrics="off", extra=""):
        policies = SOURCE / "config" / "policies"
        self.config.write_text(
            CONFIG.format(pool=pool, limit=limit, policies=policies, metrics=metrics) + extra)

    def environment(self):
        return {k: v for k, v in os.environ.items() if not k.startswith("THINKV_")}

    def start(self, *arguments, **config):
        if not self.config.exists():
            self.write_config(**config)
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                [BIN / "thinkvd", "--config", self.config, "--socket", self.socket, *arguments],
                stderr=log, stdout=log, env=self.environment())
        self.addCleanup(self.kill)
        self.wait_for("serving on")
        return self.daemon

    def kill(self):
        if self.daemon.poll() is None:
            self.daemon.kill()
            self.daemon.wait()

    def stop(self):
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.wait(10)

    def log_text(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text, seconds=10.0):
        deadline = time.monotonic() + seconds
        while text not in self.log_text():
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                self.fail(f"no {text!r} in the log:\n{self.log_text()}")
            time.sleep(0.01)

    def metrics_url(self):
        return re.search(r"metrics (http://\S+)", self.log_text()).group(1)

    def status(self):
        control = raw_client.Control(self.socket)
        try:
            return json.loads(control.status_text())
        finally:
            control.close()

    def wait_status(self, condition, seconds=5.0):
        deadline = time.monotonic() + seconds
        while True:
            status = self.status()
            if condition(status):
                return status
            if time.monotonic() > deadline:
                self.fail(f"status never became as expected: {json.dumps(status, indent=1)}")
            time.sleep(0.01)

    def run_ctl(self, *arguments):
        return subprocess.run([BIN / "thinkvctl", "--socket", self.socket, *arguments],
                              capture_output=True, text=True, timeout=30,
                              env=self.environment(), check=False)
