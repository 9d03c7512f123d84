// batch_streams.cpp: what a batch does for sequences with entropy-coded streams.
#include "client/gpu/batch.h"

namespace thinkv::client {

// Working memory for the coded blocks of one layer at a time: a 16-bit page for each entry of its
// list.
Status GpuBatch::make_stream_pages() {
  const uint64_t bytes = uint64_t{list_pages_} * page_bytes(engine_->geometry().head_dim);
  THINKV_ASSIGN_OR_RETURN(stream_pages_,
                          GpuMemory::make(engine_->gpu(), GpuMemory::Place::kDevice, bytes,
                                          "the pages that coded blocks are decoded to"));
  view_.stream_pages = stream_pages_.as<unsigned char>();
  return {};
}

Status GpuBatch::use_streams(const GpuSequence& sequence) {
  if (!sequence.policy().entropy.on() || streams_) return {};
  if (launched_) {
    return make_error(ErrorCode::kInvalidArgument,
                      "this batch's steps were launched without reading coded blocks, which this "
                      "sequence's policy has: open another batch for it");
  }
  THINKV_TRY(make_stream_pages());
  streams_ = true;
  return {};
}

// Decodes the layer's blocks. Requires: the context is current.
Status GpuBatch::read_streams(uint32_t layer) {
  if (!streams_) return {};
  return GpuEngine::launched(engine_->kernels().read_streams(view_, layer, engine_->stream()),
                             "read_streams");
}

}  // namespace thinkv::client
