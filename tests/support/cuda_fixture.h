// cuda_fixture.h: tests on the fake CUDA driver, each of which must give back what it took.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "kernels/cuda/driver.h"
#include "tests/support/fake_libcuda.h"

namespace thinkv::test {

class CudaFixture : public testing::Test {
 protected:
  static constexpr uint64_t kBytes = uint64_t{2} << 20;

  void SetUp() override {
    ASSERT_TRUE(fake_cuda::held()) << "the fake driver is not loaded: run this through ctest";
    const Result<const cuda::Driver*> loaded = cuda::Driver::load();
    ASSERT_TRUE(loaded) << loaded.error().what;
    driver_ = *loaded;
  }
  void TearDown() override {
    for (const char* name : {"FAKE_CUDA_FAIL", "FAKE_CUDA_BYTES", "FAKE_CUDA_RESERVE_MAX"}) {
      ::unsetenv(name);
    }
    EXPECT_EQ(fake_cuda::held(), fake_cuda::Held{});
  }

  // Every call of `name` from its n-th on answers `code`.
  static void fail(const char* name, int n, int code) {
    const std::string rule =
        std::string(name) + ":" + std::to_string(n) + ":" + std::to_string(code);
    ::unsetenv("FAKE_CUDA_FAIL");
    ::setenv("FAKE_CUDA_FAIL", rule.c_str(), 1);
  }
  static void stop_failing() { ::unsetenv("FAKE_CUDA_FAIL"); }

  const cuda::Driver* driver_ = nullptr;
};

// The memory behind a descriptor of the fake driver, as another process would see it.
class HostView {
 public:
  explicit HostView(int fd, uint64_t bytes)
      : bytes_(bytes),
        data_(static_cast<uint8_t*>(
            ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0))) {}
  ~HostView() { ::munmap(data_, bytes_); }
  HostView(const HostView&) = delete;
  HostView& operator=(const HostView&) = delete;
  [[nodiscard]] uint8_t* data() const { return data_; }
  [[nodiscard]] bool all(uint8_t value) const {
    return std::all_of(data_, data_ + bytes_, [value](uint8_t b) { return b == value; });
  }

 private:
  uint64_t bytes_;
  uint8_t* data_;
};

}  // namespace thinkv::test
