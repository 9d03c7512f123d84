// staging.h: 16-bit pages that exist for one call of attention.
//
// What lies in streams or in a tier comes to the attention kernel in pages of the existing format,
// in working memory of the caller's thread. They are no pages of the pool and are counted nowhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace thinkv::kernels {

class StagingPages {
 public:
  // Room for `tokens` tokens of `format`; earlier pages and their addresses are gone. Memory is
  // kept from call to call.
  void start(Format format, uint32_t head_dim, uint32_t tokens);
  // Rows k, v [count, head_dim] behind those that were written; a view of each new page goes to
  // `views`. A page holds rows of one call only. Requires: room, and a call fills whole pages or
  // is the last.
  void write(const KernelSet& kernels, const float* k, const float* v, const uint32_t* positions,
             uint32_t count, std::vector<PageView>& views);

 private:
  struct alignas(64) Granule {
    std::byte bytes[64];
  };
  std::vector<Granule> memory_;
  Format format_ = Format::kF16;
  uint32_t head_dim_ = 64;
  uint32_t used_ = 0;  // pages
};

}  // namespace thinkv::kernels
