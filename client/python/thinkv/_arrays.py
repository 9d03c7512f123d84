"""Arrays in and out: numpy, DLPack, or the buffer protocol; DLPack for memory of a GPU.

Everything that libthinkv reads must be dense and row-major; what is not is an error here rather
than a silent copy, except that DLPack and numpy arrays of another layout are named with their
strides so that the caller can fix the call.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, Structure, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

from ._library import BFLOAT16, FLOAT16, FLOAT32, Tensor

try:  # optional: without it results are memoryviews
    import numpy
except ImportError:  # pragma: no cover - depends on the environment
    numpy = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

_NAMES = {FLOAT32: "float32", FLOAT16: "float16", BFLOAT16: "bfloat16"}
_BYTES = {FLOAT32: 4, FLOAT16: 2, BFLOAT16: 2}


class _DLDevice(Structure):
    _fields_ = [("device_type", c_int32), ("device_id", c_int32)]


class _DLDataType(Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class _DLTensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", _DLDevice),
        ("ndim", c_int32),
        ("dtype", _DLDataType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


_DL_CPU = (1, 3, 11)  # CPU, pinned CUDA, pinned ROCm: all readable by the host
_DL_CUDA = (2, 13)  # CUDA, managed CUDA
# For __dlpack__: no synchronisation, the caller works on the stream that made the data.
_SAME_STREAM = -1
_DL_TYPES = {(2, 32): FLOAT32, (2, 16): FLOAT16, (4, 16): BFLOAT16}

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Input:
    """A checked input: the C struct, and what keeps its memory alive during the call."""

    def __init__(self, tensor: Tensor, owner: object) -> None:
        self.tensor = tensor
        self.owner = owner


def _describe(shape: Seq[int | None]) -> str:
    return "[" + ", ".join("n" if size is None else str(size) for size in shape) + "]"


def _check_shape(name: str, got: tuple[int, ...], expected: Seq[int | None]) -> None:
    fits = len(got) == len(expected) and all(
        want is None or have == want for have, want in zip(got, expected)
    )
    if not fits:
        raise ValueError(f"{name}: shape is {_describe(got)}, expected {_describe(expected)}")


def _tensor(address: int, dtype: int, shape: tuple[int, ...]) -> Tensor:
    tensor = Tensor(data=address, dtype=dtype, ndim=len(shape))
    for i, size in enumerate(shape):
        tensor.shape[i] = size
    return tensor


def _dense(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> bool:
    want = unit
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size > 1 and stride != want:
            return False
        want *= size
    return True


def _from_numpy(name: str, array: Any, expected: Seq[int | None]) -> Input:
    dtype = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}.get(array.dtype.name)
    if dtype is None or not array.dtype.isnative:
        raise TypeError(
            f"{name}: data type is {array.dtype}, expected float32, float16 or bfloat16"
        )
    _check_shape(name, array.shape, expected)
    if not _dense(array.shape, array.strides, _BYTES[dtype]):
        raise ValueError(
            f"{name}: not contiguous (shape {array.shape}, strides {array.strides}); "
            "use numpy.ascontiguousarray"
        )
    return Input(_tensor(array.ctypes.data, dtype, array.shape), array)


def _from_dlpack(name: str, array: Any, expected: Seq[int | None]) -> Input:
    device = array.__dlpack_device__()
    if int(device[0]) not in _DL_CPU:
        raise TypeError(f"{name}: lies on device {tuple(device)}, expected host memory")
    return _from_capsule(name, array, array.__dlpack__(), expected)


_torch_types: dict[Any, int] = {}


def lies_on_gpu(tensor: Any) -> bool:
    """Whether a PyTorch tensor does. Tests without a GPU replace it."""
    return bool(tensor.is_cuda)


# DLPack costs ten times as much as this, for each of the hundred tensors of a step.
def _from_torch(name: str, tensor: Any, expected: Seq[int | None]) -> Input:
    if not lies_on_gpu(tensor):
        raise TypeError(
            f"{name}: lies on device {tensor.device}, expected memory of the pool's GPU"
        )
    if not _torch_types:
        torch = sys.modules["torch"]
        _torch_types.update(
            {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
        )
    dtype = _torch_types.get(tensor.dtype)
    if dtype is None:
        raise TypeError(
            f"{name}: data type is {tensor.dtype}, expected float32, float16 or bfloat16"
        )
    shape = tuple(tensor.shape)
    _check_shape(name, shape, expected)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: not contiguous (shape {shape}); call contiguous() on it")
    return Input(_tensor(tensor.data_ptr(), dtype, shape), tensor)


def as_device(name: str, array: Any, expected: Seq[int | None]) -> Input:
    """Checks a tensor in GPU memory of `expected` shape (None: any), to be used in place by work
    on its own stream. Raises TypeError or ValueError."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _from_torch(name, array, expected)
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        kind = type(array).__name__
        raise TypeError(f"{name}: {kind} is not a GPU tensor; expected one with __dlpack__")
    device = array.__dlpack_device__()
    if int(device[0]) not in _DL_CUDA:
        raise TypeError(
            f"{name}: lies on device {tuple(device)}, expected memory of the pool's GPU"
        )
    return _from_capsule(name, array, array.__dlpack__(stream=_SAME_STREAM), expected)


def _from_capsule(name: str, array: Any, capsule: object, expected: Seq[int | None]) -> Input:
    # The first member of DLManagedTensor. The capsule keeps its name, so its own destructor frees
    # the tensor when the Input goes.
    dl = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    dtype = _DL_TYPES.get((dl.dtype.code, dl.dtype.bits)) if dl.dtype.lanes == 1 else None
    if dtype is None:
        raise TypeError(
            f"{name}: DLPack type {dl.dtype.code} with {dl.dtype.bits} bits, "
            "expected float32, float16 or bfloat16"
        )
    shape = tuple(dl.shape[i] for i in range(dl.ndim))
    _check_shape(name, shape, expected)
    if dl.strides and not _dense(shape, tuple(dl.strides[i] for i in range(dl.ndim)), 1):
        raise ValueError(f"{name}: not contiguous (shape {shape}); call contiguous() on it")
    return Input(_tensor((dl.data or 0) + dl.byte_offset, dtype, shape), (array, capsule))


def _from_buffer(name: str, view: memoryview, expected: Seq[int | None]) -> Input:
    dtype = {"f": FLOAT32, "e": FLOAT16}.get(view.format.lstrip("@="))
    if dtype is None:
        raise TypeError(f"{name}: buffer format is '{view.format}', expected 'f' or 'e'")
    _check_shape(name, view.shape, expected)
    if not view.c_contiguous:
        raise ValueError(f"{name}: not contiguous (shape {view.shape}, strides {view.strides})")
    if view.readonly:
        raw = bytes(view)
        address = ctypes.cast(ctypes.c_char_p(raw), c_void_p).value or 0
        return Input(_tensor(address, dtype, view.shape), raw)
    keep = (ctypes.c_char * view.nbytes).from_buffer(view)
    return Input(_tensor(ctypes.addressof(keep), dtype, view.shape), keep)


def as_input(name: str, array: Any, expected: Seq[int | None]) -> Input:
    """Checks an array of `expected` shape (None: any). Raises TypeError or ValueError."""
    if numpy is not None and isinstance(array, numpy.ndarray):
        return _from_numpy(name, array, expected)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _from_dlpack(name, array, expected)
    try:
        view = memoryview(array)
    except TypeError:
        kind = type(array).__name__
        raise TypeError(
            f"{name}: {kind} is not an array; expected numpy, DLPack or a buffer"
        ) from None
    return _from_buffer(name, view, expected)


def make_output(shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    """Memory for a float32 result: a numpy array, or a memoryview of the same shape."""
    if numpy is not None:
        array = numpy.empty(shape, numpy.float32)
        return array, _tensor(array.ctypes.data, FLOAT32, shape)
    count = 1
    for size in shape:
        count *= size
    memory = (ctypes.c_float * count)()
    view = memoryview(memory).cast("B").cast("f", shape)
    return view, _tensor(ctypes.addressof(memory), FLOAT32, shape)


def dtype_number(dtype: str) -> int:
    """Of 16-bit pages."""
    numbers = {"float16": FLOAT16, "bfloat16": BFLOAT16}
    if dtype not in numbers:
        raise ValueError(f"dtype is '{dtype}', expected 'float16' or 'bfloat16'")
    return numbers[dtype]
