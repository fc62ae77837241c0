// The arithmetic policy of a tile in float or double. Rows of other types are converted.
#pragma once

#include <limits>
#include <span>

#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Other arithmetic policies have the same members. Rows of queries, scores,
/// weights and outputs are `stride` lanes apart.
template <class RealType>
struct FloatArithmetic {
  using Real = RealType;
  using Query = Real;   ///< element of the packed queries, [query_rows][stride]
  using Key = Real;     ///< element of key rows
  using Value = Real;   ///< element of value rows, [keys / keys_in_row][columns]
  using Weight = Real;  ///< element of weight rows, [keys / keys_in_row][stride]
  static constexpr Index keys_in_row = 1;
  static constexpr Index columns_in_tile = tile_rows;  ///< outputs have a multiple of this
  /// Length of a key block. Blocks begin at multiples of it in key index.
  static constexpr Index keys_in_block = tuning::keys_in_float_block;
  /// The score of a masked key. Finite, so that code compiled with -ffast-math keeps its meaning, and
  /// so far below `empty_max` that its weight is exactly 0 under any maximum.
  static constexpr Real masked_score = std::numeric_limits<Real>::lowest();

  static Index query_rows(Index head_dim) { return head_dim; }
  /// The scale goes into the queries; scores come out in score units.
  static Real query_factor(double scale) { return static_cast<Real>(scale); }
  static Real score_factor(double) { return Real(1); }

  /// Packs one packet of queries, lane i from row_of(i), times `factor`.
  template <class RowOf>
  static void pack(const RowOf& row_of, Index head_dim, Real factor, Query* to, Index stride) {
    constexpr Index w = lanes<Real>;
    decltype(row_of(0)) row[std::size_t(w)];
    for (Index i = 0; i < w; ++i) row[i] = row_of(i);
    const Packet<Real> by = broadcast(factor);
    Index column = 0;
    for (; column + w <= head_dim; column += w) {
      Packet<Real> square[std::size_t(w)];
      LONGSPAN_UNROLL
      for (int i = 0; i < w; ++i) square[i] = load_as<Real>(row[i] + column) * by;
      transpose(square);
      LONGSPAN_UNROLL
      for (int i = 0; i < w; ++i) store(to + (column + i) * stride, square[i]);
    }
    for (; column < head_dim; ++column) {
      for (Index i = 0; i < w; ++i) to[column * stride + i] = static_cast<Real>(row[i][column]) * factor;
    }
  }

  template <int packets, class... Ahead>
  static void score_rows(const Key* k, Index k_stride, Index keys, const Query* q, Index head_dim, Real* s,
                         Real* highest, Index stride, Ahead... ahead) {
    detail::score_rows<packets>(k, k_stride, keys, q, head_dim, s, highest,
                                tile_stride<Real, packets>(stride), ahead...);
  }
  template <int packets>
  static void exp_rows(Real* s, Index keys, Real, const Real* shift, Real* total, Weight*, Index stride) {
    detail::exp_rows<packets>(s, stride, keys, shift, total);
  }
  template <int packets, class... Ahead>
  static void value_rows(const Value* v, Index v_stride, Index columns, const Weight* p,
                         std::span<const RowRun> runs, Real* o, Accumulate into, const Real* scale,
                         Index stride, Ahead... ahead) {
    const auto of_tile = tile_stride<Real, packets>(stride);
    detail::value_rows<packets>(v, v_stride, columns, p, of_tile, runs, o, of_tile, into, scale, ahead...);
  }

  /// x * 0 is 0 for finite x and NaN for the others, and NaN stays in a sum. (An opaque 0, and a sum tested by its
  /// bits: -ffast-math knows of no NaN.)
  static bool values_finite(const Value* v, Index v_stride, Index rows, Index columns) {
    constexpr int w = lanes<Real>;
    const Packet<Real> zero = broadcast(Real(0));
    Packet<Real> zeros[4] = {zero, zero, zero, zero};
    const Packet<Real> by = opaque(zero);
    for (Index j = 0; j < rows; ++j, v += v_stride) {
      Index column = 0;
      for (; column + 4 * w <= columns; column += 4 * w) {
        LONGSPAN_UNROLL
        for (int n = 0; n < 4; ++n) zeros[n] = fma(load(v + column + n * w), by, zeros[n]);
      }
      for (; column + w <= columns; column += w) zeros[0] = fma(load(v + column), by, zeros[0]);
      if (column < columns) zeros[1] = fma(load_part<Real>(v + column, columns - column), by, zeros[1]);
    }
    return is_finite(sum_of_lanes((zeros[0] + zeros[1]) + (zeros[2] + zeros[3])));
  }

  /// The weights of key j for one packet of queries, and one value of it.
  static Packet<Real> weight_of(const Weight* p, Index j, Index stride) { return load(p + j * stride); }
  static Real value_of(const Value* v, Index v_stride, Index j, Index column) {
    return v[j * v_stride + column];
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
