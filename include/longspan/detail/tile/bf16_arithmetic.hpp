// The arithmetic policy of a tile for processors with bfloat16 dot products (AVX512-BF16), which are twice as fast as
// float on Zen 5.
//
// VDPBF16PS adds two products of bfloat16 pairs to a float. Scores lose nothing, since q and k are bfloat16 already.
// Weights are rounded to bfloat16 before they multiply the values, a relative error of up to 2^-8 each; the row sums
// are taken before that rounding.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    !defined(EIGEN_DONT_VECTORIZE)
#define LONGSPAN_HAS_BF16_ARITHMETIC 1

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>

#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/bf16_weights.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_INTRINSICS_BEGIN

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

struct Bf16Arithmetic {
  using Real = float;
  /// Two bfloat16: of columns c and c + 1 in queries, of keys j and j + 1 in values and weights.
  using Pair = std::uint32_t;
  using Query = Pair;
  using Key = Eigen::bfloat16;
  using Value = Pair;
  using Weight = Pair;
  static constexpr Index keys_in_row = 2;
  static constexpr Index columns_in_tile = tile_rows;
  static constexpr Index keys_in_block = tuning::keys_in_bf16_block;
  /// Infinite, since scores are scaled after the products: no finite number is sure to stay below `empty_max`.
  static constexpr float masked_score = -std::numeric_limits<float>::infinity();

  static Index query_rows(Index head_dim) { return head_dim / 2; }
  static float query_factor(double) { return 1; }
  static float score_factor(double scale) { return static_cast<float>(scale); }

  template <class RowOf>
  static void pack(const RowOf& row_of, Index head_dim, float, Query* to, Index stride) {
    const Key* row[16];
    for (Index i = 0; i < 16; ++i) row[i] = row_of(i);
    Index column = 0;
    for (; column + 32 <= head_dim; column += 32) {
      Packet<float> square[16];  // holds pairs: only moved, never computed with
      LONGSPAN_UNROLL
      for (int i = 0; i < 16; ++i) square[i].raw = _mm512_castsi512_ps(_mm512_loadu_si512(row[i] + column));
      transpose(square);
      LONGSPAN_UNROLL
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(to + (column / 2 + i) * stride, _mm512_castps_si512(square[i].raw));
      }
    }
    for (; column < head_dim; column += 2) {
      for (Index i = 0; i < 16; ++i) std::memcpy(to + column / 2 * stride + i, row[i] + column, sizeof(Pair));
    }
  }

  template <int packets>
  static void score_rows(const Key* k, Index k_stride, Index keys, const Query* q, Index head_dim, float* s,
                         float* highest, Index stride) {
    detail::score_rows<packets, float, PairFactors>(k, k_stride, keys, q, head_dim, s, highest,
                                                    tile_stride<float, packets>(stride));
  }

  /// pairs[j / 2] = exp_score(factor * s[j] - shift) of two keys, rounded; `total` grows by the unrounded
  /// weights.
  template <int packets>
  static void exp_rows(float* s, Index keys, float factor, const float* shift, float* total, Weight* pairs,
                       Index stride) {
    if (keys % 2 != 0) std::fill_n(s + keys * stride, packets * 16, masked_score);
    bool any_huge = false;
    for (int c = 0; c < packets; ++c) any_huge = any_huge || huge_lanes(_mm512_loadu_ps(shift + c * 16)) != 0;
    if (any_huge) {
      exp_pairs<packets>(s, keys, factor, shift, total, pairs, stride, [](auto score, auto by, auto down) {
        const Packet<float> product =
            fma(score, by, broadcast(0.0f));  // written as fma, so that no compiler fuses it with the sum
        return Packet<float>{
            _mm512_mask_add_ps(fma(score, by, down).raw, huge_lanes(down.raw), product.raw, down.raw)};
      });
    } else {
      exp_pairs<packets>(s, keys, factor, shift, total, pairs, stride,
                         [](auto score, auto by, auto down) { return fma(score, by, down); });
    }
  }

  template <int packets>
  static void value_rows(const Value* v, Index v_stride, Index columns, const Weight* p,
                         std::span<const RowRun> runs, float* o, Accumulate into, const float* scale,
                         Index stride) {
    const auto of_tile = tile_stride<float, packets>(stride);
    detail::value_rows<packets, float, PairFactors>(v, v_stride, columns, p, of_tile, runs, o, of_tile, into,
                                                    scale);
  }

  /// See FloatArithmetic.
  static bool values_finite(const Value* v, Index v_stride, Index rows, Index columns) {
    const __m512bh zero = std::bit_cast<__m512bh>(_mm512_setzero_si512());
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (Index j = 0; j < rows; ++j, v += v_stride) {
      Index column = 0;
      for (; column + 32 <= columns; column += 32) {
        even = _mm512_dpbf16_ps(even, std::bit_cast<__m512bh>(_mm512_loadu_si512(v + column)), zero);
        odd = _mm512_dpbf16_ps(odd, std::bit_cast<__m512bh>(_mm512_loadu_si512(v + column + 16)), zero);
      }
      for (; column < columns; column += 16) {
        const auto present = static_cast<__mmask16>((1u << std::min<Index>(16, columns - column)) - 1);
        even = _mm512_dpbf16_ps(even, std::bit_cast<__m512bh>(_mm512_maskz_loadu_epi32(present, v + column)),
                                zero);
      }
    }
    return is_finite(sum_of_lanes(Packet<float>{_mm512_add_ps(even, odd)}));
  }

  static Packet<float> weight_of(const Weight* p, Index j, Index stride) {
    return weight_of_pair(p, j, stride);
  }
  static float value_of(const Value* v, Index v_stride, Index j, Index column) {
    const Pair pair = v[j / 2 * v_stride + column];
    return std::bit_cast<float>(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  }

  /// Rows of values as pairs of two keys: to[j / 2][column]. Missing keys and columns become 0.
  static void pair_values(const Key* v, Index v_stride, Index keys, Index cols, Value* to, Index to_cols) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (Index j = 0; j < keys; j += 2, v += 2 * v_stride, to += to_cols) {
      const bool two = j + 1 < keys;
      const Key* next = v + v_stride;
      Index c = 0;
      for (; c + 32 <= cols; c += 32) {
        const __m512i a = _mm512_loadu_si512(v + c),
                      b = two ? _mm512_loadu_si512(next + c) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + c + 16, _mm512_permutex2var_epi16(a, high, b));
      }
      for (; c < cols; ++c) {
        to[c] = std::bit_cast<std::uint16_t>(v[c]) |
                (two ? Pair{std::bit_cast<std::uint16_t>(next[c])} << 16 : 0);
      }
      std::fill(to + c, to + to_cols, Pair{0});
    }
  }

 private:
  /// The factors that score_rows and value_rows multiply: pairs, whose product is the sum of two products.
  struct PairFactors {
    using Real = float;
    using Key = Eigen::bfloat16;
    using Element = Pair;
    using Factor = __m512bh;
    static constexpr Index columns = 2;

    static LONGSPAN_INLINE Factor load(const Pair* from) {
      return std::bit_cast<__m512bh>(_mm512_loadu_si512(from));
    }
    static LONGSPAN_INLINE Factor broadcast(const void* from) {
      int pair;
      std::memcpy(&pair, from, sizeof pair);
      return std::bit_cast<__m512bh>(_mm512_set1_epi32(pair));
    }
    static LONGSPAN_INLINE Factor broadcast_key(const Key* from) { return broadcast(from); }
    static LONGSPAN_INLINE Packet<float> add_product(Factor a, Factor b, Packet<float> sum) {
      return {_mm512_dpbf16_ps(sum.raw, a, b)};
    }
  };

  template <int packets, class Shifted>
  static LONGSPAN_INLINE void exp_pairs(const float* s, Index keys, float factor, const float* shift,
                                        float* total, Weight* pairs, Index stride, const Shifted& shifted) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const Packet<float> by = broadcast(factor);
    Packet<float> sum[std::size_t(packets)], down[std::size_t(packets)];
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) {
      sum[c] = load<float>(total + c * 16);
      down[c] = broadcast(0.0f) - load<float>(shift + c * 16);
    }
    for (Index j = 0; j < keys; j += 2, s += 2 * stride, pairs += stride) {
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) {
        const Packet<float> first = coarse_exp_score(shifted(load<float>(s + c * 16), by, down[c]));
        const Packet<float> second = coarse_exp_score(shifted(load<float>(s + stride + c * 16), by, down[c]));
        sum[c] = sum[c] + (first + second);
        const __m512i rounded = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second.raw, first.raw));
        _mm512_storeu_si512(pairs + c * 16, _mm512_permutexvar_epi16(interleave, rounded));
      }
    }
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) store(total + c * 16, sum[c]);
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END

LONGSPAN_INTRINSICS_END

#endif
