// prompt_attention.cu: the attention that a prompt's tokens receive from its newest queries, added
// to the sums of their slots (kernels/policy/prompt_attention.h has the order of every step).
//
// Two kernels read the keys: one finds the maximum and sum of each row of logits, a block some rows
// and all tokens; the other adds the probabilities, a block 32 tokens and all rows, because a slot
// adds them query by query. In between each row's two numbers wait in the lane's first buffer page,
// which holds no token before the prompt's end. Rows come in runs that have room there.
#include <cstdint>
#include <limits>

#include "kernels/cuda/centre.cuh"
#include "kernels/cuda/codec_token.cuh"
#include "kernels/cuda/device_steps.cuh"
#include "kernels/cuda/prompt_pages.cuh"
#include "kernels/cuda/prompt_queries.h"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/kernels.h"
#include "kernels/policy/prompt_attention.h"

namespace thinkv::cuda {
namespace {

using policy::RowSoftmax;

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / 32;
constexpr uint32_t kKeys = policy::kAttentionChunk;  // tokens of a tile, a lane of a warp each
constexpr uint32_t kLogitStride = kKeys + 1;
constexpr uint32_t kSoftmaxRows = 16, kAddRows = 32;  // rows at a time in the two kernels
constexpr uint32_t kRunRows = 256;                    // rows of a launch
constexpr uint32_t kBlocksMax = 132 * 16;
static_assert(kKeys == 32 && kKeys * 8 == kThreads && limits::kGroupMax <= kSoftmaxRows);
static_assert(kRunRows * sizeof(float2) <= kCentreOffset<64>);

struct AttentionParams {
  QueryParams queries;
  float scale;
  kernels::GqaReduce reduce;
  bool rotates;
  uint32_t first;  // of the run, in the sample
  uint32_t run;    // queries
};

// Dynamic shared memory.
struct AttentionTile {
  float* keys;    // [kKeys, dim + 1]
  float* rows;    // [rows, dim]
  float* logits;  // [rows, kLogitStride]
};
[[nodiscard]] __device__ __forceinline__ AttentionTile tile_at(unsigned char* memory, uint32_t dim,
                                                               uint32_t rows) {
  auto* keys = reinterpret_cast<float*>(memory);
  float* const queries = keys + kKeys * (dim + 1);
  return {keys, queries, queries + rows * dim};
}
[[nodiscard]] constexpr uint32_t tile_bytes(uint32_t dim, uint32_t rows) {
  return (kKeys * (dim + 1) + rows * dim + rows * kLogitStride) *
         static_cast<uint32_t>(sizeof(float));
}

// Whole queries of a run that a block holds at a time.
struct QuerySet {
  uint32_t first;  // of the run
  uint32_t queries;
};
[[nodiscard]] __device__ __forceinline__ QuerySet query_set(const AttentionParams& params,
                                                            uint32_t group, uint32_t rows,
                                                            uint32_t index) {
  const uint32_t each = rows / group, first = index * each;
  return {first, first < params.run ? min(each, params.run - first) : 0};
}
[[nodiscard]] __device__ __forceinline__ uint32_t position_of_query(const AttentionParams& params,
                                                                    uint32_t of_run) {
  const policy::PromptSample& sample = params.queries.sample;
  return params.queries.tokens - sample.given +
         policy::sampled_query(sample, params.first + of_run);
}

// Keys of the tokens from `first` on; zeros beyond the prompt. Eight threads a key.
template <int kDim>
__device__ void load_keys(const LaneView& lane, const PromptPages& split, uint32_t tokens,
                          uint32_t first, float* keys) {
  const uint32_t row = threadIdx.x / 8, token = first + row;
  float x[kDim / 8] = {};
  if (token < tokens) {
    const PromptSlot where = prompt_slot(split, token);
    const DeviceDescriptor* d = prompt_descriptor(lane, where);
    unsigned char* page = d == nullptr ? nullptr : page_at(*lane.batch, d->page);
    if (page != nullptr) decode_token<kDim, true>(x, page, where.format, where.slot);
  }
#pragma unroll
  for (uint32_t c = 0; c < kDim / 8; ++c) {
    keys[row * (kDim + 1) + threadIdx.x % 8 + 8 * c] = x[c];
  }
}

// The query rows of a kv head, as its keys are kept; zeros beyond the set.
template <int kDim>
__device__ void load_queries(const ModelGeometry& g, const AttentionParams& params, uint32_t head,
                             const QuerySet& set, uint32_t rows, float* queries) {
  const uint32_t group = g.group();
  for (uint32_t row = threadIdx.x / 8; row < rows; row += kThreads / 8) {  // whole warps
    const bool active = row < set.queries * group;
    const uint32_t older = params.queries.tokens - params.queries.count;  // not given
    const uint32_t query = active ? position_of_query(params, set.first + row / group) - older : 0;
    const uint64_t at = (uint64_t{query} * g.q_heads + head * group + row % group) * kDim;
    float x[kDim / 8];
    load_row<kDim>(x, params.queries.q, params.queries.element, at, active);
    if (params.rotates) rotate_vector<kDim>(x);
#pragma unroll
    for (uint32_t c = 0; c < kDim / 8; ++c) queries[row * kDim + threadIdx.x % 8 + 8 * c] = x[c];
  }
}

// policy::dot of rows w, w + 8, .. of the tile with the key of each thread of warp w.
template <int kDim, uint32_t kRows>
__device__ __forceinline__ void dot_tile(const AttentionTile& tile, float (&dots)[kRows / kWarps]) {
  const float* key = tile.keys + threadIdx.x % 32 * (kDim + 1);
  const float* rows = tile.rows + threadIdx.x / 32 * kDim;
  float sums[kRows / kWarps][8] = {};
  for (uint32_t d = 0; d < kDim; d += 8) {
    float k[8];
#pragma unroll
    for (uint32_t l = 0; l < 8; ++l) k[l] = key[d + l];
#pragma unroll
    for (uint32_t j = 0; j < kRows / kWarps; ++j) {
      const auto* row = reinterpret_cast<const float4*>(rows + j * kWarps * kDim + d);
      const float4 low = row[0], high = row[1];
      const float q[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (uint32_t l = 0; l < 8; ++l) sums[j][l] = exact_add(sums[j][l], exact_mul(q[l], k[l]));
    }
  }
#pragma unroll
  for (uint32_t j = 0; j < kRows / kWarps; ++j) {
#pragma unroll
    for (uint32_t h = 4; h >= 1; h /= 2) {
#pragma unroll
      for (uint32_t l = 0; l < h; ++l) sums[j][l] = exact_add(sums[j][l], sums[j][l + h]);
    }
    dots[j] = sums[j][0];
  }
}

// tile.logits; minus infinity where a query does not see a token.
template <int kDim, uint32_t kRows>
__device__ void score_tile(const AttentionTile& tile, const AttentionParams& params, uint32_t group,
                           const QuerySet& set, uint32_t first_token) {
  float dots[kRows / kWarps];
  dot_tile<kDim, kRows>(tile, dots);
  const uint32_t token = first_token + threadIdx.x % 32;
#pragma unroll
  for (uint32_t j = 0; j < kRows / kWarps; ++j) {
    const uint32_t row = threadIdx.x / 32 + j * kWarps;
    const bool seen = token <= position_of_query(params, set.first + row / group);
    tile.logits[row * kLogitStride + threadIdx.x % 32] =
        seen ? exact_mul(dots[j], params.scale) : -std::numeric_limits<float>::infinity();
  }
}

// Rows of logits that have a softmax: those of heads, or of a query's heads together.
struct Lines {
  uint32_t count;   // of the set
  uint32_t before;  // of the run's sets before
  uint32_t rows;    // that one is made of
};
[[nodiscard]] __device__ __forceinline__ Lines lines_of(const AttentionParams& params,
                                                        uint32_t group, const QuerySet& set) {
  if (params.reduce == kernels::GqaReduce::kMaxLogit) return {set.queries, set.first, group};
  return {set.queries * group, set.first * group, 1};
}
// That of this thread's token.
[[nodiscard]] __device__ __forceinline__ float line_logit(const AttentionTile& tile,
                                                          const Lines& lines, uint32_t line) {
  const float* logit = tile.logits + line * lines.rows * kLogitStride + threadIdx.x % 32;
  float most = logit[0];
  for (uint32_t r = 1; r < lines.rows; ++r) most = policy::larger(most, logit[r * kLogitStride]);
  return most;
}

// A chunk of one line, by a warp; `row` is the same in all threads.
__device__ __forceinline__ void add_line(RowSoftmax& row, float logit) {
  float most = policy::larger(row.most, logit);
  for (uint32_t x = 16; x > 0; x /= 2) {
    most = policy::larger(most, __shfl_xor_sync(kAllLanes, most, x));
  }
  float terms = policy::softmax_term<DeviceSteps>(logit, most);
  for (uint32_t x = 16; x > 0; x /= 2) {
    terms = exact_add(terms, __shfl_xor_sync(kAllLanes, terms, x));
  }
  policy::add_chunk<DeviceSteps>(row, most, terms);
}

// What a block works on, or lane null.
struct PromptHead {
  LaneView lane;
  PromptPages split;
  float2* softmax;  // [lines of the run] maximum and factor
};
[[nodiscard]] __device__ inline PromptHead prompt_head(const BatchView& view,
                                                       const AttentionParams& params,
                                                       uint32_t head) {
  PromptHead found{};
  DeviceSequence* sequence = sequence_at(view, params.queries.root);
  if (sequence == nullptr || sequence->score_bytes != sizeof(float)) return found;
  found.split = split_prompt(view, sequence, params.queries.layer, params.queries.tokens);
  const uint32_t index = params.queries.layer * view.geometry.kv_heads + head;
  found.lane = prompt_lane(view, sequence, index, found.split, params.queries.tokens);
  if (found.lane.lane == nullptr) return found;
  found.softmax = reinterpret_cast<float2*>(page_at(view, found.lane.lane->buffer_page[0]));
  if (found.softmax == nullptr) found.lane.lane = nullptr;
  return found;
}

// A block a set of rows of a kv head.
template <int kDim>
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(const __grid_constant__ BatchView view,
                   const __grid_constant__ AttentionParams params) {
  const ModelGeometry& g = view.geometry;
  const uint32_t group = g.group(), head = blockIdx.x % g.kv_heads;
  const QuerySet set = query_set(params, group, kSoftmaxRows, blockIdx.x / g.kv_heads);
  if (set.queries == 0) return;
  const PromptHead found = prompt_head(view, params, head);
  if (found.lane.lane == nullptr) return;
  const AttentionTile tile = tile_at(dynamic_shared(), kDim, kSoftmaxRows);
  const Lines lines = lines_of(params, group, set);
  RowSoftmax softmax[kSoftmaxRows / kWarps];
  load_queries<kDim>(g, params, head, set, kSoftmaxRows, tile.rows);
  for (uint32_t first = 0; first < params.queries.tokens; first += kKeys) {
    load_keys<kDim>(found.lane, found.split, params.queries.tokens, first, tile.keys);
    __syncthreads();
    score_tile<kDim, kSoftmaxRows>(tile, params, group, set, first);
    __syncthreads();
#pragma unroll
    for (uint32_t j = 0; j < kSoftmaxRows / kWarps; ++j) {
      const uint32_t line = threadIdx.x / 32 + j * kWarps;
      if (line < lines.count) add_line(softmax[j], line_logit(tile, lines, line));
    }
  }
#pragma unroll
  for (uint32_t j = 0; j < kSoftmaxRows / kWarps; ++j) {
    const uint32_t line = threadIdx.x / 32 + j * kWarps;
    if (line >= lines.count || threadIdx.x % 32 != 0) continue;
    const RowSoftmax& row = softmax[j];
    found.softmax[lines.before + line] =
        make_float2(row.most, policy::softmax_factor(row, exact_div(1.0f, row.sum)));
  }
}

// Logits of a set become probabilities, each line in its first row.
__device__ __forceinline__ void make_probabilities(const AttentionTile& tile, const Lines& lines,
                                                   const float2* softmax) {
  for (uint32_t line = threadIdx.x / 32; line < lines.count; line += kWarps) {
    const float2 row = softmax[lines.before + line];
    const float term = policy::softmax_term<DeviceSteps>(line_logit(tile, lines, line), row.x);
    tile.logits[line * lines.rows * kLogitStride + threadIdx.x % 32] = exact_mul(term, row.y);
  }
}

// What a query of the set gives the thread's token.
[[nodiscard]] __device__ __forceinline__ float query_probability(const AttentionTile& tile,
                                                                 kernels::GqaReduce reduce,
                                                                 uint32_t group, uint32_t query) {
  const float* p = tile.logits + query * group * kLogitStride + threadIdx.x % 32;
  float all = p[0];
  if (reduce == kernels::GqaReduce::kMaxLogit) return all;
  for (uint32_t h = 1; h < group; ++h) {
    const float other = p[h * kLogitStride];
    all = reduce == kernels::GqaReduce::kMeanProbability ? exact_add(all, other)
                                                         : policy::larger(all, other);
  }
  if (reduce != kernels::GqaReduce::kMeanProbability) return all;
  return exact_div(all, static_cast<float>(group));
}

// All queries of the run on the tokens from `first` on. Whole block.
template <int kDim>
__device__ void add_to_tile(const BatchView& view, const AttentionParams& params, uint32_t head,
                            const PromptHead& found, uint32_t first) {
  const ModelGeometry& g = view.geometry;
  const uint32_t group = g.group(), token = first + threadIdx.x % 32;
  const AttentionTile tile = tile_at(dynamic_shared(), kDim, kAddRows);
  load_keys<kDim>(found.lane, found.split, params.queries.tokens, first, tile.keys);
  float* slot = nullptr;  // the first warp's
  if (threadIdx.x < 32 && token < params.queries.tokens) {
    const PromptSlot where = prompt_slot(found.split, token);
    DeviceDescriptor* d = prompt_descriptor(found.lane, where);
    if (d != nullptr) slot = sums_of(found.lane, d, where.page) + where.slot;
  }
  float sum = slot == nullptr ? 0.0f : *slot;
  for (uint32_t index = 0;; ++index) {
    const QuerySet set = query_set(params, group, kAddRows, index);
    if (set.queries == 0) break;
    load_queries<kDim>(g, params, head, set, kAddRows, tile.rows);
    __syncthreads();
    score_tile<kDim, kAddRows>(tile, params, group, set, first);
    __syncthreads();
    make_probabilities(tile, lines_of(params, group, set), found.softmax);
    __syncthreads();
    if (threadIdx.x >= 32) continue;
    for (uint32_t i = 0; i < set.queries; ++i) {
      if (token > position_of_query(params, set.first + i)) continue;
      sum = exact_add(sum, query_probability(tile, params.reduce, group, i));
    }
  }
  if (slot != nullptr) *slot = sum;
  __syncthreads();
}

template <int kDim>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const __grid_constant__ BatchView view,
               const __grid_constant__ AttentionParams params) {
  const uint32_t tiles = (params.queries.tokens + kKeys - 1) / kKeys;
  const uint32_t head = blockIdx.x % view.geometry.kv_heads;
  const PromptHead found = prompt_head(view, params, head);
  if (found.lane.lane == nullptr) return;
  const uint32_t blocks = gridDim.x / view.geometry.kv_heads;
  for (uint32_t tile = blockIdx.x / view.geometry.kv_heads; tile < tiles; tile += blocks) {
    add_to_tile<kDim>(view, params, head, found, tile * kKeys);
  }
}

template <int kDim>
cudaError_t launch_run(const BatchView& view, const AttentionParams& params, cudaStream_t stream) {
  const ModelGeometry& g = view.geometry;
  const uint32_t each = kSoftmaxRows / g.group();
  const cudaError_t found = launch(softmax_kernel<kDim>,
                                   {.blocks = g.kv_heads * ((params.run + each - 1) / each),
                                    .threads = kThreads,
                                    .shared_bytes = tile_bytes(kDim, kSoftmaxRows)},
                                   stream, view, params);
  if (found != cudaSuccess) return found;
  const uint32_t tiles = (params.queries.tokens + kKeys - 1) / kKeys;
  const uint32_t most = kBlocksMax / g.kv_heads + 1;
  return launch(add_kernel<kDim>,
                {.blocks = g.kv_heads * (tiles < most ? tiles : most),
                 .threads = kThreads,
                 .shared_bytes = tile_bytes(kDim, kAddRows)},
                stream, view, params);
}

template <int kDim>
cudaError_t launch_runs(const BatchView& view, AttentionParams params, cudaStream_t stream) {
  const uint32_t each = kRunRows / view.geometry.group();
  const uint32_t end = params.queries.sample.used;
  for (uint32_t first = 0; first < end; first += each) {
    params.first = first;
    params.run = end - first < each ? end - first : each;
    const cudaError_t launched = launch_run<kDim>(view, params, stream);
    if (launched != cudaSuccess) return launched;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_query_attention(const BatchView& view, const PolicyParams& policy,
                                   const QueryParams& queries, cudaStream_t stream) {
  const AttentionParams params{.queries = queries,
                               .scale = softmax_scale_of(view.geometry),
                               .reduce = static_cast<kernels::GqaReduce>(policy.score_reduce),
                               .rotates = policy.rotate != 0,
                               .first = 0,
                               .run = 0};
  switch (view.geometry.head_dim) {
    case 64:
      return launch_runs<64>(view, params, stream);
    case 128:
      return launch_runs<128>(view, params, stream);
    case 256:
      return launch_runs<256>(view, params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
