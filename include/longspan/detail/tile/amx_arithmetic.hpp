// The arithmetic policy of a tile for processors with AMX: bfloat16 products by matrix tiles.
//
//   scores  S[key][lane]     += K[key][d]       * Q[d pair][lane]        keys x queries, K read in place
//   outputs O[column][lane]  += V^T[column][key] * P[key pair][lane]      V is transposed once for each block
//
// Queries are in the lanes, as in the other policies. So maxima, sums and masks need no operation across lanes, and
// scores, weights and outputs have the layouts of Bf16Arithmetic. While an Intel core uses matrix tiles, it executes
// only one instead of two multiplications of float vectors per cycle, and at head_dim 64 the exponentials take as
// long as both products. Additions and logic keep their rate, so this file uses them where it can.
#pragma once

#include "longspan/detail/simd/tile_unit.hpp"

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(EIGEN_DONT_VECTORIZE)
#define LONGSPAN_HAS_AMX_ARITHMETIC 1

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/simd/prefetch_line.hpp"
#include "longspan/detail/tile/amx_rows.hpp"
#include "longspan/detail/tile/bf16_weights.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_INTRINSICS_BEGIN

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// `Unit` is HardwareTiles or EmulatedTiles, or one of them with RowScales.
template <class Unit>
struct AmxArithmetic : AmxRows {
  static constexpr bool scales_rows = requires { Unit::scales_rows; };
  using Real = float;
  using Query = Pair;
  using Value = Pair;
  using Weight = Pair;
  static constexpr Index keys_in_row = 2;
  static constexpr Index keys_in_step = 32;  ///< keys whose scores are made together
  static constexpr float masked_score = -std::numeric_limits<float>::infinity();

  static float query_factor(double) { return 1; }
  static float score_factor(double scale) { return static_cast<float>(scale); }

  /// S[j][lane] of 32 keys, all of whose rows are read up to a multiple of 32 columns.
  template <int packets>
  static LONGSPAN_INLINE void score_keys(const Key* k, Index k_stride, const Query* q, Index head_dim,
                                         float* s, Index stride) {
    multiply_rows<packets>(k, k_stride, q, stride, head_dim, s, stride, false);
  }

  /// C[r][lane] = sum_k A[r][k] * B[k][lane] for 32 rows, added to C if `adds`. B is in pairs of k; A is read up to a
  /// multiple of 32 columns.
  template <int packets>
  static LONGSPAN_INLINE void multiply_rows(const Key* a_rows, Index a_stride, const Pair* b_pairs,
                                            Index b_stride, Index depth, float* c, Index c_stride,
                                            bool adds) {
    const Index c_row = c_stride * Index(sizeof(float)), b_row = b_stride * Index(sizeof(Pair)),
                a_row = a_stride * Index(sizeof(Key));
    if (adds) {
      load_sums<packets>(c, c + 16 * c_stride, c_row);
    } else {
      zero_sums<packets>();
    }
    for (Index k = 0; k < depth; k += columns_in_step, a_rows += columns_in_step, b_pairs += 16 * b_stride)
      add_step<packets>(a_rows, a_row, a_rows + 16 * a_stride, a_row, b_pairs, b_row);
    store_sums<packets>(c, c + 16 * c_stride, c_row);
  }

  /// O[column][lane] += the sum over `steps` steps of 32 keys of V^T[column][key] * P[key pair][lane]. Values are laid
  /// out by transpose_values, `columns` (a multiple of 16) of them.
  template <int packets>
  static LONGSPAN_INLINE void add_values(const Value* v, Index columns, const Weight* p, Index steps,
                                         float* o, Index stride) {
    const Index row = stride * Index(sizeof(float)), v_step = columns * 16;
    for (Index column = 0; column < columns; column += 32, v += 512, o += 32 * stride) {
      const Value* of_step = v;
      const Weight* weights = p;
      if (column + 16 < columns) {
        load_sums<packets>(o, o + 16 * stride, row);
        for (Index n = 0; n < steps; ++n, of_step += v_step, weights += 16 * stride)
          add_step<packets>(of_step, 64, of_step + 256, 64, weights, row);
        store_sums<packets>(o, o + 16 * stride, row);
      } else {
        for_each_tile<packets>([&]<int c>() { Unit::template load<c>(o + 16 * c, row); });
        for (Index n = 0; n < steps; ++n, of_step += v_step, weights += 16 * stride) {
          Unit::template load<a>(of_step, 64);
          for_each_tile<packets>([&]<int c>() {
            Unit::template load<b>(weights + 16 * c, row);
            Unit::template add_products<c, a, b>();
          });
        }
        for_each_tile<packets>([&]<int c>() { Unit::template store<c>(o + 16 * c, row); });
      }
    }
  }

  /// If a weight would be above 2^most_rise, the row max is raised and the weights are computed again.
  static constexpr float most_rise = 16;

  /// Two rows of keys for each step.
  struct RowsAhead {
    const Key* next;
    Index row_stride, columns;

    LONGSPAN_INLINE void step() {
      for (int row = 0; row < 2; ++row, next += row_stride) {
        for (Index column = 0; column < columns; column += cache_line / Index(sizeof(Key)))
          prefetch_line_to_l2(reinterpret_cast<std::uintptr_t>(next + column));
      }
    }
  };

  /// weights[j / 2] = exp_score(factor * s[j] - row_max) of two keys, times v_scale[j] if rows have scales, rounded to
  /// bfloat16. Adds exp_score(...) to `sum`. Returns true if an exponent is above most_rise; the results are then of no
  /// use. Takes a step of `ahead` for each two keys.
  template <int packets, bool rounds_products, class Ahead>
  static LONGSPAN_INLINE bool exp_keys(const float* s, float factor, const float* row_max,
                                       [[maybe_unused]] const float* v_scale, float* sum, Weight* weights,
                                       Index stride, Ahead ahead) {
    const __m512 by = _mm512_set1_ps(factor), most = _mm512_set1_ps(most_rise);
    Packet<float> total[std::size_t(packets)], shift[std::size_t(packets)];
    __m512i above = _mm512_setzero_si512();  // a sign bit where an exponent is above `most`
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) {
      total[c] = load<float>(static_cast<const float*>(sum) + c * 16);
      shift[c] = load<float>(row_max + c * 16);
    }
    LONGSPAN_NO_UNROLL
    for (int j = 0; j < keys_in_step; j += 2, s += 2 * stride, weights += stride) {
      ahead.step();
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) {
        const __m512 s_x = _mm512_loadu_ps(s + c * 16), s_y = _mm512_loadu_ps(s + stride + c * 16);
        const __m512 x = exponent<rounds_products>(s_x, by, shift[c].raw);
        const __m512 y = exponent<rounds_products>(s_y, by, shift[c].raw);
        above = _mm512_ternarylogic_epi32(above, _mm512_castps_si512(_mm512_sub_ps(most, x)),
                                          _mm512_castps_si512(_mm512_sub_ps(most, y)), 0xfe);
        Packet<float> first = coarse_exp_score({x}), second = coarse_exp_score({y});
        total[c] = total[c] + (first + second);
        if constexpr (scales_rows) {
          first = scaled_weight(first, s_x, v_scale[j]);
          second = scaled_weight(second, s_y, v_scale[j + 1]);
        }
        store_weights(weights + c * 16, first, second);
      }
    }
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) store(sum + c * 16, total[c]);
    return _mm512_movepi32_mask(above) != 0;
  }

  /// The weight of a hidden key is 0 even if its scale is NaN.
  static LONGSPAN_INLINE Packet<float> scaled_weight(Packet<float> p, __m512 s, float scale) {
    const __mmask16 seen = _mm512_cmp_ps_mask(s, _mm512_set1_ps(masked_score), _CMP_NEQ_UQ);
    return {_mm512_maskz_mul_ps(seen, p.raw, _mm512_set1_ps(scale))};
  }

  /// s[j] *= scale[j].
  template <int packets>
  static LONGSPAN_INLINE void scale_scores(const float* scale, Index keys, float* s, Index stride) {
    for (Index j = 0; j < keys; ++j, s += stride) {
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c)
        store(s + c * 16, load<float>(static_cast<const float*>(s) + c * 16) * broadcast(scale[j]));
    }
  }

  /// A packet of pairs, rounded to bfloat16, halves away from 0. The first of a pair moves down by a shuffle, which
  /// has a port of its own.
  static LONGSPAN_INLINE void store_weights(Weight* to, Packet<float> first, Packet<float> second) {
    const __m512i high = _mm512_set1_epi32(-65536), half = _mm512_set1_epi32(0x8000);
    const __m512i down =
        _mm512_set4_epi32(int(0x80800f0e), int(0x80800b0a), int(0x80800706), int(0x80800302));
    const __m512i low = _mm512_shuffle_epi8(_mm512_add_epi32(_mm512_castps_si512(first.raw), half), down);
    const __m512i up = _mm512_add_epi32(_mm512_castps_si512(second.raw), half);
    _mm512_storeu_si512(to, _mm512_ternarylogic_epi32(high, up, low, 0xca));
  }

  /// s[j] = exp_score(factor * s[j] - row_max). Adds the results to `sum`.
  template <int packets, bool rounds_products>
  static LONGSPAN_INLINE void exp_rows(float* s, Index keys, float factor, const float* row_max, float* sum,
                                       Index stride) {
    const __m512 by = _mm512_set1_ps(factor);
    Packet<float> total[std::size_t(packets)], shift[std::size_t(packets)];
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) {
      total[c] = load<float>(static_cast<const float*>(sum) + c * 16);
      shift[c] = load<float>(row_max + c * 16);
    }
    LONGSPAN_NO_UNROLL
    for (Index j = 0; j < keys; ++j, s += stride) {
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) {
        const Packet<float> e =
            coarse_exp_score({exponent<rounds_products>(_mm512_loadu_ps(s + c * 16), by, shift[c].raw)});
        total[c] = total[c] + e;
        store(s + c * 16, e);
      }
    }
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) store(sum + c * 16, total[c]);
  }

  /// factor * s - row_max. With `rounds_products` the product is rounded before the subtraction in huge_lanes.
  template <bool rounds_products>
  static LONGSPAN_INLINE __m512 exponent(__m512 s, __m512 factor, __m512 row_max) {
    const __m512 fused = _mm512_fmsub_ps(s, factor, row_max);
    if constexpr (!rounds_products) return fused;
    return _mm512_mask_sub_ps(fused, huge_lanes(row_max), opaque(_mm512_mul_ps(s, factor)), row_max);
  }

  static Packet<float> weight_of(const Weight* p, Index j, Index stride) {
    return weight_of_pair(p, j, stride);
  }

 private:
  // Tiles 0 to 2 hold 16 rows of sums, tiles 3 to 5 the next 16 rows, tiles 6 and 7 the factors.
  static constexpr int a = 6, b = 7;

  template <int count, class Work>
  static LONGSPAN_INLINE void for_each_tile(const Work& work) {
    work.template operator()<0>();
    if constexpr (count > 1) work.template operator()<1>();
    if constexpr (count > 2) work.template operator()<2>();
  }
  template <int packets>
  static LONGSPAN_INLINE void zero_sums() {
    for_each_tile<packets>([]<int c>() {
      Unit::template zero<c>();
      Unit::template zero<3 + c>();
    });
  }
  template <int packets>
  static LONGSPAN_INLINE void load_sums(const float* upper, const float* lower, Index row) {
    for_each_tile<packets>([&]<int c>() { Unit::template load<c>(upper + 16 * c, row); });
    for_each_tile<packets>([&]<int c>() { Unit::template load<3 + c>(lower + 16 * c, row); });
  }
  template <int packets>
  static LONGSPAN_INLINE void store_sums(float* upper, float* lower, Index row) {
    for_each_tile<packets>([&]<int c>() { Unit::template store<c>(upper + 16 * c, row); });
    for_each_tile<packets>([&]<int c>() { Unit::template store<3 + c>(lower + 16 * c, row); });
  }
  /// Adds the products of 32 rows and 32 columns of the left matrix with all packets of the right one. The right tile
  /// that was loaded last is used for both halves of the rows.
  template <int packets>
  static LONGSPAN_INLINE void add_step(const void* upper, Index upper_row, const void* lower, Index lower_row,
                                       const Pair* right, Index right_row) {
    Unit::template load<a>(upper, upper_row);
    for_each_tile<packets>([&]<int c>() {
      Unit::template load<b>(right + 16 * c, right_row);
      Unit::template add_products<c, a, b>();
    });
    Unit::template load<a>(lower, lower_row);
    for_each_tile<packets>([&]<int n>() {
      constexpr int c = packets - 1 - n;
      if constexpr (n > 0) Unit::template load<b>(right + 16 * c, right_row);
      Unit::template add_products<3 + c, a, b>();
    });
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END

LONGSPAN_INTRINSICS_END

#endif
