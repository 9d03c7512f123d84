"""Arrays in the memory of a GPU without PyTorch: DLPack over the driver that this process loads,
which is the fake one of tests/support where there is no GPU."""

import ctypes
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_int32, c_int64, c_size_t
from ctypes import c_uint8, c_uint16, c_uint64, c_void_p, py_object
from uuid import UUID

import numpy as np

CUDA = 2
TYPES = {"float32": (2, 32), "float16": (2, 16), "uint16": (4, 16)}  # uint16 stands for bfloat16


class _Tensor(Structure):
    _fields_ = [("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32),
                ("ndim", c_int32), ("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16),
                ("shape", POINTER(c_int64)), ("strides", c_void_p), ("byte_offset", c_uint64)]


class _Managed(Structure):
    pass


_Deleter = CFUNCTYPE(None, POINTER(_Managed))
_Managed._fields_ = [("tensor", _Tensor), ("context", c_void_p), ("deleter", _Deleter)]

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = py_object
_new_capsule.argtypes = [c_void_p, c_char_p, c_void_p]


class Gpu:
    """A GPU of the driver, its primary context current on this thread; `with gpu:` makes it so
    again for a while."""

    def __init__(self, number=0):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.number = number
        device, self.context = c_int32(), c_void_p()
        self.ok("cuInit", self.cuda.cuInit(0))
        self.ok("cuDeviceGet", self.cuda.cuDeviceGet(byref(device), number))
        self.ok("retain", self.cuda.cuDevicePrimaryCtxRetain(byref(self.context), device))
        uuid = (c_uint8 * 16)()
        self.ok("uuid", self.cuda.cuDeviceGetUuid_v2(byref(uuid), device))
        self.uuid = "GPU-" + str(UUID(bytes=bytes(uuid)))
        self.__enter__()

    @staticmethod
    def count():
        cuda, count = ctypes.CDLL("libcuda.so.1"), c_int32()
        Gpu.ok("cuInit", cuda.cuInit(0))
        Gpu.ok("count", cuda.cuDeviceGetCount(byref(count)))
        return count.value

    def __enter__(self):
        self.ok("push", self.cuda.cuCtxPushCurrent_v2(self.context))
        return self

    def __exit__(self, *_):
        self.ok("pop", self.cuda.cuCtxPopCurrent_v2(byref(c_void_p())))

    @staticmethod
    def ok(what, result):
        if result != 0:
            raise RuntimeError(f"{what}: CUDA error {result}")

    def array(self, values):
        with self:
            return GpuArray(self, np.ascontiguousarray(values))

    def empty(self, shape, dtype=np.float32):
        return self.array(np.full(shape, np.nan, dtype))


class GpuArray:
    def __init__(self, gpu, values):
        self.gpu, self.shape, self.dtype = gpu, values.shape, values.dtype
        self.address = c_uint64()
        gpu.ok("cuMemAlloc", gpu.cuda.cuMemAlloc_v2(byref(self.address), c_size_t(values.nbytes)))
        gpu.ok("to device", gpu.cuda.cuMemcpyHtoD_v2(self.address, c_void_p(values.ctypes.data),
                                                     c_size_t(values.nbytes)))

    def numpy(self):
        values = np.empty(self.shape, self.dtype)
        with self.gpu as gpu:
            gpu.ok("synchronise", gpu.cuda.cuStreamSynchronize(c_void_p()))
            gpu.ok("to host", gpu.cuda.cuMemcpyDtoH_v2(
                c_void_p(values.ctypes.data), self.address, c_size_t(values.nbytes)))
        return values

    def __del__(self):
        with self.gpu as gpu:
            gpu.cuda.cuMemFree_v2(self.address)

    def __dlpack_device__(self):
        return CUDA, self.gpu.number

    def __dlpack__(self, stream=None):
        assert stream == -1, "no synchronisation is wanted"
        managed = _Managed()
        code, bits = TYPES[self.dtype.name]
        self._shape = (c_int64 * len(self.shape))(*self.shape)
        managed.tensor = _Tensor(self.address.value, CUDA, self.gpu.number, len(self.shape), code,
                                 bits, 1, self._shape, None, 0)
        self._managed = managed  # lives as long as the array
        return _new_capsule(ctypes.addressof(managed), b"dltensor", None)
