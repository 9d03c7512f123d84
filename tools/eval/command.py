"""Turns the errors that a person can do something about into one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

import thinkv
from engine.daemon import DaemonError
from engine.gguf_weights import WeightsError


def guarded(main: Callable[[list[str]], int]) -> int:
    try:
        return main(sys.argv[1:])
    except (thinkv.Error, DaemonError, WeightsError, ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
