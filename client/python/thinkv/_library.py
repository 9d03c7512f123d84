"""libthinkv through ctypes: where it is, its structs, its functions.

Mirrors include/thinkv/thinkv.h; a test compares every size and offset with the C compiler's.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from collections.abc import Iterator
from ctypes import POINTER, Structure, c_char, c_char_p, c_float, c_int32, c_int64, c_size_t
from ctypes import c_uint32, c_uint64, c_void_p
from pathlib import Path

from ._errors import error_of

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
BUDGET_OF_POLICY, BUDGET_NONE = 0, 0xFFFFFFFF
TRACE_SPARSITY = 1
BATCH_GROWS = 1
ATTEND_SILENT, ATTEND_MEASURE_ONLY = 1, 2


class ErrorStruct(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("code", c_int32),
        ("os_error", c_int32),
        ("reserved", c_uint32),
        ("text", c_char * 240),
    ]


class Tensor(Structure):
    """thinkv_tensor and thinkv_output: the two differ in the constness of data only."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_uint32),
        ("ndim", c_uint32),
        ("shape", c_int64 * 4),
    ]


class ClientOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("threads", c_uint32),
        ("socket_path", c_char_p),
        ("client_name", c_char_p),
        ("timeout_ms", c_uint32),
        ("reserved0", c_uint32),
        ("pool_name", c_char_p),
        ("reserved", c_uint32 * 4),
    ]


class PoolStats(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved0", c_uint32),
        ("backend", c_char * 16),
        ("pool_bytes", c_uint64),
        ("pool_free_bytes", c_uint64),
        ("tenant_used_bytes", c_uint64),
        ("tenant_limit_bytes", c_uint64),
        ("client_granted_bytes", c_uint64),
        ("client_leased_bytes", c_uint64),
        ("pool_name", c_char * 64),
    ]


class ModelOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("layers", c_uint32),
        ("q_heads", c_uint32),
        ("kv_heads", c_uint32),
        ("head_dim", c_uint32),
        ("value_type", c_uint32),
        ("softmax_scale", c_float),
        ("reserved0", c_uint32),
        ("model_name", c_char_p),
        ("reserved", c_uint32 * 8),
    ]


class SequenceOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("budget_tokens", c_uint32),
        ("policy_name", c_char_p),
        ("flags", c_uint32),
        ("reserved", c_uint32 * 7),
    ]


class BatchOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("capacity", c_uint32),
        ("tokens_max", c_uint32),
        ("flags", c_uint32),
        ("reserved", c_uint32 * 8),
    ]


class AttendOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("window", c_uint32),
        ("sinks", c_uint32),
        ("flags", c_uint32),
        ("reserved", c_uint32 * 8),
    ]


class SequenceStats(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("lanes", c_uint32),
        ("tokens", c_uint64),
        ("prompt_tokens", c_uint64),
        ("live_slots", c_uint64),
        ("live_tokens_max", c_uint64),
        ("pages", c_uint64),
        ("page_bytes", c_uint64),
        ("metadata_bytes", c_uint64),
        ("bytes_held", c_uint64),
        ("bytes_f16", c_uint64),
        ("evicted_slots", c_uint64),
        ("reused_slots", c_uint64),
        ("gathered_bytes", c_uint64),
        ("recoded_slots", c_uint64),
        ("demotions", c_uint64),
        ("over_budget_steps", c_uint64),
        ("thoughts", c_uint64 * 3),
        ("budget_tokens", c_uint64),
        ("tier_bytes", c_uint64),
        ("reserved", c_uint64 * 5),
    ]


_E = POINTER(ErrorStruct)
_T = POINTER(Tensor)
_HANDLE = c_void_p
_OUT = POINTER(c_void_p)

# name: (result type, argument types); None as a result is void.
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "thinkv_client_open": (c_int32, [POINTER(ClientOptions), _OUT, _E]),
    "thinkv_client_close": (None, [_HANDLE]),
    "thinkv_client_pool_stats": (c_int32, [_HANDLE, POINTER(PoolStats), _E]),
    "thinkv_client_status_json": (c_int32, [_HANDLE, _OUT, _E]),
    "thinkv_string_free": (None, [c_void_p]),
    "thinkv_client_ping": (c_int32, [_HANDLE, _E]),
    "thinkv_model_open": (c_int32, [_HANDLE, POINTER(ModelOptions), _OUT, _E]),
    "thinkv_model_close": (None, [_HANDLE]),
    "thinkv_sequence_open": (c_int32, [_HANDLE, POINTER(SequenceOptions), _OUT, _E]),
    "thinkv_sequence_close": (None, [_HANDLE]),
    "thinkv_sequence_prefill": (c_int32, [_HANDLE, c_uint32, _T, _T, _E]),
    "thinkv_sequence_prefill_end": (c_int32, [_HANDLE, _E]),
    "thinkv_sequence_evict": (
        c_int32,
        [_HANDLE, POINTER(c_uint32), c_size_t, POINTER(c_uint64), _E],
    ),
    "thinkv_sequence_quantize": (
        c_int32,
        [_HANDLE, c_uint32, c_uint32, c_char_p, POINTER(c_uint64), _E],
    ),
    "thinkv_sequence_set_budget": (c_int32, [_HANDLE, c_uint32, _E]),
    "thinkv_sequence_get_stats": (c_int32, [_HANDLE, POINTER(SequenceStats), _E]),
    "thinkv_sequence_sparsity": (c_int32, [_HANDLE, _T, _E]),
    "thinkv_step_begin": (c_int32, [_HANDLE, POINTER(c_void_p), c_uint32, _OUT, _E]),
    "thinkv_step_append": (c_int32, [_HANDLE, c_uint32, _T, _T, _E]),
    "thinkv_step_attend": (c_int32, [_HANDLE, c_uint32, _T, _T, _T, _E]),
    "thinkv_step_end": (c_int32, [_HANDLE, _E]),
    "thinkv_step_cancel": (None, [_HANDLE]),
    "thinkv_model_set_stream": (c_int32, [_HANDLE, c_void_p, _E]),
    "thinkv_batch_open": (c_int32, [_HANDLE, POINTER(BatchOptions), _OUT, _E]),
    "thinkv_batch_close": (None, [_HANDLE]),
    "thinkv_batch_set": (c_int32, [_HANDLE, c_uint32, _HANDLE, _E]),
    "thinkv_batch_reserve": (c_int32, [_HANDLE, c_uint32, _E]),
    "thinkv_batch_begin": (c_int32, [_HANDLE, _E]),
    "thinkv_batch_append": (c_int32, [_HANDLE, c_uint32, _T, _T, _E]),
    "thinkv_batch_attend": (c_int32, [_HANDLE, c_uint32, _T, _T, _T, _E]),
    "thinkv_batch_attend_with": (
        c_int32,
        [_HANDLE, c_uint32, POINTER(AttendOptions), _T, _T, _T, _E],
    ),
    "thinkv_batch_end": (c_int32, [_HANDLE, _E]),
    "thinkv_batch_unreserve": (c_int32, [_HANDLE, _E]),
    "thinkv_sequence_trim": (c_int32, [_HANDLE, c_uint32, _E]),
    "thinkv_sequence_copy": (c_int32, [_HANDLE, _OUT, _E]),
    "thinkv_version": (c_char_p, []),
    "thinkv_status_name": (c_char_p, [c_int32]),
    "thinkv_sequence_prefill_queries": (c_int32, [_HANDLE, c_uint32, _T, _E]),
    "thinkv_sequence_token_classes": (c_int32, [_HANDLE, c_uint32, c_char_p, c_size_t, _E]),
    "thinkv_sequence_prefetch": (c_int32, [_HANDLE, c_uint32, _T, _E]),
}


def _candidates() -> Iterator[str]:
    """THINKV_LIBRARY, the wheel's copy, a source tree's build folder, the system's."""
    chosen = os.environ.get("THINKV_LIBRARY")
    if chosen:
        yield chosen
        return
    here = Path(__file__).resolve().parent
    yield str(here / "libthinkv.so")
    if len(here.parents) >= 3:  # <tree>/client/python/thinkv; a bundle: <root>/python/thinkv
        yield str(here.parents[2] / "build" / "lib" / "libthinkv.so")
        yield str(here.parents[1] / "lib" / "libthinkv.so")
    yield "libthinkv.so"


def _load() -> ctypes.CDLL:
    tried: list[str] = []
    for path in _candidates():
        if os.path.isabs(path) and not os.path.exists(path):
            tried.append(path)
            continue
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            tried.append(f"{path} ({error})")
    raise ImportError(
        "libthinkv.so was not found; build it or set THINKV_LIBRARY. Tried: " + ", ".join(tried)
    )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


lib = _declare(_load())


def call(name: str, *arguments: object) -> None:
    """Calls a function that can fail; the error argument is added here."""
    error = ErrorStruct(struct_size=ctypes.sizeof(ErrorStruct))
    code = getattr(lib, name)(*arguments, ctypes.byref(error))
    if code != 0:
        raise error_of(code, error.text.decode("utf-8", "replace"), error.os_error)
