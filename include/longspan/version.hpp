// The version of the library, and the two namespaces that let translation units with different flags be linked.
#pragma once

// Compilers stop only after a missing header. Without C++20 thousands of other errors would otherwise follow this
// sentence.
#if defined(_MSVC_LANG) ? _MSVC_LANG < 202002L : __cplusplus < 202002L
#error "longspan: this library needs C++20: compile with -std=c++20 or /std:c++20"
#include "longspan/compile_with_std_c++20"
#endif

#include "longspan/detail/simd/instruction_sets.hpp"

#define LONGSPAN_VERSION_MAJOR 0
#define LONGSPAN_VERSION_MINOR 2
#define LONGSPAN_VERSION_PATCH 0
#define LONGSPAN_VERSION \
  (LONGSPAN_VERSION_MAJOR * 10000 + LONGSPAN_VERSION_MINOR * 100 + LONGSPAN_VERSION_PATCH)

// ----------------------------------------------------------------------------------------------------------
// Two translation units of one program may be compiled for different instruction sets, or only one of them with OpenMP.
// Of two functions with the same name the linker keeps only one. Code is therefore in an inline namespace whose name
// contains everything that changes the code, for instance v0_2_x3_omp (x86-64-v3, OpenMP).
//
// Views, errors and options are in another inline namespace, v0_2, and are the same types in all units, so that they
// can be used in the signature of a function that one unit defines and another calls. Their members are always
// inlined (LONGSPAN_INLINE), so that the linker never has to choose between two versions.

// Settings that may differ between the translation units of a program.
#if defined(EIGEN_DONT_VECTORIZE)
#define LONGSPAN_ABI_VECTORS _scalar
#else
#define LONGSPAN_ABI_VECTORS
#endif
#if defined(EIGEN_FAST_MATH) && EIGEN_FAST_MATH + 0 == 0
#define LONGSPAN_ABI_EIGEN _slow  // Eigen's tanh is then that of the C library
#else
#define LONGSPAN_ABI_EIGEN
#endif
#if defined(__FAST_MATH__)
#define LONGSPAN_ABI_MATH _fast
#elif defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ + 0 != 0
#define LONGSPAN_ABI_MATH _finite
#elif defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
#define LONGSPAN_ABI_MATH _inexact
#else
#define LONGSPAN_ABI_MATH
#endif
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define LONGSPAN_ABI_ERRORS
#elif defined(LONGSPAN_ERROR_HANDLER)
#define LONGSPAN_ABI_ERRORS _handler
#else
#define LONGSPAN_ABI_ERRORS _abort
#endif
#if defined(_OPENMP)
#define LONGSPAN_ABI_THREADS _omp
#else
#define LONGSPAN_ABI_THREADS
#endif
#if defined(_GLIBCXX_DEBUG)
#define LONGSPAN_ABI_CONTAINERS _debug  // std::vector has another layout then
#else
#define LONGSPAN_ABI_CONTAINERS
#endif

#define LONGSPAN_VOCABULARY_PASTE(major, minor) v##major##_##minor
#define LONGSPAN_VOCABULARY_JOIN(major, minor) LONGSPAN_VOCABULARY_PASTE(major, minor)
#define LONGSPAN_VOCABULARY LONGSPAN_VOCABULARY_JOIN(LONGSPAN_VERSION_MAJOR, LONGSPAN_VERSION_MINOR)
#define LONGSPAN_ABI                                                                                 \
  LONGSPAN_ABI_JOIN(LONGSPAN_VOCABULARY, LONGSPAN_ABI_ISA, LONGSPAN_ABI_VECTORS, LONGSPAN_ABI_EIGEN, \
                    LONGSPAN_ABI_MATH, LONGSPAN_ABI_ERRORS,                                          \
                    LONGSPAN_ABI_JOIN(LONGSPAN_ABI_THREADS, LONGSPAN_ABI_CONTAINERS, , , , , , ), )

/// Code, and every type with a member that is not LONGSPAN_INLINE.
#define LONGSPAN_NAMESPACE_BEGIN \
  namespace longspan {           \
  inline namespace LONGSPAN_ABI {
#define LONGSPAN_NAMESPACE_END \
  }                            \
  }

/// Types that are the same in all translation units of a version. They have no namespace `detail`, because that would
/// be a second namespace of this name.
#define LONGSPAN_VOCABULARY_BEGIN \
  namespace longspan {            \
  inline namespace LONGSPAN_VOCABULARY {
#define LONGSPAN_VOCABULARY_END \
  }                             \
  }

// ----------------------------------------------------------------------------------------------------------
// How functions are compiled

#if defined(__GNUC__) || defined(__clang__)
#define LONGSPAN_INLINE inline __attribute__((always_inline))
#define LONGSPAN_NOINLINE __attribute__((noinline))
#define LONGSPAN_COLD __attribute__((noinline, cold))  // compiled for size: it only runs before an error
#elif defined(_MSC_VER)
#define LONGSPAN_INLINE __forceinline
#define LONGSPAN_NOINLINE __declspec(noinline)
#define LONGSPAN_COLD __declspec(noinline)
#else
#define LONGSPAN_INLINE inline
#define LONGSPAN_NOINLINE
#define LONGSPAN_COLD
#endif
