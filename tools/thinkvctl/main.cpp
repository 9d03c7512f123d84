// thinkvctl: what a running thinkvd holds, for a person or a program.
//
// Exit status: 0; 1 for an error; 3 when no daemon answers.
#include <unistd.h>
#include <CLI/CLI.hpp>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "thinkv/version.h"
#include "tools/thinkvctl/status_client.h"
#include "tools/thinkvctl/views.h"

namespace {

constexpr int kExitError = 1;
constexpr int kExitUnavailable = 3;

struct Arguments {
  std::string socket;
  bool json = false;
  double interval_s = 1.0;
  bool once = false;
};

// Prints one fetch with `show`; the exit status.
template <class Show>
int with_status(const Arguments& arguments, Show show) {
  std::string why;
  const auto text = thinkv::ctl::fetch_status(arguments.socket, &why);
  if (!text) {
    std::fprintf(stderr, "thinkvctl: %s\n", why.c_str());
    return text.error().code == thinkv::ErrorCode::kUnavailable ? kExitUnavailable : kExitError;
  }
  const auto status = nlohmann::json::parse(*text, nullptr, false);
  if (status.is_discarded()) {
    std::fprintf(stderr, "thinkvctl: thinkvd sent a status that is not JSON\n");
    return kExitError;
  }
  const std::string shown = show(*text, status);
  const bool written = std::fwrite(shown.data(), 1, shown.size(), stdout) == shown.size();
  return written && std::fflush(stdout) == 0 ? 0 : kExitError;
}

int status(const Arguments& arguments) {
  return with_status(arguments, [&](const std::string& text, const nlohmann::json& parsed) {
    return arguments.json ? text + "\n" : thinkv::ctl::status_view(parsed);
  });
}

int policies(const Arguments& arguments) {
  return with_status(arguments, [&](const std::string&, const nlohmann::json& parsed) {
    return arguments.json ? parsed.value("policies", nlohmann::json::array()).dump(2) + "\n"
                          : thinkv::ctl::policies_view(parsed);
  });
}

int top(const Arguments& arguments) {
  const bool terminal = ::isatty(STDOUT_FILENO) == 1;
  const char* no_color = std::getenv("NO_COLOR");
  const bool color = terminal && (no_color == nullptr || no_color[0] == '\0');
  for (;;) {
    const int code = with_status(arguments, [&](const std::string&, const nlohmann::json& parsed) {
      // Home, then clear to the end: less flicker than clearing first.
      return (terminal && !arguments.once ? "\x1b[H\x1b[J" : "") +
             thinkv::ctl::top_view(parsed, color);
    });
    if (code != 0 || arguments.once) return code;
    std::this_thread::sleep_for(std::chrono::duration<double>(arguments.interval_s));
  }
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  arguments.socket = thinkv::ctl::default_socket();
  CLI::App app("Shows what a running thinkvd holds.");
  app.set_version_flag("--version", std::string("thinkvctl ") + thinkv::kVersionText);
  app.add_option("--socket", arguments.socket, "control socket of the daemon (THINKV_SOCKET)")
      ->type_name("PATH");
  app.require_subcommand(1);
  app.fallthrough();
  auto* status_command = app.add_subcommand("status", "pool, tenants and clients");
  status_command->add_flag("--json", arguments.json, "everything, as JSON");
  auto* policies_command = app.add_subcommand("policies", "the policies that clients can ask for");
  policies_command->add_flag("--json", arguments.json, "as JSON");
  auto* top_command = app.add_subcommand("top", "who holds what, refreshed");
  top_command->add_option("-n", arguments.interval_s, "seconds between two refreshes")
      ->check(CLI::Range(0.1, 3600.0))
      ->type_name("SEC");
  top_command->add_flag("--once", arguments.once, "show once and exit");
  CLI11_PARSE(app, argc, argv);
  if (status_command->parsed()) return status(arguments);
  if (policies_command->parsed()) return policies(arguments);
  return top(arguments);
}
