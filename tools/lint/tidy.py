#!/usr/bin/env python3
"""Runs clang-tidy over sources of the build, most important first, within a time limit.

    tidy.py [--build DIR] [--limit SECONDS] [--jobs N] [FILE...]

Without FILEs: sources changed against the main branch first, then daemon/core, then the rest. What
the limit leaves out is counted in the last line. Findings fail in the CLEAN folders only. Exit 77
without clang-tidy 14.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Folders without a finding: one there is a failure. Elsewhere findings are shown and do not fail
# yet. The list may only grow.
CLEAN = ("daemon/core/",)
ORDER = ("daemon/core/", "daemon/ipc/", "client/", "daemon/", "kernels/", "tools/")


def changed_files() -> set[str]:
    """Sources that differ from origin/main, or an empty set where git cannot tell."""
    command = ["git", "-C", str(ROOT), "diff", "--name-only", "--merge-base", "origin/main"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(answer.stdout.split()) if answer.returncode == 0 else set()


def sources(build: Path, wanted: list[str]) -> list[str]:
    """Paths relative to the root, in the order in which they are to be checked."""
    entries = json.loads((build / "compile_commands.json").read_text())
    files = set()
    for entry in entries:
        path = Path(entry["directory"], entry["file"]).resolve()
        if path.is_relative_to(ROOT) and path.suffix in (".cpp", ".cc"):
            files.add(path.relative_to(ROOT).as_posix())
    if wanted:
        return [name for name in (Path(w).resolve().relative_to(ROOT).as_posix() for w in wanted)
                if name in files]
    changed = changed_files()

    def rank(name: str) -> tuple[bool, int, str]:
        folder = next((i for i, prefix in enumerate(ORDER) if name.startswith(prefix)), len(ORDER))
        return (name not in changed, folder, name)

    return sorted((name for name in files if not name.startswith("tests/")), key=rank)


def check_one(tool: str, build: Path, name: str, deadline: float) -> tuple[str, str | None]:
    """(name, findings); None when the time was up before it began, "" when it is clean."""
    if time.monotonic() > deadline:
        return name, None
    # clang does not know g++'s warning options, and warnings are the compiler's business.
    command = [tool, "-p", str(build), "--quiet", "--extra-arg=-Wno-everything", str(ROOT / name)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if answer.returncode == 0:
        return name, ""
    return name, answer.stdout or answer.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds; 0: no limit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    tool = shutil.which("clang-tidy-14")
    if tool is None:
        print("skipped: clang-tidy-14 is not installed (tools/setup --check installs it)")
        return 77
    names = sources(options.build, options.files)
    if not names:
        print("tidy: no source found to check")
        return 1
    deadline = time.monotonic() + options.limit if options.limit else float("inf")
    failed = left = known = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, findings in pool.map(
                lambda n: check_one(tool, options.build, n, deadline), names):
            if findings is None:
                left += 1
            elif findings:
                failed += name.startswith(CLEAN)
                known += not name.startswith(CLEAN)
                print(f"--- {name}\n{findings}", flush=True)
    print(f"tidy: {len(names) - left} of {len(names)} files checked, {failed} failed, "
          f"{known} with findings in folders that are not clean yet")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
