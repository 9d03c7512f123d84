#include "client/gpu/engine.h"

#include <algorithm>
#include <cstring>

#include "client/error_text.h"

namespace thinkv::client {
namespace {

using Place = GpuMemory::Place;

// Free pages that the device's stack has room for; what waits there is not used.
constexpr uint64_t kStackPagesMax = uint64_t{1} << 22;
constexpr uint32_t kStagingPages = 1u << 20;
// Pages that stay on the stack when a sequence closes: the next one finds them there.
constexpr uint64_t kSpareLanes = 2;

}  // namespace

GpuEngine::GpuEngine(Session& session, const ModelGeometry& geometry, const KernelTable& kernels)
    : session_(&session),
      geometry_(geometry),
      kernels_(&kernels),
      window_(session.device_window()),
      source_(session.make_source(page_class(geometry.head_dim))) {}

Result<std::unique_ptr<GpuEngine>> GpuEngine::open(Session& session,
                                                   const ModelGeometry& geometry) {
  const KernelTable* kernels = kernel_table();
  if (kernels == nullptr) {
    return describe(ErrorCode::kUnsupported,
                    "thinkvd's pool is on a GPU and this libthinkv was built without CUDA: build "
                    "it with -DTHINKV_CUDA=ON, or use thinkvd with backend host");
  }
  std::unique_ptr<GpuEngine> engine(new GpuEngine(session, geometry, *kernels));
  THINKV_TRY(engine->make_memory());
  return engine;
}

Status GpuEngine::make_memory() {
  THINKV_ASSIGN_OR_RETURN(const PoolUse use, session_->pool_use());
  const uint64_t pages =
      std::min(use.pool_bytes / page_bytes(geometry_.head_dim) + 1, kStackPagesMax);
  const cuda::Gpu& gpu = window_->gpu();
  THINKV_ASSIGN_OR_RETURN(lease_, GpuMemory::make(gpu, Place::kDevice, 256, "the page lease"));
  THINKV_ASSIGN_OR_RETURN(
      stack_, GpuMemory::make(gpu, Place::kDevice, pages * sizeof(uint32_t), "the page lease"));
  THINKV_ASSIGN_OR_RETURN(staging_, GpuMemory::make(gpu, Place::kPinnedHost,
                                                    kStagingPages * sizeof(uint32_t), "page ids"));
  THINKV_ASSIGN_OR_RETURN(
      rank_memory_, GpuMemory::make(gpu, Place::kDevice, sizeof(cuda::RankMemory), "rank rules"));
  THINKV_ASSIGN_OR_RETURN(answer_,
                          GpuMemory::make(gpu, Place::kPinnedHost, kAnswerBytes, "answers"));
  const cuda::ContextScope context(gpu);
  THINKV_TRY(context.status());
  const cuda::Driver& driver = gpu.driver();
  cuda::Lease fresh{};
  fresh.capacity = static_cast<uint32_t>(pages);
  fresh.pages = stack_.as<uint32_t>();
  THINKV_TRY(cuda::driver_status(
      driver,
      driver.memcpy_to_device(reinterpret_cast<cuda::DevicePointer>(lease_.as<void>()), &fresh,
                              sizeof(fresh)),
      "cuMemcpyHtoD"));
  int32_t count = 0;
  THINKV_TRY(
      cuda::driver_status(driver,
                          driver.device_get_attribute(
                              &count, cuda::DeviceAttribute::kMultiprocessors, gpu.info().ordinal),
                          "cuDeviceGetAttribute"));
  multiprocessors_ = static_cast<uint32_t>(std::max(count, 1));
  return {};
}

// Sequences were closed before: what is left on the stack goes back.
GpuEngine::~GpuEngine() {
  static_cast<void>(settle());
  source_->settle();
}

cuda::BatchView GpuEngine::view() const {
  cuda::BatchView view{};
  view.pool = {window_->base(), window_->extent_bytes(), window_->extents()};
  view.geometry = geometry_;
  view.lease = lease_.as<cuda::Lease>();
  view.rank_memory = rank_memory_.as<cuda::RankMemory>();
  return view;
}

void GpuEngine::set_stream(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  stream_ = stream;
}

StreamHandle GpuEngine::stream() const {
  const std::lock_guard lock(mutex_);
  return stream_;
}

Status GpuEngine::refuse_capture(const char* what) const {
  const cuda::ContextScope context(gpu());
  THINKV_TRY(context.status());
  int32_t status = 0;
  const cuda::Driver& driver = gpu().driver();
  THINKV_TRY(cuda::driver_status(driver, driver.stream_is_capturing(stream_, &status),
                                 "cuStreamIsCapturing"));
  if (status == 0) return {};
  return describe(ErrorCode::kInvalidArgument,
                  "%s while the stream is being captured: a graph holds begin, append, attend and "
                  "end only",
                  what);
}

Status GpuEngine::check_pointer(const char* name, const void* data) const {
  constexpr int32_t kMemoryType = 2;  // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
  constexpr int32_t kOrdinal = 9;     // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
  constexpr uint32_t kDevice = 2;     // CU_MEMORYTYPE_DEVICE
  const cuda::Driver& driver = gpu().driver();
  const auto address = reinterpret_cast<cuda::DevicePointer>(data);
  uint32_t type = 0;
  cuda::DriverResult result = driver.pointer_get_attribute(&type, kMemoryType, address);
  if (result != cuda::kSuccess || type != kDevice) {
    return describe(ErrorCode::kInvalidArgument,
                    "%s is not in GPU memory, and the pool is on a GPU (backend cuda)", name);
  }
  cuda::DeviceOrdinal ordinal = 0;
  result = driver.pointer_get_attribute(&ordinal, kOrdinal, address);
  if (result == cuda::kSuccess && ordinal == gpu().info().ordinal) return {};
  return describe(ErrorCode::kInvalidArgument,
                  "%s is on GPU %d of this process, and the pool '%s' is on GPU %d", name, ordinal,
                  session_->pool(), gpu().info().ordinal);
}

Status GpuEngine::launched(int code, const char* kernel) {
  if (code == 0) return {};
  Error error =
      describe(ErrorCode::kDeviceFailed, "the launch of %s failed: CUDA error %d", kernel, code);
  error.os_error = code;
  return error;
}

uint64_t GpuEngine::level() const {
  const uint64_t used_at_most = used_ + (promised_ - used_at_);
  return refilled_ > used_at_most ? refilled_ - used_at_most : 0;
}

void GpuEngine::report(uint64_t used_total, uint64_t promised) {
  const std::lock_guard lock(mutex_);
  if (promised < used_at_) return;  // an older step of another batch
  used_ = used_total;
  used_at_ = promised;
}

Status GpuEngine::promise(uint64_t pages) {
  const std::lock_guard lock(mutex_);
  if (pages > level()) {
    THINKV_TRY(refuse_capture("pages cannot be reserved"));
    if (const Status filled = refill(pages - level()); !filled) {
      // What the bound calls used may be free: look before giving up.
      const ErrorCode code = filled.error().code;
      if (code != ErrorCode::kExhausted && code != ErrorCode::kQuotaExceeded) return filled;
      cuda::Lease lease{};
      THINKV_TRY(synchronise());
      THINKV_TRY(read_lease(&lease));
      report(lease.used_total, promised_);
      if (pages > level()) THINKV_TRY(refill(pages - level()));
    }
  }
  promised_ += pages;
  return {};
}

Status GpuEngine::make_rank_memory(const cuda::RankNeed& need) {
  const std::lock_guard lock(mutex_);
  const cuda::RankNeed all = rank_need_.and_of(need);
  if (all == rank_need_) return {};
  THINKV_TRY(refuse_capture("working memory cannot grow"));
  const cuda::RankMemoryShape shape = kernels_->rank_memory_shape(all, multiprocessors_);
  THINKV_ASSIGN_OR_RETURN(GpuMemory rows, GpuMemory::make(gpu(), Place::kDevice, shape.bytes,
                                                          "the work of rank rules"));
  THINKV_TRY(synchronise());  // nobody uses the old rows any more
  const cuda::ContextScope context(gpu());
  THINKV_TRY(context.status());
  const cuda::RankMemory memory{rows.as<unsigned char>(), shape.room, shape.dims, shape.blocks};
  const cuda::Driver& driver = gpu().driver();
  THINKV_TRY(cuda::driver_status(
      driver,
      driver.memcpy_to_device(reinterpret_cast<cuda::DevicePointer>(rank_memory_.as<void>()),
                              &memory, sizeof(memory)),
      "cuMemcpyHtoD"));
  rank_rows_ = std::move(rows);
  rank_need_ = {std::max<uint64_t>(all.tokens, shape.room - 1), all.dims};
  return {};
}

void GpuEngine::take_back(uint64_t pages) {
  const std::lock_guard lock(mutex_);
  promised_ -= pages;
  used_at_ = std::min(used_at_, promised_);
}

Status GpuEngine::release(uint64_t pages) {
  const std::lock_guard lock(mutex_);
  THINKV_TRY(refuse_capture("pages cannot go back"));
  THINKV_TRY(synchronise());
  staged_ = 0;
  return drain(std::min(pages, level()));
}

Status GpuEngine::refill(uint64_t pages) {
  if (pages > kStackPagesMax) {
    return describe(ErrorCode::kExhausted, "a step would need %llu pages at once",
                    static_cast<unsigned long long>(pages));
  }
  // A little more than now: asking again costs a launch.
  const uint64_t spare = std::max<uint64_t>(geometry_.lanes(), pages / 8);
  auto wanted = static_cast<uint32_t>(std::min(pages + spare, kStackPagesMax));
  if (!source_->reserve(wanted)) {
    wanted = static_cast<uint32_t>(pages);
    THINKV_TRY(source_->reserve(wanted));
  }
  for (uint32_t done = 0; done < wanted;) {
    const uint32_t count = std::min(wanted - done, kStagingPages / 2);
    THINKV_TRY(enqueue_refill(count));
    done += count;
  }
  source_->settle();
  return {};
}

Status GpuEngine::enqueue_refill(uint32_t count) {
  const cuda::ContextScope context(gpu());
  THINKV_TRY(context.status());
  if (staged_ + count > kStagingPages) {
    THINKV_TRY(synchronise());
    staged_ = 0;
  }
  uint32_t* ids = staging_.as<uint32_t>() + staged_;
  for (uint32_t i = 0; i < count; ++i) ids[i] = source_->take().raw();
  THINKV_TRY(launched(kernels_->refill(lease_.as<cuda::Lease>(), ids, count, stream_), "refill"));
  staged_ += count;
  refilled_ += count;
  return {};
}

Status GpuEngine::read_lease(cuda::Lease* lease) const {
  const cuda::ContextScope context(gpu());
  THINKV_TRY(context.status());
  const cuda::Driver& driver = gpu().driver();
  return cuda::driver_status(
      driver,
      driver.memcpy_to_host(lease, reinterpret_cast<cuda::DevicePointer>(lease_.as<void>()),
                            sizeof(*lease)),
      "cuMemcpyDtoH");
}

Status GpuEngine::synchronise() const {
  const cuda::ContextScope context(gpu());
  THINKV_TRY(context.status());
  const cuda::Driver& driver = gpu().driver();
  return cuda::driver_status(driver, driver.stream_synchronize(stream_), "cuStreamSynchronize");
}

Status GpuEngine::settle() {
  const std::lock_guard lock(mutex_);
  THINKV_TRY(refuse_capture("pages cannot go back"));
  THINKV_TRY(synchronise());
  staged_ = 0;
  cuda::Lease lease{};
  THINKV_TRY(read_lease(&lease));
  report(lease.used_total, promised_);
  const uint64_t keep = used_ == 0 ? 0 : kSpareLanes * geometry_.lanes();
  if (lease.count > keep) THINKV_TRY(drain(lease.count - keep));
  return {};
}

Status GpuEngine::drain(uint64_t pages) {
  const cuda::ContextScope context(gpu());
  THINKV_TRY(context.status());
  uint32_t* out = staging_.as<uint32_t>();
  while (pages > 0) {
    const auto count = static_cast<uint32_t>(std::min<uint64_t>(pages, kStagingPages - 1));
    THINKV_TRY(launched(kernels_->drain(lease_.as<cuda::Lease>(), out, count, stream_), "drain"));
    THINKV_TRY(synchronise());
    const uint32_t got = std::min(out[0], count);
    for (uint32_t i = 0; i < got; ++i) source_->give_back(PageId(out[1 + i]));
    source_->settle();
    refilled_ -= got;
    if (got < count) return {};
    pages -= got;
  }
  return {};
}

Result<PageId> GpuEngine::take_root() {
  const std::lock_guard lock(mutex_);
  THINKV_TRY(source_->reserve(1));
  const PageId root = source_->take();
  source_->settle();
  // The open kernel counts it as used, the close gives it to the stack.
  refilled_ += 1;
  promised_ += 1;
  return root;
}

void GpuEngine::give_root(PageId root) {
  const std::lock_guard lock(mutex_);
  refilled_ -= 1;
  source_->give_back(root);
  source_->settle();
}

}  // namespace thinkv::client
