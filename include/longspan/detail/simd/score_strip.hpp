// The scores of one packet of queries with consecutive keys, which a score function changes in place.
#pragma once

#include <algorithm>
#include <cstddef>

#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Scores [keys][lanes of one packet] of queries at consecutive positions. A score function that can change all of them
/// faster than one by one offers
///
///   template <class Real> void on_strip(const detail::ScoreStrip<Real>&) const
template <class Real>
struct ScoreStrip {
  Real* scores = nullptr;  ///< key j is in row j
  Index stride = 0;        ///< from one key to the next
  Index batch = 0;
  Index head = 0;
  Index first_position = 0;  ///< of lane 0
  Index queries = 0;         ///< lanes in use; those after them repeat the last
  Index first_key = 0;
  Index keys = 0;

  Index position(Index lane) const noexcept { return first_position + (std::min)(lane, queries - 1); }
};

template <class S, class Real>
concept StripScore = requires(const S& score, const ScoreStrip<Real>& strip) { score.on_strip(strip); };

/// Prefetches what on_strip will read, if the score function offers `prefetch_strip`. The kernel calls this before it
/// computes the scores of the strip.
template <class S, class Real>
void prefetch_strip(const S& score, const ScoreStrip<Real>& strip) {
  if constexpr (requires { score.prefetch_strip(strip); }) score.prefetch_strip(strip);
}

/// Adds x[j] to the scores of key j, in all lanes.
template <class Real, class T>
void add_row(const ScoreStrip<Real>& strip, const T* x) {
  Real* s = strip.scores;
  for (Index j = 0; j < strip.keys; ++j, s += strip.stride)
    store(s, load(static_cast<const Real*>(s)) + broadcast(static_cast<Real>(x[j])));
}

/// Adds row_of(lane)[j] to the score of key j in that lane. Loads and transposes squares of rows.
template <class Real, class RowOf>
void add_rows(const ScoreStrip<Real>& strip, const RowOf& row_of) {
  constexpr Index w = lanes<Real>;
  decltype(row_of(0)) row[std::size_t(w)];
  for (Index i = 0; i < w; ++i) row[i] = row_of(i);
  Real* s = strip.scores;
  const auto add_square = [&](Packet<Real>(&square)[std::size_t(w)], Index keys) {
    transpose(square);
    for (Index j = 0; j < keys; ++j, s += strip.stride)
      store(s, load(static_cast<const Real*>(s)) + square[j]);
  };
  Index at = 0;
  for (; at + w <= strip.keys; at += w) {
    Packet<Real> square[std::size_t(w)];
    LONGSPAN_UNROLL
    for (Index i = 0; i < w; ++i) square[i] = load_as<Real>(row[i] + at);
    add_square(square, w);
  }
  if (at == strip.keys) return;
  Packet<Real> square[std::size_t(w)];
  for (Index i = 0; i < w; ++i) square[i] = load_part<Real>(row[i] + at, strip.keys - at);
  add_square(square, strip.keys - at);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
