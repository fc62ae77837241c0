// The running softmax of a few queries: as accumulator.hpp, turned.
#pragma once

#include <algorithm>
#include <functional>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The running softmax of the queries of one KV head, one row of `o` to a query. As Accumulator, turned.
template <class Real>
struct RowAccumulator {
  static constexpr Index w = lanes<Real>;

  Real* o = nullptr;  ///< [queries][stride]
  Real* row_max = nullptr;
  Real* sum = nullptr;
  Index queries = 0;
  Index stride = 0;

  static RowAccumulator take(Arena& arena, Index queries, Index value_dim) {
    RowAccumulator a;
    a.queries = queries;
    a.stride = round_up(value_dim, lanes<Real>);
    a.o = arena.take<Real>(queries * a.stride);
    a.row_max = arena.take<Real>(queries);
    a.sum = arena.take<Real>(queries);
    return a;
  }

  void clear() const {
    std::fill_n(o, queries * stride, Real(0));
    std::fill_n(row_max, queries, empty_max<Real>);
    std::fill_n(sum, queries, Real(0));
  }

  /// As Accumulator::merge.
  void merge(const RowAccumulator& other) const {
    for (Index g = 0; g < queries; ++g) {
      const Packet<Real> mine = broadcast(row_max[g]), others = broadcast(other.row_max[g]),
                         both = lane_max(mine, others);
      const Packet<Real> my_share = exp_score(mine - both), other_share = exp_score(others - both);
      for (Index c = 0; c < stride; c += lanes<Real>) {
        Real* to = o + g * stride + c;
        store(to, fma(load<Real>(to), my_share, load<Real>(other.o + g * stride + c) * other_share));
      }
      const Packet<Real> total = fma(broadcast(sum[g]), my_share, broadcast(other.sum[g]) * other_share);
      alignas(64) Real of_lane[std::size_t(lanes<Real>)];
      store<Real>(of_lane, total);
      sum[g] = of_lane[0];
      store<Real>(of_lane, both);
      row_max[g] = of_lane[0];
    }
  }

  /// Takes scores [keys][count] of the queries from `first` on: raises their maxima to them, turns them into weights and
  /// adds these to the sums. What o has before is to be multiplied by `rescale`. `size` is a multiple of w * count.
  template <int count>
  void weigh(Real* scores, Index size, Index first, Real* rescale) const {
    Real* const maxima = row_max + first;
    Real* const sums = sum + first;
    alignas(64) Real of_lane[std::size_t(w)];
    for (int i = 0; i < w; ++i) of_lane[i] = maxima[i % count];
    const Packet<Real> before = load<Real>(of_lane);
    Packet<Real> raised = before;
    for (Index i = 0; i < size; i += w) raised = lane_max(raised, load<Real>(scores + i));
    store<Real>(of_lane, raised);
    fold<count>(of_lane, larger);
    for (int i = count; i < w; ++i) of_lane[i] = of_lane[i % count];
    raised = load<Real>(of_lane);
    store(rescale, exp_score(before - raised));
    std::copy_n(of_lane, count, maxima);

    // A lane of total[n] has every w-th key, whatever `count` is: added up from the farthest apart to the next, the
    // sum of a query is the same beside any others.
    Packet<Real> total[std::size_t(count)];
    LONGSPAN_UNROLL
    for (int n = 0; n < count; ++n) total[n] = broadcast(Real(0));
    for (Index i = 0; i < size; i += w * count) {
      LONGSPAN_UNROLL
      for (int n = 0; n < count; ++n) {
        const Packet<Real> p = exp_score(load<Real>(scores + i + n * w) - raised);
        total[n] = total[n] + p;
        store(scores + i + n * w, p);
      }
    }
    LONGSPAN_UNROLL
    for (int apart = count / 2; apart > 0; apart /= 2) {
      LONGSPAN_UNROLL
      for (int n = 0; n < apart; ++n) total[n] = total[n] + total[n + apart];
    }
    store<Real>(of_lane, total[0]);
    fold<count>(of_lane, std::plus<>());
    for (int g = 0; g < count; ++g) sums[g] = sums[g] * rescale[g] + of_lane[g];
  }

 private:
  /// of_lane[g] = all of of_lane[g], of_lane[g + count], ... combined.
  template <int count, class Combine>
  static void fold(Real (&of_lane)[std::size_t(w)], const Combine& combine) {
    LONGSPAN_UNROLL
    for (Index apart = w / 2; apart >= count; apart /= 2) {
      LONGSPAN_UNROLL
      for (Index i = 0; i < apart; ++i) of_lane[i] = combine(of_lane[i], of_lane[i + apart]);
    }
  }

  /// NaN, where either is, stays. (Without a branch: lanes are compared together.)
  static Real larger(Real a, Real b) { return bool(int(a < b) | int(b != b)) ? b : a; }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
