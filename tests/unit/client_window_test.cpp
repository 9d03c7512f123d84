// The client's side of a pool on a GPU: DeviceWindow, ExtentMap and Session on the fake driver.
#include "client/device_window.h"

#include <fcntl.h>
#include <sys/wait.h>

#include <cstring>
#include <memory>

#include "client/extent_map.h"
#include "client/session.h"
#include "daemon/device/cuda/cuda_device.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/fake_daemon.h"

namespace thinkv::client {
namespace {

using test::FakeDaemon;
using test::HostView;
namespace fake_cuda = test::fake_cuda;

class DeviceWindowTest : public test::CudaFixture {
 protected:
  void SetUp() override {
    CudaFixture::SetUp();
    if (driver_ == nullptr) return;
    device_ = std::move(device::CudaDevice::open(
                            *driver_, cuda::find_gpu(*driver_, fake_cuda::uuid_of(1)).value()))
                  .value();
  }
  void TearDown() override {
    device_.reset();
    CudaFixture::TearDown();
  }

  [[nodiscard]] Result<std::unique_ptr<DeviceWindow>> open(uint32_t extents_min = 1) const {
    return DeviceWindow::open(
        *driver_,
        {.device = fake_cuda::uuid_of(1), .extent_bytes = kBytes, .extents_min = extents_min});
  }
  // A new extent of the daemon.
  int extent(uint32_t id) {
    EXPECT_TRUE(device_->create_extent(ExtentId(id), kBytes));
    return device_->export_fd(ExtentId(id)).value();
  }
  static uint8_t* host(cuda::DevicePointer address) { return reinterpret_cast<uint8_t*>(address); }

  std::unique_ptr<device::CudaDevice> device_;
};

TEST_F(DeviceWindowTest, AddressIsArithmeticOnThePageId) {
  const auto window = std::move(open()).value();
  EXPECT_EQ(window->extents(), limits::kExtentsMax);
  EXPECT_FALSE(window->mapped(ExtentId(5)));
  const int fd = extent(5);
  ASSERT_TRUE(window->map(ExtentId(5), fd, Access::kReadWrite));
  EXPECT_TRUE(window->mapped(ExtentId(5)));
  EXPECT_FALSE(window->mapped(ExtentId(4)));
  const PageId page(ExtentId(5), 3);
  const uint64_t expected =
      window->base() + uint64_t{page.raw() >> 20} * kBytes + uint64_t{page.raw() & 0xFFFFF} * 2304;
  EXPECT_EQ(window->address(page, 2304), expected);
  *host(expected) = 0x5C;
  EXPECT_EQ(HostView(fd, kBytes).data()[3 * 2304], 0x5C);
}

TEST_F(DeviceWindowTest, TwoWindowsSeeOneMemory) {
  const auto one = std::move(open()).value();
  const auto two = std::move(open()).value();
  const int fd = extent(0);
  ASSERT_TRUE(one->map(ExtentId(0), fd, Access::kReadWrite));
  ASSERT_TRUE(two->map(ExtentId(0), fd, Access::kRead));
  std::memset(host(one->base()), 7, kBytes);
  EXPECT_NE(one->base(), two->base());
  EXPECT_EQ(host(two->base())[kBytes - 1], 7);
}

TEST_F(DeviceWindowTest, NewMemoryReplacesTheOldAtTheSameAddress) {
  const auto window = std::move(open()).value();
  ASSERT_TRUE(window->map(ExtentId(2), extent(2), Access::kReadWrite));
  std::memset(host(window->address(ExtentId(2))), 0xAB, kBytes);
  device_->release_extent(ExtentId(2));
  ASSERT_TRUE(window->map(ExtentId(2), extent(2), Access::kReadWrite));
  EXPECT_EQ(host(window->address(ExtentId(2)))[0], 0);
  EXPECT_EQ(fake_cuda::held()->mappings, 1u);
  EXPECT_EQ(fake_cuda::held()->memories, 1u);  // the daemon's: the import is released at once
}

TEST_F(DeviceWindowTest, WritingThroughAReadOnlyMapFaults) {
  const auto window = std::move(open()).value();
  ASSERT_TRUE(window->map(ExtentId(0), extent(0), Access::kRead));
  uint8_t* const page = host(window->base());
  EXPECT_EQ(page[0], 0);
  EXPECT_DEATH(page[0] = 1, "");
  const cuda::ContextScope scope(window->gpu());
  EXPECT_EQ(driver_->memset_d8_async(window->base(), 1, 1, nullptr), cuda::kErrorIllegalAddress);
}

TEST_F(DeviceWindowTest, WhatCannotBeMappedIsAnErrorAndNothingIsMapped) {
  const auto window = std::move(open()).value();
  const auto before = fake_cuda::held();
  const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  for (const int fd : {-1, null.get()}) {
    const Status refused = window->map(ExtentId(0), fd, Access::kReadWrite);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::kDeviceFailed);
    EXPECT_NE(refused.error().os_error, 0);
  }
  const UniqueFd small = test::sealed_memfd(4096);
  EXPECT_FALSE(window->map(ExtentId(0), small.get(), Access::kReadWrite));
  EXPECT_EQ(window->map(ExtentId(limits::kExtentsMax), small.get(), Access::kRead).error().code,
            ErrorCode::kUnavailable);
  EXPECT_FALSE(window->mapped(ExtentId(0)));
  EXPECT_EQ(fake_cuda::held(), before);
}

TEST_F(DeviceWindowTest, AStepThatFailsLeavesNothingMapped) {
  const auto window = std::move(open()).value();
  const int fd = extent(0);
  const auto before = fake_cuda::held();
  for (const char* step :
       {"cuCtxPushCurrent_v2", "cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"}) {
    fail(step, 1, cuda::kErrorOutOfMemory);
    const Status refused = window->map(ExtentId(0), fd, Access::kReadWrite);
    stop_failing();
    ASSERT_FALSE(refused) << step;
    EXPECT_EQ(refused.error().code, ErrorCode::kExhausted) << step;
    EXPECT_EQ(fake_cuda::held(), before) << step;
    EXPECT_FALSE(window->mapped(ExtentId(0))) << step;
  }
  EXPECT_TRUE(window->map(ExtentId(0), fd, Access::kReadWrite));
}

TEST_F(DeviceWindowTest, FewerAddressesDoAsLongAsThePoolFits) {
  ::setenv("FAKE_CUDA_RESERVE_MAX", std::to_string(100 * kBytes).c_str(), 1);
  EXPECT_EQ((*open(1))->extents(), 64u);
  EXPECT_EQ((*open(100))->extents(), 100u);
  const auto refused = open(101);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kExhausted);
  EXPECT_NE(std::string(refused.error().what).find("101 extents"), std::string::npos);
  const auto window = std::move(open(1)).value();
  EXPECT_EQ(window->map(ExtentId(64), extent(64), Access::kReadWrite).error().code,
            ErrorCode::kUnavailable);
}

TEST_F(DeviceWindowTest, GpuThatIsNotHereOrSizesThatDoNotFit) {
  const auto absent = DeviceWindow::open(
      *driver_, {.device = fake_cuda::uuid_of(6), .extent_bytes = kBytes, .extents_min = 1});
  ASSERT_FALSE(absent);
  EXPECT_EQ(absent.error().code, ErrorCode::kUnsupported);
  EXPECT_NE(std::string(absent.error().what).find(device_uuid_text(fake_cuda::uuid_of(6))),
            std::string::npos);
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{4096}, uint64_t{2} << 30}) {
    const auto odd = DeviceWindow::open(
        *driver_, {.device = fake_cuda::uuid_of(1), .extent_bytes = bytes, .extents_min = 1});
    ASSERT_FALSE(odd);
    EXPECT_EQ(odd.error().code, ErrorCode::kInvalidArgument);
  }
}

TEST_F(DeviceWindowTest, ForkedChildLeavesTheDriverAlone) {
  auto window = std::move(open()).value();
  ASSERT_TRUE(window->map(ExtentId(0), extent(0), Access::kReadWrite));
  const auto before = fake_cuda::held();
  const pid_t child = ::fork();
  if (child == 0) {
    window.reset();
    ::_exit(fake_cuda::held() == before ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST_F(DeviceWindowTest, ExtentMapPutsExtentsIntoTheWindow) {
  const auto window = std::move(open()).value();
  ExtentMap map;
  map.expect(kBytes, window.get());
  protocol::Extent message = test::extent_message(0, kBytes);
  message.extent_id = 3;
  ASSERT_TRUE(map.add(message, extent(3)));
  const PageId page(ExtentId(3), 2);
  ASSERT_TRUE(map.holds(page, 0));
  EXPECT_EQ(reinterpret_cast<cuda::DevicePointer>(map.address(page)),
            window->address(page, message.page_bytes));
  EXPECT_FALSE(map.add(message, device_->export_fd(ExtentId(3)).value()));  // twice
  message.generation = 2;
  EXPECT_FALSE(map.add(message, -1));
  EXPECT_FALSE(map.mapped(ExtentId(3)));  // the old memory is gone already
  EXPECT_TRUE(map.add(message, device_->export_fd(ExtentId(3)).value()));
}

TEST_F(DeviceWindowTest, ExtentOfAnotherSizeThanAnnouncedIsRefused) {
  ExtentMap map;
  map.expect(kBytes, nullptr);
  const UniqueFd fd = test::sealed_memfd(2 * kBytes);
  const Status refused = map.add(test::extent_message(0, 2 * kBytes), fd.get());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kUnavailable);
  map.expect(2 * kBytes, nullptr);
  EXPECT_TRUE(map.add(test::extent_message(0, 2 * kBytes), fd.get()));
}

class CudaSession : public test::CudaFixture {};

TEST_F(CudaSession, OpensAWindowOnTheDaemonsGpu) {
  FakeDaemon daemon({.backend = "cuda", .device = fake_cuda::uuid_of(1), .extent_bytes = kBytes});
  const auto session = Session::open({.socket_path = daemon.path(), .client_name = "window"});
  ASSERT_TRUE(session) << session.error().what;
  const DeviceWindow* window = (*session)->device_window();
  ASSERT_NE(window, nullptr);
  EXPECT_EQ(window->gpu().info().uuid, fake_cuda::uuid_of(1));
  EXPECT_EQ(window->extent_bytes(), kBytes);
}

TEST_F(CudaSession, OnTheHostBackendThereIsNoWindow) {
  FakeDaemon daemon({});
  const auto session = Session::open({.socket_path = daemon.path(), .client_name = "window"});
  ASSERT_TRUE(session) << session.error().what;
  EXPECT_EQ((*session)->device_window(), nullptr);
  EXPECT_EQ(fake_cuda::held(), fake_cuda::Held{});
}

TEST_F(CudaSession, GpuThatThisProcessDoesNotSeeIsUnsupported) {
  FakeDaemon daemon({.backend = "cuda", .device = fake_cuda::uuid_of(4), .extent_bytes = kBytes});
  const auto session = Session::open({.socket_path = daemon.path(), .client_name = "window"});
  ASSERT_FALSE(session);
  EXPECT_EQ(session.error().code, ErrorCode::kUnsupported);
}

// What the fake driver says is current in this thread while it lives.
class CurrentGpu {
 public:
  CurrentGpu(const cuda::Driver& driver, int32_t device) : driver_(driver), device_(device) {
    cuda::ContextHandle context = nullptr;
    EXPECT_EQ(driver.primary_context_retain(&context, device), cuda::kSuccess);
    EXPECT_EQ(driver.context_push(context), cuda::kSuccess);
  }
  ~CurrentGpu() {
    cuda::ContextHandle context = nullptr;
    EXPECT_EQ(driver_.context_pop(&context), cuda::kSuccess);
    EXPECT_EQ(driver_.primary_context_release(device_), cuda::kSuccess);
  }
  CurrentGpu(const CurrentGpu&) = delete;
  CurrentGpu& operator=(const CurrentGpu&) = delete;

 private:
  const cuda::Driver& driver_;
  int32_t device_;
};

const std::vector<protocol::PoolEntry> kThreePools = {
    test::pool_entry("ram", {}), test::pool_entry("first", fake_cuda::uuid_of(0)),
    test::pool_entry("second", fake_cuda::uuid_of(1))};

TEST_F(CudaSession, WithoutANameThePoolOfTheCurrentGpuIsTaken) {
  for (const int32_t device : {1, 0}) {
    const CurrentGpu current(*driver_, device);
    FakeDaemon daemon({.backend = "cuda",
                       .device = fake_cuda::uuid_of(device),
                       .extent_bytes = kBytes,
                       .pools = kThreePools});
    const auto session = Session::open({.socket_path = daemon.path(), .client_name = "choice"});
    ASSERT_TRUE(session) << session.error().what;
    EXPECT_STREQ((*session)->pool(), device == 1 ? "second" : "first");
  }
}

TEST_F(CudaSession, WithoutAContextTheFirstGpuCounts) {
  FakeDaemon daemon({.backend = "cuda",
                     .device = fake_cuda::uuid_of(0),
                     .extent_bytes = kBytes,
                     .pools = kThreePools});
  const auto session = Session::open({.socket_path = daemon.path(), .client_name = "choice"});
  ASSERT_TRUE(session) << session.error().what;
  EXPECT_STREQ((*session)->pool(), "first");
}

TEST_F(CudaSession, ANameIsSentAsItIs) {
  const CurrentGpu current(*driver_, 1);
  FakeDaemon daemon({.pools = kThreePools});
  const auto session =
      Session::open({.socket_path = daemon.path(), .client_name = "choice", .pool = "ram"});
  ASSERT_TRUE(session) << session.error().what;
  EXPECT_STREQ((*session)->pool(), "ram");
}

struct BadChoice {
  test::FakeFaults faults;
  ErrorCode code;
  const char* words;
};

TEST_F(CudaSession, PoolsAmongWhichNoneCanBeChosen) {
  const CurrentGpu current(*driver_, 1);
  const std::vector<protocol::PoolEntry> hosts = {test::pool_entry("a", {}),
                                                  test::pool_entry("b", {})};
  const std::vector<protocol::PoolEntry> elsewhere = {
      test::pool_entry("first", fake_cuda::uuid_of(0)),
      test::pool_entry("third", fake_cuda::uuid_of(2))};
  const BadChoice choices[] = {
      {{.pools = hosts}, ErrorCode::kInvalidArgument, "several pools: name one"},
      {{.pools = hosts}, ErrorCode::kInvalidArgument, "THINKV_POOL): a, b"},
      {{.pools = elsewhere},
       ErrorCode::kInvalidArgument,
       "none on GPU-face0000-c0de-0000-0000-000000000002: name one"},
      {{.pools = hosts, .pools_count_more = 15}, ErrorCode::kUnavailable, "announced 17 pools"},
      {{.pools = kThreePools, .pools_always = true},
       ErrorCode::kUnavailable,
       "does not take the name of its pool 'second'"},
  };
  for (const BadChoice& choice : choices) {
    FakeDaemon daemon(choice.faults);
    const auto session = Session::open({.socket_path = daemon.path(), .client_name = "choice"});
    ASSERT_FALSE(session) << choice.words;
    EXPECT_EQ(session.error().code, choice.code) << session.error().what;
    EXPECT_NE(std::string(session.error().what).find(choice.words), std::string::npos)
        << session.error().what;
  }
}

TEST_F(CudaSession, ANameThatIsTooLongIsNotCut) {
  FakeDaemon daemon({});
  const auto session = Session::open(
      {.socket_path = daemon.path(), .client_name = "choice", .pool = std::string(64, 'x')});
  ASSERT_FALSE(session);
  EXPECT_EQ(session.error().code, ErrorCode::kInvalidArgument);
}

TEST_F(DeviceWindowTest, MemoryOfAnotherGpuCannotBeMappedByMistake) {
  const auto window = std::move(open()).value();
  const auto other =
      std::move(device::CudaDevice::open(*driver_,
                                         cuda::find_gpu(*driver_, fake_cuda::uuid_of(0)).value()))
          .value();
  ASSERT_TRUE(other->create_extent(ExtentId(0), kBytes));
  EXPECT_FALSE(window->map(ExtentId(0), other->export_fd(ExtentId(0)).value(), Access::kReadWrite));
  EXPECT_FALSE(window->mapped(ExtentId(0)));
  ASSERT_TRUE(device_->create_extent(ExtentId(0), kBytes));
  EXPECT_TRUE(
      window->map(ExtentId(0), device_->export_fd(ExtentId(0)).value(), Access::kReadWrite));
}

}  // namespace
}  // namespace thinkv::client
