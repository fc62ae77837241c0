// Applies a score function in place to the scores [keys][queries] of a few queries.
#pragma once

#include <algorithm>
#include <limits>

#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The scores of some queries and a run of keys: s[j * count + g] is that of query `first` + g and key
/// keys.begin + j. `count` divides the lanes of a packet.
///
/// `count` is not a template argument: the same machine code then computes the scores of a query whatever the number of
/// other queries, so the compiler cannot contract multiplications and additions in two different ways.
template <class Real>
struct ScoreBlock {
  static constexpr Index w = lanes<Real>;
  static constexpr Real hidden = FloatArithmetic<Real>::masked_score;

  Real* s = nullptr;           ///< whole packets
  const bool* seen = nullptr;  ///< the same shape, or null if all keys are visible
  const QueryLanes& queries;
  Index first = 0;
  Index count = 1;
  KeyRange keys;

  Index size() const { return (keys.end - keys.begin) * count; }
  /// The queries without surplus slots, which repeat the last query and whose results nothing reads.
  Index real_queries() const { return (std::min)(count, queries.count - first); }
  Index query(Index lane) const { return first + lane % count; }
  Index key(Index at) const { return keys.begin + at / count; }
};

/// The form of the changed scores: in score units, ready for the softmax, or as the next score function needs them.
enum class ScoreEnd : bool { in_units, for_next };

/// Converts a changed score to the form `end`. A score of -infinity hides its key: in score units it becomes the finite
/// FloatArithmetic::masked_score.
template <ScoreEnd end, class Real>
LONGSPAN_INLINE Packet<Real> ended(Packet<Real> s) {
  if constexpr (end == ScoreEnd::for_next) return s;
  return lane_max(s * broadcast(score_unit<Real>), broadcast(FloatArithmetic<Real>::masked_score));
}

/// s = f(s, distance of each lane) for all packets of a block. Returns true if a score is now the masked score.
template <ScoreEnd end, class Real, class F>
LONGSPAN_NOINLINE bool change_packets(const ScoreBlock<Real>& block, const F& f) {
  constexpr Index w = lanes<Real>;
  constexpr auto exact = Index{1} << std::numeric_limits<Real>::digits;
  const Packet<Real> hidden = broadcast(FloatArithmetic<Real>::masked_score), one = broadcast(Real(1));
  Packet<Real> hides = broadcast(Real(0));
  alignas(64) Real of_lane[std::size_t(w)];
  const auto distances_at = [&](Index at) {
    for (Index i = 0; i < w; ++i)
      of_lane[i] = static_cast<Real>(block.queries.position(block.query(i)) - block.key(at + i));
    return load(static_cast<const Real*>(of_lane));
  };
  const auto change = [&](Index at, Packet<Real> distance) {
    const Packet<Real> s = ended<end>(f(load(static_cast<const Real*>(block.s + at)), distance));
    if constexpr (end == ScoreEnd::in_units) hides = hides + (equal(s, hidden) & one);
    store(block.s + at, s);
  };
  const Index size = block.size();
  const auto is_exact = [&](Index distance) { return -exact < distance && distance < exact; };
  const Index first_position = block.queries.position(block.first),
              last_position = block.queries.position(block.first + block.count - 1);
  if (is_exact(last_position - block.keys.begin) && is_exact(first_position - block.keys.end - w)) {
    const Packet<Real> step = broadcast(static_cast<Real>(w / block.count));
    Packet<Real> distance = distances_at(0);
    for (Index at = 0; at < size; at += w, distance = distance - step) change(at, distance);
  } else {
    for (Index at = 0; at < size; at += w) change(at, distances_at(at));
  }
  return !(sum_of_lanes(hides) == Real(0));
}

/// Applies a packet score that accepts one head for all lanes to lanes of different heads: computes each head in turn
/// and selects its lanes.
template <class Real, class S>
class HeadByHead {
 public:
  HeadByHead(const S& score, const Index* heads) : score_(score) {
    alignas(64) Real is_of[std::size_t(lanes<Real>)];
    for (int i = 0; i < lanes<Real>; ++i) {
      if (std::find(heads, heads + i, heads[i]) != heads + i) continue;
      for (int lane = 0; lane < lanes<Real>; ++lane) is_of[lane] = Real(heads[lane] == heads[i]);
      head_[distinct_] = heads[i];
      lanes_of_[distinct_++] = equal(load(static_cast<const Real*>(is_of)), broadcast(Real(1)));
    }
  }
  Packet<Real> operator()(Packet<Real> s, Packet<Real> distance) const {
    Packet<Real> changed = score_.on_packet(s, head_[0], distance);
    for (int n = 1; n < distinct_; ++n)
      changed = select(lanes_of_[n], score_.on_packet(s, head_[n], distance), changed);
    return changed;
  }

 private:
  const S& score_;
  Index head_[std::size_t(lanes<Real>)];
  Packet<Real> lanes_of_[std::size_t(lanes<Real>)];
  int distinct_ = 0;
};

/// Calls a score function once for each key that query g sees. Returns true if it hides one.
template <ScoreEnd end, bool masked, class Real, class S>
LONGSPAN_NOINLINE bool change_each(const ScoreBlock<Real>& block, const S& score, Index g) {
  constexpr Real hidden = FloatArithmetic<Real>::masked_score;
  const Index b = block.queries.batch, h = block.queries.head(block.first + g),
              i = block.queries.position(block.first + g), count = block.count, end_key = block.keys.end;
  Real* s = block.s + g;
  const bool* seen = block.seen + (masked ? g : 0);
  Real lowest = 0;
  for (Index j = block.keys.begin; j < end_key; ++j, s += count) {
    if constexpr (masked) {
      const bool sees = *seen;
      seen += count;
      if (!sees) continue;
    }
    Real changed = static_cast<Real>(score(static_cast<ScoreValue<S, Real>>(*s), b, h, i, j));
    if constexpr (end == ScoreEnd::in_units) {
      changed = (std::max)(changed * score_unit<Real>, hidden);  // in this order NaN stays NaN
      lowest = (std::min)(lowest, changed);
    }
    *s = changed;
  }
  return lowest == hidden;
}

template <class S>
inline constexpr bool is_piped = false;
template <class A, class B>
inline constexpr bool is_piped<piped<A, B>> = true;

/// Applies `score` in the fastest way that it offers: packets of any heads, packets of one head, or one by one. Returns
/// true if a score is now the masked score. The previous scores of hidden keys are lost.
template <ScoreEnd end = ScoreEnd::in_units, class Real, class S>
bool change_scores(const ScoreBlock<Real>& block, const S& score) {
  if constexpr (PacketScore<S, Packet<Real>>) {
    Index heads[std::size_t(lanes<Real>)];
    for (Index i = 0; i < lanes<Real>; ++i) heads[i] = block.queries.head(block.query(i));
    if constexpr (PacketScoreOfHeads<S, Real>) {
      return change_packets<end>(block, score.template for_heads<Real>(heads));
    } else {
      return change_packets<end>(block, HeadByHead<Real, S>(score, heads));
    }
  } else if constexpr (is_piped<S>) {
    change_scores<ScoreEnd::for_next>(block, score.first);
    return change_scores<end>(block, score.second);
  } else {
    bool hides = false;
    for (Index g = 0; g < block.real_queries(); ++g) {
      hides |= block.seen == nullptr ? change_each<end, false>(block, score, g)
                                     : change_each<end, true>(block, score, g);
    }
    return hides;
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
