// Constants that depend on the processor. They change the speed, and results only where a comment says so.
//
// The target of the compiler determines the default. For a processor that was not measured, define the macro before the
// first header of the library: -DLONGSPAN_STREAM_PREFETCH=1. All translation units of a program that are compiled for
// the same target must define the same value.
#pragma once

#include "longspan/detail/eigen_core.hpp"
#include "longspan/version.hpp"

// Intel's cores from Sapphire Rapids on have AVX512-FP16, AMD's up to Zen 5 do not.
#if defined(__AVX512FP16__) || defined(LONGSPAN_TARGETS_AMX)
#define LONGSPAN_TUNED_FOR_INTEL 1
#else
#define LONGSPAN_TUNED_FOR_INTEL 0
#endif

/// How rows that are read only once are prefetched: 0 non-temporal, 1 into the second-level cache, 2 into all caches.
///   Zen 5       0: a decode step over DRAM takes 3-10 % less time than with 2
///   Intel AMX   2: one thread, 32768 keys of d = 128 from memory, GB/s for 0, 1, 2: float, 32 heads over 8, 5.0,
///               13.9, 12.9; float, 32 over 32, 8.0, 15.2, 14.6; bfloat16, 32 over 8, 6.1, 14.5, 12.4. A
///               non-temporal prefetch bypasses the second-level cache there, which leaves too few cache lines in
///               flight. From that cache 1 takes 10-25 % longer than 2 (512 keys, d = 64), from the third-level cache
///               2-5 % (17 to 67 MB of keys and values), and from memory 2-7 % less (from 134 MB on)
#if !defined(LONGSPAN_STREAM_PREFETCH)
#define LONGSPAN_STREAM_PREFETCH (LONGSPAN_TUNED_FOR_INTEL ? 2 : 0)
#endif

/// Whether bfloat16 query tiles multiply with VDPBF16PS, if the target has this instruction and matrix tiles are not
/// used. It rounds weights to bfloat16. With 0, bfloat16 storage is converted to float.
///   Zen 5       1: 2.0 times the rate of float
///   Intel AMX   0: VDPBF16PS has 0.5 times the rate of float
#if !defined(LONGSPAN_BF16_PAIRS)
#define LONGSPAN_BF16_PAIRS (!LONGSPAN_TUNED_FOR_INTEL)
#endif

/// The sums that a kernel keeps in registers: rows of keys or columns, times packets of queries.
///   32 registers   8 x 3: 24 sums reach 99 % of the rate of multiply-adds, 4 x 4 reach 78 % (Zen 5); on Intel AMX 6 x
///                  4, 9 x 3 and 14 x 2 gain nothing
///   16 registers   4 x 3, or 4 x 2 without fused multiply-add, since each product then needs a register
#if defined(EIGEN_VECTORIZE_AVX512) || defined(EIGEN_VECTORIZE_NEON) || defined(EIGEN_VECTORIZE_ALTIVEC)
#define LONGSPAN_VECTOR_REGISTERS 32
#else
#define LONGSPAN_VECTOR_REGISTERS 16
#endif
#if !defined(LONGSPAN_TILE_ROWS)
#define LONGSPAN_TILE_ROWS (LONGSPAN_VECTOR_REGISTERS == 32 ? 8 : 4)
#endif
#if !defined(LONGSPAN_TILE_PACKETS)
#if defined(EIGEN_VECTORIZE_FMA) || defined(EIGEN_VECTORIZE_NEON) || defined(EIGEN_VECTORIZE_ALTIVEC) || \
    defined(EIGEN_VECTORIZE_AVX512)
#define LONGSPAN_TILE_PACKETS 3
#else
#define LONGSPAN_TILE_PACKETS 2
#endif
#endif

LONGSPAN_NAMESPACE_BEGIN
namespace detail::tuning {

inline constexpr int stream_prefetch = LONGSPAN_STREAM_PREFETCH;
inline constexpr bool bf16_pairs = LONGSPAN_BF16_PAIRS != 0;
inline constexpr int tile_rows = LONGSPAN_TILE_ROWS, tile_packets = LONGSPAN_TILE_PACKETS;

/// Keys in a block of the prefill kernels, which results depend on (in their last bits).
///   float        flat from 96 to 256 (Zen 5 and Intel AMX)
///   bf16 pairs   256: 128 takes 2 % longer (Zen 5)
///   tiles        256: 128 takes 2-5 % longer, 512 as long (Intel AMX)
inline constexpr int keys_in_float_block = 128, keys_in_bf16_block = 256, keys_in_tile_block = 256;

/// How far ahead the decode kernel prefetches, in bytes. 16 KB: the same time; 2 and 4 KB: 5-10 % longer (Zen 5).
inline constexpr int prefetch_distance = 8192;

/// The most bytes of transposed values, and of encoded keys, that a worker keeps from task to task, for matrix tiles.
/// Transposing values for each task takes 9 % of a call at head_dim 64 (Intel AMX).
inline constexpr int kept_block_bytes = 4 << 20;

}  // namespace detail::tuning
LONGSPAN_NAMESPACE_END
