// Constants that depend on the processor. They change the speed, and results only where a comment says so.
//
// The target of the compiler determines the default. For a processor that was not measured, define the macro before the
// first header of the library: -DLONGSPAN_STREAM_PREFETCH=1. All translation units of a program that are compiled for
// the same target must define the same value.
#pragma once

#include "longspan/version.hpp"

// Intel's cores from Sapphire Rapids on have AVX512-FP16, AMD's up to Zen 5 do not.
#if defined(__AVX512FP16__) || defined(LONGSPAN_TARGETS_AMX)
#define LONGSPAN_TUNED_FOR_INTEL 1
#else
#define LONGSPAN_TUNED_FOR_INTEL 0
#endif

/// How rows that are read only once are prefetched: 0 non-temporal, 1 into the second-level cache, 2 into all caches.
///   Zen 5       0: a decode step over DRAM takes 3-10 % less time than with 2
///   Intel AMX   1: 12.4 GB/s, against 4.8 with 0, 11.0 with 2 and 10.9 without prefetch (f32, 32 heads, 8 KV heads,
///               32768 keys, one thread, huge pages). A non-temporal prefetch bypasses the second-level cache there,
///               which leaves too few cache lines in flight
#if !defined(LONGSPAN_STREAM_PREFETCH)
#define LONGSPAN_STREAM_PREFETCH (LONGSPAN_TUNED_FOR_INTEL ? 1 : 0)
#endif

/// Whether bfloat16 query tiles multiply with VDPBF16PS, if the target has this instruction and the matrix unit is not
/// used. It rounds weights to bfloat16. With 0, bfloat16 storage is converted to float.
///   Zen 5       1: 2.0 times the rate of float
///   Intel AMX   0: VDPBF16PS has 0.5 times the rate of float
#if !defined(LONGSPAN_BF16_PAIRS)
#define LONGSPAN_BF16_PAIRS (!LONGSPAN_TUNED_FOR_INTEL)
#endif

LONGSPAN_NAMESPACE_BEGIN
namespace detail::tuning {

inline constexpr int stream_prefetch = LONGSPAN_STREAM_PREFETCH;
inline constexpr bool bf16_pairs = LONGSPAN_BF16_PAIRS != 0;

}  // namespace detail::tuning
LONGSPAN_NAMESPACE_END
