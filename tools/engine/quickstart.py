"""Two engine processes with a real model share one pool; started by tools/quickstart."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from . import report
from .daemon import ROOT, Daemon, DaemonError, bin_dir
from .gpu import GpuEngine, NoGpu, find_gpu
from .prompts import ENGINES
from .screen import Screen

EMPTY_S = 5.0  # how long the pool may take to take everything back
EXIT_S = 20.0

DESCRIPTION = """\
Starts thinkvd and two engine processes that answer their own step-by-step questions with
SmolLM2-135M-Instruct; the KV caches of both live in the daemon's pool: on the GPU where torch and
transformers can use one (--backend), else in host memory. At the end: a table of bytes, evictions
and quality, one process exits, the other one is killed, and the pool must be empty again. The
first run installs what is missing (Debian packages need root or sudo)."""

EPILOG = """\
A model of this size repeats itself under greedy decoding, so tokens are drawn at the given
temperature from the most likely 95 %, with a mild penalty (1.1) on the last 64 tokens and a fixed
seed a process: two runs with the same options draw from the same random numbers. The end of the
answer is suppressed until --tokens are reached."""


class QuickstartError(RuntimeError):
    """What went wrong, for the person at the terminal."""


class Worker:
    """An engine process and what it has reported. Ended by close() or kill(), stop() at last."""

    def __init__(self, name: str, seed: int, socket: str, options: argparse.Namespace,
                 gpu: GpuEngine | None) -> None:
        self.name = name
        self.result: dict[str, Any] | None = None
        self.stats: dict[str, Any] = {}
        self.error: str | None = None
        self.closed = False
        self._pending = b""
        command = [
            gpu.python if gpu else sys.executable, "-m", "engine.worker",
            "--name", name, "--socket", socket,
            "--policy", options.policy, "--tokens", str(options.tokens), "--seed", str(seed),
            "--temperature", str(options.temperature),
        ]
        if options.budget is not None:
            command += ["--budget", str(options.budget)]
        if gpu:
            command += ["--gpu"]
        # One thread each for the matrix products: two processes share the machine, and a product
        # of this size gains nothing from threads that fight over the same cores.
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1",
                           PYTHONUNBUFFERED="1", **(gpu.environment() if gpu else {}))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment, cwd=ROOT, start_new_session=True,
        )

    def events(self) -> Iterator[dict[str, Any]]:
        """Events that are there now; `error` is set if the process ended without saying why."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            self._ended()
            return
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)

    def _ended(self) -> None:
        self.process.wait()
        if self.error is None and not self.closed:
            assert self.process.stderr is not None
            trace = self.process.stderr.read().decode(errors="replace").strip()
            status = self.process.returncode
            self.error = f"ended with status {status}\n{trace}"

    def close(self) -> None:
        """Lets the process close its sequence and exit. Raises if it does not exit with 0."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.close()
        try:
            status = self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired as error:
            raise QuickstartError(f"{self.name} does not exit") from error
        if status != 0:
            raise QuickstartError(f"{self.name} ended with status {status}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def handle(worker: Worker, event: dict[str, Any], screen: Screen, tokens: int) -> None:
    kind = event["event"]
    if kind == "text":
        screen.text(worker.name, event["text"])
    elif kind == "progress":
        screen.progress(worker.name, event["tokens"], tokens, event["tokens_per_s"])
    elif kind == "phase":
        screen.end_text(worker.name)
        screen.say(f"[{worker.name}] {event['phase']}")
    elif kind == "result":
        worker.result, worker.stats = event["result"], event["stats"]
    elif kind == "error":
        worker.error = event["message"]
    elif kind == "closed":
        worker.closed = True


def follow(workers: list[Worker], screen: Screen, tokens: int) -> None:
    """Shows what the workers say until each has its result. Raises when one of them fails."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        while any(worker.result is None for worker in workers):
            for key, _ in selector.select():
                worker: Worker = key.data
                for event in worker.events():
                    handle(worker, event, screen, tokens)
                if worker.error is not None:
                    screen.end_progress()
                    raise QuickstartError(f"{worker.name}: {worker.error}")
    screen.end_progress()


def wait_until_empty(daemon: Daemon) -> tuple[int, float]:
    """(bytes still held, seconds waited); gives up after EMPTY_S."""
    started = time.monotonic()
    while True:
        pool = daemon.status()["pool"]
        waited = time.monotonic() - started
        if pool["bytes_used"] == 0 or waited > EMPTY_S:
            return int(pool["bytes_used"]), waited
        time.sleep(0.02)


def run(options: argparse.Namespace, daemon: Daemon, gpu: GpuEngine | None) -> int:
    screen = Screen(list(ENGINES))
    for note in daemon.notes:
        screen.say(f"[thinkvd] {note}")
    screen.say(f"[thinkvd] process {daemon.pid}, socket {daemon.socket}")
    workers: list[Worker] = []
    try:
        for seed, name in enumerate(ENGINES, start=1):
            workers.append(Worker(name, seed, str(daemon.socket), options, gpu))
        follow(workers, screen, options.tokens)
        both = daemon.status()["pool"]
        screen.say(f"[thinkvd] both engines hold {report.mib(both['bytes_used'])} of the pool")
        workers[0].close()
        screen.say(f"[{workers[0].name}] closed its sequence and exited")
        workers[1].kill()
        screen.say(f"[{workers[1].name}] killed (SIGKILL) while it held its sequence")
        held, waited = wait_until_empty(daemon)
    except DaemonError as error:
        raise QuickstartError(f"{error}\n{daemon.log_tail()}") from error
    finally:
        for worker in workers:
            worker.stop()
    pool = {**daemon.status()["pool"], "bytes_held_after": held}
    return finish(options, [worker.result for worker in workers if worker.result], pool, waited)


def finish(
    options: argparse.Namespace, results: list[dict[str, Any]], pool: dict[str, Any], waited: float
) -> int:
    print(report.render(results, pool))
    if options.json:
        text = json.dumps(report.as_json(results, pool), indent=2, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    if pool["bytes_held_after"] != 0:
        print(f"FAILED: the pool still holds {pool['bytes_held_after']:,} bytes", file=sys.stderr)
        return 1
    print(f"The pool is empty again ({1000 * waited:.0f} ms after the kill).")
    return 0


def choose_gpu(backend: str) -> GpuEngine | None:
    """None: the host. Raises QuickstartError where cuda was asked for and cannot be."""
    if backend == "host":
        return None
    try:
        return find_gpu()
    except NoGpu as error:
        if backend == "cuda":
            raise QuickstartError(str(error)) from error
        return None


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def temperature(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 2.0:
        raise argparse.ArgumentTypeError("must be between 0 and 2")
    return value


def token_count(text: str) -> int:
    value = positive(text)
    if value > 7000:
        raise argparse.ArgumentTypeError("must be at most 7000: the model's context is 8192")
    return value


def budget(text: str) -> int | None:
    return None if text == "policy" else positive(text)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/quickstart", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=token_count, default=800, metavar="N",
                        help="tokens that each process generates (default 800)")
    parser.add_argument("--policy", default="thinkv", metavar="NAME",
                        help="a policy of config/policies (default thinkv)")
    parser.add_argument("--budget", type=budget, default=256, metavar="N",
                        help="live tokens a lane, or 'policy' for the policy's own "
                        "(default 256: small, so that evictions show)")
    parser.add_argument("--temperature", type=temperature, default=0.7, metavar="T",
                        help="0 is greedy (default 0.7)")
    parser.add_argument("--backend", choices=("auto", "host", "cuda"), default="auto",
                        help="where the pool and the model are; auto: the GPU where there is one, "
                        "with torch, transformers and a build of the preset cuda (default)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE",
                        help="also write every number and both texts to FILE")
    parser.add_argument("--keep-running", action="store_true",
                        help="leave thinkvd running and say how to reach and stop it")
    options = parser.parse_args(arguments)
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: the folder of {options.json} does not exist")
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    # A terminated quickstart stops its workers and its daemon, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        gpu = choose_gpu(options.backend)
        with Daemon(metrics=True, gpu=gpu.bin_dir if gpu else None) as daemon:
            status = run(options, daemon, gpu)
            if options.keep_running:
                daemon.keep()
                print(f"thinkvd keeps running: process {daemon.pid}, log {daemon.log}")
                print(f"  look:  {bin_dir() / 'thinkvctl'} --socket {daemon.socket} status")
                print(f"  use:   export THINKV_SOCKET={daemon.socket}")
                print(f"  stop:  kill {daemon.pid}")
            return status
    except (QuickstartError, DaemonError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; the engines and thinkvd are stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
