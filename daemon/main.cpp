// thinkvd: parses arguments, loads the configuration, runs.
//
// Exit status: 0 after SIGTERM or SIGINT; 1 when the start failed or the loop broke; 2 for a bad
// configuration; CLI11's own codes for bad arguments.
#include <spdlog/spdlog.h>
#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "daemon/daemon.h"
#include "daemon/ops/log.h"
#include "thinkv/version.h"

namespace {

struct Arguments {
  thinkv::Overrides overrides;
  std::string log_level;
  bool check_config = false;
};

void describe(CLI::App* app, Arguments* arguments) {
  app->set_version_flag("--version", std::string("thinkvd ") + thinkv::kVersionText +
                                         ", protocol " + std::to_string(thinkv::kProtocolMajor) +
                                         "." + std::to_string(thinkv::kProtocolMinor));
  app->add_option("--config", arguments->overrides.config_file,
                  "configuration file; without it the defaults are used")
      ->envname("THINKV_CONFIG")
      ->type_name("FILE");
  app->add_option("--socket", arguments->overrides.socket_path,
                  "control socket, instead of socket.path")
      ->envname("THINKV_SOCKET")
      ->type_name("PATH");
  app->add_option("--log-level", arguments->log_level, "debug, info, warning or error")
      ->envname("THINKV_LOG_LEVEL")
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}))
      ->type_name("LEVEL");
  app->add_flag("--check-config", arguments->check_config,
                "check the configuration and its policies, then exit");
}

int run(const Arguments& arguments) {
  std::vector<std::string> problems;
  std::optional<thinkv::Settings> settings = thinkv::load_settings(arguments.overrides, &problems);
  for (const std::string& problem : problems) std::fprintf(stderr, "%s\n", problem.c_str());
  if (!settings) return 2;
  if (arguments.check_config) {
    const std::string& file = arguments.overrides.config_file;
    std::printf("%s: ok, %zu pools, %zu tenants, %zu policies\n",
                file.empty() ? "defaults" : file.c_str(), settings->config.pools.size(),
                settings->config.tenants.size(), settings->policies.policies.size());
    return 0;
  }
  thinkv::ops::start_log(settings->config.log_level);
  std::string why;
  auto daemon = thinkv::Daemon::create(arguments.overrides, std::move(*settings), &why);
  if (!daemon) {
    spdlog::error("cannot start: {}", why.empty() ? daemon.error().what : why);
    return 1;
  }
  return (*daemon)->run() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app("ThinKV daemon: owns the KV-cache memory that inference processes share.");
  describe(&app, &arguments);
  CLI11_PARSE(app, argc, argv);
  if (!arguments.log_level.empty()) {
    arguments.overrides.log_level = thinkv::ops::log_level_from_name(arguments.log_level);
  }
  try {
    return run(arguments);
  } catch (const std::exception& error) {  // out of memory, or a library's own failure
    std::fprintf(stderr, "thinkvd: %s\n", error.what());
    return 1;
  }
}
