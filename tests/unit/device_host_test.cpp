#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "daemon/device/host/host_device.h"

namespace thinkv::device {
namespace {

constexpr uint64_t kBytes = uint64_t{2} << 20;

// A mapping of a whole extent, as a client has it.
class Mapping {
 public:
  explicit Mapping(int fd)
      : bytes_(static_cast<uint8_t*>(
            ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0))) {}
  ~Mapping() { ::munmap(bytes_, kBytes); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  [[nodiscard]] uint8_t* data() const { return bytes_; }
  [[nodiscard]] bool all(uint8_t value) const {
    return std::all_of(bytes_, bytes_ + kBytes, [value](uint8_t b) { return b == value; });
  }

 private:
  uint8_t* bytes_;
};

TEST(HostDevice, NewExtentReadsAsZerosAndIsCommitted) {
  HostDevice device;
  ASSERT_TRUE(device.create_extent(ExtentId(3), kBytes).has_value());
  const int fd = device.export_fd(ExtentId(3)).value();
  struct stat info {};
  ASSERT_EQ(::fstat(fd, &info), 0);
  EXPECT_EQ(static_cast<uint64_t>(info.st_size), kBytes);
  EXPECT_GE(static_cast<uint64_t>(info.st_blocks) * 512, kBytes);
  EXPECT_TRUE(Mapping(fd).all(0));
}

TEST(HostDevice, DescriptorIsSealedAndClosedOnExec) {
  HostDevice device;
  ASSERT_TRUE(device.create_extent(ExtentId(0), kBytes).has_value());
  const int fd = device.export_fd(ExtentId(0)).value();
  const int seals = ::fcntl(fd, F_GET_SEALS);
  constexpr int kWanted = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  EXPECT_EQ(seals & kWanted, kWanted);
  EXPECT_EQ(seals & F_SEAL_WRITE, 0);
  EXPECT_NE(::fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_NE(::ftruncate(fd, 0), 0);
  EXPECT_EQ(errno, EPERM);
  EXPECT_NE(::ftruncate(fd, kBytes * 2), 0);
  EXPECT_EQ(errno, EPERM);
  EXPECT_NE(::fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
  EXPECT_EQ(errno, EPERM);
}

TEST(HostDevice, RecycledExtentIsOtherMemoryAndTheOldLivesWithItsMapper) {
  HostDevice device;
  ASSERT_TRUE(device.create_extent(ExtentId(1), kBytes).has_value());
  const Mapping old(device.export_fd(ExtentId(1)).value());
  std::memset(old.data(), 0xAB, kBytes);
  device.release_extent(ExtentId(1));
  ASSERT_TRUE(device.create_extent(ExtentId(1), kBytes).has_value());
  const Mapping fresh(device.export_fd(ExtentId(1)).value());
  EXPECT_TRUE(fresh.all(0));
  EXPECT_TRUE(old.all(0xAB));
  old.data()[0] = 1;
  EXPECT_TRUE(fresh.all(0));
}

TEST(HostDevice, ExtentThatExistsIsNotReplaced) {
  HostDevice device;
  ASSERT_TRUE(device.create_extent(ExtentId(1), kBytes).has_value());
  const int fd = device.export_fd(ExtentId(1)).value();
  const Status again = device.create_extent(ExtentId(1), kBytes);
  ASSERT_FALSE(again.has_value());
  EXPECT_EQ(again.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(device.export_fd(ExtentId(1)).value(), fd);
}

TEST(HostDevice, UnknownExtentHasNoDescriptor) {
  HostDevice device;
  EXPECT_EQ(device.export_fd(ExtentId(9)).error().code, ErrorCode::kNotFound);
  device.release_extent(ExtentId(9));
  ASSERT_TRUE(device.create_extent(ExtentId(9), kBytes).has_value());
  device.release_extent(ExtentId(9));
  EXPECT_EQ(device.export_fd(ExtentId(9)).error().code, ErrorCode::kNotFound);
}

TEST(HostDevice, ImpossibleSizesAreErrorsNotCrashes) {
  HostDevice device;
  EXPECT_EQ(device.create_extent(ExtentId(0), 0).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(device.create_extent(ExtentId(0), ~uint64_t{0}).error().code,
            ErrorCode::kInvalidArgument);
  EXPECT_TRUE(device.create_extent(ExtentId(0), kBytes).has_value());
}

// A memfd has no limit of its own: asking the kernel would end in its OOM killer, not in an error.
// The file size limit is the net below this test: if the device did ask, ftruncate would fail and
// os_error would not be ENOMEM.
TEST(HostDevice, MoreThanTheMachineHasIsRefusedBeforeTheKernelIsAsked) {
  HostDevice device;
  const Capacity capacity = device.capacity().value();
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  struct rlimit small = before;
  small.rlim_cur = kBytes;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  for (const uint64_t bytes :
       {capacity.total_bytes, capacity.total_bytes * 16 / 17, uint64_t{1} << 62}) {
    const Status failed = device.create_extent(ExtentId(0), bytes);
    EXPECT_FALSE(failed.has_value());
    if (failed) continue;
    EXPECT_EQ(failed.error().code, ErrorCode::kExhausted);
    EXPECT_EQ(failed.error().os_error, ENOMEM);
  }
  ::signal(SIGXFSZ, old_handler);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_EQ(device.export_fd(ExtentId(0)).error().code, ErrorCode::kNotFound);
  EXPECT_TRUE(device.create_extent(ExtentId(0), kBytes).has_value());
}

TEST(HostDevice, WithoutDescriptorsItIsExhaustedAndRecovers) {
  HostDevice device;
  // Also lets the undefined-behaviour sanitizer know the type while it can still open a pipe.
  ASSERT_TRUE(device.create_extent(ExtentId(1), kBytes).has_value());
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  struct rlimit none = before;
  none.rlim_cur = 0;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  const Status failed = device.create_extent(ExtentId(0), kBytes);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  ASSERT_FALSE(failed.has_value());
  EXPECT_EQ(failed.error().code, ErrorCode::kExhausted);
  EXPECT_EQ(failed.error().os_error, EMFILE);
  EXPECT_TRUE(device.create_extent(ExtentId(0), kBytes).has_value());
}

TEST(HostDevice, TellsItsNameAndCapacity) {
  const HostDevice device;
  EXPECT_STREQ(device.name(), "host");
  const Capacity capacity = device.capacity().value();
  EXPECT_GT(capacity.total_bytes, 0u);
  EXPECT_LE(capacity.available_bytes, capacity.total_bytes);
}

}  // namespace
}  // namespace thinkv::device
