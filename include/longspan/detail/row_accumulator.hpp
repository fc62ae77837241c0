// The running softmax of a few queries: as accumulator.hpp, turned.
#pragma once

#include <algorithm>

#include "longspan/detail/accumulator.hpp"
#include "longspan/detail/exp2.hpp"
#include "longspan/detail/scratch.hpp"
#include "longspan/detail/simd.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN
namespace detail {

/// The running softmax of the queries of one KV head, one row of `o` to a query. As Accumulator, turned.
template <class Real>
struct RowAccumulator {
  Real* o = nullptr;  ///< [queries][stride]
  Real* top = nullptr;
  Real* sum = nullptr;
  Index queries = 0;
  Index stride = 0;

  static RowAccumulator take(Arena& arena, Index queries, Index value_dim) {
    RowAccumulator a;
    a.queries = queries;
    a.stride = round_up(value_dim, lanes<Real>);
    a.o = arena.take<Real>(queries * a.stride);
    a.top = arena.take<Real>(queries);
    a.sum = arena.take<Real>(queries);
    return a;
  }

  void clear() const {
    std::fill_n(o, queries * stride, Real(0));
    std::fill_n(top, queries, nothing_seen<Real>);
    std::fill_n(sum, queries, Real(0));
  }

  /// As Accumulator::merge.
  void merge(const RowAccumulator& other) const {
    for (Index g = 0; g < queries; ++g) {
      const Packet<Real> mine = broadcast(top[g]), others = broadcast(other.top[g]), both = max(mine, others);
      const Packet<Real> my_share = weight(mine - both), other_share = weight(others - both);
      for (Index c = 0; c < stride; c += lanes<Real>) {
        Real* to = o + g * stride + c;
        store(to, fma(load<Real>(to), my_share, load<Real>(other.o + g * stride + c) * other_share));
      }
      const Packet<Real> total = fma(broadcast(sum[g]), my_share, broadcast(other.sum[g]) * other_share);
      alignas(64) Real of_lane[std::size_t(lanes<Real>)];
      store<Real>(of_lane, total);
      sum[g] = of_lane[0];
      store<Real>(of_lane, both);
      top[g] = of_lane[0];
    }
  }
};

}  // namespace detail
LONGSPAN_END
