// The mask of a stream, and the keys that later queries may still see, which the stream must keep.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <type_traits>

#include "longspan/error.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// True if M hides all keys after a query.
template <class M>
inline constexpr bool hides_later_keys = std::is_same_v<M, causal>;
template <class A, class B>
inline constexpr bool hides_later_keys<both<A, B>> = hides_later_keys<A> || hides_later_keys<B>;
template <class A, class B>
inline constexpr bool hides_later_keys<either<A, B>> = hides_later_keys<A> && hides_later_keys<B>;

/// True if M sets an upper limit to the keys of every query, whatever the values of its members.
template <class M>
inline constexpr bool limits_all_queries = std::is_same_v<M, causal> || std::is_same_v<M, sinks> ||
                                           std::is_same_v<M, segments> || std::is_same_v<M, padding>;
template <class A, class B>
inline constexpr bool limits_all_queries<both<A, B>> = limits_all_queries<A> || limits_all_queries<B>;
template <class A, class B>
inline constexpr bool limits_all_queries<either<A, B>> = limits_all_queries<A> && limits_all_queries<B>;

/// True if M sets no upper limit to the keys of any query, or offers neither `keys` nor `key_ranges` to tell.
template <class M>
inline constexpr bool limits_no_query =
    std::is_same_v<M, everything> ||
    !(RangeMask<M> || requires(const M& mask, const Tile& tile) { KeyRanges(mask.key_ranges(tile)); });
template <class A>
inline constexpr bool limits_no_query<inverse<A>> = true;
template <class A, class B>
inline constexpr bool limits_no_query<both<A, B>> = limits_no_query<A> && limits_no_query<B>;
template <class A, class B>
inline constexpr bool limits_no_query<either<A, B>> = limits_no_query<A> || limits_no_query<B>;

constexpr Index end_of(const KeyRanges& ranges) {
  return ranges.empty() ? KeyRange::lowest : (ranges.end() - 1)->end;
}
constexpr bool is_limited(const KeyRanges& ranges) { return end_of(ranges) < KeyRange::highest; }

/// M unchanged for each query for which M sets an upper limit of the keys, and causal for every other query.
template <Mask M>
struct CausalWhereUnlimited {
  M mask;

  constexpr KeyRange keys(Index batch, Index i) const
  requires RangeMask<M>
  {
    KeyRange range = mask.keys(batch, i);
    if (range.end >= KeyRange::highest) range.end = i + 1;
    return range;
  }
  constexpr bool sees(Index batch, Index h, Index i, Index j) const {
    return longspan::sees(mask, batch, h, i, j) && (j <= i || limits({batch, h, 1, i, 1, 0, 0}));
  }
  constexpr Coverage classify(const Tile& tile) const {
    const Coverage seen = longspan::classify(mask, tile);
    const KeyRange keys_of_tile = tile.key_range();
    if (seen == Coverage::none || keys_of_tile.end <= tile.first_query + 1 || limits(tile)) return seen;
    bool hidden = true, whole = true;
    for_each_query(tile, [&](const Tile& query) {
      const bool shown = keys_of_tile.end <= query.first_query + 1 || limits(query);
      hidden = hidden && !shown && keys_of_tile.begin > query.first_query;
      whole = whole && shown;
    });
    return hidden ? Coverage::none : whole ? seen : Coverage::some;
  }
  constexpr KeyRanges key_ranges(const Tile& tile) const {
    const KeyRanges ranges = longspan::key_ranges(mask, tile);
    if (is_limited(ranges)) return ranges;
    Index end = KeyRange::lowest;
    for_each_query(tile, [&](const Tile& query) {
      const KeyRanges of_query = longspan::key_ranges(mask, query);
      end = (std::max)(end, is_limited(of_query) ? end_of(of_query) : query.first_query + 1);
    });
    return intersection(ranges, KeyRanges({KeyRange::lowest, end}));
  }

 private:
  constexpr bool limits(const Tile& tile) const { return is_limited(longspan::key_ranges(mask, tile)); }
  template <class Work>
  static constexpr void for_each_query(const Tile& tile, const Work& work) {
    for (Index h = tile.first_head; h < tile.first_head + tile.heads; ++h) {
      for (Index i = tile.first_query; i <= tile.last_query(); ++i)
        work(Tile{tile.batch, h, 1, i, 1, tile.first_key, tile.keys});
    }
  }
};

/// The mask of a stream whose functor has mask M: a query sees what M shows it, but no later keys if M sets no upper
/// limit. The type is M itself wherever possible, so that a stream runs the same kernels as calls of its functor.
template <class M>
using StreamMask = std::conditional_t<
    limits_all_queries<M>, M,
    std::conditional_t<std::is_same_v<M, everything>, causal,
                       std::conditional_t<limits_no_query<M>, both<causal, M>, CausalWhereUnlimited<M>>>>;

template <Mask M>
constexpr StreamMask<M> stream_mask(const M& mask) {
  if constexpr (limits_all_queries<M>) {
    return mask;
  } else if constexpr (std::is_same_v<M, everything>) {
    return causal{};
  } else if constexpr (limits_no_query<M>) {
    return causal{} & mask;
  } else {
    return {mask};
  }
}

/// One past the last key that the query at position i may see under the mask of a stream; at least i + 1.
template <Mask M>
constexpr Index reach_of(const M& mask, Index batch, Index heads, Index i) {
  return (std::max)(i + 1, end_of(key_ranges(mask, Tile{batch, 0, heads, i, 1, 0, 0})));
}

/// Throws Error if a query of the tokens [first, end) may see a key at `end` or later.
template <Mask M>
void check_reach(std::string_view function, const M& mask, Index batch, Index heads, Index first, Index end) {
  if constexpr (!hides_later_keys<M>) {
    for (Index b = 0; b < batch; ++b) {
      Index end_before = KeyRange::lowest;
      for (Index i = first; i < end; ++i) {
        const Index reach = reach_of(mask, b, heads, i);
        if (reach > end) {
          refuse(function, "the chunk",
                 "the tokens " + std::to_string(first) + " to " + std::to_string(end - 1) + ", but query " +
                     std::to_string(i) + " may see keys up to " + std::to_string(reach - 1),
                 "a longer chunk that contains these keys, or the mask causal{} & mask");
        }
        if constexpr (RangeMask<M>) {
          const Index range_end = mask.keys(b, i).end;
          if (range_end < end_before) {
            refuse(function, "the end of the keys of query " + std::to_string(i), std::to_string(range_end),
                   "at least " + std::to_string(end_before) + " as for the query before");
          }
          end_before = range_end;
        }
      }
    }
  }
}

/// Where tokens [first, end), which contain all keys that their queries may see, can be cut: after at least `most`
/// tokens, and where no query before the cut may see a key after it.
template <Mask M>
Index end_of_piece(const M& mask, Index batch, Index heads, Index first, Index end, Index most) {
  if (end - first <= most) return end;
  if constexpr (hides_later_keys<M>) return first + most;
  Index reach = first;
  for (Index i = first; i < end; ++i) {
    if (i >= first + most && reach <= i) return i;
    for (Index b = 0; b < batch; ++b) reach = (std::max)(reach, reach_of(mask, b, heads, i));
  }
  return end;
}

/// Ranges that contain every key which some query at position `first` or later sees.
template <Mask M>
struct LaterKeys {
  static constexpr KeyRanges of(const M& mask, Index batch, Index first) {
    // The begin and the end of a range mask never decrease from one query to the next.
    if constexpr (RangeMask<M>) return KeyRanges({mask.keys(batch, first).begin, KeyRange::highest});
    return KeyRanges(KeyRange::everything());
  }
};

template <>
struct LaterKeys<sinks> {
  static constexpr KeyRanges of(const sinks& mask, Index, Index) { return KeyRanges({0, mask.count}); }
};

template <Mask A, Mask B>
struct LaterKeys<both<A, B>> {
  static constexpr KeyRanges of(const both<A, B>& mask, Index batch, Index first) {
    return intersection(LaterKeys<A>::of(mask.a, batch, first), LaterKeys<B>::of(mask.b, batch, first));
  }
};

template <Mask A, Mask B>
struct LaterKeys<either<A, B>> {
  static constexpr KeyRanges of(const either<A, B>& mask, Index batch, Index first) {
    return united(LaterKeys<A>::of(mask.a, batch, first), LaterKeys<B>::of(mask.b, batch, first));
  }
};

template <Mask M>
struct LaterKeys<CausalWhereUnlimited<M>> {
  static constexpr KeyRanges of(const CausalWhereUnlimited<M>& mask, Index batch, Index first) {
    return LaterKeys<M>::of(mask.mask, batch, first);
  }
};

template <Mask M>
constexpr KeyRanges later_keys(const M& mask, Index batch, Index first) {
  return LaterKeys<M>::of(mask, batch, first);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
