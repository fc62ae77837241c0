// The three inner loops of attention, on tiles that stay in registers.
//
// Queries are in the lanes. Scores S[key][lane], weights P[key][lane] and outputs O[column][lane] are rows of
// packets, so max, exp and sum are all vertical; K and V are read by broadcast, in their own layout, at any
// row stride: no packing and no horizontal sums. With keys in the lanes and K packed once per head the same
// tile is 7-8 % slower, packed per tile 22 %.
#pragma once

#include <algorithm>

#include "longspan/detail/exp2.hpp"
#include "longspan/detail/simd.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN
namespace detail {

/// Register tiles, rows x packets: 8 x 3 with 32 vector registers (24 accumulators reach 99 % of the FMA
/// roof, 4 x 4 only 78 %), 4 x 3 with 16, or 4 x 2 where the product of a multiply-add needs a register of
/// its own.
inline constexpr int tile_rows = vector_registers == 32 ? 8 : 4;
inline constexpr int tile_packets = vector_registers == 32 || has_fused_multiply_add ? 3 : 2;

/// Calls work.template operator()<packets>() with the run-time number of packets, 1 to tile_packets.
template <class Work>
LONGSPAN_INLINE void with_packets(int packets, const Work& work) {
  if (packets == 1) return work.template operator()<1>();
  if constexpr (tile_packets == 3) {
    if (packets == 3) return work.template operator()<3>();
  }
  work.template operator()<2>();
}

/// S[j][lane] = sum_c K[j][c] * Q[c][lane] for the keys j < tile_rows, and highest[lane] = max over them.
///
/// `k_rows` (1 to tile_rows) keys exist: rows behind repeat the last one, which changes no maximum. All of
/// tile_rows rows of S are written.
template <int packets, class Real>
void score_rows(const Real* k, Index k_stride, Index k_rows, const Real* q, Index q_stride, Index head_dim,
                Real* s, Index s_stride, Real* highest) {
  constexpr int w = lanes<Real>;
  const Real* row[std::size_t(tile_rows)];
  LONGSPAN_UNROLL
  for (int r = 0; r < tile_rows; ++r) row[r] = k + std::min<Index>(r, k_rows - 1) * k_stride;

  Packet<Real> sum[std::size_t(tile_rows)][std::size_t(packets)];
  LONGSPAN_UNROLL
  for (int r = 0; r < tile_rows; ++r) {
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) sum[r][c] = broadcast(Real(0));
  }
  LONGSPAN_NO_UNROLL
  for (Index i = 0; i < head_dim; ++i, q += q_stride) {
    Packet<Real> of_query[std::size_t(packets)];
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) of_query[c] = load(q + c * w);
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      const Packet<Real> of_key = broadcast(row[r] + i);
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) sum[r][c] = fma(of_key, of_query[c], sum[r][c]);
    }
  }
  LONGSPAN_UNROLL
  for (int c = 0; c < packets; ++c) {
    Packet<Real> top = load(static_cast<const Real*>(highest) + c * w);
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      top = max(top, sum[r][c]);
      store(s + r * s_stride + c * w, sum[r][c]);
    }
    store(highest + c * w, top);
  }
}

/// P[j][lane] = weight(S[j][lane] - shift[lane]) in place for `keys` rows; total[lane] grows by their sum.
template <int packets, class Real>
void weigh_rows(Real* s, Index s_stride, Index keys, const Real* shift, Real* total) {
  constexpr int w = lanes<Real>;
  Packet<Real> by[std::size_t(packets)], sum[std::size_t(packets)];
  LONGSPAN_UNROLL
  for (int c = 0; c < packets; ++c) {
    by[c] = load(shift + c * w);
    sum[c] = load(static_cast<const Real*>(total) + c * w);
  }
  LONGSPAN_UNROLL_BY_2
  for (Index j = 0; j < keys; ++j) {
    Real* row = s + j * s_stride;
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) {
      const Packet<Real> p = weight(load(static_cast<const Real*>(row) + c * w) - by[c]);
      sum[c] = sum[c] + p;
      store(row + c * w, p);
    }
  }
  LONGSPAN_UNROLL
  for (int c = 0; c < packets; ++c) store(total + c * w, sum[c]);
}

/// What value_rows does with the sum over its keys.
enum class Into : unsigned char {
  fresh,      ///< O = sum
  continued,  ///< O = O + sum, the sum carried on from O key by key
  rescaled,   ///< O = scale * O + sum
};

/// sum = sum_j V[j][r] * P[j][lane] over `keys` keys, for the value columns r < tile_rows, into O[r][lane].
template <int packets, class Real>
void value_rows(const Real* v, Index v_stride, const Real* p, Index p_stride, Index keys, Real* o,
                Index o_stride, Into into, const Real* scale) {
  constexpr int w = lanes<Real>;
  Packet<Real> sum[std::size_t(tile_rows)][std::size_t(packets)];
  LONGSPAN_UNROLL
  for (int r = 0; r < tile_rows; ++r) {
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) sum[r][c] = broadcast(Real(0));
  }
  if (into == Into::continued) {
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) sum[r][c] = load(static_cast<const Real*>(o) + r * o_stride + c * w);
    }
  }
  LONGSPAN_NO_UNROLL
  for (Index j = 0; j < keys; ++j, v += v_stride, p += p_stride) {
    Packet<Real> of_query[std::size_t(packets)];
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) of_query[c] = load(p + c * w);
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      const Packet<Real> of_value = broadcast(v + r);
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) sum[r][c] = fma(of_value, of_query[c], sum[r][c]);
    }
  }
  if (into == Into::rescaled) {
    Packet<Real> by[std::size_t(packets)];
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) by[c] = load(scale + c * w);
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) {
        sum[r][c] = fma(by[c], load(static_cast<const Real*>(o) + r * o_stride + c * w), sum[r][c]);
      }
    }
  }
  LONGSPAN_UNROLL
  for (int r = 0; r < tile_rows; ++r) {
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) store(o + r * o_stride + c * w, sum[r][c]);
  }
}

}  // namespace detail
LONGSPAN_END
