// The running softmax of a few queries: accumulator.hpp transposed.
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

/// The running softmax of the queries of one KV head. The transpose of Accumulator: each query is a row of `o`.
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

  /// Adds the sums of `other`, as Accumulator::merge does.
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

  /// Takes scores [keys][count] of the `count` queries from `first` on: raises the row maxima, replaces each score by
  /// its exp score and adds the exp scores to the row sums. Writes the factors by which the caller must multiply o to
  /// `rescale`. `count` is a power of two of at most w, `size` a multiple of w * count.
  void weigh(Real* scores, Index size, Index count, Index first, Real* rescale) const {
    Real* const maxima = row_max + first;
    Real* const sums = sum + first;
    alignas(64) Real of_lane[std::size_t(w)];
    for (Index i = 0; i < w; ++i) of_lane[i] = maxima[i & (count - 1)];
    const Packet<Real> before = load<Real>(of_lane);
    Packet<Real> raised = before;
    for (Index i = 0; i < size; i += w) raised = lane_max(raised, load<Real>(scores + i));
    store<Real>(of_lane, raised);
    fold(of_lane, count, larger);
    for (Index i = count; i < w; ++i) of_lane[i] = of_lane[i & (count - 1)];
    raised = load<Real>(of_lane);
    store(rescale, exp_score(before - raised));
    std::copy_n(of_lane, count, maxima);

    // A lane of total n adds every w-th key, whatever `count` is. The totals are then added in the order of decreasing
    // distance, so the sum of a query does not depend on the queries next to it.
    Packet<Real> total[std::size_t(w)];
    for (Index n = 0; n < count; ++n) {
      Packet<Real> of_n = broadcast(Real(0));
      for (Index i = n * w; i < size; i += w * count) {
        const Packet<Real> p = exp_score(load<Real>(scores + i) - raised);
        of_n = of_n + p;
        store(scores + i, p);
      }
      total[n] = of_n;
    }
    for (Index apart = count / 2; apart > 0; apart /= 2) {
      for (Index n = 0; n < apart; ++n) total[n] = total[n] + total[n + apart];
    }
    store<Real>(of_lane, total[0]);
    fold(of_lane, count, std::plus<>());
    for (Index g = 0; g < count; ++g) sums[g] = sums[g] * rescale[g] + of_lane[g];
  }

 private:
  /// Combines of_lane[g], of_lane[g + count], ... into of_lane[g].
  template <class Combine>
  static void fold(Real (&of_lane)[std::size_t(w)], Index count, const Combine& combine) {
    for (Index apart = w / 2; apart >= count; apart /= 2) {
      for (Index i = 0; i < apart; ++i) of_lane[i] = combine(of_lane[i], of_lane[i + apart]);
    }
  }

  /// The larger one; NaN if either is NaN. (Without a branch, so that the compiler compares all lanes together.)
  static Real larger(Real a, Real b) { return bool(int(a < b) | int(b != b)) ? b : a; }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
