// pages.h: the pages of one sequence: a PageSource whose promises are counted.
//
// A take() without a promise would be a step that can fail in its middle; counting makes such a
// defect stop here instead of in the pool.
#pragma once

#include <cstdint>

#include "kernels/sequence/page_source.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {

class Pages {
 public:
  explicit Pages(PageSource& source) : source_(&source) {}

  // Does nothing where `pages` are promised exactly; see PageSource::reserve for the errors.
  [[nodiscard]] Status reserve(uint32_t pages) {
    if (pages == promised_) return {};
    promised_ = 0;
    THINKV_TRY(source_->reserve(pages));
    promised_ = pages;
    return {};
  }
  // Lets go of what is left of the promise. Nothing depends on the answer.
  void end_reservation() { static_cast<void>(reserve(0)); }
  [[nodiscard]] PageId take() {
    THINKV_CHECK(promised_ > 0);
    --promised_;
    return source_->take();
  }
  void give_back(PageId page) { source_->give_back(page); }
  [[nodiscard]] std::byte* address(PageId page) const { return source_->address(page); }
  [[nodiscard]] std::byte* address(uint32_t raw) const { return address(PageId(raw)); }
  [[nodiscard]] uint32_t promised() const { return promised_; }

 private:
  PageSource* source_;
  uint32_t promised_ = 0;
};

}  // namespace thinkv::kernels
