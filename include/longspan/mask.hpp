// Which keys a query sees. A mask is arithmetic, never a tensor: it takes no memory, and what it hides is
// skipped, not computed.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#include "longspan/key_ranges.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// How much of a tile is seen: no pair of it, every pair, or perhaps some.
enum class Seen : std::uint8_t { none, some, all };

/// The queries [first_query, first_query + queries) of the heads [first_head, first_head + heads) of one
/// batch row, against the keys [first_key, first_key + keys). Queries are named by position (see
/// softmax_attention).
struct Tile {
  Index batch = 0;
  Index first_head = 0;
  Index heads = 1;
  Index first_query = 0;
  Index queries = 0;
  Index first_key = 0;
  Index keys = 0;

  LONGSPAN_INLINE constexpr Index last_query() const noexcept { return first_query + queries - 1; }
  LONGSPAN_INLINE constexpr KeyRange key_range() const noexcept { return {first_key, first_key + keys}; }
};

LONGSPAN_VOCABULARY_END

LONGSPAN_BEGIN

// ----------------------------------------------------------------------------------------------------------
// What a mask may offer. The least is `sees`; the rest makes it faster, and a mask that leaves it out is slow
// but never wrong.
//
//   bool sees(Index i, Index j) const                does the query at position i see key j?
//   bool sees(Index b, Index h, Index i, Index j)    the same, where it depends on batch row or head
//   Seen classify(const Tile&) const                 `none` and `all` must be true, `some` always may be said
//   KeyRanges key_ranges(const Tile&) const          every key outside is hidden from all of the tile
//
// Where the keys of each query are one range whose two ends never fall from one query to the next, a mask
// says that range, and all the answers above follow from it:
//
//   KeyRange keys(Index b, Index i) const

template <class M>
concept RangeMask = requires(const M& mask, Index x) {
  { mask.keys(x, x) } -> std::convertible_to<KeyRange>;
};

namespace detail {

template <class M>
concept SeesByPosition = requires(const M& mask, Index x) {
  { mask.sees(x, x) } -> std::convertible_to<bool>;
};
template <class M>
concept SeesByHead = requires(const M& mask, Index x) {
  { mask.sees(x, x, x, x) } -> std::convertible_to<bool>;
};

}  // namespace detail

template <class M>
concept Mask = std::is_object_v<M> && (RangeMask<M> || detail::SeesByPosition<M> || detail::SeesByHead<M>);

/// Does the query at position i of head h, batch row b, see key j?
template <Mask M>
constexpr bool sees(const M& mask, Index b, Index h, Index i, Index j) {
  if constexpr (RangeMask<M>) {
    return mask.keys(b, i).contains(j);
  } else if constexpr (detail::SeesByHead<M>) {
    return mask.sees(b, h, i, j);
  } else {
    return mask.sees(i, j);
  }
}

template <Mask M>
constexpr Seen classify(const M& mask, const Tile& tile) {
  if constexpr (RangeMask<M>) {
    const KeyRange first = mask.keys(tile.batch, tile.first_query),
                   last = mask.keys(tile.batch, tile.last_query());
    const KeyRange tile_keys = tile.key_range();
    if (!KeyRange{first.begin, last.end}.overlaps(tile_keys)) return Seen::none;
    return KeyRange{last.begin, first.end}.contains(tile_keys) ? Seen::all : Seen::some;
  } else if constexpr (requires {
                         { mask.classify(tile) } -> std::convertible_to<Seen>;
                       }) {
    return mask.classify(tile);
  } else {
    return Seen::some;
  }
}

/// Key ranges that hold every key which any query of the tile sees. The tile's own keys are not read.
template <Mask M>
constexpr KeyRanges key_ranges(const M& mask, const Tile& tile) {
  if constexpr (RangeMask<M>) {
    return KeyRanges(
        {mask.keys(tile.batch, tile.first_query).begin, mask.keys(tile.batch, tile.last_query()).end});
  } else if constexpr (requires {
                         { mask.key_ranges(tile) } -> std::convertible_to<KeyRanges>;
                       }) {
    return mask.key_ranges(tile);
  } else {
    return KeyRanges(KeyRange::everything());
  }
}

// ----------------------------------------------------------------------------------------------------------
// The masks of the library

/// No mask: every query sees every key.
struct everything {
  constexpr KeyRange keys(Index, Index) const noexcept { return KeyRange::everything(); }
};

/// Query i sees the keys 0 .. i. With fewer queries than keys the last query is aligned with the last key,
/// since that is where positions stand unless `first_query` says otherwise.
struct causal {
  constexpr KeyRange keys(Index, Index i) const noexcept { return {KeyRange::lowest, i + 1}; }
};

/// Query i sees the keys i - left .. i + right. `causal{} & window{.left = 4095}` sees the last 4096 keys.
struct window {
  static constexpr Index unlimited = KeyRange::highest;
  Index left = unlimited;
  Index right = unlimited;

  constexpr KeyRange keys(Index, Index i) const noexcept {
    return {left == unlimited ? KeyRange::lowest : i - left,
            right == unlimited ? KeyRange::highest : i + right + 1};
  }
};

/// Every query sees the first `count` keys (attention sinks: Xiao et al. 2023, arXiv 2309.17453).
struct sinks {
  Index count = 4;

  constexpr KeyRange keys(Index, Index) const noexcept { return {0, count}; }
};

/// Positions are cut into segments of `length` (at least 1); query i sees the keys of its own segment.
struct segments {
  Index length = 1;

  constexpr KeyRange keys(Index, Index i) const noexcept {
    const Index into = i % length, first = i - (into < 0 ? into + length : into);
    return {first, first + length};
  }
};

/// Packed documents: document n holds the positions starts[n] .. starts[n + 1] - 1, and a query sees the keys
/// of its own document. `starts` rises and is not owned.
struct documents {
  std::span<const Index> starts;

  constexpr KeyRange keys(Index, Index i) const noexcept {
    const auto next = std::upper_bound(starts.begin(), starts.end(), i);
    return {next == starts.begin() ? KeyRange::lowest : *(next - 1),
            next == starts.end() ? KeyRange::highest : *next};
  }
};

/// Batch row b has lengths[b] keys; those behind are padding. `!padding{pads}` is padding on the left: the
/// first pads[b] keys are hidden. One length for each batch row; not owned.
struct padding {
  std::span<const Index> lengths;

  constexpr KeyRange keys(Index b, Index) const noexcept { return {0, lengths[static_cast<std::size_t>(b)]}; }
};

// ----------------------------------------------------------------------------------------------------------
// Masks made of masks

/// What both see. `a & b`.
template <Mask A, Mask B>
struct both {
  A a;
  B b;

  constexpr bool sees(Index batch, Index h, Index i, Index j) const {
    return longspan::sees(a, batch, h, i, j) && longspan::sees(b, batch, h, i, j);
  }
  constexpr Seen classify(const Tile& tile) const {
    const Seen of_a = longspan::classify(a, tile);
    if (of_a == Seen::none) return Seen::none;
    return std::min(of_a, longspan::classify(b, tile));
  }
  constexpr KeyRanges key_ranges(const Tile& tile) const {
    return intersection(longspan::key_ranges(a, tile), longspan::key_ranges(b, tile));
  }
  constexpr KeyRange keys(Index batch, Index i) const
  requires(RangeMask<A> && RangeMask<B>)
  {
    const KeyRange of_a = a.keys(batch, i), of_b = b.keys(batch, i);
    return {std::max(of_a.begin, of_b.begin), std::min(of_a.end, of_b.end)};
  }
};

/// What either sees. `a | b`.
template <Mask A, Mask B>
struct either {
  A a;
  B b;

  constexpr bool sees(Index batch, Index h, Index i, Index j) const {
    return longspan::sees(a, batch, h, i, j) || longspan::sees(b, batch, h, i, j);
  }
  constexpr Seen classify(const Tile& tile) const {
    const Seen of_a = longspan::classify(a, tile);
    if (of_a == Seen::all) return Seen::all;
    return std::max(of_a, longspan::classify(b, tile));
  }
  constexpr KeyRanges key_ranges(const Tile& tile) const {
    return united(longspan::key_ranges(a, tile), longspan::key_ranges(b, tile));
  }
};

/// What the other hides. `!a`.
template <Mask A>
struct inverse {
  A a;

  constexpr bool sees(Index batch, Index h, Index i, Index j) const {
    return !longspan::sees(a, batch, h, i, j);
  }
  constexpr Seen classify(const Tile& tile) const {
    const Seen of_a = longspan::classify(a, tile);
    return of_a == Seen::some ? Seen::some : of_a == Seen::all ? Seen::none : Seen::all;
  }
};

template <Mask A, Mask B>
constexpr both<A, B> operator&(A a, B b) {
  return {std::move(a), std::move(b)};
}
template <Mask A, Mask B>
constexpr either<A, B> operator|(A a, B b) {
  return {std::move(a), std::move(b)};
}
template <Mask A>
constexpr inverse<A> operator!(A a) {
  return {std::move(a)};
}

LONGSPAN_END
