include(GoogleTest)

# Environment that makes a sanitizer report a failure of the test, in every build.
set(THINKV_TEST_ENV
  "ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1"
  "UBSAN_OPTIONS=print_stacktrace=1"
  "TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1")

# thinkv_test(NAME <exe> SOURCES <files> [LIBS <targets>] [LABELS unit|property|...]
#             [ENV VAR=value...] [TIMEOUT <seconds>] [NO_MAIN] [WHOLE] [SERIAL])
# A GoogleTest program; each of its cases becomes one ctest case (GTEST_SKIP counts as skipped).
#   NO_MAIN  the sources define main()
#   WHOLE    one ctest case for the whole program (shared expensive fixture, or not GoogleTest)
#   SERIAL   never beside another test
# TIMEOUT is per case, 60 s by default; sanitizer builds get four times as much.
function(thinkv_test)
  cmake_parse_arguments(PARSE_ARGV 0 arg "NO_MAIN;WHOLE;SERIAL" "NAME;TIMEOUT"
    "SOURCES;LIBS;LABELS;ENV")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_NAME OR NOT arg_SOURCES)
    message(FATAL_ERROR "thinkv_test(${arg_NAME}): bad arguments: ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT THINKV_BUILD_TESTS)
    return()
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 60)
  endif()
  if(THINKV_SANITIZE OR THINKV_FUZZ)
    math(EXPR arg_TIMEOUT "${arg_TIMEOUT} * 4")
  endif()
  if(NOT arg_LABELS)
    set(arg_LABELS unit)
  endif()

  add_executable(${arg_NAME} ${arg_SOURCES})
  target_link_libraries(${arg_NAME} PRIVATE ${arg_LIBS} GTest::gtest GTest::gmock
    Threads::Threads)
  if(NOT arg_NO_MAIN)
    target_link_libraries(${arg_NAME} PRIVATE GTest::gtest_main)
  endif()
  set_target_properties(${arg_NAME} PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests"
    BUILD_RPATH "$ORIGIN/../lib")
  add_dependencies(thinkv_tests ${arg_NAME})
  if("tsan" IN_LIST arg_LABELS)
    add_dependencies(thinkv_tsan_tests ${arg_NAME})
  endif()

  set(environment ${THINKV_TEST_ENV} "THINKV_BIN_DIR=${CMAKE_BINARY_DIR}/bin"
    "THINKV_LIB_DIR=${CMAKE_BINARY_DIR}/lib" "THINKV_SOURCE_DIR=${CMAKE_SOURCE_DIR}" ${arg_ENV})
  set(serial FALSE)
  if(arg_SERIAL)
    set(serial TRUE)
  endif()
  if(arg_WHOLE)
    add_test(NAME ${arg_NAME} COMMAND ${arg_NAME})
    set_tests_properties(${arg_NAME} PROPERTIES LABELS "${arg_LABELS}" TIMEOUT ${arg_TIMEOUT}
      ENVIRONMENT "${environment}" RUN_SERIAL ${serial})
    return()
  endif()
  gtest_discover_tests(${arg_NAME} DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
    TEST_LIST ${arg_NAME}_cases)
  # gtest_discover_tests splits a property that is a list, so ctest sets them itself, from this
  # file, after it has discovered the cases.
  set(properties "${CMAKE_CURRENT_BINARY_DIR}/${arg_NAME}_properties.cmake")
  file(WRITE "${properties}"
"if(${arg_NAME}_cases)
  set_tests_properties(\${${arg_NAME}_cases} PROPERTIES
    LABELS \"${arg_LABELS}\" TIMEOUT ${arg_TIMEOUT} RUN_SERIAL ${serial}
    ENVIRONMENT \"${environment}\")
endif()
")
  set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES "${properties}")
endfunction()

# thinkv_script_test(NAME <name> COMMAND <command...> [LABELS ...] [ENV ...] [TIMEOUT s] [SERIAL])
# A script as one ctest case. Exit status 77 means skipped (the script prints why).
function(thinkv_script_test)
  cmake_parse_arguments(PARSE_ARGV 0 arg "SERIAL" "NAME;TIMEOUT;WORKING_DIRECTORY"
    "COMMAND;LABELS;ENV")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_NAME OR NOT arg_COMMAND OR NOT arg_LABELS)
    message(FATAL_ERROR "thinkv_script_test(${arg_NAME}): bad arguments")
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()
  if(NOT arg_WORKING_DIRECTORY)
    set(arg_WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}")
  endif()
  add_test(NAME ${arg_NAME} COMMAND ${arg_COMMAND} WORKING_DIRECTORY "${arg_WORKING_DIRECTORY}")
  set(environment ${THINKV_TEST_ENV} "THINKV_BIN_DIR=${CMAKE_BINARY_DIR}/bin"
    "THINKV_LIB_DIR=${CMAKE_BINARY_DIR}/lib" "THINKV_SOURCE_DIR=${CMAKE_SOURCE_DIR}"
    "PYTHONDONTWRITEBYTECODE=1" ${arg_ENV})
  set_tests_properties(${arg_NAME} PROPERTIES LABELS "${arg_LABELS}" TIMEOUT ${arg_TIMEOUT}
    SKIP_RETURN_CODE 77 ENVIRONMENT "${environment}")
  if(arg_SERIAL)
    set_tests_properties(${arg_NAME} PROPERTIES RUN_SERIAL TRUE)
  endif()
endfunction()

# thinkv_fuzzer(NAME fuzz_<what> SOURCES <files> [LIBS <targets>] [CORPUS <folder>])
# The sources define LLVMFuzzerTestOneInput. Under THINKV_FUZZ this is a libFuzzer program in bin/;
# in every other build the same target feeds each corpus file through the same entry point once,
# as a ctest case labelled `fuzz`, so the corpus is a regression test of each commit.
function(thinkv_fuzzer)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "NAME;CORPUS" "SOURCES;LIBS")
  if(arg_UNPARSED_ARGUMENTS OR NOT arg_NAME MATCHES "^fuzz_" OR NOT arg_SOURCES)
    message(FATAL_ERROR "thinkv_fuzzer(${arg_NAME}): bad arguments")
  endif()
  if(THINKV_FUZZ)
    add_executable(${arg_NAME} ${arg_SOURCES})
    target_link_options(${arg_NAME} PRIVATE -fsanitize=fuzzer)
    add_dependencies(thinkv_fuzzers ${arg_NAME})
    if(arg_CORPUS)
      file(MAKE_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
      file(CREATE_LINK "${CMAKE_CURRENT_SOURCE_DIR}/${arg_CORPUS}"
        "${CMAKE_BINARY_DIR}/bin/${arg_NAME}.corpus" SYMBOLIC)
    endif()
  else()
    add_executable(${arg_NAME} ${arg_SOURCES} "${CMAKE_SOURCE_DIR}/tools/cmake/fuzz_replay.cpp")
    set_target_properties(${arg_NAME} PROPERTIES
      RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
    add_dependencies(thinkv_tests ${arg_NAME})
    if(arg_CORPUS)
      add_test(NAME ${arg_NAME}.corpus
        COMMAND ${arg_NAME} "${CMAKE_CURRENT_SOURCE_DIR}/${arg_CORPUS}")
      set_tests_properties(${arg_NAME}.corpus PROPERTIES LABELS fuzz TIMEOUT 120
        ENVIRONMENT "${THINKV_TEST_ENV}")
    endif()
  endif()
  target_link_libraries(${arg_NAME} PRIVATE ${arg_LIBS})
endfunction()
