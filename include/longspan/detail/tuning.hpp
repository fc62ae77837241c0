// What a processor decides: constants of speed, which change no result but where a comment says so.
//
// Each is chosen by the target of the compiler and can be set by a macro before the first header of the library, for a
// processor that was not measured: -DLONGSPAN_STREAM_PREFETCH=1. All translation units of a program that are compiled for
// the same target must agree.
#pragma once

#include "longspan/version.hpp"

// AVX512-FP16 tells Intel's cores (Sapphire Rapids and later) from AMD's up to Zen 5.
#if defined(__AVX512FP16__) || defined(LONGSPAN_TARGETS_AMX)
#define LONGSPAN_TUNED_FOR_INTEL 1
#else
#define LONGSPAN_TUNED_FOR_INTEL 0
#endif

/// How rows are prefetched that are read once: 0 non-temporal, 1 into the second cache, 2 into all caches.
///   Zen 5       0: a decode step over DRAM takes 3-10 % less time than with 2
///   Intel AMX   f32, 32 heads over 8, 32768 keys, one thread, GB/s with huge pages: 0 4.8, 1 12.4, 2 11.0, none 10.9. A
///               non-temporal prefetch bypasses the second cache there and leaves too few lines in flight
#if !defined(LONGSPAN_STREAM_PREFETCH)
#define LONGSPAN_STREAM_PREFETCH (LONGSPAN_TUNED_FOR_INTEL ? 1 : 0)
#endif

/// Whether bfloat16 tiles multiply by VDPBF16PS where the target has it and matrix tiles are not in use. It rounds
/// weights to bfloat16.
///   Zen 5       2.0 times the float rate: 1
///   Intel AMX   0.5 times the float rate: 0, bfloat16 storage is then converted to float
#if !defined(LONGSPAN_BF16_PAIRS)
#define LONGSPAN_BF16_PAIRS (!LONGSPAN_TUNED_FOR_INTEL)
#endif

LONGSPAN_NAMESPACE_BEGIN
namespace detail::tuning {

inline constexpr int stream_prefetch = LONGSPAN_STREAM_PREFETCH;
inline constexpr bool bf16_pairs = LONGSPAN_BF16_PAIRS != 0;

}  // namespace detail::tuning
LONGSPAN_NAMESPACE_END
