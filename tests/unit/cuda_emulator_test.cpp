// The emulated GPU of kernels/cuda/emulated itself: barriers, and what it does about threads that
// miss one.
#include <array>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/emulated/device.h"

namespace thinkv::cuda {
namespace {

// Each thread writes, and after the block's barrier reads what the thread opposite wrote.
void opposite_kernel(uint32_t* out) {
  __shared__ std::array<uint32_t, 1024> places;
  places[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = places[blockDim.x - 1 - threadIdx.x];
}

TEST(CudaEmulator, NobodyPassesABlocksBarrierBeforeTheLast) {
  for (const uint32_t threads : {1u, 32u, 33u, 1024u}) {
    std::vector<uint32_t> out(threads);
    ASSERT_EQ(launch(opposite_kernel, {2, threads}, nullptr, out.data()), cudaSuccess);
    for (uint32_t i = 0; i < threads; ++i) ASSERT_EQ(out[i], threads - 1 - i) << threads;
  }
}

// Warps of unequal numbers of rounds between two barriers of the block.
void rounds_kernel(uint32_t* sums) {
  uint32_t sum = threadIdx.x;
  for (uint32_t i = 0; i <= threadIdx.x / 32; ++i) sum += __shfl_xor_sync(~0u, sum, 1);
  __syncthreads();
  sums[threadIdx.x] = sum;
}

TEST(CudaEmulator, WarpsMeetEachAtItsOwnPace) {
  std::array<uint32_t, 128> sums{};
  ASSERT_EQ(launch(rounds_kernel, {1, 128}, nullptr, sums.data()), cudaSuccess);
  for (uint32_t i = 0; i < 128; ++i) {
    const uint32_t pair = i + (i ^ 1);
    ASSERT_EQ(sums[i], pair << i / 32) << i;
  }
}

// Threads above `stay` return before the others meet.
void leaving_kernel(uint32_t stay, uint32_t* lanes) {
  if (threadIdx.x >= stay) return;
  const uint32_t there = __ballot_sync(~0u, true);
  __syncthreads();
  if (threadIdx.x == 0) *lanes = there;
}

TEST(CudaEmulator, ThreadsThatReturnedAreNotWaitedFor) {
  uint32_t lanes = 0;
  ASSERT_EQ(launch(leaving_kernel, {1, 96}, nullptr, 5u, &lanes), cudaSuccess);
  EXPECT_EQ(lanes, 0x1Fu);
}

void missed_by_a_lane() {
  if (threadIdx.x == 7) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

TEST(CudaEmulatorDeathTest, ABarrierThatALaneMissesIsSaid) {
  EXPECT_DEATH(static_cast<void>(launch(missed_by_a_lane, {1, 32}, nullptr)), "never reach");
}

}  // namespace
}  // namespace thinkv::cuda
