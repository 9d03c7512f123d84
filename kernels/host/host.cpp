#include "kernels/host/host_set.h"

#if THINKV_HAVE_AVX2_BUILD
#include <cpuid.h>
#endif

namespace thinkv::kernels {

#if THINKV_HAVE_AVX2_BUILD
namespace {

// __builtin_cpu_supports of clang 14 does not know the name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

}  // namespace
#endif

const KernelSet& host_baseline_set() {
  static constexpr KernelSet kSet = {
      .name = "host-baseline",
      .rotate = host_baseline::rotate,
      .rotate_back = host_baseline::rotate_back,
      .encode = host_baseline::encode,
      .encode_block = host_baseline::encode_block,
      .decode = host_baseline::decode,
      .attend = host_baseline::attend,
      .medoids = host_baseline::medoids,
  };
  return kSet;
}

const KernelSet* host_avx2_set() {
#if THINKV_HAVE_AVX2_BUILD
  static constexpr KernelSet kSet = {
      .name = "host-avx2",
      .rotate = host_avx2::rotate,
      .rotate_back = host_avx2::rotate_back,
      .encode = host_avx2::encode,
      .encode_block = host_avx2::encode_block,
      .decode = host_avx2::decode,
      .attend = host_avx2::attend,
      .medoids = host_avx2::medoids,
  };
  static const bool runs_here =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  return runs_here ? &kSet : nullptr;
#else
  return nullptr;
#endif
}

const KernelSet& host() {
  static const KernelSet& best =
      host_avx2_set() != nullptr ? *host_avx2_set() : host_baseline_set();
  return best;
}

}  // namespace thinkv::kernels
