#include "client/gpu/kernel_table.h"

namespace thinkv::client {

#if defined(THINKV_HAVE_CUDA) || defined(THINKV_CUDA_EMULATED)

namespace {

// A launch function with the driver's type of a stream and a number for the error.
template <auto kLaunch, class... Arguments>
int call(Arguments... arguments, StreamHandle stream) {
  return static_cast<int>(kLaunch(arguments..., static_cast<cudaStream_t>(stream)));
}

using View = const cuda::BatchView&;
using U32 = uint32_t;

constexpr KernelTable kTable = {
    .refill = call<cuda::launch_refill, cuda::Lease*, const U32*, U32>,
    .drain = call<cuda::launch_drain, cuda::Lease*, U32*, U32>,
    .open = call<cuda::launch_open, View, U32, const PolicyParams&, U32, bool>,
    .prefill =
        call<cuda::launch_prefill, View, U32, U32, const void*, const void*, cuda::Element, U32>,
    .code_prompt = call<cuda::launch_code_prompt, View, U32, U32, const void*, const void*,
                        cuda::Element, U32>,
    .prefill_queries = call<cuda::launch_prefill_queries, View, U32, const PolicyParams&, U32,
                            const void*, cuda::Element, const cuda::Prompt&>,
    .prefill_end =
        call<cuda::launch_prefill_end, View, U32, const PolicyParams&, const cuda::Prompt&>,
    .classes = call<cuda::launch_classes, View, U32, U32, const uint8_t*, U32>,
    .close = call<cuda::launch_close, View, U32>,
    .evict = call<cuda::launch_evict, View, U32, const U32*, U32>,
    .trim = call<cuda::launch_trim, View, U32, U32>,
    .copy = call<cuda::launch_copy, View, U32, U32>,
    .recode = call<cuda::launch_recode, View, U32, U32, U32, Format>,
    .budget = call<cuda::launch_budget, View, U32, U32>,
    .numbers = call<cuda::launch_numbers, View, U32, cuda::SequenceNumbers*>,
    .sparsity = call<cuda::launch_sparsity, View, U32, float*>,
    .begin = call<cuda::launch_begin, View>,
    .append = call<cuda::launch_append, View, U32, const void*, const void*, cuda::Element>,
    .end = call<cuda::launch_end, View>,
    .read_streams = call<cuda::launch_read_streams, View, U32>,
    .attend = call<cuda::launch_attend, const cuda::AttendParams&, const cuda::AttendShape&>,
    .centred_lse = call<cuda::launch_centred_lse, View, U32, const void*, cuda::Element, float*>,
    .tier_put = call<cuda::launch_tier_put, const cuda::TierPut&>,
    .tier_choose = call<cuda::launch_tier_choose, View, const cuda::TierQuery&>,
    .tier_fetch = call<cuda::launch_tier_fetch, View, const cuda::TierQuery&>,
    .attend_shape = cuda::attend_shape,
    .attend_part_floats = cuda::attend_part_floats,
    .emit_scratch_bytes = cuda::emit_scratch_bytes,
    .open_pages = cuda::open_pages,
    .prefill_pages = cuda::prefill_pages,
    .prefill_end_pages = cuda::prefill_end_pages,
    .class_pages = cuda::class_pages,
    .classes_max = cuda::classes_max,
    .step_pages = cuda::step_pages,
    .recode_pages = cuda::recode_pages,
    .rank_need = cuda::rank_need,
    .rank_memory_shape = cuda::rank_memory_shape,
    .supported = cuda::supported,
    .lane_pages_limit = cuda::lane_pages_limit,
};

}  // namespace

const KernelTable* kernel_table() {
  return &kTable;
}

#else

const KernelTable* kernel_table() {
  return nullptr;
}

#endif

}  // namespace thinkv::client
