// Which keys a query sees. The masks of this header are arithmetic: they take no memory, and what they hide is
// skipped, not computed. For a mask that is a tensor see dense_mask.hpp.
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

/// How much of a tile is seen: no pair of it, every pair, or perhaps some.
enum class Coverage : std::uint8_t { none, some, all };

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

LONGSPAN_NAMESPACE_BEGIN

// ----------------------------------------------------------------------------------------------------------
// What a mask may offer. The least is `sees`; the rest makes it faster, and a mask that leaves it out is slow
// but never wrong.
//
//   bool sees(Index i, Index j) const                does the query at position i see key j?
//   bool sees(Index b, Index h, Index i, Index j)    the same, where it depends on batch row or head
//   Coverage classify(const Tile&) const                 `none` and `all` must be true, `some` always may be said
//   KeyRanges key_ranges(const Tile&) const          every key outside is hidden from all of the tile
//   std::uint64_t seen_bits(Index b, Index h, Index i, Index first, std::uint64_t asked) const
//                                                    the same as `sees`, 64 keys at once: bit n of the answer
//                                                    is that of key first + n. Only bits set in `asked` are
//                                                    used; the other keys may lie outside the call
//
// Where the keys of each query are one range whose two ends never fall from one query to the next, a mask
// says that range, and all the answers above follow from it:
//
//   KeyRange keys(Index b, Index i) const
//
// A mask of either kind may check its options and arrays against a call (call_sizes.hpp). It throws Error by
// detail::refuse, allocates nothing otherwise, and is called before anything is written:
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

namespace detail {

/// The `count` lowest bits: none below 1, all from 64 on.
constexpr std::uint64_t low_bits(Index count) noexcept {
  return count <= 0 ? 0 : count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}
/// Bit n is that of key first + n.
constexpr std::uint64_t bits_of_range(KeyRange keys, Index first) noexcept {
  return low_bits(keys.end - first) & ~low_bits(keys.begin - first);
}

/// Bit n: does the query see key first + n? Where `asked` has no bit, the mask is not asked and the answer is 0.
template <Mask M>
std::uint64_t seen_bits(const M& mask, Index b, Index h, Index i, Index first, std::uint64_t asked) {
  if constexpr (RangeMask<M>) {
    return asked & bits_of_range(mask.keys(b, i), first);
  } else if constexpr (SeesInBits<M>) {
    return asked & mask.seen_bits(b, h, i, first, asked);
  } else {
    const int begin = std::countr_zero(asked), end = 64 - std::countl_zero(asked);
    if (asked != 0 && std::popcount(asked) == end - begin) {
      // Bytes first: of a simple `sees` compilers make vectors then, and of a loop over bits they do not.
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

/// Does M answer for 64 keys in less time than `classify` takes, so that asking it first would not pay?
template <class M>
inline constexpr bool has_cheap_bits = RangeMask<M> || SeesInBits<M>;

}  // namespace detail

// ----------------------------------------------------------------------------------------------------------
// The masks of the library. Their bounds saturate: a window of any size may end anywhere.

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

/// Query i sees the keys 0 .. i. With fewer queries than keys the last query is aligned with the last key,
/// since that is where positions stand unless `first_query` says otherwise.
struct causal {
  constexpr KeyRange keys(Index, Index i) const noexcept {
    return {KeyRange::lowest, detail::saturating_sum(i, 1)};
  }
};

/// Query i sees the keys i - left .. i + right. `causal{} & window{.left = 4095}` sees the last 4096 keys.
/// A side that is not set is unlimited; a negative one is refused.
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

/// Positions are cut into segments of `length` (at least 1); query i sees the keys of its own segment.
struct segments {
  Index length = 1;

  constexpr KeyRange keys(Index, Index i) const noexcept {
    const Index rest = i % length, into = rest < 0 ? rest + length : rest;
    return {detail::saturating_difference(i, into), detail::saturating_sum(i, length - into)};
  }
  void check(const CallSizes& sizes) const { detail::check_at_least(sizes, "segments.length", length, 1); }
};

/// Packed documents: document n holds the positions starts[n] .. starts[n + 1] - 1, and a query sees the keys
/// of its own document. `starts` never falls: an entry that repeats the one before makes an empty document.
/// Positions before the first entry are a document of their own. Not owned.
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

/// Batch row b has lengths[b] keys; those after them are padding. `!padding{pads}` is padding on the left: the
/// first pads[b] keys are hidden. One length for each batch row, at least 0; not owned.
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

/// What both see. `a & b`.
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

/// What either sees. `a | b`.
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

/// What the other hides. `!a`.
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
