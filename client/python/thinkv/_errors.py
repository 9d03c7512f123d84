"""Errors by code: what the caller does about them (thinkv.h)."""

from __future__ import annotations


class Error(Exception):
    """Base of everything that libthinkv reports. ``code`` is the number of thinkv.h."""

    code: int = 11

    def __init__(self, message: str, os_error: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.os_error = os_error


class InvalidArgumentError(Error, ValueError):
    """The call is wrong: a shape, a layer, an order of calls."""

    code = 1


class ExhaustedError(Error, MemoryError):
    """The pool has no page left: evict, close, or retry later. Nothing was changed."""

    code = 2


class QuotaExceededError(Error, MemoryError):
    """The tenant's limit is reached: close sequences or raise it. Nothing was changed."""

    code = 3


class NotFoundError(Error, LookupError):
    """No such policy."""

    code = 4


class StaleError(Error):
    """The handle was closed, or belongs to the parent of a forked process."""

    code = 5


class UnavailableError(Error, ConnectionError):
    """No daemon: start thinkvd, then open a new client."""

    code = 6


class VersionMismatchError(Error):
    """Library and daemon do not speak the same protocol: upgrade one."""

    code = 7


class PermissionDeniedError(Error, PermissionError):
    """This user may not."""

    code = 8


class UnsupportedError(Error):
    """Valid, but not possible here."""

    code = 9


class DeviceFailedError(Error):
    """The device's context is dead: restart."""

    code = 10


class InternalError(Error):
    """A defect of libthinkv: please report."""

    code = 11


_BY_CODE: dict[int, type[Error]] = {
    kind.code: kind
    for kind in (
        InvalidArgumentError,
        ExhaustedError,
        QuotaExceededError,
        NotFoundError,
        StaleError,
        UnavailableError,
        VersionMismatchError,
        PermissionDeniedError,
        UnsupportedError,
        DeviceFailedError,
        InternalError,
    )
}


def error_of(code: int, message: str, os_error: int = 0) -> Error:
    return _BY_CODE.get(code, InternalError)(message, os_error)
