// views.h: the status JSON as text for a terminal. Pure functions; missing keys read as zero, so
// an older or newer daemon still shows.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace thinkv::ctl {

[[nodiscard]] std::string status_view(const nlohmann::json& status);
[[nodiscard]] std::string policies_view(const nlohmann::json& status);
// `color`: escape sequences for the bars.
[[nodiscard]] std::string top_view(const nlohmann::json& status, bool color);

}  // namespace thinkv::ctl
