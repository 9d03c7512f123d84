"""The files that the lints look at, and how they report."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {".git", "build", "__pycache__", "dist", ".cache"}


@dataclass(frozen=True)
class Problem:
    """One finding; `line` 0 means the file as a whole."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def files_of(root: Path) -> list[Path]:
    """Every file that is or could be committed, relative to root, sorted.

    Falls back to walking the folder where git does not answer (an exported tree, or a clone that
    belongs to another user).
    """
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others",
               "--exclude-standard"]
    answer = subprocess.run(command, capture_output=True, check=False)
    if answer.returncode == 0 and (root / ".git").exists():
        names = [Path(os.fsdecode(name)) for name in answer.stdout.split(b"\0") if name]
        return sorted(name for name in names if (root / name).is_file())
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name).relative_to(root) for name in names]
    return sorted(found)


def text_of(path: Path) -> str | None:
    """The file as text, or None for a binary file."""
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        return None
    return data.decode("utf-8", errors="replace")


def report(name: str, problems: list[Problem]) -> int:
    """Prints the findings and one closing line; returns the exit status."""
    for problem in problems:
        print(problem)
    print(f"{name}: {len(problems)} problem(s)")
    sys.stdout.flush()
    return 1 if problems else 0
