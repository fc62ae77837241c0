// <Eigen/Core>, without the warnings that g++ 12 gives about its own AVX-512 intrinsics.
// They come out of Eigen's packet functions; an including program that has read <Eigen/Core> before sees
// them.
#pragma once

// Around code on intrinsics. g++ 12 says of its own that they use an uninitialised value (its bug 105593, seen
// through inlining), and of vector types that template arguments lose their attributes. Neither is ours, and both
// would reach users.
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
