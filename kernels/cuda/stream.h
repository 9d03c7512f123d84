// stream.h: CUDA's handles for headers that must not need CUDA's headers.
#pragma once

#if defined(THINKV_CUDA_EMULATED)
#include "kernels/cuda/emulated/device.h"
#elif defined(THINKV_HAVE_CUDA)
#include <cuda_runtime_api.h>
#else
struct CUstream_st;
using cudaStream_t = CUstream_st*;
using cudaError_t = int;  // an enum of the same size in CUDA's header
#endif
