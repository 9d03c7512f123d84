#include "kernels/sequence/staging.h"

#include <algorithm>
#include <array>

#include "kernels/sequence/lane.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {

void StagingPages::start(Format format, uint32_t head_dim, uint32_t tokens) {
  format_ = format;
  head_dim_ = head_dim;
  used_ = 0;
  const uint32_t slots = page_layout(format, head_dim).slots;
  const size_t pages = (size_t{tokens} + slots - 1) / slots;
  memory_.resize(pages * (page_bytes(head_dim) / sizeof(Granule)));
}

void StagingPages::write(const KernelSet& kernels, const float* k, const float* v,
                         const uint32_t* positions, uint32_t count, std::vector<PageView>& views) {
  static constexpr std::array<uint8_t, 8> kSlots = {0, 1, 2, 3, 4, 5, 6, 7};
  const uint32_t slots = page_layout(format_, head_dim_).slots;
  THINKV_CHECK(slots == kSlots.size());
  const size_t granules = page_bytes(head_dim_) / sizeof(Granule);
  for (uint32_t done = 0; done < count; done += slots) {
    const uint32_t here = std::min(slots, count - done);
    THINKV_CHECK((used_ + 1) * granules <= memory_.size());
    auto* page = reinterpret_cast<std::byte*>(memory_.data() + used_++ * granules);
    kernels.encode({.page = page,
                    .format = format_,
                    .head_dim = head_dim_,
                    .slots = {kSlots.data(), here},
                    .k = k + size_t{done} * head_dim_,
                    .v = v + size_t{done} * head_dim_,
                    .positions = positions + done});
    views.push_back({.bytes = page, .live = low_slots(here), .format = format_});
  }
}

}  // namespace thinkv::kernels
