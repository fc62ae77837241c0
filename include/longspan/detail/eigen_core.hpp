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

// a + b of two vectors, and so on. The operators of g++ and clang++ make the same instructions as Eigen's functions,
// with two functions less to inline for each of the thousands in a kernel: 3 % of the compile time of a call.
#if defined(__GNUC__) || defined(__clang__)
#define LONGSPAN_VECTOR_OPERATION(function, a, op, b) a op b
#else
#define LONGSPAN_VECTOR_OPERATION(function, a, op, b) Eigen::internal::function(a, b)
#endif

LONGSPAN_INTRINSICS_BEGIN
#include <Eigen/Core>  // IWYU pragma: export
LONGSPAN_INTRINSICS_END
