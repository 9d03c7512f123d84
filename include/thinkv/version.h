// version.h: the two numbers that decide whether two builds can talk.
#pragma once

#include <cstdint>

namespace thinkv {

// Library and daemon release. Text form is THINKV_VERSION of the build.
inline constexpr uint32_t kVersionMajor = 0;
inline constexpr uint32_t kVersionMinor = 1;
inline constexpr uint32_t kVersionPatch = 0;
inline constexpr const char* kVersionText = "0.1.0";

// Control messages, ring descriptors and shared layouts. A different major is refused with a
// clear message; a newer minor only adds messages and fields in reserved bytes.
inline constexpr uint16_t kProtocolMajor = 3;
inline constexpr uint16_t kProtocolMinor = 0;

}  // namespace thinkv
