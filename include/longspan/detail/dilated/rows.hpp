// The rows that one head keeps of a branch, numbered as a sequence of their own: row t is at position first + t * step.
// Masks, scores and encodings use the positions in the whole sequence.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/dilation.hpp"
#include "longspan/error.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Throws Error if the sum of two positions might not fit into an Index.
inline void check_dilated_first_query(std::string_view function, Index first_query) {
  constexpr Index most = Index{1} << 61;
  if (first_query < -most || first_query > most) {
    refuse(function, "first_query", std::to_string(first_query),
           std::to_string(-most) + ".." + std::to_string(most));
  }
}

constexpr Index floor_divide(Index x, Index by) { return x >= 0 ? x / by : -divide_up(-x, by); }

struct DilatedRows {
  Index first = 0;
  Index step = 1;
  Index in_segment = 1;  ///< rows of a segment; segments follow one another without a gap

  constexpr Index position(Index t) const noexcept { return first + t * step; }
  /// The first row at or after position n.
  constexpr Index row_from(Index n) const noexcept { return -floor_divide(first - n, step); }
  constexpr KeyRange segment(Index t) const noexcept {
    const Index begin = t / in_segment * in_segment;
    return {begin, begin + in_segment};
  }
  /// The smallest tile of positions that contains a tile of rows.
  constexpr Tile spread(const Tile& tile) const noexcept {
    return {tile.batch,
            tile.first_head,
            tile.heads,
            position(tile.first_query),
            (tile.queries - 1) * step + 1,
            position(tile.first_key),
            (tile.keys - 1) * step + 1};
  }
};

/// The keys of the query's own segment that a range mask shows: again a range mask.
template <RangeMask M>
struct SegmentMask {
  const M* mask;
  DilatedRows rows;

  KeyRange keys(Index b, Index t) const {
    const KeyRange own = rows.segment(t), seen = within_bounds(mask->keys(b, rows.position(t)));
    return {(std::max)(own.begin, rows.row_from(seen.begin)), (std::min)(own.end, rows.row_from(seen.end))};
  }
};

/// The same for any mask, without the keys that the query has already seen in an earlier branch.
template <Mask M>
struct UnmetMask {
  const M* mask;
  DilatedRows rows;
  std::span<const Branch> earlier;
  Phase phase;
  Index heads;

  bool sees(Index b, Index h, Index t, Index u) const {
    if (!rows.segment(t).contains(u)) return false;
    const Index n = rows.position(t), m = rows.position(u);
    for (const Branch& branch : earlier) {
      const Index offset = head_offset(phase, h, heads, branch.dilation);
      if (n / branch.segment == m / branch.segment && covers(branch, offset, n) && covers(branch, offset, m))
        return false;
    }
    return longspan::sees(*mask, b, h, n, m);
  }

  Coverage classify(const Tile& tile) const {
    const KeyRange first = rows.segment(tile.first_query), last = rows.segment(tile.last_query());
    const KeyRange keys = tile.key_range();
    if (!KeyRange{first.begin, last.end}.overlaps(keys)) return Coverage::none;
    Coverage seen = longspan::classify(*mask, rows.spread(tile));
    if (!KeyRange{last.begin, first.end}.contains(keys)) seen = (std::min)(seen, Coverage::some);
    for (const Branch& branch : earlier) seen = (std::min)(seen, unmet(branch, rows.spread(tile)));
    return seen;
  }
  KeyRanges key_ranges(const Tile& tile) const {
    return KeyRanges({rows.segment(tile.first_query).begin, rows.segment(tile.last_query()).end});
  }

 private:
  /// How much of a tile an earlier branch leaves. If the earlier branch keeps every row of this one, as in a schedule
  /// where each step is a multiple of the one before, it has covered exactly the keys of its own segment.
  Coverage unmet(const Branch& branch, const Tile& tile) const {
    const Index keys_from = tile.first_key / branch.segment,
                keys_to = (tile.first_key + tile.keys - 1) / branch.segment;
    const Index queries_from = tile.first_query / branch.segment,
                queries_to = tile.last_query() / branch.segment;
    if (keys_to < queries_from || keys_from > queries_to) return Coverage::all;
    const bool keeps_all =
        branch.segment % branch.dilation == 0 && rows.step % branch.dilation == 0 &&
        covers(branch, head_offset(phase, tile.first_head, heads, branch.dilation), rows.first);
    return keeps_all && keys_from == keys_to && queries_from == queries_to ? Coverage::none : Coverage::some;
  }
};

/// A score function that receives positions in the whole sequence.
template <Score S>
struct DilatedScore {
  const S* score;
  DilatedRows rows;

  template <class Real>
  Real operator()(Real s, Index b, Index h, Index t, Index u) const {
    using Value = ScoreValue<S, Real>;
    return static_cast<Real>((*score)(static_cast<Value>(s), b, h, rows.position(t), rows.position(u)));
  }
  template <class Real>
  requires PacketScore<S, Packet<Real>>
  Packet<Real> on_packet(Packet<Real> s, Index h, Packet<Real> distance) const {
    return score->on_packet(s, h, distance * broadcast(static_cast<Real>(rows.step)));
  }
  template <class Real>
  Real derivative(Real s, Index b, Index h, Index t, Index u) const
  requires DifferentiableScore<S>
  {
    using Value = ScoreValue<S, Real>;
    return static_cast<Real>(
        score->derivative(static_cast<Value>(s), b, h, rows.position(t), rows.position(u)));
  }
  template <class Real>
  requires PacketDerivative<S, Packet<Real>>
  Packet<Real> derivative_on_packet(Packet<Real> s, Index h, Packet<Real> distance) const {
    return score->derivative_on_packet(s, h, distance * broadcast(static_cast<Real>(rows.step)));
  }
};

template <class S>
inline constexpr bool only_adds<DilatedScore<S>> = only_adds<S>;

/// A position encoding that receives positions in the whole sequence.
template <Position P>
struct DilatedPosition {
  const P* encoding;
  DilatedRows rows;

  template <class Real>
  void encode(MatrixView<Real> x, Index t, Role role) const {
    if (rows.step == 1) return encoding->encode(x, rows.position(t), role);
    for (Index i = 0; i < x.rows; ++i) {
      encoding->encode(MatrixView<Real>{x.row(i), 1, x.cols, x.row_stride}, rows.position(t + i), role);
    }
  }
  void check(Index) const noexcept {}
};

/// `unchanged` and `no_position` keep their types, so that a kernel still recognises them.
template <Score S>
auto dilated_score(const S& score, const DilatedRows& rows) {
  if constexpr (std::is_same_v<S, unchanged>) {
    return unchanged{};
  } else {
    return DilatedScore<S>{&score, rows};
  }
}
template <Position P>
auto dilated_position(const P& position, const DilatedRows& rows) {
  if constexpr (std::is_same_v<P, no_position>) {
    return no_position{};
  } else {
    return DilatedPosition<P>{&position, rows};
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
