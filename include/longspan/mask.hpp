// Masks: which keys a query sees. The masks of this header are computed from positions: they take no memory, and the
// kernels skip what they hide. For masks that are tensors see dense_mask.hpp.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "longspan/call_sizes.hpp"
#include "longspan/detail/simd/byte_bits.hpp"
#include "longspan/error.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// How much of a tile is visible: no pair, possibly some pairs, or all pairs.
enum class Coverage : std::uint8_t { none, some, all };

/// The pairs of the queries [first_query, first_query + queries) of the heads [first_head, first_head + heads) of one
/// batch row with the keys [first_key, first_key + keys). Queries are numbered by position (see softmax_attention).
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

LONGSPAN_NAMESPACE_BEGIN

// ----------------------------------------------------------------------------------------------------------
// The members of a mask. Only `sees` is required; the others make the mask faster, but do not change results.
//
//   bool sees(Index i, Index j) const                true if the query at position i sees key j
//   bool sees(Index b, Index h, Index i, Index j)    the same, if it depends on the batch row or the head
//   Coverage classify(const Tile&) const             `none` and `all` must be correct; `some` is always allowed
//   KeyRanges key_ranges(const Tile&) const          every key outside of them is hidden from the whole tile
//   std::uint64_t seen_bits(Index b, Index h, Index i, Index first, std::uint64_t asked) const
//                                                    the same as `sees`, for 64 keys at once: bit n of the result
//                                                    belongs to key first + n. Only bits set in `asked` are
//                                                    used; the other keys may be outside the call
//
// If the visible keys of each query are one range, and neither end of the range ever decreases from one query to the
// next, a mask offers only this range, from which all members above follow:
//
//   KeyRange keys(Index b, Index i) const
//
// A mask of either kind may check its options and arrays against a call (call_sizes.hpp). This member is called before
// anything is written; it throws Error by detail::refuse and allocates nothing otherwise:
//
//   void check(const CallSizes& sizes) const

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
template <class M>
concept SeesInBits = requires(const M& mask, Index x, std::uint64_t asked) {
  { mask.seen_bits(x, x, x, x, asked) } -> std::same_as<std::uint64_t>;
};

}  // namespace detail

template <class M>
concept Mask = std::is_object_v<M> && (RangeMask<M> || detail::SeesByPosition<M> || detail::SeesByHead<M>);

/// True if the query at position i of head h, batch row b, sees key j.
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
constexpr Coverage classify(const M& mask, const Tile& tile) {
  if constexpr (RangeMask<M>) {
    const KeyRange first = mask.keys(tile.batch, tile.first_query),
                   last = mask.keys(tile.batch, tile.last_query());
    const KeyRange tile_keys = tile.key_range();
    if (!KeyRange{first.begin, last.end}.overlaps(tile_keys)) return Coverage::none;
    return KeyRange{last.begin, first.end}.contains(tile_keys) ? Coverage::all : Coverage::some;
  } else if constexpr (requires {
                         { mask.classify(tile) } -> std::convertible_to<Coverage>;
                       }) {
    return mask.classify(tile);
  } else {
    return Coverage::some;
  }
}

/// Key ranges that contain every key which some query of the tile sees. The tile's own key range is not used.
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

namespace detail {

/// A word whose `count` lowest bits are set: none if count < 1, all if count >= 64.
constexpr std::uint64_t low_bits(Index count) noexcept {
  return count <= 0 ? 0 : count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}
/// Bit n is set if the range contains key first + n.
constexpr std::uint64_t bits_of_range(KeyRange keys, Index first) noexcept {
  return low_bits(keys.end - first) & ~low_bits(keys.begin - first);
}

/// Bit n is set if the query sees key first + n. For bits not set in `asked` the mask is not called, and the bit is 0.
template <Mask M>
std::uint64_t seen_bits(const M& mask, Index b, Index h, Index i, Index first, std::uint64_t asked) {
  if constexpr (RangeMask<M>) {
    return asked & bits_of_range(mask.keys(b, i), first);
  } else if constexpr (SeesInBits<M>) {
    return asked & mask.seen_bits(b, h, i, first, asked);
  } else {
    const int begin = std::countr_zero(asked), end = 64 - std::countl_zero(asked);
    if (asked != 0 && std::popcount(asked) == end - begin) {
      // Bytes first: compilers vectorise this loop for a simple `sees`, but not a loop over bits.
      bool seen[64];
      for (int n = begin; n < end; ++n) seen[n] = longspan::sees(mask, b, h, i, first + n);
      return bits_of_bytes(reinterpret_cast<const unsigned char*>(seen) + begin, end - begin) << begin;
    }
    std::uint64_t seen = 0;
    for (std::uint64_t left = asked; left != 0; left &= left - 1) {
      const int n = std::countr_zero(left);
      seen |= std::uint64_t{longspan::sees(mask, b, h, i, first + n)} << n;
    }
    return seen;
  }
}

/// True if M computes the bits of 64 keys faster than `classify`, so that calling `classify` first does not pay.
template <class M>
inline constexpr bool has_cheap_bits = RangeMask<M> || SeesInBits<M>;

}  // namespace detail

// ----------------------------------------------------------------------------------------------------------
// The masks of the library. Their bounds saturate, so that options of any size are safe from overflow.

namespace detail {

inline void check_at_least(const CallSizes& sizes, std::string_view option, Index got, Index least,
                           std::string_view otherwise = {}) {
  if (got >= least) return;
  std::string wanted = "at least ";
  wanted.append(std::to_string(least)).append(otherwise);
  refuse(sizes.function, option, std::to_string(got), wanted);
}

}  // namespace detail

/// No mask: every query sees every key.
struct everything {
  constexpr KeyRange keys(Index, Index) const noexcept { return KeyRange::everything(); }
};

/// Query i sees the keys 0 .. i. With fewer queries than keys the last query is aligned with the last key, unless
/// `first_query` sets other positions.
struct causal {
  constexpr KeyRange keys(Index, Index i) const noexcept {
    return {KeyRange::lowest, detail::saturating_sum(i, 1)};
  }
};

/// Query i sees the keys i - left .. i + right. `causal{} & window{.left = 4095}` sees the last 4096 keys.
/// A side that is not set is unlimited; a negative one throws Error.
struct window {
  static constexpr Index unlimited = KeyRange::highest;
  Index left = unlimited;
  Index right = unlimited;

  constexpr KeyRange keys(Index, Index i) const noexcept {
    return {
        left >= unlimited ? KeyRange::lowest : detail::saturating_difference(i, left),
        right >= unlimited ? KeyRange::highest : detail::saturating_sum(detail::saturating_sum(i, right), 1)};
  }
  void check(const CallSizes& sizes) const {
    detail::check_at_least(sizes, "window.left", left, 0, ", or window::unlimited");
    detail::check_at_least(sizes, "window.right", right, 0, ", or window::unlimited");
  }
};

/// Every query sees the first `count` keys (attention sinks: Xiao et al. 2023, arXiv 2309.17453).
struct sinks {
  Index count = 4;

  constexpr KeyRange keys(Index, Index) const noexcept { return {0, detail::saturating_sum(count, 0)}; }
  void check(const CallSizes& sizes) const { detail::check_at_least(sizes, "sinks.count", count, 0); }
};

/// Positions are cut into segments of `length` (at least 1); a query sees the keys of its own segment.
struct segments {
  Index length = 1;

  constexpr KeyRange keys(Index, Index i) const noexcept {
    const Index rest = i % length, into = rest < 0 ? rest + length : rest;
    return {detail::saturating_difference(i, into), detail::saturating_sum(i, length - into)};
  }
  void check(const CallSizes& sizes) const { detail::check_at_least(sizes, "segments.length", length, 1); }
};

/// Packed documents: document n consists of the positions starts[n] .. starts[n + 1] - 1, and a query sees the keys of
/// its own document. `starts` never decreases: an entry equal to the one before is an empty document. Positions before
/// the first entry are a document of their own. Not owned.
struct documents {
  std::span<const Index> starts;

  constexpr KeyRange keys(Index, Index i) const noexcept {
    const auto next = std::upper_bound(starts.begin(), starts.end(), i);
    return {next == starts.begin() ? KeyRange::lowest : detail::saturating_sum(*(next - 1), 0),
            next == starts.end() ? KeyRange::highest : detail::saturating_sum(*next, 0)};
  }
  void check(const CallSizes& sizes) const {
    const auto falling = std::is_sorted_until(starts.begin(), starts.end());
    if (falling == starts.end()) return;
    detail::refuse(sizes.function,
                   std::string("documents.starts[") + std::to_string(falling - starts.begin()) + "]",
                   std::to_string(*falling),
                   std::string("at least the entry before, ") + std::to_string(*(falling - 1)));
  }
};

/// Batch row b has lengths[b] keys; the keys after them are padding. `!padding{pads}` is padding on the left: the first
/// pads[b] keys are hidden. One length for each batch row, at least 0; not owned.
struct padding {
  std::span<const Index> lengths;

  constexpr KeyRange keys(Index b, Index) const noexcept {
    return {0, detail::saturating_sum(lengths[static_cast<std::size_t>(b)], 0)};
  }
  void check(const CallSizes& sizes) const {
    if (static_cast<Index>(lengths.size()) != sizes.batch) {
      detail::refuse(sizes.function, "the number of padding.lengths", std::to_string(lengths.size()),
                     std::to_string(sizes.batch) + ", one for each batch row");
    }
    for (const Index length : lengths) detail::check_at_least(sizes, "one of padding.lengths", length, 0);
  }
};

// ----------------------------------------------------------------------------------------------------------
// Masks made of masks

/// A query sees the keys that both masks show. `a & b`.
template <Mask A, Mask B>
struct both {
  A a;
  B b;

  constexpr bool sees(Index batch, Index h, Index i, Index j) const {
    return longspan::sees(a, batch, h, i, j) && longspan::sees(b, batch, h, i, j);
  }
  std::uint64_t seen_bits(Index batch, Index h, Index i, Index first, std::uint64_t asked) const {
    return detail::seen_bits(b, batch, h, i, first, detail::seen_bits(a, batch, h, i, first, asked));
  }
  constexpr Coverage classify(const Tile& tile) const {
    const Coverage of_a = longspan::classify(a, tile);
    if (of_a == Coverage::none) return Coverage::none;
    return (std::min)(of_a, longspan::classify(b, tile));
  }
  constexpr KeyRanges key_ranges(const Tile& tile) const {
    return intersection(longspan::key_ranges(a, tile), longspan::key_ranges(b, tile));
  }
  constexpr KeyRange keys(Index batch, Index i) const
  requires(RangeMask<A> && RangeMask<B>)
  {
    const KeyRange of_a = a.keys(batch, i), of_b = b.keys(batch, i);
    return {(std::max)(of_a.begin, of_b.begin), (std::min)(of_a.end, of_b.end)};
  }
  void check(const CallSizes& sizes) const {
    detail::check_part(a, sizes);
    detail::check_part(b, sizes);
  }
};

/// A query sees the keys that at least one of the masks shows. `a | b`.
template <Mask A, Mask B>
struct either {
  A a;
  B b;

  constexpr bool sees(Index batch, Index h, Index i, Index j) const {
    return longspan::sees(a, batch, h, i, j) || longspan::sees(b, batch, h, i, j);
  }
  std::uint64_t seen_bits(Index batch, Index h, Index i, Index first, std::uint64_t asked) const {
    const std::uint64_t by_a = detail::seen_bits(a, batch, h, i, first, asked);
    return by_a | detail::seen_bits(b, batch, h, i, first, asked & ~by_a);
  }
  constexpr Coverage classify(const Tile& tile) const {
    const Coverage of_a = longspan::classify(a, tile);
    if (of_a == Coverage::all) return Coverage::all;
    return (std::max)(of_a, longspan::classify(b, tile));
  }
  constexpr KeyRanges key_ranges(const Tile& tile) const {
    return united(longspan::key_ranges(a, tile), longspan::key_ranges(b, tile));
  }
  void check(const CallSizes& sizes) const {
    detail::check_part(a, sizes);
    detail::check_part(b, sizes);
  }
};

/// A query sees the keys that the mask hides. `!a`.
template <Mask A>
struct inverse {
  A a;

  constexpr bool sees(Index batch, Index h, Index i, Index j) const {
    return !longspan::sees(a, batch, h, i, j);
  }
  std::uint64_t seen_bits(Index batch, Index h, Index i, Index first, std::uint64_t asked) const {
    return asked & ~detail::seen_bits(a, batch, h, i, first, asked);
  }
  constexpr Coverage classify(const Tile& tile) const {
    const Coverage of_a = longspan::classify(a, tile);
    return of_a == Coverage::some ? Coverage::some : of_a == Coverage::all ? Coverage::none : Coverage::all;
  }
  void check(const CallSizes& sizes) const { detail::check_part(a, sizes); }
};

namespace detail {

template <class A, class B>
inline constexpr bool has_cheap_bits<both<A, B>> = has_cheap_bits<A> && has_cheap_bits<B>;
template <class A, class B>
inline constexpr bool has_cheap_bits<either<A, B>> = has_cheap_bits<A> && has_cheap_bits<B>;
template <class A>
inline constexpr bool has_cheap_bits<inverse<A>> = has_cheap_bits<A>;

}  // namespace detail

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

LONGSPAN_NAMESPACE_END
