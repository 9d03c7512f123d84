#!/usr/bin/env python3
"""Checks who includes whom: the layers of the tree, as a table.

    check_layers.py [ROOT]

An include in quotes, and <thinkv/...>, must resolve to a file of a layer that the including layer
may use. An include in angle brackets must not be one that the layer forbids.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tree import Problem, files_of, report, text_of  # noqa: E402

# The longest prefix that matches a path gives its layer.
FOLDERS = {
    "include/": "base",
    "kernels/": "kernels",
    "client/": "client",
    "daemon/core/": "core",
    "daemon/device/": "device",
    "daemon/ipc/": "ipc",
    "daemon/ops/": "ops",
    "daemon/tiers/": "tiers",
    "daemon/": "thinkvd",
    "tools/thinkvctl/": "thinkvctl",
    "tools/": "tools",
    "tests/": "tests",
}

# layer -> the layers it may include, besides itself.
ALLOWED = {
    "base": set(),
    "kernels": {"base"},
    "core": {"base"},
    "client": {"base", "kernels"},
    "device": {"base", "kernels", "core"},
    "ipc": {"base", "core"},
    "ops": {"base", "core"},
    "tiers": {"base", "core"},
    "thinkvd": {"base", "core", "device", "ipc", "ops", "tiers"},
    "thinkvctl": {"base", "client"},
    "tools": {"base", "kernels", "client", "core", "device", "ipc", "ops", "tiers", "thinkvd"},
    "tests": {"base", "kernels", "client", "core", "device", "ipc", "ops", "tiers", "thinkvd",
              "thinkvctl", "tools"},
}

THIRD_PARTY = r"boost/|yaml-cpp/|prometheus/|spdlog/|fmt/|nlohmann/|CLI/|systemd/"
GPU = r"cuda|cu[A-Z_]|cooperative_groups"
IO = (r"sys/|net/|netinet/|arpa/|linux/|unistd\.h|fcntl\.h|poll\.h|signal\.h|pthread\.h|time\.h|"
      r"ctime|csignal|fstream|iostream|filesystem")
TIME_AND_THREADS = r"chrono|thread|mutex|shared_mutex|condition_variable|future|semaphore|latch"
# layer -> what it must not include from outside.
FORBIDDEN = {
    # No third-party type crosses a public or shared header.
    "base": f"{THIRD_PARTY}|{GPU}",
    # The state machine: no clock, thread, file, socket, GPU or library, so that it can be replayed.
    "core": f"{THIRD_PARTY}|{GPU}|{IO}|{TIME_AND_THREADS}",
    # Boost.Context carries the emulated GPU's threads, in tests only.
    "kernels": THIRD_PARTY.replace("boost/", "boost/(?!context/)"),
    # libthinkv lives inside other programs: it brings nothing but the C library.
    "client": r"boost/(?!asio)|yaml-cpp/|prometheus/|spdlog/|nlohmann/|CLI/|systemd/",
    "ops": GPU,
    "ipc": GPU,
}
# CUDA sources of the kernels are the one place for CUDA headers below the device layer.
GPU_FOLDERS = ("kernels/cuda/", "daemon/device/", "client/", "tools/", "tests/")

TEST_LIBRARIES = r"gtest/|gmock/|rapidcheck|benchmark/"
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
SOURCES = {".h", ".hpp", ".c", ".cc", ".cpp", ".cu", ".cuh", ".inc"}


def layer_of(path: str) -> str | None:
    fitting = [prefix for prefix in FOLDERS if path.startswith(prefix)]
    return FOLDERS[max(fitting, key=len)] if fitting else None


def resolve(name: str, including: Path, known: set[str]) -> str | None:
    """The file of the tree that an include names, or None."""
    for base in (including.parent.as_posix(), "", "include", "kernels", "client", "daemon", "tests",
                 "tools"):
        candidate = (Path("/") / base / name).resolve().relative_to("/").as_posix()
        if candidate in known:
            return candidate
    return None


def check_include(path: Path, line: int, quoted: str, angled: str,
                  known: set[str]) -> Problem | None:
    own = layer_of(path.as_posix())
    if own is None:
        return Problem(str(path), line, "a source outside every layer (see FOLDERS)")
    name = quoted or angled
    target = resolve(name, path, known) if quoted or name.startswith("thinkv/") else None
    if target is None:
        if quoted and not re.match(TEST_LIBRARIES, name):
            return Problem(str(path), line, f'"{name}" is not a file of this tree')
        if re.match(FORBIDDEN.get(own, "(?!)"), name):
            return Problem(str(path), line, f"layer {own} must not include <{name}>")
        if re.match(GPU, name) and not path.as_posix().startswith(GPU_FOLDERS):
            return Problem(str(path), line, f"<{name}> outside the folders for CUDA")
        return None
    theirs = layer_of(target)
    if theirs is not None and theirs != own and theirs not in ALLOWED[own]:
        return Problem(str(path), line, f"layer {own} must not include layer {theirs}: {target}")
    return None


def check(root: Path) -> list[Problem]:
    files = files_of(root)
    known = {path.as_posix() for path in files}
    problems = []
    for path in files:
        if path.suffix not in SOURCES:
            continue
        text = text_of(root / path) or ""
        for match in INCLUDE.finditer(text):
            line = text.count("\n", 0, match.start(match.lastindex or 0)) + 1
            problem = check_include(path, line, match.group(1), match.group(2), known)
            if problem:
                problems.append(problem)
    return problems


if __name__ == "__main__":
    tree = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2]).resolve()
    sys.exit(report("layers", check(tree)))
