// thinkv.hpp: ownership and errors; with a daemon where THINKV_BIN_DIR has one.
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "thinkv/thinkv.hpp"

namespace thinkv::api {
namespace {

static_assert(!std::is_copy_constructible_v<Client> && std::is_move_constructible_v<Client>);
static_assert(!std::is_copy_constructible_v<Step> && std::is_move_assignable_v<Sequence>);

// A thinkvd of its own in a private folder.
struct HppTest : testing::Test {
  void SetUp() override {
    const char* bin = std::getenv("THINKV_BIN_DIR");
    const char* source = std::getenv("THINKV_SOURCE_DIR");
    ASSERT_TRUE(bin != nullptr && source != nullptr) << "run by ctest";
    char pattern[] = "/tmp/thinkv-hpp-XXXXXX";
    folder = ::mkdtemp(pattern);
    socket = folder + "/s";
    const std::string config = folder + "/thinkvd.yaml";
    std::ofstream(config) << "pool: {bytes: 16MiB, extent_bytes: 2MiB}\nmetrics: {port: off}\n"
                          << "policies: {directories: [" << source << "/config/policies]}\n";
    const std::string program = std::string(bin) + "/thinkvd";
    std::vector<std::string> words = {program, "--config", config, "--socket", socket};
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    ASSERT_EQ(::posix_spawn(&daemon, program.c_str(), nullptr, nullptr, arguments.data(), environ),
              0);
    for (int i = 0; i < 1000 && !std::filesystem::exists(socket); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    options.socket_path = socket.c_str();
    shape.layers = 1;
    shape.q_heads = 2;
    shape.kv_heads = 1;
    shape.head_dim = 64;
  }
  void TearDown() override {
    if (daemon > 0) {
      ::kill(daemon, SIGTERM);
      ::waitpid(daemon, nullptr, 0);
    }
    if (!folder.empty()) std::filesystem::remove_all(folder);
  }

  Status decode_one(Model& model, Sequence& sequence) {
    const Sequence* batch[] = {&sequence};
    THINKV_ASSIGN_OR_RETURN(Step step, model.step(batch));
    THINKV_TRY(
        step.append(0, tensor(values.data(), {1, 1, 64}), tensor(values.data(), {1, 1, 64})));
    THINKV_TRY(step.attend(0, tensor(values.data(), {1, 2, 64}), output(out.data(), {1, 2, 64})));
    return step.end();
  }

  std::string folder, socket;
  pid_t daemon = 0;
  thinkv_client_options options = THINKV_CLIENT_OPTIONS_INIT;
  thinkv_model_options shape = THINKV_MODEL_OPTIONS_INIT;
  std::vector<float> values = std::vector<float>(128, 1.0f);
  std::vector<float> out = std::vector<float>(128);
};

TEST_F(HppTest, DecodesAndReportsThroughResults) {
  Result<Client> client = Client::open(options);
  ASSERT_TRUE(client) << last_error_text();
  Result<Model> model = client->model(shape);
  ASSERT_TRUE(model) << last_error_text();
  Result<Sequence> sequence = model->sequence("full-f16");
  ASSERT_TRUE(sequence) << last_error_text();
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(decode_one(*model, *sequence)) << last_error_text();
  EXPECT_NEAR(out[0], 1.0f, 1e-3f);
  EXPECT_EQ(sequence->stats()->tokens, 20u);
  EXPECT_TRUE(client->ping());
  EXPECT_GT(client->pool_stats()->client_granted_bytes, 0u);
  EXPECT_EQ(client->status_json()->front(), '{');
}

TEST_F(HppTest, HintsOfThePromptReachTheRules) {
  Result<Client> client = Client::open(options);
  ASSERT_TRUE(client) << last_error_text();
  Result<Model> model = client->model(shape);
  ASSERT_TRUE(model) << last_error_text();
  Result<Sequence> sequence = model->sequence("snapkv", 33);
  ASSERT_TRUE(sequence) << last_error_text();
  const std::vector<float> rows(size_t{40} * 2 * 64, 1.0f);
  const uint8_t classes[] = {1, 0, 2};
  ASSERT_TRUE(sequence->token_classes(0, classes)) << last_error_text();
  const thinkv_tensor k = tensor(rows.data(), {40, 1, 64});
  ASSERT_FALSE(sequence->prefill_queries(0, tensor(rows.data(), {32, 2, 64})));
  EXPECT_NE(std::string(last_error_text()).find("prefill"), std::string::npos);
  ASSERT_TRUE(sequence->prefill(0, k, k)) << last_error_text();
  ASSERT_TRUE(sequence->prefill_queries(0, tensor(rows.data(), {32, 2, 64}))) << last_error_text();
  ASSERT_TRUE(sequence->prefill_end()) << last_error_text();
  EXPECT_EQ(sequence->stats()->live_slots, 33u);
}

TEST_F(HppTest, StepDroppedWithoutEndIsCancelled) {
  Result<Client> client = Client::open(options);
  ASSERT_TRUE(client) << last_error_text();
  Result<Model> model = client->model(shape);
  Result<Sequence> sequence = model->sequence("full-f16");
  ASSERT_TRUE(sequence) << last_error_text();
  {
    const Sequence* batch[] = {&*sequence};
    Result<Step> step = model->step(batch);
    ASSERT_TRUE(step);
  }
  EXPECT_EQ(sequence->stats()->tokens, 0u);
  EXPECT_TRUE(decode_one(*model, *sequence));
}

TEST_F(HppTest, ErrorsCarryCodeAndWords) {
  Result<Client> client = Client::open(options);
  ASSERT_TRUE(client) << last_error_text();
  thinkv_model_options bad = shape;
  bad.head_dim = 80;
  const Result<Model> refused = client->model(bad);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported);
  EXPECT_NE(std::string(last_error_text()).find("head_dim 80"), std::string::npos);
  Result<Model> model = client->model(shape);
  ASSERT_TRUE(model);
  client->close();
  const Result<Sequence> late = model->sequence();
  ASSERT_FALSE(late);
  EXPECT_EQ(late.error().code, ErrorCode::kStale);
}

TEST(Hpp, AbsentDaemonIsUnavailable) {
  thinkv_client_options options = THINKV_CLIENT_OPTIONS_INIT;
  options.socket_path = "/nonexistent/control.sock";
  const Result<Client> client = Client::open(options);
  ASSERT_FALSE(client);
  EXPECT_EQ(client.error().code, ErrorCode::kUnavailable);
}

}  // namespace
}  // namespace thinkv::api
