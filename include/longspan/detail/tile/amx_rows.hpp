// Rows of queries, keys and values in the layouts that matrix tiles multiply.
#pragma once

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(EIGEN_DONT_VECTORIZE)

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/simd/prefetch_line.hpp"
#include "longspan/detail/tuning.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_INTRINSICS_BEGIN

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The part of AmxArithmetic that only moves and rounds numbers.
struct AmxRows {
  using Key = Eigen::bfloat16;
  /// Two bfloat16: of columns c and c + 1 in queries, of keys j and j + 1 in values and weights.
  using Pair = std::uint32_t;
  static constexpr Index keys_in_block = tuning::keys_in_tile_block;
  static constexpr Index columns_in_step = 32;
  static constexpr Index columns_in_tile = 16;  ///< outputs have a multiple of this

  static Index query_rows(Index head_dim) { return round_up(head_dim, columns_in_step) / 2; }

  /// Packs 16 queries, whose rows are bfloat16, or float and then rounded; rows up to query_rows(head_dim) become 0.
  template <class RowOf>
  static void pack(const RowOf& row_of, Index head_dim, float, Pair* to, Index stride) {
    decltype(row_of(0)) row[16];
    for (Index i = 0; i < 16; ++i) row[i] = row_of(i);
    for (Index column = 0; column < head_dim; column += 32) {
      const auto present = first_of_32(head_dim - column);
      Packet<float> square[16];  // holds pairs: only moved, never computed with
      LONGSPAN_UNROLL
      for (int i = 0; i < 16; ++i) square[i].raw = _mm512_castsi512_ps(load_32(row[i] + column, present));
      transpose(square);
      LONGSPAN_UNROLL
      for (int i = 0; i < 16; ++i)
        _mm512_storeu_si512(to + (column / 2 + i) * stride, _mm512_castps_si512(square[i].raw));
    }
  }

  /// Converts rows to bfloat16, those of int8 divided by 128. `to_cols` is a multiple of 32; missing columns become 0.
  template <class T>
  static void round_rows(const T* from, Index from_stride, Index rows, Index cols, Key* to, Index to_cols) {
    for (Index i = 0; i < rows; ++i, from += from_stride, to += to_cols) {
      for (Index column = 0; column < to_cols; column += 32)
        _mm512_storeu_si512(to + column, load_32(from + column, first_of_32(cols - column)));
    }
  }

  /// Pairs of neighbouring rows: to[j / 2][column] has the columns of rows j and j + 1. `rows` and `to_cols` are
  /// rounded up to multiples of 32 and 16; what is missing becomes 0.
  static void pair_rows(const Key* from, Index from_stride, Index rows, Index cols, Pair* to, Index to_cols) {
    for (Index j = 0; j < round_up(rows, 32); j += 2, to += to_cols) {
      for (Index column = 0; column < to_cols; column += 16) {
        const auto row = [&](Index i) {
          const __mmask16 present =
              i < rows ? static_cast<__mmask16>(first_of_32(std::max<Index>(0, cols - column)))
                       : __mmask16{0};
          return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, from + i * from_stride + column));
        };
        _mm512_storeu_si512(to + column, _mm512_or_si512(row(j), _mm512_slli_epi32(row(j + 1), 16)));
      }
    }
  }

  /// True if no value of `rows` pairs of keys, rounded up to a multiple of 16, is infinite or NaN.
  static bool values_finite(const Pair* v, Index v_stride, Index rows, Index) {
    const Pair* end = v + round_up(rows, 16) * v_stride;
    __mmask32 found = 0;
    for (; v != end; v += 16) found |= not_finite(_mm512_loadu_si512(v));
    return found == 0;
  }

  /// Copies a multiple of 16 pairs, with 0 in place of infinity and NaN.
  static void copy_finite(const Pair* from, Index pairs, Pair* to) {
    for (Index i = 0; i < pairs; i += 16) {
      const __m512i values = _mm512_loadu_si512(from + i);
      _mm512_storeu_si512(to + i, _mm512_maskz_mov_epi16(~not_finite(values), values));
    }
  }

  static float value_of(const Pair* v, Index v_stride, Index j, Index column) {
    const Pair pair = v[j / 32 * 16 * v_stride + column * 16 + j % 32 / 2];
    return std::bit_cast<float>(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  }

  /// Transposes rows of values: to[j / 32][column][j % 32], those of int8 divided by 128. `to_cols` is a multiple of
  /// 16; missing keys and columns become 0. `prefetches`: also prefetches the rows of the next block.
  template <bool prefetches = false, class T>
  static void transpose_values(const T* v, Index v_stride, Index keys, Index cols, Pair* to, Index to_cols) {
    for (Index first = 0; first < keys; first += 32, v += 32 * v_stride, to += 16 * to_cols) {
      for (Index column = 0; column < to_cols; column += 32)
        transpose_square<prefetches>(v + column, v_stride, keys - first, cols - column, to + 16 * column,
                                     column + 16 < to_cols);
    }
  }

 private:
  /// The bfloat16 that are infinite or NaN: all bits of their exponent are set.
  static LONGSPAN_INLINE __mmask32 not_finite(__m512i values) {
    const __m512i exponent_bits = _mm512_set1_epi16(0x7f80);
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(values, exponent_bits), exponent_bits);
  }

  /// Loads 32 columns of a row, of which those in `present` are read and the others are 0.
  static LONGSPAN_INLINE __m512i load_32(const Key* row, __mmask32 present) {
    return _mm512_maskz_loadu_epi16(present, row);
  }
  /// Divides by 128, so that a scale and the row's largest number are of one magnitude: the product of a weight and a
  /// scale is not rounded to 0 before the products with the values are.
  static LONGSPAN_INLINE __m512i load_32(const std::int8_t* row, __mmask32 present) {
    const __m256i numbers = _mm512_castsi512_si256(_mm512_maskz_loadu_epi8(present, row));
    const auto high_half = [](__m128i x) {
      const __m512 number =
          _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)), _mm512_set1_ps(0x1p-7f));
      return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(number), 16));
    };
    const __m256i low = high_half(_mm256_castsi256_si128(numbers)),
                  high = high_half(_mm256_extracti128_si256(numbers, 1));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  static LONGSPAN_INLINE __m512i load_32(const float* row, __mmask32 present) {
    const Packet<float> low{_mm512_maskz_loadu_ps(static_cast<__mmask16>(present), row)},
        high{_mm512_maskz_loadu_ps(static_cast<__mmask16>(present >> 16), row + 16)};
    return _mm512_inserti64x4(_mm512_castsi256_si512(bfloat16_bits(low)), bfloat16_bits(high), 1);
  }

  static __mmask32 first_of_32(Index count) {
    return count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1ull << count) - 1);
  }

  /// 32 keys and 32 columns: to[column][key pair], 16 columns to a tile.
  template <bool prefetches, class T>
  static LONGSPAN_INLINE void transpose_square(const T* v, Index v_stride, Index keys, Index cols, Pair* to,
                                               bool both_tiles) {
    const __mmask32 present = first_of_32(std::max<Index>(0, cols));
    // Within a row of 32: columns (0..3, 16..19), (4..7, 20..23), ... so that unpacking leaves 0..15 and 16..31 apart.
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    Packet<float> low[16], high[16];
    LONGSPAN_UNROLL
    for (int i = 0; i < 16; ++i) {
      const auto row = [&](Index j) {
        if (j >= keys) return _mm512_setzero_si512();
        if constexpr (prefetches)
          prefetch_line_to_l2(reinterpret_cast<std::uintptr_t>(v + (j + keys_in_block) * v_stride));
        return _mm512_permutexvar_epi64(order, load_32(v + j * v_stride, present));
      };
      const __m512i even = row(2 * i), odd = row(2 * i + 1);
      low[i].raw = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd));
      high[i].raw = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd));
    }
    transpose(low);
    LONGSPAN_UNROLL
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 16 * i, _mm512_castps_si512(low[i].raw));
    if (!both_tiles) return;
    transpose(high);
    LONGSPAN_UNROLL
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 256 + 16 * i, _mm512_castps_si512(high[i].raw));
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END

LONGSPAN_INTRINSICS_END

#endif
