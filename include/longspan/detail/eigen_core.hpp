// <Eigen/Core>, without the warnings of g++ 12 about its own AVX-512 intrinsics.
// These warnings come from Eigen's packet functions. A program that includes <Eigen/Core> before this header still
// sees them.
#pragma once

// To be put around code that uses intrinsics. g++ 12 warns that its own intrinsics use an uninitialised value (gcc bug
// 105593, visible through inlining), and that vector types lose their attributes as template arguments. Neither is a
// fault of this library, and without these macros users would see both.
#if defined(__GNUC__) && !defined(__clang__)
#define LONGSPAN_INTRINSICS_BEGIN                                                      \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wuninitialized\"") \
      _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")                      \
          _Pragma("GCC diagnostic ignored \"-Wignored-attributes\"")
#define LONGSPAN_INTRINSICS_END _Pragma("GCC diagnostic pop")
#else
#define LONGSPAN_INTRINSICS_BEGIN
#define LONGSPAN_INTRINSICS_END
#endif

LONGSPAN_INTRINSICS_BEGIN
#include <Eigen/Core>  // IWYU pragma: export
LONGSPAN_INTRINSICS_END
