// attend_npy landmark_stream: landmark attention in chunks, with retrieval of sealed blocks.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "arguments.hpp"
#include "attend_files.hpp"
#include "chunks.hpp"
#include "longspan/position.hpp"
#include "longspan/stream/landmark_cache.hpp"

namespace attend_npy {

inline constexpr std::string_view landmark_stream_help =
    "block=B                             every B-th key is a landmark, the last of its block\n"
    "chunks=n,n,...                      tokens that come together (default: all of them)\n"
    "top_k=k                             blocks that a query retrieves (default 4)\n"
    "select=token_head|max_heads|max_tokens  for whom blocks are chosen (default token_head)\n"
    "capacity=n                          blocks that are kept (default: all)\n"
    "positions=stingy|exact              where retrieved blocks stand (default stingy)\n"
    "rope_base=x                         base of rotary positions (default 10000)\n"
    "rope_layout=interleaved|half        rotary positions; none where it is left out\n"
    "scale=x                             multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n";

/// Which of the words the key has; 0 where it is absent.
inline std::size_t word_of(const Keys& keys, std::string_view key, std::span<const std::string_view> words) {
  const auto text = keys.text(key);
  if (!text) return 0;
  const auto found = std::find(words.begin(), words.end(), *text);
  if (found == words.end()) {
    throw Error("the key " + std::string(key) + " is '" + std::string(*text) + "', wanted one of " +
                listed(words));
  }
  return static_cast<std::size_t>(found - words.begin());
}

/// A functor like the others, that streams its tokens through a cache.
template <class P, class Map>
struct LandmarkStream {
  longspan::landmark_cache_options options;
  P position;
  std::vector<Index> chunks;

  template <class Q, class K, class V, class Out, class Lse, class E>
  void operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse& lse,
                  const E& executor) const {
    if (q.rows != k.rows) {
      throw Error("landmark_stream: q has " + std::to_string(q.rows) + " rows and k has " +
                  std::to_string(k.rows) + ", wanted one query for each key");
    }
    const std::vector<Index> lengths = chunks_of(chunks, q.rows);
    using Real = longspan::Arithmetic<std::remove_const_t<typename Q::Element>>;
    longspan::landmark_cache<Real, P, Map> cache({q.batch, q.heads, k.heads, q.cols, v.cols}, options,
                                                 position);
    Index first = 0;
    for (const Index length : lengths) {
      auto of_chunk = lse;
      of_chunk.data += first;
      of_chunk.rows = length;
      cache.extend(q.slice_rows(first, length), k.slice_rows(first, length), v.slice_rows(first, length),
                   out.slice_rows(first, length), of_chunk, executor);
      first += length;
    }
  }
};

inline void landmark_stream(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("landmark_stream",
             std::array<std::string_view, 9>{"block", "chunks", "top_k", "select", "capacity", "positions",
                                             "rope_base", "rope_layout", "scale"});
  longspan::landmark_cache_options options;
  const auto block = keys.positive_integer("block");
  if (!block) throw Error("the key block is missing");
  options.block = *block;
  options.top_k = keys.positive_integer("top_k").value_or(options.top_k);
  options.capacity = keys.positive_integer("capacity").value_or(0);
  options.scale = keys.nonzero("scale").value_or(longspan::default_scale);
  constexpr std::array selections{longspan::LandmarkSelect::per_token_and_head,
                                  longspan::LandmarkSelect::max_over_heads,
                                  longspan::LandmarkSelect::max_over_tokens};
  options.select = selections[word_of(
      keys, "select", std::array<std::string_view, 3>{"token_head", "max_heads", "max_tokens"})];
  const std::vector<Index> chunks = keys.positive_integers("chunks");
  const bool exact = word_of(keys, "positions", std::array<std::string_view, 2>{"stingy", "exact"}) == 1;
  const auto base = keys.positive_float("rope_base");
  if (!keys.text("rope_layout")) {
    if (base) throw Error("the key rope_base needs the key rope_layout");
    // Without an encoding the two kinds of positions are one.
    return attend_files(
        arguments, LandmarkStream<longspan::no_position, longspan::stingy_positions>{options, {}, chunks});
  }
  const bool half = word_of(keys, "rope_layout", std::array<std::string_view, 2>{"interleaved", "half"}) == 1;
  const longspan::rotary position(half ? longspan::Pairing::half_split : longspan::Pairing::interleaved,
                                  static_cast<double>(base.value_or(10000.0f)));
  if (exact) {
    attend_files(arguments,
                 LandmarkStream<longspan::rotary, longspan::exact_positions>{options, position, chunks});
  } else {
    attend_files(arguments,
                 LandmarkStream<longspan::rotary, longspan::stingy_positions>{options, position, chunks});
  }
}

}  // namespace attend_npy
