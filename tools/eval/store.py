"""Rows of results, written as they are found: a run that is killed goes on where it was.

One JSON object a line. A row carries a key over everything that decides it (policy file, tokens,
prompt, memory point, library), so rows of another policy or build are never taken for this one's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import thinkv._library

from .policies import Policy
from .texts import Text

VERSION = 1  # of how rows are measured: raised when old rows no longer compare


@functools.cache
def library_digest() -> str:
    """Of the libthinkv that this process uses."""
    file = pathlib.Path(thinkv._library.lib._name)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(file)


def key_of(
    policy: Policy, text: Text, mode: str, point: float, library: str, tile: int
) -> str:
    parts = [VERSION, policy.name, policy.text, text.name, text.split, text.tokens,
             sorted(text.answers), text.prompt(mode), mode, point, library, tile]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Store:
    def __init__(self, file: pathlib.Path, resume: bool) -> None:
        self._file = file
        self._rows: dict[str, dict[str, Any]] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        if resume and file.exists():
            self._read()
        else:
            file.write_text("", encoding="utf-8")

    def _read(self) -> None:
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a kill may leave half a line
        for line in whole.splitlines():
            row = json.loads(line)
            self._rows[row["key"]] = row
        if len(whole) < len(data):
            self._file.write_bytes(whole)

    def add(self, rows: list[dict[str, Any]]) -> None:
        with open(self._file, "a", encoding="utf-8") as file:
            for row in rows:
                self._rows[row["key"]] = row
                file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def get(self, key: str) -> dict[str, Any] | None:
        return self._rows.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._rows
