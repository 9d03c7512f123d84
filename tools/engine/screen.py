"""Terminal output of several streams at once: whole lines with a name in front, and below them
one progress line that is redrawn."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

COLOURS = ("\x1b[36m", "\x1b[33m", "\x1b[35m", "\x1b[32m")
RESET = "\x1b[0m"
QUIET_STEP = 100  # tokens between two progress lines where lines cannot be redrawn


class Screen:
    """Single-threaded. Without a terminal there are no colours and no redrawn line."""

    def __init__(self, names: list[str], out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._tty = self._out.isatty()
        self._colour = self._tty and "NO_COLOR" not in os.environ
        self._names = names
        self._label = max((len(name) for name in names), default=0)
        self._partial = {name: "" for name in names}
        self._progress: dict[str, tuple[int, int, float]] = {}
        self._said = {name: 0 for name in names}
        self._shown = False

    def text(self, name: str, piece: str) -> None:
        """Adds streamed text; a line goes out when it is complete or as wide as the terminal."""
        width = self._width() - self._label - 3
        lines = (self._partial[name] + piece).split("\n")
        self._partial[name] = lines.pop()
        for line in lines:
            while line:
                head, line = self._cut(line, width)
                self._line(name, head)
        while len(self._partial[name]) > width:
            head, self._partial[name] = self._cut(self._partial[name], width)
            self._line(name, head)

    def end_text(self, name: str) -> None:
        if self._partial[name]:
            self._line(name, self._partial[name])
            self._partial[name] = ""

    def say(self, message: str) -> None:
        self._erase()
        self._out.write(message + "\n")
        self._draw()

    def progress(self, name: str, tokens: int, wanted: int, rate: float) -> None:
        self._progress[name] = (tokens, wanted, rate)
        if self._tty:
            self._erase()
            self._draw()
        elif tokens - self._said[name] >= QUIET_STEP:
            self._said[name] = tokens
            self._out.write(f"[{name}] {tokens} of {wanted} tokens, {rate:.1f} tokens/s\n")
            self._out.flush()

    def end_progress(self) -> None:
        self._erase()
        self._progress.clear()

    @staticmethod
    def _cut(line: str, width: int) -> tuple[str, str]:
        if len(line) <= width:
            return line, ""
        space = line.rfind(" ", 1, width + 1)
        if space <= 0:
            return line[:width], line[width:]
        return line[:space], line[space + 1 :]

    def _width(self) -> int:
        return max(40, shutil.get_terminal_size((100, 24)).columns)

    def _line(self, name: str, line: str) -> None:
        label = name.ljust(self._label)
        if self._colour:
            colour = COLOURS[self._names.index(name) % len(COLOURS)]
            label = f"{colour}{label}{RESET}"
        # Control characters of generated text must not reach the terminal.
        clean = "".join(char if char.isprintable() else " " for char in line)
        self.say(f"{label} | {clean}")

    def _erase(self) -> None:
        if self._shown:
            self._out.write("\r\x1b[K")
            self._shown = False

    def _draw(self) -> None:
        if self._tty and self._progress:
            parts = [
                f"{name} {tokens}/{wanted} {rate:.1f} tok/s"
                for name, (tokens, wanted, rate) in self._progress.items()
            ]
            self._out.write("   ".join(parts)[: self._width() - 1])
            self._shown = True
        self._out.flush()
