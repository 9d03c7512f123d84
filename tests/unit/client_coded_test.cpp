// Sequences with entropy-coded streams in batches of a GPU: what is read when, listed and refused.
#include <numeric>
#include <string>
#include <vector>

#include "tests/support/idle_gpu.h"

namespace thinkv::client {
namespace {

TEST_F(ReserveBehind, CodedBlocksAreReadBeforeAttention) {
  open(0);
  ASSERT_TRUE(batch_->attend(0, {}));
  EXPECT_EQ(world.stream_reads, 0u);
  ASSERT_TRUE(batch_->set(0, nullptr));
  sequence_ = coded_sequence();
  ASSERT_TRUE(batch_->set(0, sequence_.get()));
  ASSERT_TRUE(batch_->attend(0, {}));
  EXPECT_EQ(world.stream_reads, 1u);
  EXPECT_NE(world.stream_pages, nullptr);
}

TEST_F(ReserveBehind, CodedBlocksAreRefusedByStepsThatWereLaunchedWithoutThem) {
  open(0);
  ASSERT_TRUE(run(1));
  ASSERT_TRUE(batch_->set(0, nullptr));
  sequence_ = coded_sequence();
  const Status refused = batch_->set(0, sequence_.get());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
}

TEST_F(ReserveBehind, CodedTokensHaveTheirPlaceInTheList) {
  world.lane_pages = 3;
  open(300);  // 17 pages a lane: enough for three and two of the buffer
  ASSERT_TRUE(batch_->set(0, nullptr));
  sequence_ = coded_sequence();
  ASSERT_TRUE(sequence_->prefill(0, this, this, Element::kF32, 192));
  ASSERT_TRUE(sequence_->prefill_end());
  ASSERT_TRUE(batch_->set(0, sequence_.get()));
  // 128 tokens are coded: 16 pages, and there are as many in the lane's table.
  const Status refused = batch_->reserve(1);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(std::string(refused.error().what).find("tokens_max"), std::string::npos);
}

TEST_F(ReserveBehind, CodedBlocksGoWholeOrNotAtAll) {
  open(0);
  sequence_ = coded_sequence();
  ASSERT_TRUE(sequence_->prefill(0, this, this, Element::kF32, 256));
  ASSERT_TRUE(sequence_->prefill_end());
  world.tokens = 256;
  const auto refusal = [&](std::vector<uint32_t> positions) {
    const Result<uint64_t> evicted = sequence_->evict(positions);
    return evicted ? std::string() : std::string(evicted.error().what);
  };
  std::vector<uint32_t> second(64);
  std::iota(second.begin(), second.end(), 64u);
  EXPECT_NE(refusal({3}).find("name all 64"), std::string::npos);
  EXPECT_NE(refusal({200}).find("whole coded blocks"), std::string::npos);
  EXPECT_EQ(refusal(second), "");
  EXPECT_EQ(world.evicted, second);
  world.evicted.clear();
  EXPECT_EQ(refusal({70, 80}), "") << "they are gone already";
  EXPECT_TRUE(world.evicted.empty());
  EXPECT_EQ(sequence_->trim(64).error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(sequence_->quantize(0, 10, Format::kK4V4).error().code, ErrorCode::kUnsupported);
}

}  // namespace
}  // namespace thinkv::client
