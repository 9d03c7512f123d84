"""Starts a private thinkvd for the tools of this folder, and asks it for its status."""

from __future__ import annotations

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
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config" / "thinkvd.yaml"
READY_S = 10.0
STOP_S = 5.0


class DaemonError(RuntimeError):
    """thinkvd could not be started or does not answer; the text says what to do."""


def bin_dir() -> pathlib.Path:
    return pathlib.Path(os.environ.get("THINKV_BIN_DIR", str(ROOT / "build" / "bin")))


def _binary(name: str, folder: pathlib.Path | None = None) -> str:
    path = (folder or bin_dir()) / name
    if not path.is_file():
        raise DaemonError(f"{path} is not there: build first (tools/setup)")
    return str(path)


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _config_on_gpu(text: str) -> str:
    text, count = re.subn(r"(?m)^(\s+backend:) host$", r"\1 cuda", text)
    if count != 1:
        raise DaemonError("the configuration names no backend host that could become cuda")
    return text


def _config_without_metrics(
    text: str, folder: pathlib.Path, policies: list[pathlib.Path] | None = None
) -> str:
    """The configuration with the metrics port off and the policy folders made absolute, because
    the copy lies elsewhere; `policies` are further folders."""

    def absolute(match: re.Match[str]) -> str:
        names = [str(folder / name.strip()) for name in match.group(2).split(",")]
        return f"{match.group(1)}[{', '.join(names + [str(each) for each in policies or []])}]"

    text, ports = re.subn(r"(?m)^(\s+port:).*$", r"\1 off", text)
    text, folders = re.subn(r"(?m)^(\s+directories:\s*)\[([^]]*)\]", absolute, text)
    if ports != 1 or folders != 1:
        raise DaemonError(
            f"{folder / 'thinkvd.yaml'}: no single metrics port or policy folder list")
    return text


class Daemon:
    """thinkvd on a socket in a fresh private directory; `with` stops it and removes the directory.

    metrics False switches the Prometheus port off; True switches it off only if it is taken.
    gpu: the folder of a build with the cuda backend, whose pool is on the first GPU.
    policies: folders of policy files beside those of the configuration; pool: the size of the pool
    in place of the configured one, for example "4GiB". Both need metrics False.
    """

    def __init__(
        self,
        metrics: bool = False,
        config: pathlib.Path = CONFIG,
        *,
        gpu: pathlib.Path | None = None,
        policies: list[pathlib.Path] | None = None,
        pool: str | None = None,
    ) -> None:
        self._gpu = gpu
        if metrics and (policies or pool):
            raise ValueError("Daemon: policies and pool need a private configuration")
        base = os.environ.get("XDG_RUNTIME_DIR")
        if not base or not os.access(base, os.W_OK):
            base = None
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="thinkv-", dir=base))
        self.socket = self.folder / "control.sock"
        self.log = self.folder / "thinkvd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._kept = False
        self.notes: list[str] = []
        try:
            self._config = self._choose_config(config, metrics, policies, pool)
            self._start()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._kept:
            self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def keep(self) -> None:
        """Leaves the daemon and its directory when the `with` block ends."""
        self._kept = True

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 15) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def status(self) -> dict[str, Any]:
        """What `thinkvctl status --json` prints."""
        command = [_binary("thinkvctl", self._gpu), "--socket", str(self.socket),
                   "status", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode != 0:
            raise DaemonError(f"thinkvctl status failed: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _choose_config(
        self,
        config: pathlib.Path,
        metrics: bool,
        policies: list[pathlib.Path] | None,
        pool: str | None,
    ) -> pathlib.Path:
        text = config.read_text() if self._gpu is None else _config_on_gpu(config.read_text())
        port = re.search(r"(?m)^\s+port:\s*(\d+)", text)
        wanted = metrics and port is not None and _port_is_free(int(port.group(1)))
        if wanted and self._gpu is None:
            return config
        if metrics and port and not wanted:
            self.notes.append(f"port {port.group(1)} is taken: this thinkvd runs without metrics")
        private = self.folder / "thinkvd.yaml"
        text = _config_without_metrics(text, config.parent.resolve(), policies)
        if pool is not None:
            text, sizes = re.subn(r"(?m)^(  bytes:).*$", rf"\1 {pool}", text)
            if sizes != 1:
                raise DaemonError(f"{config}: no single pool size")
        private.write_text(text)
        return private

    def _start(self) -> None:
        command = [_binary("thinkvd", self._gpu), "--config", str(self._config),
                   "--socket", str(self.socket)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("THINKV_")}
        with open(self.log, "wb") as log:
            # A session of its own: Ctrl-C in the terminal reaches the tool, which stops the
            # daemon after its clients.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise DaemonError(
                    f"thinkvd ended with status {self._process.returncode}:\n{self.log_tail()}"
                )
            if self._answers():
                return
            time.sleep(0.02)
        raise DaemonError(f"thinkvd does not listen after {READY_S:.0f} s:\n{self.log_tail()}")

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
        return True
