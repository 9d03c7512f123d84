# Compiler settings of the whole tree. Included once, by the top-level CMakeLists.txt.
include(GNUInstallDirs)

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

get_property(thinkv_multi_config GLOBAL PROPERTY GENERATOR_IS_MULTI_CONFIG)
if(NOT CMAKE_BUILD_TYPE AND NOT thinkv_multi_config)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "Build type" FORCE)
endif()
# THINKV_CHECK stays on in every build; NDEBUG only removes the O(n) walks of THINKV_DCHECK.
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -g1 -DNDEBUG")
set(CMAKE_C_FLAGS_RELWITHDEBINFO "-O2 -g1 -DNDEBUG")

set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")
set(CMAKE_ARCHIVE_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")
# bin/ finds lib/ beside it wherever the pair is copied. DT_RPATH (not RUNPATH) because only it also
# applies to the dependencies of dependencies, which is what makes the bundle relocatable.
set(CMAKE_BUILD_RPATH_USE_ORIGIN ON)
set(CMAKE_BUILD_RPATH "$ORIGIN;$ORIGIN/../lib")
set(CMAKE_INSTALL_RPATH "")
add_link_options(-Wl,--disable-new-dtags)

if(NOT CMAKE_CXX_COMPILER_LAUNCHER)
  find_program(THINKV_CCACHE ccache)
  if(THINKV_CCACHE)
    set(CMAKE_C_COMPILER_LAUNCHER "${THINKV_CCACHE}")
    set(CMAKE_CXX_COMPILER_LAUNCHER "${THINKV_CCACHE}")
  endif()
endif()

# C and C++ only: nvcc does not know these spellings.
add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-Wall;-Wextra;-Wconversion;-Wshadow;-Werror>")
# A fused multiply-add rounds once where the source rounds twice: codecs must give the same bytes
# from every compiler and every instruction set.
add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-ffp-contract=off>")

if(THINKV_SANITIZE AND THINKV_FUZZ)
  message(FATAL_ERROR "THINKV_FUZZ brings its own sanitizers; leave THINKV_SANITIZE empty")
endif()

if(THINKV_SANITIZE STREQUAL "address")
  # Without the checks of every pointer that the address sanitizer sees where the pointer is used:
  # they were 15 to 23 % of the compiler's time (three sources).
  set(thinkv_sanitizers -fsanitize=address,undefined
    -fno-sanitize=null,object-size,pointer-overflow,vptr)
elseif(THINKV_SANITIZE STREQUAL "thread")
  set(thinkv_sanitizers -fsanitize=thread)
elseif(THINKV_SANITIZE)
  message(FATAL_ERROR "THINKV_SANITIZE must be empty, 'address' or 'thread'")
elseif(THINKV_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "THINKV_FUZZ needs clang (cmake --preset fuzz)")
  endif()
  set(thinkv_sanitizers -fsanitize=address,undefined)
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()

if(thinkv_sanitizers)
  add_compile_options(${thinkv_sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(${thinkv_sanitizers})
  add_compile_options(-D_GLIBCXX_ASSERTIONS)
  # The instrumentation hides initialisations from g++'s flow analysis; the plain build checks them.
  # Fuzzers build with clang, whose further warnings are not the tree's rule.
  add_compile_options("$<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>"
    "$<$<CXX_COMPILER_ID:Clang>:-Wno-error>")
else()
  set(thinkv_hardening -D_FORTIFY_SOURCE=2 -fstack-protector-strong -fstack-clash-protection)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    list(APPEND thinkv_hardening -fcf-protection)
  endif()
  add_compile_options(
    "$<$<AND:$<CONFIG:Release,RelWithDebInfo>,$<COMPILE_LANGUAGE:C,CXX>>:${thinkv_hardening}>")
  add_link_options(-Wl,-z,relro,-z,now,-z,noexecstack)
endif()
