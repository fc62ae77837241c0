// Applies a score function, and its derivative, to the scores of one query with consecutive keys.
#pragma once

#include <cstddef>

#include "longspan/detail/simd/packet.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The scores of the query at position `query` with the keys [first_key, first_key + keys), in whole packets: lanes
/// after the last key hold any numbers.
template <class Real>
struct ScoreRow {
  Real* s = nullptr;
  Index batch = 0, head = 0, query = 0, first_key = 0, keys = 0;

  /// Position minus key for each lane of a packet.
  Packet<Real> distance(Index at) const {
    alignas(64) Real of_lane[std::size_t(lanes<Real>)];
    for (Index i = 0; i < lanes<Real>; ++i) of_lane[i] = static_cast<Real>(query - (first_key + at + i));
    return load(static_cast<const Real*>(of_lane));
  }
};

template <class S, class Real>
concept KeysScore = requires(const S& score, Real* s, Index x) { score.on_keys(s, x, x, x, x, x); };

template <class S>
inline constexpr bool is_chain = false;
template <class A, class B>
inline constexpr bool is_chain<piped<A, B>> = true;

/// Changes the scores in place, in the fastest way that the score function offers.
template <class Real, class S>
void change_row(const S& score, const ScoreRow<Real>& row) {
  constexpr Index w = lanes<Real>;
  if constexpr (PacketScore<S, Packet<Real>>) {
    for (Index at = 0; at < row.keys; at += w)
      store(row.s + at,
            score.on_packet(load(static_cast<const Real*>(row.s + at)), row.head, row.distance(at)));
  } else if constexpr (KeysScore<S, Real>) {
    score.on_keys(row.s, row.batch, row.head, row.query, row.first_key, row.keys);
  } else if constexpr (is_chain<S>) {
    change_row(score.first, row);
    change_row(score.second, row);
  } else {
    for (Index n = 0; n < row.keys; ++n) {
      row.s[n] = static_cast<Real>(score(static_cast<ScoreValue<S, Real>>(row.s[n]), row.batch, row.head,
                                         row.query, row.first_key + n));
    }
  }
}

/// slope[n] = the derivative of the changed score with respect to score n.
template <class Real, class S>
void slopes_of(const S& score, const ScoreRow<Real>& row, Real* slope) {
  constexpr Index w = lanes<Real>;
  if constexpr (PacketDerivative<S, Packet<Real>>) {
    for (Index at = 0; at < row.keys; at += w) {
      store(slope + at, score.derivative_on_packet(load(static_cast<const Real*>(row.s + at)), row.head,
                                                   row.distance(at)));
    }
  } else {
    const Index padded = (row.keys + w - 1) / w * w;
    for (Index n = 0; n < padded; ++n) {
      slope[n] = n < row.keys
                     ? static_cast<Real>(score.derivative(static_cast<ScoreValue<S, Real>>(row.s[n]),
                                                          row.batch, row.head, row.query, row.first_key + n))
                     : Real(0);
    }
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
