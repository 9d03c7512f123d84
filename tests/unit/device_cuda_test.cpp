// The CUDA backend on the fake driver (tests/support/fake_libcuda.cpp).
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <cstring>
#include <string>

#include "daemon/device/cuda/cuda_device.h"
#include "daemon/device/factory.h"
#include "tests/support/cuda_fixture.h"

namespace thinkv::device {
namespace {

using test::HostView;
namespace fake_cuda = test::fake_cuda;

class CudaDeviceTest : public test::CudaFixture {
 protected:
  [[nodiscard]] std::unique_ptr<CudaDevice> open() const {
    return std::move(CudaDevice::open(*driver_, cuda::find_gpu(*driver_, std::nullopt).value()))
        .value();
  }
};

TEST_F(CudaDeviceTest, NewExtentReadsAsZerosThroughItsDescriptor) {
  const auto device = open();
  ASSERT_TRUE(device->create_extent(ExtentId(3), 2 * kBytes));
  const int fd = device->export_fd(ExtentId(3)).value();
  struct stat info {};
  ASSERT_EQ(::fstat(fd, &info), 0);
  EXPECT_EQ(static_cast<uint64_t>(info.st_size), 2 * kBytes);
  EXPECT_TRUE(HostView(fd, 2 * kBytes).all(0));
}

TEST_F(CudaDeviceTest, DaemonKeepsNoMappingAndOneClosingDescriptor) {
  const auto device = open();
  ASSERT_TRUE(device->create_extent(ExtentId(0), kBytes));
  EXPECT_EQ(fake_cuda::held(), (fake_cuda::Held{.memories = 1, .contexts = 1}));
  const int fd = device->export_fd(ExtentId(0)).value();
  EXPECT_EQ(device->export_fd(ExtentId(0)).value(), fd);
  EXPECT_NE(::fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
}

TEST_F(CudaDeviceTest, RecycledExtentIsOtherMemoryAndTheOldLivesWithItsMapper) {
  const auto device = open();
  ASSERT_TRUE(device->create_extent(ExtentId(1), kBytes));
  const HostView old(device->export_fd(ExtentId(1)).value(), kBytes);
  std::memset(old.data(), 0xAB, kBytes);
  device->release_extent(ExtentId(1));
  EXPECT_EQ(device->export_fd(ExtentId(1)).error().code, ErrorCode::kNotFound);
  ASSERT_TRUE(device->create_extent(ExtentId(1), kBytes));
  EXPECT_TRUE(HostView(device->export_fd(ExtentId(1)).value(), kBytes).all(0));
  EXPECT_TRUE(old.all(0xAB));
}

TEST_F(CudaDeviceTest, ImpossibleSizesAndKnownExtentsAreErrors) {
  const auto device = open();
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{4096}, kBytes + 4096, ~uint64_t{0}}) {
    EXPECT_EQ(device->create_extent(ExtentId(0), bytes).error().code, ErrorCode::kInvalidArgument)
        << bytes;
  }
  ASSERT_TRUE(device->create_extent(ExtentId(0), kBytes));
  const int fd = device->export_fd(ExtentId(0)).value();
  EXPECT_EQ(device->create_extent(ExtentId(0), kBytes).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(device->export_fd(ExtentId(0)).value(), fd);
  device->release_extent(ExtentId(9));
}

TEST_F(CudaDeviceTest, TwoGpusAreTwoMemories) {
  ::setenv("FAKE_CUDA_BYTES", std::to_string(2 * kBytes).c_str(), 1);
  std::string why;
  const auto make = [&](int32_t number) {
    return make_device({.kind = Kind::kCuda,
                        .gpu = fake_cuda::uuid_of(number),
                        .pool_bytes = 2 * kBytes,
                        .extent_bytes = kBytes},
                       &why);
  };
  const auto first = make(0);
  ASSERT_TRUE(first) << why;
  const auto second = make(1);
  ASSERT_TRUE(second) << why;
  EXPECT_EQ((*second)->uuid(), fake_cuda::uuid_of(1));
  for (const uint32_t id : {0u, 1u}) ASSERT_TRUE((*first)->create_extent(ExtentId(id), kBytes));
  EXPECT_EQ((*first)->create_extent(ExtentId(2), kBytes).error().code, ErrorCode::kExhausted);
  EXPECT_EQ((*first)->capacity()->available_bytes, 0u);
  EXPECT_EQ((*second)->capacity()->available_bytes, 2 * kBytes);
  ASSERT_TRUE((*second)->create_extent(ExtentId(0), kBytes));
  EXPECT_NE((*second)->export_fd(ExtentId(0)).value(), (*first)->export_fd(ExtentId(0)).value());
}

TEST_F(CudaDeviceTest, OutOfMemoryIsExhaustedAndMayWorkLater) {
  const auto device = open();
  fail("cuMemCreate", 2, cuda::kErrorOutOfMemory);
  ASSERT_TRUE(device->create_extent(ExtentId(0), kBytes));
  const Status failed = device->create_extent(ExtentId(1), kBytes);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().code, ErrorCode::kExhausted);
  EXPECT_EQ(failed.error().os_error, cuda::kErrorOutOfMemory);
  EXPECT_STREQ(failed.error().what, "cuMemCreate: out of memory (CUDA error 2)");
  stop_failing();
  EXPECT_TRUE(device->create_extent(ExtentId(1), kBytes));
}

TEST_F(CudaDeviceTest, LostContextIsADeadDevice) {
  const auto device = open();
  fail("cuStreamSynchronize", 1, cuda::kErrorIllegalAddress);
  const Status failed = device->create_extent(ExtentId(0), kBytes);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().code, ErrorCode::kDeviceFailed);
  EXPECT_EQ(failed.error().os_error, cuda::kErrorIllegalAddress);
  EXPECT_NE(std::string(failed.error().what).find("context is lost"), std::string::npos);
}

TEST_F(CudaDeviceTest, AStepThatFailsLeavesNothingBehind) {
  const auto device = open();
  const auto before = fake_cuda::held();
  for (const char* step :
       {"cuCtxPushCurrent_v2", "cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess",
        "cuMemsetD8Async", "cuStreamSynchronize", "cuMemExportToShareableHandle"}) {
    fail(step, 1, cuda::kErrorUnknown);
    const Status failed = device->create_extent(ExtentId(0), kBytes);
    stop_failing();
    ASSERT_FALSE(failed) << step;
    EXPECT_EQ(failed.error().code, ErrorCode::kDeviceFailed) << step;
    EXPECT_EQ(failed.error().os_error, cuda::kErrorUnknown) << step;
    EXPECT_EQ(fake_cuda::held(), before) << step;
    EXPECT_EQ(device->export_fd(ExtentId(0)).error().code, ErrorCode::kNotFound) << step;
  }
  EXPECT_TRUE(device->create_extent(ExtentId(0), kBytes));
}

TEST_F(CudaDeviceTest, WithoutDescriptorsItIsExhaustedAndRecovers) {
  const auto device = open();
  ASSERT_TRUE(device->create_extent(ExtentId(1), kBytes));
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  struct rlimit none = before;
  none.rlim_cur = 0;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  const Status failed = device->create_extent(ExtentId(0), kBytes);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().code, ErrorCode::kExhausted);
  EXPECT_TRUE(device->create_extent(ExtentId(0), kBytes));
}

TEST_F(CudaDeviceTest, CapacityIsTheGpusAndFallsWithExtents) {
  ::setenv("FAKE_CUDA_BYTES", "16777216", 1);
  const auto device = open();
  ASSERT_TRUE(device->create_extent(ExtentId(0), kBytes));
  const Capacity capacity = device->capacity().value();
  EXPECT_EQ(capacity.total_bytes, 8 * kBytes);
  EXPECT_EQ(capacity.available_bytes, 7 * kBytes);
  EXPECT_EQ(device->create_extent(ExtentId(1), 8 * kBytes).error().code, ErrorCode::kExhausted);
  EXPECT_STREQ(device->name(), "cuda");
}

TEST_F(CudaDeviceTest, GpuIsChosenByUuidOrFirst) {
  EXPECT_EQ(cuda::find_gpu(*driver_, std::nullopt)->ordinal, 0);
  const cuda::GpuInfo second = cuda::find_gpu(*driver_, fake_cuda::uuid_of(1)).value();
  EXPECT_EQ(second.ordinal, 1);
  EXPECT_EQ(second.name, "Fake GPU 1");
  EXPECT_EQ(CudaDevice::open(*driver_, second).value()->uuid(), fake_cuda::uuid_of(1));
  const Result<cuda::GpuInfo> none = cuda::find_gpu(*driver_, fake_cuda::uuid_of(7));
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().code, ErrorCode::kNotFound);
  EXPECT_NE(std::string(none.error().what).find(device_uuid_text(fake_cuda::uuid_of(1))),
            std::string::npos);
}

class DeviceFactory : public test::CudaFixture {
 protected:
  static std::string why_not(const DeviceOptions& options) {
    std::string why;
    const auto made = make_device(options, &why);
    return made ? std::string("made") : why;
  }
  static constexpr DeviceOptions kOptions{
      .kind = Kind::kCuda, .gpu = std::nullopt, .pool_bytes = 4 * kBytes, .extent_bytes = kBytes};
};

TEST_F(DeviceFactory, MakesWhatTheOptionsName) {
  std::string why;
  EXPECT_STREQ(make_device({}, &why).value()->name(), "host");
  EXPECT_TRUE(make_device({}, &why).value()->uuid().is_none());
  DeviceOptions options = kOptions;
  options.gpu = fake_cuda::uuid_of(1);
  EXPECT_EQ(make_device(options, &why).value()->uuid(), fake_cuda::uuid_of(1));
}

TEST_F(DeviceFactory, SaysWhatIsWrong) {
  DeviceOptions absent = kOptions;
  absent.gpu = fake_cuda::uuid_of(5);
  EXPECT_NE(why_not(absent).find("pool.device; nvidia-smi -L lists them"), std::string::npos);
  DeviceOptions odd = kOptions;
  odd.extent_bytes = kBytes / 2;
  EXPECT_NE(why_not(odd).find("granularity"), std::string::npos);
  ::setenv("FAKE_CUDA_BYTES", "4194304", 1);
  EXPECT_NE(why_not(kOptions).find("pool.bytes is 8 MiB, the GPU has 4 MiB free of 4 MiB"),
            std::string::npos);
  ::unsetenv("FAKE_CUDA_BYTES");
  ::setenv("FAKE_CUDA_COMPUTE_MODE", "3", 1);
  EXPECT_NE(why_not(kOptions).find("EXCLUSIVE_PROCESS"), std::string::npos);
  ::unsetenv("FAKE_CUDA_COMPUTE_MODE");
  fail("cuDevicePrimaryCtxRetain", 1, cuda::kErrorOutOfMemory);
  EXPECT_NE(why_not(kOptions).find("cuDevicePrimaryCtxRetain: out of memory"), std::string::npos);
}

class OpenDriver : public test::CudaFixture {
 protected:
  static Error error_of(const char* library) {
    cuda::Driver driver;
    const Status opened = cuda::open_driver(library, &driver);
    return opened ? make_error(ErrorCode::kOk, "opened") : opened.error();
  }
  // The same with a variable of the fake driver set.
  static Error error_with(const char* name, const char* value) {
    ::setenv(name, value, 1);
    const Error error = error_of("libcuda.so.1");
    ::unsetenv(name);
    return error;
  }
  // Leaves the driver as the other tests of this process need it.
  void TearDown() override {
    EXPECT_EQ(error_of("libcuda.so.1").code, ErrorCode::kOk);
    CudaFixture::TearDown();
  }
};

TEST_F(OpenDriver, LibrariesThatAreNoneOrTooOld) {
  const Error none = error_of("libno-such-driver.so.1");
  EXPECT_EQ(none.code, ErrorCode::kUnsupported);
  EXPECT_NE(std::string(none.what).find("no CUDA driver on this machine"), std::string::npos);
  const Error other = error_of("libc.so.6");
  EXPECT_EQ(other.code, ErrorCode::kUnsupported);
  EXPECT_NE(std::string(other.what).find("has no cuInit"), std::string::npos);
  const Error old = error_with("FAKE_CUDA_VERSION", "11040");
  EXPECT_EQ(old.code, ErrorCode::kUnsupported);
  EXPECT_NE(std::string(old.what).find("supports CUDA 11.4, ThinKV needs 12.0"), std::string::npos);
}

TEST_F(OpenDriver, MachinesWithoutAGpuOrWithABrokenDriver) {
  const Error none = error_with("FAKE_CUDA_DEVICES", "0");
  EXPECT_EQ(none.code, ErrorCode::kUnsupported);
  EXPECT_NE(std::string(none.what).find("finds no GPU"), std::string::npos);
  const Error broken = error_with("FAKE_CUDA_FAIL", "cuInit:1:803");
  EXPECT_EQ(broken.code, ErrorCode::kDeviceFailed);
  EXPECT_EQ(broken.os_error, 803);
  EXPECT_STREQ(broken.what, "cuInit: a fake error (CUDA error 803)");
}

TEST_F(OpenDriver, LoadIsOnceAndKeepsItsAnswer) {
  ::setenv("FAKE_CUDA_DEVICES", "0", 1);
  EXPECT_EQ(cuda::Driver::load().value(), driver_);
  ::unsetenv("FAKE_CUDA_DEVICES");
  EXPECT_EQ(driver_->version, 12040);
}

}  // namespace
}  // namespace thinkv::device
