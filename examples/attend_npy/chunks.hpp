// The chunks of tokens of the streaming variants.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "arguments.hpp"

namespace attend_npy {

struct Chunk {
  Index first = 0;
  Index length = 0;
};

/// Chunks of the given lengths, which must add up to the number of tokens; one chunk of all tokens if none are given.
inline std::vector<Chunk> chunks_of(std::string_view variant, const std::vector<Index>& wanted, Index queries,
                                    Index keys) {
  if (queries != keys) {
    throw Error(std::string(variant) + ": q has " + std::to_string(queries) + " rows and k has " +
                std::to_string(keys) + ", wanted one query for each key");
  }
  if (wanted.empty()) return {{0, keys}};
  std::vector<Chunk> chunks;
  Index first = 0;
  for (const Index length : wanted) {
    if (length > keys - first) first = -1;
    if (first < 0) break;
    chunks.push_back({first, length});
    first += length;
  }
  if (first != keys) throw Error("the key chunks does not add up to the " + std::to_string(keys) + " tokens");
  return chunks;
}

/// Extends a stream with lse by a chunk of the tokens.
template <class Stream, class Q, class K, class V, class Out, class Lse, class E>
void extend(Stream& stream, Chunk chunk, const Q& q, const K& k, const V& v, const Out& out, Lse lse,
            const E& executor) {
  lse.data += chunk.first * lse.row_stride;
  lse.rows = chunk.length;
  stream.extend(q.slice_rows(chunk.first, chunk.length), k.slice_rows(chunk.first, chunk.length),
                v.slice_rows(chunk.first, chunk.length), out.slice_rows(chunk.first, chunk.length), lse,
                executor);
}

/// Extends a stream without lse.
template <class Stream, class Q, class K, class V, class Out, class E>
void extend(Stream& stream, Chunk chunk, const Q& q, const K& k, const V& v, const Out& out,
            const E& executor) {
  stream.extend(q.slice_rows(chunk.first, chunk.length), k.slice_rows(chunk.first, chunk.length),
                v.slice_rows(chunk.first, chunk.length), out.slice_rows(chunk.first, chunk.length), executor);
}

}  // namespace attend_npy
