// The outputs of a tile: lanes become rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// True if the outputs of two columns are converted to a pair before the transposition, which halves its shuffles
/// and the stores.
template <class Real, class To>
inline constexpr bool writes_pairs =
    converts_pairs && std::is_same_v<Real, float> && std::is_same_v<To, Eigen::bfloat16>;

/// Writes the outputs and log-sum-exps of the queries of a tile.
template <class Real, class To>
void write_lanes(const Accumulator<Real>& state, const QueryLanes& queries, TensorView<To> out,
                 RowsView<Real> lse) {
  constexpr Index w = lanes<Real>;
  const Packet<Real> zero = broadcast(Real(0)), one = broadcast(Real(1));
  for (Index first_lane = 0; first_lane < queries.count; first_lane += w) {
    const Index used = (std::min)(w, queries.count - first_lane);
    To* row[std::size_t(w)];
    for (Index i = 0; i < used; ++i) {
      row[i] = out.row(queries.batch, queries.head(first_lane + i), queries.row(first_lane + i));
    }
    const Packet<Real> sum = load<Real>(state.sum + first_lane);
    // A lane that has seen no key has sum 0; its outputs are 0.
    const Packet<Real> by = select(equal(sum, zero), zero, one / sum);
    alignas(64) Real factor[std::size_t(w)];
    store<Real>(factor, by);
    // A zero is added, so that no output is -0: the sign of a zero depends on how the keys were split among threads.
    Index column = 0;
    if constexpr (writes_pairs<Real, To>) {
      for (; column + 2 * w <= out.cols; column += 2 * w) {
        Packet<Real> square[std::size_t(w)];
        LONGSPAN_UNROLL
        for (int i = 0; i < w; ++i) {
          const Real* from = state.o + (column + 2 * i) * state.stride + first_lane;
          square[i] =
              bfloat16_pairs(fma(load<Real>(from), by, zero), fma(load<Real>(from + state.stride), by, zero));
        }
        transpose(square);
        for (Index i = 0; i < used; ++i) store(reinterpret_cast<Real*>(row[i] + column), square[i]);
      }
    }
    for (; column + w <= out.cols; column += w) {
      Packet<Real> square[std::size_t(w)];
      LONGSPAN_UNROLL
      for (int i = 0; i < w; ++i)
        square[i] = fma(load<Real>(state.o + (column + i) * state.stride + first_lane), by, zero);
      transpose(square);
      for (Index i = 0; i < used; ++i) store_as(row[i] + column, square[i]);
    }
    for (; column < out.cols; ++column) {
      for (Index i = 0; i < used; ++i) {
        row[i][column] =
            static_cast<To>(state.o[column * state.stride + first_lane + i] * factor[i] + Real(0));
      }
    }
  }
  if (lse.data == nullptr) return;
  for (Index lane = 0; lane < queries.count; ++lane) {
    lse(queries.batch, queries.head(lane), queries.row(lane)) = lse_of(state.row_max[lane], state.sum[lane]);
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
