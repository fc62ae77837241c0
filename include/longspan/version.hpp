// The version of the library, and the namespace that keeps differently compiled kernels apart.
#pragma once

#define LONGSPAN_VERSION_MAJOR 0
#define LONGSPAN_VERSION_MINOR 1
#define LONGSPAN_VERSION_PATCH 0
#define LONGSPAN_VERSION \
  (LONGSPAN_VERSION_MAJOR * 10000 + LONGSPAN_VERSION_MINOR * 100 + LONGSPAN_VERSION_PATCH)

// Two translation units of one program may be compiled for different instruction sets, or one with OpenMP and
// one without. Their kernels are different functions and must have different names, or the linker keeps one
// of the two for both. So the inline namespace carries what changes the code.
#if defined(EIGEN_DONT_VECTORIZE)
#define LONGSPAN_ABI_ISA scalar
#elif defined(__AVX512BF16__)
#define LONGSPAN_ABI_ISA avx512bf16
#elif defined(__AVX512F__)
#define LONGSPAN_ABI_ISA avx512
#elif defined(__AVX2__)
#define LONGSPAN_ABI_ISA avx2
#elif defined(__AVX__)
#define LONGSPAN_ABI_ISA avx
#else
#define LONGSPAN_ABI_ISA base
#endif

#if defined(_OPENMP)
#define LONGSPAN_ABI_THREADS openmp
#else
#define LONGSPAN_ABI_THREADS serial
#endif

#define LONGSPAN_ABI_JOIN(major, minor, isa, threads) v##major##_##minor##_##isa##_##threads
#define LONGSPAN_ABI_EXPAND(major, minor, isa, threads) LONGSPAN_ABI_JOIN(major, minor, isa, threads)
#define LONGSPAN_ABI \
  LONGSPAN_ABI_EXPAND(LONGSPAN_VERSION_MAJOR, LONGSPAN_VERSION_MINOR, LONGSPAN_ABI_ISA, LONGSPAN_ABI_THREADS)

#define LONGSPAN_BEGIN \
  namespace longspan { \
  inline namespace LONGSPAN_ABI {
#define LONGSPAN_END \
  }                  \
  }
