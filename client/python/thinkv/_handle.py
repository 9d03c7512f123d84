"""Open handles of the library, as context managers."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

from ._errors import StaleError


class Handle:
    """An open handle of the library; closed once, by close(), by `with`, or when collected."""

    _what = "handle"

    def __init__(self, handle: int, closer: Any) -> None:
        # The finalizer holds the number, not the object; it also runs at exit, so that a script
        # that forgets close() says goodbye to the daemon.
        self._value: int | None = handle
        self._finalizer = weakref.finalize(self, closer, handle)

    @property
    def _handle(self) -> int:
        if self._value is None:
            raise StaleError(f"the {self._what} was closed")
        return self._value

    def close(self) -> None:
        """Closes it and everything that was opened through it. A second close does nothing."""
        self._value = None
        self._finalizer()

    @property
    def closed(self) -> bool:
        return self._value is None

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
