// Macros that system headers leave behind: <windows.h>, <complex.h>, <sys/sysmacros.h>, X11 and gnu++20. A program
// may have included them before this library. Each expands to something invalid, so that any expansion in a header is
// an error, whether or not the program instantiates that code.
//
// The standard library undefines min and max, so its headers are included first.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <ios>
#include <istream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <optional>
#include <ostream>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define min(...) )min_is_a_macro_here(
#define max(...) )max_is_a_macro_here(
// <windows.h> and what it includes
#define near )near_is_a_macro_here(
#define far )far_is_a_macro_here(
#define small )small_is_a_macro_here(
#define interface )interface_is_a_macro_here(
#define IN )IN_is_a_macro_here(
#define OUT )OUT_is_a_macro_here(
#define OPTIONAL )OPTIONAL_is_a_macro_here(
#define ERROR )ERROR_is_a_macro_here(
#define DELETE )DELETE_is_a_macro_here(
#define CONST )CONST_is_a_macro_here(
// <complex.h>
#define I )I_is_a_macro_here(
// <sys/sysmacros.h>
#undef major
#undef minor
#define major(...) )major_is_a_macro_here(
#define minor(...) )minor_is_a_macro_here(
// X11
#define None )None_is_a_macro_here(
#define Always )Always_is_a_macro_here(
#define Success )Success_is_a_macro_here(
#define Status )Status_is_a_macro_here(
#define Bool )Bool_is_a_macro_here(
// gnu++20
#undef unix
#undef linux
#define unix )unix_is_a_macro_here(
#define linux )linux_is_a_macro_here(

#include "consumer.cpp"  // NOLINT(bugprone-suspicious-include): the same program after these macros

#if !defined(min) || !defined(max)
#error a header of the standard library that Longspan reads took min and max away: include it above
#endif
