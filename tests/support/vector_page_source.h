// vector_page_source.h: a PageSource over plain memory that watches its user.
//
// New pages are full of NaN bits, so a slot or a header that is read before it is written shows.
// A take without a promise, a page given back twice or touched after that, a foreign page: each
// stops the test. Pages can be handed out in any order and moved to other addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/sequence/page_source.h"
#include "thinkv/internal/check.h"
#include "thinkv/internal/page_format.h"

namespace thinkv::testing {

// The pages of a pool; several sources can share one.
class VectorPool {
 public:
  struct Options {
    uint32_t head_dim = 64;
    uint32_t capacity = 1024;
    uint64_t shuffle_seed = 0;  // 0: ascending ids
  };
  explicit VectorPool(const Options& options)
      : page_bytes_(page_bytes(options.head_dim)),
        pages_(options.capacity),
        taken_(options.capacity, false) {
    for (uint32_t i = options.capacity; i-- > 0;) free_.push_back(i);
    if (options.shuffle_seed == 0) return;
    std::mt19937_64 random(options.shuffle_seed);
    for (size_t i = free_.size(); i > 1; --i) std::swap(free_[i - 1], free_[random() % i]);
  }

  [[nodiscard]] uint32_t free_pages() const {
    return static_cast<uint32_t>(free_.size()) - promised_;
  }
  [[nodiscard]] uint64_t held() const { return taken_total - given_total; }
  void promise(uint32_t pages) { promised_ += pages; }
  void unpromise(uint32_t pages) { promised_ -= pages; }

  PageId take() {
    THINKV_CHECK(promised_ > 0 && !free_.empty());
    --promised_;
    const uint32_t index = free_.back();
    free_.pop_back();
    taken_[index] = true;
    pages_[index] = fresh();
    ++taken_total;
    return PageId(ExtentId(index % 3), index);
  }
  void give_back(PageId page) {
    const uint32_t index = require(page);
    taken_[index] = false;
    pages_[index].reset();  // the address sanitizer sees any later use
    free_.insert(free_.begin(), index);
    ++given_total;
  }
  [[nodiscard]] std::byte* address(PageId page) const { return pages_[require(page)]->bytes; }

  // Same ids and contents, other addresses.
  void relocate() {
    for (size_t i = 0; i < pages_.size(); ++i) {
      if (!taken_[i]) continue;
      auto moved = fresh();
      std::memcpy(moved->bytes, pages_[i]->bytes, page_bytes_);
      pages_[i] = std::move(moved);
    }
  }

  uint64_t taken_total = 0;
  uint64_t given_total = 0;

 private:
  struct alignas(64) Page {
    std::byte bytes[page_bytes(256)];
  };
  [[nodiscard]] std::unique_ptr<Page> fresh() const {
    auto page = std::make_unique<Page>();
    std::memset(page->bytes, 0xFF, sizeof page->bytes);
    return page;
  }
  [[nodiscard]] uint32_t require(PageId page) const {
    THINKV_CHECK(page.valid() && page.index() < pages_.size() && taken_[page.index()]);
    THINKV_CHECK(page.extent() == ExtentId(page.index() % 3));
    return page.index();
  }

  uint32_t page_bytes_;
  std::vector<std::unique_ptr<Page>> pages_;
  std::vector<bool> taken_;
  std::vector<uint32_t> free_;
  uint32_t promised_ = 0;
};

class VectorPageSource final : public kernels::PageSource {
 public:
  explicit VectorPageSource(VectorPool& pool) : pool_(&pool) {}
  VectorPageSource(const VectorPageSource&) = delete;
  VectorPageSource& operator=(const VectorPageSource&) = delete;
  ~VectorPageSource() override { pool_->unpromise(promised_); }

  Status reserve(uint32_t pages) override {
    pool_->unpromise(promised_);
    promised_ = 0;
    ++reserve_calls;
    reserved_last = pages;
    if (pages > pool_->free_pages()) {
      return make_error(ErrorCode::kExhausted, "the test pool has no page left");
    }
    pool_->promise(pages);
    promised_ = pages;
    return {};
  }
  PageId take() override {
    THINKV_CHECK(promised_ > 0);
    --promised_;
    return pool_->take();
  }
  void give_back(PageId page) override { pool_->give_back(page); }
  std::byte* address(PageId page) const override { return pool_->address(page); }
  [[nodiscard]] uint32_t promised() const { return promised_; }

  uint64_t reserve_calls = 0;
  uint32_t reserved_last = 0;

 private:
  VectorPool* pool_;
  uint32_t promised_ = 0;
};

}  // namespace thinkv::testing
