// The device backend and its import on a real driver: several processes, one GPU's memory.
//
//   device_gpu [EXTENT_MIB]        exit status 0: all checks passed; 77: no driver or no GPU here
//
// Other first arguments are the roles of the processes that it starts: `owner` is the daemon's side
// (CudaDevice), `peer` and `reader` are further clients (DeviceWindow).
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/device_window.h"
#include "daemon/device/cuda/cuda_device.h"
#include "tests/gpu/device_process.h"
#include "tests/gpu/device_times.h"

namespace {

using thinkv::ExtentId;
using thinkv::Result;
using thinkv::Status;
using thinkv::UniqueFd;
using thinkv::client::Access;
using thinkv::client::DeviceWindow;
using thinkv::device::CudaDevice;
using thinkv::gpu_test::now_ns;
using thinkv::gpu_test::Packet;
using thinkv::gpu_test::Process;
namespace cuda = thinkv::cuda;

constexpr int kSkipped = 77;
constexpr unsigned kSecondsMax = 240;  // of any of the processes
constexpr uint32_t kRecycled = 16;     // extents that are written, given up and made again

int failures = 0;

void check(bool good, const char* what) {
  std::printf("%s %s\n", good ? "ok  " : "FAIL", what);
  std::fflush(stdout);
  if (!good) ++failures;
}

bool good(const Status& status, const char* what) {
  if (!status) std::printf("FAIL %s: %s\n", what, status.error().what);
  if (!status) ++failures;
  return status.has_value();
}

// ---- device memory, through a window ----

Status fill(const DeviceWindow& window, ExtentId extent, uint8_t value) {
  const cuda::Driver& driver = window.gpu().driver();
  const cuda::ContextScope scope(window.gpu());
  THINKV_TRY(scope.status());
  THINKV_TRY(cuda::driver_status(
      driver, driver.memset_d8_async(window.address(extent), value, window.extent_bytes(), nullptr),
      "cuMemsetD8Async"));
  return cuda::driver_status(driver, driver.stream_synchronize(nullptr), "cuStreamSynchronize");
}

bool holds(const DeviceWindow& window, ExtentId extent, uint8_t value) {
  const cuda::Driver& driver = window.gpu().driver();
  const cuda::ContextScope scope(window.gpu());
  std::vector<uint8_t> bytes(window.extent_bytes(), static_cast<uint8_t>(~value));
  if (!scope.status() ||
      driver.memcpy_to_host(bytes.data(), window.address(extent), bytes.size()) != cuda::kSuccess) {
    return false;
  }
  for (const uint8_t byte : bytes) {
    if (byte != value) return false;
  }
  return true;
}

Result<std::unique_ptr<DeviceWindow>> open_window(uint64_t extent_bytes) {
  THINKV_ASSIGN_OR_RETURN(const cuda::Driver* driver, cuda::Driver::load());
  THINKV_ASSIGN_OR_RETURN(const cuda::GpuInfo gpu, cuda::find_gpu(*driver, std::nullopt));
  return DeviceWindow::open(
      *driver, {.device = gpu.uuid, .extent_bytes = extent_bytes, .extents_min = kRecycled});
}

// ---- role: owner ----

Packet answer(CudaDevice& device, const Packet& command, uint64_t extent_bytes, UniqueFd* fd) {
  Packet reply = command;
  const ExtentId extent(command.extent);
  if (command.what == 'r') {
    device.release_extent(extent);
    return reply;
  }
  const uint64_t start = now_ns();
  const Status made = device.create_extent(extent, extent_bytes);
  reply.nanoseconds = now_ns() - start;
  if (!made) {
    reply.error = static_cast<int32_t>(made.error().code);
    std::snprintf(reply.text, sizeof(reply.text), "%s", made.error().what);
    return reply;
  }
  *fd = UniqueFd(::fcntl(device.export_fd(extent).value(), F_DUPFD_CLOEXEC, 0));
  return reply;
}

int run_owner(uint64_t extent_bytes, int socket) {
  const Result<const cuda::Driver*> driver = cuda::Driver::load();
  if (!driver) return 1;
  const Result<cuda::GpuInfo> gpu = cuda::find_gpu(**driver, std::nullopt);
  if (!gpu) return 1;
  Result<std::unique_ptr<CudaDevice>> device = CudaDevice::open(**driver, *gpu);
  if (!device) return 1;
  for (;;) {
    Packet command;
    UniqueFd none;
    if (!thinkv::gpu_test::receive_packet(socket, &command, &none)) return 0;
    UniqueFd fd;
    const Packet reply = answer(**device, command, extent_bytes, &fd);
    if (!thinkv::gpu_test::send_packet(socket, reply, fd.get())) return 1;
  }
}

class Owner {
 public:
  explicit Owner(uint64_t extent_bytes) {
    int pair[2] = {-1, -1};
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) std::abort();
    mine_ = UniqueFd(pair[0]);
    const UniqueFd theirs(pair[1]);
    process_.emplace(std::vector<std::string>{"owner", std::to_string(extent_bytes)}, theirs.get());
  }
  // The descriptor of a new extent; not valid, and a failure noted, where there is none.
  UniqueFd create(uint32_t extent) {
    Packet command;
    command.what = 'c';
    command.extent = extent;
    Packet reply;
    UniqueFd fd;
    const bool served = thinkv::gpu_test::send_packet(mine_.get(), command) &&
                        thinkv::gpu_test::receive_packet(mine_.get(), &reply, &fd);
    if (!served || !fd.valid()) check(false, served ? reply.text : "the owner answers");
    create_ns_ += reply.nanoseconds;
    ++created_;
    return fd;
  }
  void release(uint32_t extent) {
    Packet command;
    command.what = 'r';
    command.extent = extent;
    Packet reply;
    UniqueFd none;
    if (!thinkv::gpu_test::send_packet(mine_.get(), command) ||
        !thinkv::gpu_test::receive_packet(mine_.get(), &reply, &none)) {
      check(false, "the owner releases an extent");
    }
  }
  void kill() { process_->kill(); }
  [[nodiscard]] double create_us() const {
    return static_cast<double>(create_ns_) / 1e3 / (created_ == 0 ? 1 : created_);
  }

 private:
  UniqueFd mine_;
  std::optional<Process> process_;
  uint64_t create_ns_ = 0;
  uint32_t created_ = 0;
};

// ---- roles: peer (reads 0x11, writes 0x22), reader (reads 0x22, must not be able to write) ----

int run_client(bool may_write, uint64_t extent_bytes, int fd) {
  const Result<std::unique_ptr<DeviceWindow>> window = open_window(extent_bytes);
  if (!window) return 2;
  const ExtentId extent(9);  // an id of its own: the address is this process's affair
  if (!(*window)->map(extent, fd, may_write ? Access::kReadWrite : Access::kRead)) return 3;
  if (!holds(**window, extent, may_write ? 0x11 : 0x22)) return 4;
  const Status written = fill(**window, extent, may_write ? 0x22 : 0x33);
  if (!written) std::printf("     the write ends in: %s\n", written.error().what);
  std::fflush(stdout);
  // After a fault the context is dead: no destructor can do anything for it.
  ::_exit(written.has_value() == may_write ? 0 : 5);
}

int run_other(const char* role, uint64_t extent_bytes, int fd) {
  Process process({role, std::to_string(extent_bytes)}, fd);
  return process.wait();
}

// ---- the checks ----

void check_sharing(DeviceWindow& window, int fd) {
  const ExtentId extent(0);
  const uint64_t bytes = window.extent_bytes();
  if (!good(window.map(extent, fd, Access::kReadWrite), "map an extent of another process")) return;
  check(holds(window, extent, 0), "a new extent reads as zeros");
  if (!good(fill(window, extent, 0x11), "fill it")) return;
  check(run_other("peer", bytes, fd) == 0, "a second client reads it and writes it");
  check(holds(window, extent, 0x22), "the first client sees what the second wrote");
  check(run_other("reader", bytes, fd) == 0, "a write through a read-only mapping faults");
  check(holds(window, extent, 0x22), "and changes nothing, and hurts nobody else");
}

// The id comes again with other memory, while somebody still holds the old.
void check_generation(DeviceWindow& window, Owner& owner, int old_fd) {
  owner.release(0);
  const UniqueFd fd = owner.create(0);
  if (!good(window.map(ExtentId(0), fd.get(), Access::kReadWrite), "map its successor")) return;
  check(holds(window, ExtentId(0), 0), "the successor of an extent reads as zeros");
  if (!good(window.map(ExtentId(7), old_fd, Access::kReadWrite), "map the old memory")) return;
  check(holds(window, ExtentId(7), 0x22), "the old memory lives with its descriptor");
}

// Memory that one tenant wrote and gave up comes back as zeros. Every hold on it is dropped in
// between, so the driver is free to hand out the same bytes.
void check_recycling(uint64_t extent_bytes, Owner& owner) {
  for (const bool second : {false, true}) {
    Result<std::unique_ptr<DeviceWindow>> window = open_window(extent_bytes);
    if (!window) return check(false, window.error().what);
    bool zeros = true;
    for (uint32_t i = 1; i <= kRecycled; ++i) {
      const UniqueFd fd = owner.create(i);
      if (!good((*window)->map(ExtentId(i), fd.get(), Access::kReadWrite), "map")) return;
      zeros = zeros && holds(**window, ExtentId(i), 0);
      if (!good(fill(**window, ExtentId(i), 0x5A), "fill")) return;
    }
    check(zeros, second ? "recycled extents read as zeros" : "many new extents read as zeros");
    for (uint32_t i = 1; i <= kRecycled; ++i) owner.release(i);
  }
}

void check_survival(std::unique_ptr<DeviceWindow> window, Owner& owner, int fd) {
  const uint64_t bytes = window->extent_bytes();
  owner.kill();
  check(holds(*window, ExtentId(7), 0x22), "mapped memory survives SIGKILL of its owner");
  window.reset();  // now the descriptor is the only hold
  Result<std::unique_ptr<DeviceWindow>> again = open_window(bytes);
  if (!again) return check(false, again.error().what);
  if (!good((*again)->map(ExtentId(0), fd, Access::kReadWrite), "import it again")) return;
  check(holds(**again, ExtentId(0), 0x22), "memory survives its owner by the descriptor alone");
}

int run_all(uint64_t extent_bytes) {
  const Result<const cuda::Driver*> driver = cuda::Driver::load();
  if (!driver) {
    std::printf("no GPU to test: %s\n", driver.error().what);
    return driver.error().code == thinkv::ErrorCode::kUnsupported ? kSkipped : 1;
  }
  const uint64_t start = now_ns();
  Result<std::unique_ptr<DeviceWindow>> window = open_window(extent_bytes);
  if (!window) {
    std::printf("FAIL no window: %s\n", window.error().what);
    return 1;
  }
  std::printf("window of %u extents at 0x%llx, with the context %.1f ms\n", (*window)->extents(),
              static_cast<unsigned long long>((*window)->base()),
              static_cast<double>(now_ns() - start) / 1e6);
  Owner owner(extent_bytes);
  const UniqueFd fd = owner.create(0);
  check_sharing(**window, fd.get());
  check_generation(**window, owner, fd.get());
  check_recycling(extent_bytes, owner);
  good(thinkv::gpu_test::print_times(extent_bytes), "measure");
  std::printf("  CudaDevice::create_extent, all of it: %.1f\n", owner.create_us());
  check_survival(std::move(*window), owner, fd.get());
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

uint64_t number(const char* text) {
  return std::strtoull(text, nullptr, 10);
}

}  // namespace

int main(int argc, char** argv) {
  ::alarm(kSecondsMax);  // a driver that hangs must not hang the test
  if (argc <= 2) return run_all((argc == 2 ? number(argv[1]) : 64) << 20);
  if (argc != 4) return 2;
  const std::string role = argv[1];
  const int fd = static_cast<int>(number(argv[3]));
  if (role == "owner") return run_owner(number(argv[2]), fd);
  if (role == "peer" || role == "reader") return run_client(role == "peer", number(argv[2]), fd);
  return 2;
}
