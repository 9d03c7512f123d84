# Every external package of the tree, found once here so that all folders see the same imported
# targets. Their headers are SYSTEM: our warnings do not apply to them.
#   Threads::Threads            Boost::headers (1.74, headers only)
#   yaml-cpp                    prometheus-cpp::core prometheus-cpp::pull
#   spdlog::spdlog fmt::fmt     CLI11::CLI11     nlohmann_json::nlohmann_json
#   tests: GTest::gtest GTest::gtest_main GTest::gmock benchmark::benchmark rapidcheck
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
find_package(Boost 1.74 REQUIRED)
find_package(yaml-cpp REQUIRED)
find_package(prometheus-cpp REQUIRED)
find_package(fmt REQUIRED)
find_package(spdlog REQUIRED)
find_package(CLI11 REQUIRED)
find_package(nlohmann_json REQUIRED)

# The distribution's interpreter, not whichever shim comes first in PATH: lints and script tests
# must not depend on a developer's environment.
find_program(THINKV_PYTHON NAMES python3 PATHS /usr/bin NO_DEFAULT_PATH)
find_program(THINKV_PYTHON NAMES python3 REQUIRED)

if(THINKV_BUILD_TESTS)
  find_package(GTest REQUIRED)
  find_package(benchmark REQUIRED)
  find_package(rapidcheck REQUIRED)
endif()
