#include "client/gpu/tier.h"

#include <algorithm>
#include <cstring>

#include "client/error_text.h"
#include "kernels/cuda/device_format.h"

namespace thinkv::client {
namespace {

using enum ErrorCode;
using Place = GpuMemory::Place;

constexpr uint64_t kWorkingAt = 64;  // of cuda::WorkingPages in tables_
static_assert(sizeof(cuda::TierMemory) <= kWorkingAt);

cuda::DevicePointer pointer(const void* memory) {
  return reinterpret_cast<cuda::DevicePointer>(memory);
}

// Done when it returns: a copy from pageable memory may still be under way after its call, and
// other streams do not wait for it.
Status write(const GpuEngine& engine, const void* to, const void* from, uint64_t bytes) {
  const cuda::ContextScope context(engine.gpu());
  THINKV_TRY(context.status());
  const cuda::Driver& driver = engine.gpu().driver();
  THINKV_TRY(cuda::driver_status(driver, driver.memcpy_to_device(pointer(to), from, bytes),
                                 "cuMemcpyHtoD"));
  return cuda::driver_status(driver, driver.stream_synchronize(nullptr), "cuStreamSynchronize");
}

}  // namespace

// ---- a sequence's rows ----

Result<std::unique_ptr<GpuTier>> GpuTier::make(GpuEngine& engine, const PolicyParams& policy,
                                               uint32_t prompt) {
  std::unique_ptr<GpuTier> tier(new GpuTier(engine, policy));
  tier->table_.tokens = policy.tier.tier_tokens(prompt);
  tier->table_.first = policy.tier.kept_first(prompt);
  tier->table_.fetch = policy.tier.fetch;
  tier->table_.channels = policy.tier.channels;
  tier->table_.rotates = policy.rotate != 0 ? 1 : 0;
  THINKV_TRY(tier->make_table());
  return tier;
}

Status GpuTier::make_table() {
  const ModelGeometry& g = engine_->geometry();
  layers_.resize(g.layers);
  const uint64_t bytes = sizeof(table_) + uint64_t{g.lanes()} * g.head_dim * sizeof(float);
  THINKV_ASSIGN_OR_RETURN(
      device_, GpuMemory::make(engine_->gpu(), Place::kDevice, bytes, "the table of a host tier"));
  table_.key_max = reinterpret_cast<float*>(device_.as<cuda::TierSequence>() + 1);
  return {};
}

Status GpuTier::publish() const {
  return write(*engine_, sequence(), &table_, sizeof(table_));
}

float* GpuTier::key_max(uint32_t layer) const {
  const ModelGeometry& g = engine_->geometry();
  return table_.key_max + uint64_t{layer} * g.kv_heads * g.head_dim;
}

uint64_t GpuTier::layer_bytes() const {
  const ModelGeometry& g = engine_->geometry();
  return g.kv_heads *
         (cuda::tier_row_bytes(g.head_dim, table_.tokens) + g.head_dim * sizeof(float));
}

uint64_t GpuTier::bytes() const {
  const auto layers = std::count_if(layers_.begin(), layers_.end(),
                                    [](const GpuMemory& rows) { return rows.bytes() != 0; });
  return static_cast<uint64_t>(layers) * layer_bytes();
}

Status GpuTier::put(uint32_t layer, const void* k, const void* v, cuda::Element element) {
  const ModelGeometry& g = engine_->geometry();
  if (policy_.tier.dense(layer)) return {};
  if (layers_[layer].bytes() != 0) {  // a layer that was refused later on comes again
    THINKV_TRY(engine_->synchronise());
    layers_[layer] = GpuMemory();
  }
  if (bytes() + layer_bytes() > policy_.tier.host_bytes) {
    return make_error(kQuotaExceeded,
                      "the prompt's rows need more host memory than the policy's tier.host_bytes");
  }
  const uint64_t row_bytes = g.kv_heads * cuda::tier_row_bytes(g.head_dim, table_.tokens);
  THINKV_ASSIGN_OR_RETURN(GpuMemory rows, GpuMemory::make(engine_->gpu(), Place::kPinnedHost,
                                                          row_bytes, "a layer's rows in a tier"));
  const cuda::ContextScope context(engine_->gpu());
  THINKV_TRY(context.status());
  // A layer that was refused half-way may have left maxima.
  const cuda::Driver& driver = engine_->gpu().driver();
  THINKV_TRY(
      cuda::driver_status(driver,
                          driver.memset_d32_async(pointer(key_max(layer)), 0,
                                                  g.kv_heads * g.head_dim, engine_->stream()),
                          "cuMemsetD32Async"));
  THINKV_TRY(GpuEngine::launched(engine_->kernels().tier_put({.k = k,
                                                              .v = v,
                                                              .element = element,
                                                              .value_type = g.value_type,
                                                              .kv_heads = g.kv_heads,
                                                              .head_dim = g.head_dim,
                                                              .first = table_.first,
                                                              .count = table_.tokens,
                                                              .rotate = policy_.rotate != 0,
                                                              .rows = rows.as<unsigned char>(),
                                                              .key_max = key_max(layer)},
                                                             engine_->stream()),
                                 "tier_put"));
  layers_[layer] = std::move(rows);
  table_.layers[layer] = reinterpret_cast<uint64_t>(layers_[layer].as<void>());
  return {};
}

Result<std::unique_ptr<GpuTier>> GpuTier::copy() const {
  THINKV_TRY(engine_->synchronise());  // the rows are written
  std::unique_ptr<GpuTier> copy(new GpuTier(*engine_, policy_));
  copy->table_ = table_;
  THINKV_TRY(copy->make_table());
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const GpuMemory& rows = layers_[layer];
    if (rows.bytes() == 0) continue;
    THINKV_ASSIGN_OR_RETURN(copy->layers_[layer],
                            GpuMemory::make(engine_->gpu(), Place::kPinnedHost, rows.bytes(),
                                            "a layer's rows in a tier"));
    std::memcpy(copy->layers_[layer].as<void>(), rows.as<void>(), rows.bytes());
    copy->table_.layers[layer] = reinterpret_cast<uint64_t>(copy->layers_[layer].as<void>());
  }
  const ModelGeometry& g = engine_->geometry();
  std::vector<float> largest(size_t{g.lanes()} * g.head_dim);
  const cuda::ContextScope context(engine_->gpu());
  THINKV_TRY(context.status());
  const cuda::Driver& driver = engine_->gpu().driver();
  THINKV_TRY(cuda::driver_status(driver,
                                 driver.memcpy_to_host(largest.data(), pointer(table_.key_max),
                                                       largest.size() * sizeof(float)),
                                 "cuMemcpyDtoH"));
  THINKV_TRY(write(*engine_, copy->table_.key_max, largest.data(), largest.size() * sizeof(float)));
  THINKV_TRY(copy->publish());
  return copy;
}

// ---- a batch's working memory ----

uint32_t GpuTierMemory::working_pages(uint32_t tokens) {
  return (tokens + cuda::kBufferPageSlots - 1) / cuda::kBufferPageSlots;
}

Status GpuTierMemory::open(GpuEngine& engine, uint32_t capacity) {
  const cuda::Gpu& gpu = engine.gpu();
  THINKV_ASSIGN_OR_RETURN(
      tiers_, GpuMemory::make(gpu, Place::kDevice, uint64_t{capacity} * sizeof(uint64_t),
                              "the tiers of a batch"));
  THINKV_ASSIGN_OR_RETURN(
      tables_, GpuMemory::make(gpu, Place::kDevice, kWorkingAt + sizeof(cuda::WorkingPages),
                               "the tiers of a batch"));
  rows_ = capacity;
  lanes_ = capacity * engine.geometry().kv_heads;
  return {};
}

Status GpuTierMemory::make_room(GpuEngine& engine, const GpuTier& tier) {
  if (tier.tokens() <= room_ && tier.fetched() <= picks_max_) return {};
  THINKV_TRY(engine.synchronise());  // nobody uses the old memory any more
  return grow(engine, std::max(tier.tokens(), room_), std::max(tier.fetched(), picks_max_));
}

Status GpuTierMemory::grow(GpuEngine& engine, uint32_t tokens, uint32_t fetched) {
  const cuda::Gpu& gpu = engine.gpu();
  const ModelGeometry& g = engine.geometry();
  const auto device = [&](uint64_t bytes, const char* name) {
    return GpuMemory::make(gpu, Place::kDevice, bytes, name);
  };
  const uint32_t pages = working_pages(fetched);
  THINKV_ASSIGN_OR_RETURN(GpuMemory scores, device(uint64_t{cuda::tier_regions(rows_, g.kv_heads)} *
                                                       tokens * sizeof(uint32_t),
                                                   "the choice of rows in a tier"));
  THINKV_ASSIGN_OR_RETURN(GpuMemory picks, device(uint64_t{g.layers} * lanes_ *
                                                      (uint64_t{1} + fetched) * sizeof(uint32_t),
                                                  "the rows chosen in a tier"));
  THINKV_ASSIGN_OR_RETURN(
      GpuMemory working,
      device(uint64_t{lanes_} * pages * page_bytes(g.head_dim), "the working pages of a tier"));
  const cuda::TierMemory memory{scores.as<uint32_t>(), picks.as<uint32_t>(), tokens, fetched};
  const cuda::WorkingPages told{working.as<unsigned char>(), pages, 0};
  unsigned char* tables = tables_.as<unsigned char>();
  THINKV_TRY(write(engine, tables, &memory, sizeof(memory)));
  THINKV_TRY(write(engine, tables + kWorkingAt, &told, sizeof(told)));
  scores_ = std::move(scores);
  picks_ = std::move(picks);
  pages_ = std::move(working);
  room_ = tokens;
  picks_max_ = fetched;
  return {};
}

Status GpuTierMemory::set(GpuEngine& engine, uint32_t row, const GpuTier* tier) const {
  const cuda::ContextScope context(engine.gpu());
  THINKV_TRY(context.status());
  const cuda::Driver& driver = engine.gpu().driver();
  const auto address = tier == nullptr ? uint64_t{0} : reinterpret_cast<uint64_t>(tier->sequence());
  // By value in the command, as the roots of a batch; no step runs between the two halves.
  for (uint32_t half = 0; half < 2; ++half) {
    const auto* to = tiers_.as<uint32_t>() + 2 * size_t{row} + half;
    THINKV_TRY(cuda::driver_status(
        driver,
        driver.memset_d32_async(pointer(to), static_cast<uint32_t>(address >> (32 * half)), 1,
                                engine.stream()),
        "cuMemsetD32Async"));
  }
  return {};
}

void GpuTierMemory::show(cuda::BatchView& view) const {
  if (!is_open()) return;
  unsigned char* tables = tables_.as<unsigned char>();
  view.tiers = tiers_.as<const cuda::TierSequence*>();
  view.tier_memory = reinterpret_cast<const cuda::TierMemory*>(tables);
  view.working = reinterpret_cast<const cuda::WorkingPages*>(tables + kWorkingAt);
}

}  // namespace thinkv::client
