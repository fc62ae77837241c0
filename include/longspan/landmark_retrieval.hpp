// Retrieval of landmark blocks: which blocks a query attends to, and at which positions it sees them.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/parts.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/error.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// The queries that share one choice of blocks. Except for per_token_and_head, the scores of the landmarks pass
/// through a softmax over the blocks, and the largest weight among these queries counts.
enum class LandmarkSelect : std::uint8_t {
  per_token_and_head,
  max_over_heads,   ///< for each token
  max_over_tokens,  ///< for each head
  max_over_both,    ///< for each batch row
  per_kv_group      ///< for each token and KV head
};

struct landmark_cache_options {
  Index block_size = 64;  ///< keys of a block, its landmark included: every block_size-th key is a landmark
  Index top_k = 4;        ///< sealed blocks that a query retrieves
  LandmarkSelect select = LandmarkSelect::per_token_and_head;
  Index window_blocks = 0;  ///< the last full blocks, which are always attended to and sealed later
  /// All unsealed tokens are one group: the tokens of full blocks count individually like those of the open block, not
  /// by their landmarks. Together with window_blocks this is a window of exact attention.
  bool exact_window = false;
  Index capacity = 0;  ///< sealed blocks that can be retrieved; the oldest are dropped first; 0: all
  /// `truncate` can remove the last `rollback` tokens before the largest size that the stream has had. Until then the
  /// stream keeps the rows of sealed blocks, and blocks dropped because of `capacity`. Changes no result.
  Index rollback = 16;
  /// Cuts a chunk at the ends of blocks, so that a query retrieves from all blocks before its own, as it does when
  /// tokens arrive one by one. Off by default, as in the paper, where a chunk retrieves only from blocks before the
  /// chunk. With max_over_tokens and max_over_both all tokens of a piece share one choice, which cutting does not turn
  /// into the choice of single tokens.
  bool split_at_blocks = false;
  std::optional<double> scale{};  ///< multiplies q.k; 1 / sqrt(head_dim) unless set
  Index mass_sample = 0;          ///< tokens of each block from which `mass` is estimated; 0: no estimate
  std::string path{};             ///< of the file that keeps the sealed blocks; empty: they are in memory
  Index resident_bytes = Index{1} << 26;  ///< bytes of the file that stay in memory between queries
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN

namespace detail {

inline const StreamShape& checked(const StreamShape& shape, const landmark_cache_options& options) {
  check_stream_shape("landmark_cache", shape);
  const auto at_least = [](const char* what, Index got, Index least) {
    if (got < least) refuse("landmark_cache", what, std::to_string(got), "at least " + std::to_string(least));
  };
  at_least("block_size", options.block_size, 2);
  at_least("top_k", options.top_k, 0);
  at_least("window_blocks", options.window_blocks, 0);
  at_least("capacity", options.capacity, 0);
  at_least("rollback", options.rollback, 0);
  at_least("resident_bytes", options.resident_bytes, 0);
  at_least("mass_sample", options.mass_sample, 0);
  resolved_scale("landmark_cache", options.scale, shape.head_dim);
  return shape;
}

}  // namespace detail

/// The mass of the tokens that a query attended to and of those that it did not, as logarithms of sums of exp(score).
/// Landmarks do not count as tokens.
struct LandmarkMass {
  double attended = -std::numeric_limits<double>::infinity();
  double dropped = -std::numeric_limits<double>::infinity();

  /// The share, in the softmax over all these tokens, of the tokens that the query did not attend to.
  double dropped_share() const { return dropped == attended ? 0.5 : 1 / (1 + std::exp(attended - dropped)); }
};

/// A sample of a block's tokens, evenly spread about its middle: first, first + stride, ...
struct TokenSample {
  Index first = 0;
  Index stride = 1;
  Index count = 0;

  /// A sample of at most `wanted` of `tokens` tokens.
  static constexpr TokenSample of(Index tokens, Index wanted) noexcept {
    const Index count = (std::min)(tokens, wanted), stride = count == 0 ? 1 : tokens / count;
    return {count == 0 ? 0 : (tokens - 1 - (count - 1) * stride) / 2, stride, count};
  }
};

/// The state of a cache when a chunk of queries arrives.
struct Retrieval {
  Index blocks = 0;      ///< blocks that can be retrieved
  Index dropped = 0;     ///< older blocks that have been dropped
  Index top_k = 0;       ///< how many a query retrieves, at most `blocks`
  Index wanted = 0;      ///< how many it would retrieve if there were enough
  Index block_size = 0;  ///< keys of a block, landmark included
};

/// The positions at which queries see the blocks, given as positions of the blocks' first keys. `local` is the
/// position of the first key after the blocks, `scored` the position of block n while landmarks are scored,
/// `attended` its position as number `rank` of the chosen blocks.
template <class M>
concept PositionMap = requires(const M& map, const Retrieval& held, Index n) {
  { map.local(held) } -> std::convertible_to<Index>;
  { map.scored(held, n) } -> std::convertible_to<Index>;
  { map.attended(held, n, n) } -> std::convertible_to<Index>;
};

/// Positions that stay within the range of the model's training, however long the text is: old blocks share the first
/// place while they are scored, chosen blocks follow one another, and chosen blocks among the last top_k keep their
/// distance.
///
/// Source  Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.2.1, figure 2.
struct stingy_positions {
  Index local(const Retrieval& held) const noexcept {
    return (held.wanted < held.blocks ? held.wanted + 1 : held.blocks) * held.block_size;
  }
  Index scored(const Retrieval& held, Index n) const noexcept {
    return place(held, std::max<Index>(0, n - (held.blocks - held.top_k) + 1));
  }
  Index attended(const Retrieval& held, Index n, Index rank) const noexcept {
    return place(held, rank + (n >= held.blocks - held.top_k));
  }

 private:
  Index place(const Retrieval& held, Index slot) const noexcept {
    return local(held) + (slot - held.top_k - 1) * held.block_size;
  }
};

/// The positions of the keys in the text.
struct exact_positions {
  static constexpr bool are_of_the_text = true;

  Index local(const Retrieval& held) const noexcept { return (held.dropped + held.blocks) * held.block_size; }
  Index scored(const Retrieval& held, Index n) const noexcept { return (held.dropped + n) * held.block_size; }
  Index attended(const Retrieval& held, Index n, Index) const noexcept { return scored(held, n); }
};

/// An index that proposes blocks, for streams in which scoring the landmarks of all blocks takes too long.
///
///   add(b, kv_head, n, key)           block n has been sealed; key is its landmark, head_dim numbers
///   drop(n)                           the blocks before n have been dropped
///   clear()                           all blocks have been dropped
///   truncate(n)                       optional: the blocks from n on have been unsealed, and may be added
///                                     again with other keys. Without this member, and if dropped blocks come
///                                     back, the cache clears the index before the next call and adds all blocks
///   candidates(b, kv_head, query)     numbers of blocks, in any order; called on several threads at the same time
///
/// Blocks are numbered from the start of the stream. The query is encoded for the place that old blocks share, so
/// that its products with the keys rank the blocks. The candidates and the last top_k blocks are scored exactly; if
/// these are fewer than top_k, the oldest blocks are added.
template <class Finder, class Real>
concept LandmarkIndex = requires(Finder& index, const Finder& constant, Index n, std::span<const Real> row) {
  index.add(n, n, n, row);
  index.drop(n);
  index.clear();
  { constant.candidates(n, n, row) } -> std::convertible_to<std::vector<Index>>;
};

/// No index: every landmark is scored.
struct every_landmark {
  template <class Real>
  void add(Index, Index, Index, std::span<const Real>) const noexcept {}
  void drop(Index) const noexcept {}
  void clear() const noexcept {}
  template <class Real>
  std::vector<Index> candidates(Index, Index, std::span<const Real>) const {
    return {};
  }
};

template <StoredElement T = float, Position P = no_position, PositionMap Map = stingy_positions,
          LandmarkIndex<detail::ArithmeticOf<T>> Finder = every_landmark>
class landmark_cache;

namespace detail {

struct PositionMapPart {
  template <class X>
  static constexpr bool is = PositionMap<X>;
};
struct LandmarkIndexPart {
  template <class X>
  static constexpr bool is = LandmarkIndex<X, float> || LandmarkIndex<X, double>;
};

/// The type of the part of that kind among the parts of a landmark_retrieval, or Default if there is none.
template <class Kind, class Default, class... Parts>
struct RetrievalPart {
  static_assert(
      ((PositionPart::is<Parts> + PositionMapPart::is<Parts> + LandmarkIndexPart::is<Parts> == 1) && ...),
      "longspan: each part of landmark_retrieval is a position encoding (position.hpp), a position map "
      "or an index of landmarks (landmark_retrieval.hpp)");
  static_assert((int(Kind::template is<Parts>) + ... + 0) <= 1,
                "longspan: landmark_retrieval takes one position encoding, one position map and one index");
  using type = typename FindPart<Kind, Default, Parts...>::type;
};
template <class Kind, class Default, class... Parts>
using RetrievalPartOf = typename RetrievalPart<Kind, Default, Parts...>::type;

}  // namespace detail

/// Attention that retrieves landmark blocks, as a value from which streams are made: options, and then a position
/// encoding, a position map and an index of landmarks, in any order and each optional.
///
///   landmark_retrieval retrieve{{.block_size = 64, .top_k = 4}, rotary(Pairing::half_split)};
///   auto cache = retrieve.stream<Eigen::bfloat16>(shape);  // a landmark_cache
template <Position P = no_position, PositionMap Map = stingy_positions, class Finder = every_landmark>
struct landmark_retrieval {
  landmark_cache_options options{};
  P position{};
  Map map{};
  Finder finder{};

  landmark_retrieval() = default;
  template <class... Parts>
  requires(std::is_same_v<P, detail::RetrievalPartOf<detail::PositionPart, no_position, Parts...>> &&
           std::is_same_v<Map,
                          detail::RetrievalPartOf<detail::PositionMapPart, stingy_positions, Parts...>> &&
           std::is_same_v<Finder,
                          detail::RetrievalPartOf<detail::LandmarkIndexPart, every_landmark, Parts...>>)
  explicit landmark_retrieval(landmark_cache_options with, Parts... parts)
      : options(std::move(with)),
        position(detail::take_part<detail::PositionPart, P>(parts...)),
        map(detail::take_part<detail::PositionMapPart, Map>(parts...)),
        finder(detail::take_part<detail::LandmarkIndexPart, Finder>(parts...)) {}

  /// A landmark_cache<T, P, Map, Finder>, which keeps rows as T. Include longspan/stream/landmark_cache.hpp
  /// before the call.
  template <StoredElement T = float>
  auto stream(const StreamShape& shape) const {
    using Stream = landmark_cache<T, P, Map, Finder>;
    constexpr bool has_header = detail::Complete<Stream>;
    static_assert(has_header,
                  "longspan: landmark_retrieval::stream needs #include <longspan/stream/landmark_cache.hpp>");
    if constexpr (has_header) return Stream(shape, options, position, map, finder);
  }
};

template <class... Parts>
requires(sizeof...(Parts) > 0)
landmark_retrieval(landmark_cache_options, Parts...)
    -> landmark_retrieval<detail::RetrievalPartOf<detail::PositionPart, no_position, Parts...>,
                          detail::RetrievalPartOf<detail::PositionMapPart, stingy_positions, Parts...>,
                          detail::RetrievalPartOf<detail::LandmarkIndexPart, every_landmark, Parts...>>;
landmark_retrieval(landmark_cache_options = {}) -> landmark_retrieval<>;

LONGSPAN_NAMESPACE_END
