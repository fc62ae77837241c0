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
#include "longspan/detail/tile/bf16_weights.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_INTRINSICS_BEGIN

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// A tile unit for keys and values of int8. Row j of keys stands for k_scale[j] times its numbers, which are exact in
/// bfloat16, and so are those of values: scores are multiplied by k_scale, and weights by v_scale before they are rounded.
template <class TileUnit>
struct RowScales : TileUnit {
  static constexpr bool scales_rows = true;
};

/// `Unit` is HardwareTiles or EmulatedTiles, or one of them with RowScales.
template <class Unit>
struct AmxArithmetic {
  static constexpr bool scales_rows = requires { Unit::scales_rows; };
  using Real = float;
  /// Two bfloat16: of columns c and c + 1 in queries, of keys j and j + 1 in values and weights.
  using Pair = std::uint32_t;
  using Query = Pair;
  using Key = Eigen::bfloat16;
  using Value = Pair;
  using Weight = Pair;
  static constexpr Index keys_in_row = 2;
  static constexpr Index keys_in_block = tuning::keys_in_tile_block;
  static constexpr Index keys_in_step = 32;  ///< keys whose scores are made together
  static constexpr Index columns_in_step = 32;
  static constexpr Index columns_in_tile = 16;  ///< outputs have a multiple of this
  static constexpr float masked_score = -std::numeric_limits<float>::infinity();

  static Index query_rows(Index head_dim) { return round_up(head_dim, columns_in_step) / 2; }
  static float query_factor(double) { return 1; }
  static float score_factor(double scale) { return static_cast<float>(scale); }

  /// Packs 16 queries, whose rows are bfloat16, or float and then rounded; rows up to query_rows(head_dim) become 0.
  template <class RowOf>
  static void pack(const RowOf& row_of, Index head_dim, float, Query* to, Index stride) {
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

  /// Pairs of neighbouring rows: to[j / 2][column] has the columns of rows j and j + 1. `rows` and `to_cols` are rounded
  /// up to multiples of 32 and 16; what is missing becomes 0.
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

  /// True if no value of `rows` pairs of keys, rounded up to a multiple of 16, is infinite or NaN.
  static bool values_finite(const Value* v, Index v_stride, Index rows, Index) {
    const Value* end = v + round_up(rows, 16) * v_stride;
    __mmask32 found = 0;
    for (; v != end; v += 16) found |= not_finite(_mm512_loadu_si512(v));
    return found == 0;
  }

  /// Copies a multiple of 16 pairs, with 0 in place of infinity and NaN.
  static void copy_finite(const Value* from, Index pairs, Value* to) {
    for (Index i = 0; i < pairs; i += 16) {
      const __m512i values = _mm512_loadu_si512(from + i);
      _mm512_storeu_si512(to + i, _mm512_maskz_mov_epi16(~not_finite(values), values));
    }
  }

  static Packet<float> weight_of(const Weight* p, Index j, Index stride) {
    return weight_of_pair(p, j, stride);
  }
  static float value_of(const Value* v, Index v_stride, Index j, Index column) {
    const Pair pair = v[j / 32 * 16 * v_stride + column * 16 + j % 32 / 2];
    return std::bit_cast<float>(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  }

  /// Transposes rows of values: to[j / 32][column][j % 32], those of int8 divided by 128. `to_cols` is a multiple of 16;
  /// missing keys and columns become 0. `prefetches`: also prefetches the rows of the next block.
  template <bool prefetches = false, class T>
  static void transpose_values(const T* v, Index v_stride, Index keys, Index cols, Value* to, Index to_cols) {
    for (Index first = 0; first < keys; first += 32, v += 32 * v_stride, to += 16 * to_cols) {
      for (Index column = 0; column < to_cols; column += 32)
        transpose_square<prefetches>(v + column, v_stride, keys - first, cols - column, to + 16 * column,
                                     column + 16 < to_cols);
    }
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
  static LONGSPAN_INLINE void transpose_square(const T* v, Index v_stride, Index keys, Index cols, Value* to,
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
