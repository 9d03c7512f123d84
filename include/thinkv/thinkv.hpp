// thinkv.hpp: thinkv.h with ownership in types: Client, Model, Sequence, Step. No logic of its own.
//
// Move-only; each closes its handle on destruction, in any order (a closed handle answers kStale).
// Functions that can fail return Result or Status with the code and the system's number; the
// sentence for a person is in last_error_text(), of the calling thread.
// Threads: as in thinkv.h.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "thinkv/result.h"
#include "thinkv/thinkv.h"

namespace thinkv::api {

namespace detail {

inline thread_local thinkv_error last_error = THINKV_ERROR_INIT;

inline Status status_of(thinkv_status code) {
  if (code == THINKV_OK) return {};
  return make_error(static_cast<ErrorCode>(code), "see thinkv::api::last_error_text()",
                    last_error.os_error);
}

// An owned handle. `kClose` is called once.
template <class Opaque, void (*kClose)(Opaque*)>
class Handle {
 public:
  Handle() = default;
  explicit Handle(Opaque* opaque) : opaque_(opaque) {}
  Handle(Handle&& other) noexcept : opaque_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      close();
      opaque_ = other.release();
    }
    return *this;
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { close(); }

  [[nodiscard]] Opaque* get() const { return opaque_; }
  [[nodiscard]] Opaque* release() { return std::exchange(opaque_, nullptr); }
  void close() { kClose(release()); }

 private:
  Opaque* opaque_ = nullptr;
};

}  // namespace detail

// What went wrong in the last failed call of this thread.
[[nodiscard]] inline const char* last_error_text() {
  return detail::last_error.text;
}

// fp32, dense, row-major; at most 4 dimensions.
[[nodiscard]] inline thinkv_tensor tensor(const float* data, std::initializer_list<int64_t> shape) {
  thinkv_tensor t{data, THINKV_FLOAT32, 0, {0, 0, 0, 0}};
  for (const int64_t size : shape) {
    if (t.ndim < 4) t.shape[t.ndim++] = size;
  }
  return t;
}
[[nodiscard]] inline thinkv_output output(float* data, std::initializer_list<int64_t> shape) {
  thinkv_output t{data, THINKV_FLOAT32, 0, {0, 0, 0, 0}};
  for (const int64_t size : shape) {
    if (t.ndim < 4) t.shape[t.ndim++] = size;
  }
  return t;
}

// One token of each sequence of a batch. Destroyed without end(): cancelled.
class Step {
 public:
  explicit Step(thinkv_step* step) : handle_(step) {}
  [[nodiscard]] Status append(uint32_t layer, const thinkv_tensor& k, const thinkv_tensor& v) {
    return detail::status_of(thinkv_step_append(handle_.get(), layer, &k, &v, &detail::last_error));
  }
  [[nodiscard]] Status attend(uint32_t layer, const thinkv_tensor& q, const thinkv_output& out,
                              const thinkv_output* lse = nullptr) {
    return detail::status_of(
        thinkv_step_attend(handle_.get(), layer, &q, &out, lse, &detail::last_error));
  }
  [[nodiscard]] Status end() {
    return detail::status_of(thinkv_step_end(handle_.release(), &detail::last_error));
  }

 private:
  detail::Handle<thinkv_step, thinkv_step_cancel> handle_;
};

class Sequence {
 public:
  explicit Sequence(thinkv_sequence* sequence) : handle_(sequence) {}
  [[nodiscard]] thinkv_sequence* get() const { return handle_.get(); }
  [[nodiscard]] Status prefill(uint32_t layer, const thinkv_tensor& k, const thinkv_tensor& v) {
    return detail::status_of(
        thinkv_sequence_prefill(handle_.get(), layer, &k, &v, &detail::last_error));
  }
  [[nodiscard]] Status prefill_end() {
    return detail::status_of(thinkv_sequence_prefill_end(handle_.get(), &detail::last_error));
  }
  // Optional, between prefill() of the layer and prefill_end().
  [[nodiscard]] Status prefill_queries(uint32_t layer, const thinkv_tensor& q) {
    return detail::status_of(
        thinkv_sequence_prefill_queries(handle_.get(), layer, &q, &detail::last_error));
  }
  [[nodiscard]] Status token_classes(uint32_t first, std::span<const uint8_t> classes) {
    return detail::status_of(thinkv_sequence_token_classes(handle_.get(), first, classes.data(),
                                                           classes.size(), &detail::last_error));
  }
  // Optional, while the sequence is in a step, for a policy with a tier.
  [[nodiscard]] Status prefetch(uint32_t layer, const thinkv_tensor& q) {
    return detail::status_of(
        thinkv_sequence_prefetch(handle_.get(), layer, &q, &detail::last_error));
  }
  // Result: (token, lane) pairs evicted.
  [[nodiscard]] Result<uint64_t> evict(std::span<const uint32_t> positions) {
    uint64_t count = 0;
    THINKV_TRY(detail::status_of(thinkv_sequence_evict(
        handle_.get(), positions.data(), positions.size(), &count, &detail::last_error)));
    return count;
  }
  // On the cuda backend, without waiting: all but the newest `keep` tokens are evicted.
  [[nodiscard]] Status trim(uint32_t keep) {
    return detail::status_of(thinkv_sequence_trim(handle_.get(), keep, &detail::last_error));
  }
  // On the cuda backend: a sequence of its own that goes on from where this one is.
  [[nodiscard]] Result<Sequence> copy() {
    thinkv_sequence* made = nullptr;
    THINKV_TRY(detail::status_of(thinkv_sequence_copy(handle_.get(), &made, &detail::last_error)));
    return Sequence(made);
  }
  // Result: slots recoded.
  [[nodiscard]] Result<uint64_t> quantize(uint32_t first, uint32_t last, const char* format) {
    uint64_t count = 0;
    THINKV_TRY(detail::status_of(
        thinkv_sequence_quantize(handle_.get(), first, last, format, &count, &detail::last_error)));
    return count;
  }
  [[nodiscard]] Status set_budget(uint32_t tokens) {
    return detail::status_of(
        thinkv_sequence_set_budget(handle_.get(), tokens, &detail::last_error));
  }
  [[nodiscard]] Result<thinkv_sequence_stats> stats() const {
    thinkv_sequence_stats stats{};
    stats.struct_size = sizeof(stats);
    THINKV_TRY(
        detail::status_of(thinkv_sequence_get_stats(handle_.get(), &stats, &detail::last_error)));
    return stats;
  }
  void close() { handle_.close(); }

 private:
  detail::Handle<thinkv_sequence, thinkv_sequence_close> handle_;
};

// Rows of a decode step on a GPU; see thinkv.h. Tensors are in GPU memory.
class Batch {
 public:
  explicit Batch(thinkv_batch* batch) : handle_(batch) {}
  // A null sequence takes the row's out.
  [[nodiscard]] Status set(uint32_t row, const Sequence* sequence) {
    thinkv_sequence* joins = sequence == nullptr ? nullptr : sequence->get();
    return detail::status_of(thinkv_batch_set(handle_.get(), row, joins, &detail::last_error));
  }
  [[nodiscard]] Status reserve(uint32_t steps = 1) {
    return detail::status_of(thinkv_batch_reserve(handle_.get(), steps, &detail::last_error));
  }
  [[nodiscard]] Status begin() {
    return detail::status_of(thinkv_batch_begin(handle_.get(), &detail::last_error));
  }
  [[nodiscard]] Status append(uint32_t layer, const thinkv_tensor& k, const thinkv_tensor& v) {
    return detail::status_of(
        thinkv_batch_append(handle_.get(), layer, &k, &v, &detail::last_error));
  }
  [[nodiscard]] Status attend(uint32_t layer, const thinkv_tensor& q, const thinkv_output& out,
                              const thinkv_output* lse = nullptr) {
    return detail::status_of(
        thinkv_batch_attend(handle_.get(), layer, &q, &out, lse, &detail::last_error));
  }
  [[nodiscard]] Status attend(uint32_t layer, const thinkv_attend_options& options,
                              const thinkv_tensor& q, const thinkv_output& out,
                              const thinkv_output* lse = nullptr) {
    return detail::status_of(thinkv_batch_attend_with(handle_.get(), layer, &options, &q, &out, lse,
                                                      &detail::last_error));
  }
  [[nodiscard]] Status unreserve() {
    return detail::status_of(thinkv_batch_unreserve(handle_.get(), &detail::last_error));
  }
  [[nodiscard]] Status end() {
    return detail::status_of(thinkv_batch_end(handle_.get(), &detail::last_error));
  }
  void close() { handle_.close(); }

 private:
  detail::Handle<thinkv_batch, thinkv_batch_close> handle_;
};

class Model {
 public:
  explicit Model(thinkv_model* model) : handle_(model) {}
  [[nodiscard]] Result<Sequence> sequence(const char* policy = nullptr,
                                          uint32_t budget_tokens = THINKV_BUDGET_OF_POLICY) {
    thinkv_sequence_options options = THINKV_SEQUENCE_OPTIONS_INIT;
    options.policy_name = policy;
    options.budget_tokens = budget_tokens;
    thinkv_sequence* opened = nullptr;
    THINKV_TRY(detail::status_of(
        thinkv_sequence_open(handle_.get(), &options, &opened, &detail::last_error)));
    return Sequence(opened);
  }
  [[nodiscard]] Result<Step> step(std::span<const Sequence* const> batch) {
    std::vector<thinkv_sequence*> handles;
    for (const Sequence* sequence : batch) handles.push_back(sequence->get());
    thinkv_step* begun = nullptr;
    THINKV_TRY(detail::status_of(thinkv_step_begin(handle_.get(), handles.data(),
                                                   static_cast<uint32_t>(handles.size()), &begun,
                                                   &detail::last_error)));
    return Step(begun);
  }
  // cuda backend. stream: a cudaStream_t.
  [[nodiscard]] Status set_stream(void* stream) {
    return detail::status_of(thinkv_model_set_stream(handle_.get(), stream, &detail::last_error));
  }
  [[nodiscard]] Result<Batch> batch(uint32_t capacity, uint32_t tokens_max = 0) {
    thinkv_batch_options options = THINKV_BATCH_OPTIONS_INIT;
    options.capacity = capacity;
    options.tokens_max = tokens_max;
    thinkv_batch* opened = nullptr;
    THINKV_TRY(detail::status_of(
        thinkv_batch_open(handle_.get(), &options, &opened, &detail::last_error)));
    return Batch(opened);
  }
  void close() { handle_.close(); }

 private:
  detail::Handle<thinkv_model, thinkv_model_close> handle_;
};

class Client {
 public:
  // Null paths and names: as in thinkv.h.
  [[nodiscard]] static Result<Client> open(
      const thinkv_client_options& options = THINKV_CLIENT_OPTIONS_INIT) {
    thinkv_client* opened = nullptr;
    THINKV_TRY(detail::status_of(thinkv_client_open(&options, &opened, &detail::last_error)));
    return Client(opened);
  }
  [[nodiscard]] Result<Model> model(const thinkv_model_options& options) {
    thinkv_model* opened = nullptr;
    THINKV_TRY(detail::status_of(
        thinkv_model_open(handle_.get(), &options, &opened, &detail::last_error)));
    return Model(opened);
  }
  [[nodiscard]] Status ping() {
    return detail::status_of(thinkv_client_ping(handle_.get(), &detail::last_error));
  }
  [[nodiscard]] Result<thinkv_pool_stats> pool_stats() {
    thinkv_pool_stats stats{};
    stats.struct_size = sizeof(stats);
    THINKV_TRY(
        detail::status_of(thinkv_client_pool_stats(handle_.get(), &stats, &detail::last_error)));
    return stats;
  }
  [[nodiscard]] Result<std::string> status_json() {
    char* json = nullptr;
    THINKV_TRY(
        detail::status_of(thinkv_client_status_json(handle_.get(), &json, &detail::last_error)));
    std::string text(json);
    thinkv_string_free(json);
    return text;
  }
  void close() { handle_.close(); }

 private:
  explicit Client(thinkv_client* client) : handle_(client) {}
  detail::Handle<thinkv_client, thinkv_client_close> handle_;
};

}  // namespace thinkv::api
