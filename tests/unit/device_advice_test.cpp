// What the daemon says of a GPU at its start, and how it reads the facts.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "daemon/device/cuda/advice.h"
#include "daemon/device/cuda/facts.h"

namespace thinkv::device {
namespace {

GpuFacts good() {
  return {.gpu = "GPU X", .mps_pipe = "", .persistence_mode = true};
}

bool mentions(const Advice& advice, const char* words) {
  return advice.text.find(words) != std::string::npos;
}

TEST(GpuAdvice, NothingToSayOfAGoodMachine) {
  EXPECT_TRUE(advise(good()).empty());
  GpuFacts unknown = good();
  unknown.persistence_mode = std::nullopt;
  EXPECT_TRUE(advise(unknown).empty());
}

TEST(GpuAdvice, MpsIsAWarningThatSaysWhyAndHow) {
  GpuFacts facts = good();
  facts.mps_pipe = "/tmp/nvidia-mps/control";
  const std::vector<Advice> advice = advise(facts);
  ASSERT_EQ(advice.size(), 1u);
  EXPECT_EQ(advice[0].severity, Severity::kWarning);
  EXPECT_TRUE(mentions(advice[0], "/tmp/nvidia-mps/control"));
  EXPECT_TRUE(mentions(advice[0], "CUDA_MPS_PIPE_DIRECTORY"));
  EXPECT_EQ(advice[0].text.find('\n'), std::string::npos);
}

TEST(GpuAdvice, PersistenceOffIsAWarning) {
  GpuFacts facts = good();
  facts.persistence_mode = false;
  const std::vector<Advice> advice = advise(facts);
  ASSERT_EQ(advice.size(), 1u);
  EXPECT_EQ(advice[0].severity, Severity::kWarning);
  EXPECT_TRUE(mentions(advice[0], "nvidia-persistenced"));
}

TEST(GpuAdvice, ModesThatKeepEnginesOutAreErrors) {
  for (const auto& [mode, word] :
       {std::pair{cuda::ComputeMode::kExclusiveProcess, "EXCLUSIVE_PROCESS"},
        std::pair{cuda::ComputeMode::kProhibited, "PROHIBITED"}}) {
    GpuFacts facts = good();
    facts.compute_mode = mode;
    const std::vector<Advice> advice = advise(facts);
    ASSERT_EQ(advice.size(), 1u);
    EXPECT_EQ(advice[0].severity, Severity::kError);
    EXPECT_TRUE(mentions(advice[0], word));
    EXPECT_TRUE(mentions(advice[0], "nvidia-smi"));
  }
}

TEST(GpuAdvice, MemoryThatIsNotThereIsAnErrorWithBothNumbers) {
  constexpr uint64_t kMib = uint64_t{1} << 20;
  EXPECT_FALSE(advise_memory({.total_bytes = 64 * kMib, .available_bytes = 32 * kMib}, 32 * kMib));
  const auto busy =
      advise_memory({.total_bytes = 64 * kMib, .available_bytes = 32 * kMib}, 33 * kMib);
  ASSERT_TRUE(busy);
  EXPECT_EQ(busy->severity, Severity::kError);
  EXPECT_TRUE(mentions(*busy, "33 MiB"));
  EXPECT_TRUE(mentions(*busy, "32 MiB free of 64 MiB"));
  EXPECT_TRUE(mentions(*busy, "nvidia-smi"));
  const auto never =
      advise_memory({.total_bytes = 64 * kMib, .available_bytes = 64 * kMib}, 65 * kMib);
  ASSERT_TRUE(never);
  EXPECT_FALSE(mentions(*never, "nvidia-smi"));
}

TEST(GpuFacts, MpsIsFoundByItsPipeInTheFolderThatCudaWouldUse) {
  char folder[] = "/tmp/thinkv-mps-XXXXXX";
  ASSERT_NE(::mkdtemp(folder), nullptr);
  const std::string pipe = std::string(folder) + "/control";
  EXPECT_EQ(find_mps_pipe(folder), "");
  std::ofstream(pipe).put('x');
  EXPECT_EQ(find_mps_pipe(folder), pipe);
  EXPECT_EQ(find_mps_pipe((std::string(folder) + "/no").c_str()), "");
  EXPECT_EQ(find_mps_pipe(""), find_mps_pipe(nullptr));
  std::filesystem::remove_all(folder);
}

TEST(GpuFacts, PersistenceModeIsWhatNvmlSays) {
  DeviceUuid gpu;
  gpu.bytes[0] = 1;
  ::setenv("FAKE_NVML_PERSISTENCE", "0", 1);
  EXPECT_EQ(read_persistence_mode("libnvidia-ml.so.1", gpu), std::optional<bool>(false));
  ::setenv("FAKE_NVML_PERSISTENCE", "1", 1);
  EXPECT_EQ(read_persistence_mode("libnvidia-ml.so.1", gpu), std::optional<bool>(true));
  ::setenv("FAKE_NVML_FAIL", "1", 1);
  EXPECT_EQ(read_persistence_mode("libnvidia-ml.so.1", gpu), std::nullopt);
  ::unsetenv("FAKE_NVML_FAIL");
  ::unsetenv("FAKE_NVML_PERSISTENCE");
  EXPECT_EQ(read_persistence_mode("libno-such-library.so.1", gpu), std::nullopt);
  EXPECT_EQ(read_persistence_mode("libc.so.6", gpu), std::nullopt);
}

}  // namespace
}  // namespace thinkv::device
