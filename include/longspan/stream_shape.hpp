// What a stream is told before its first token.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <string_view>

#include "longspan/detail/call/check_view.hpp"
#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// The sizes that all calls of a stream share.
struct StreamShape {
  Index batch = 1;
  Index heads = 1;
  Index kv_heads = 1;
  Index head_dim = 0;
  Index value_dim = 0;

  LONGSPAN_INLINE constexpr bool operator==(const StreamShape&) const = default;
};

/// How a kv_cache keeps its rows.
struct kv_cache_options {
  /// Tokens in a page. 0: all tokens in one array, which grows by doubling. The kernels take every page by
  /// itself: a token against 32768 (float, 32 heads on 8 of 128) costs 5 to 20 % more with pages of 256 than
  /// with an array, 5 to 30 % with 64 and 15 to 50 % with 16; a chunk of 512 against 4096 1, 5 and 13 %.
  Index page_size = 0;
  /// Evict a page when the mask will show none of its keys again: with `causal{} & window{W}`, or
  /// `causal{} & (window{W} | sinks{4})`, a ring of about (W + rollback) / page_size + 2 pages remains, however many
  /// tokens have come: 38 MB with W 4096, pages of 256 and the sizes above. An array keeps everything.
  bool evict = true;
  /// The last `rollback` tokens before the largest size that the stream has had can be taken back: pages are
  /// evicted that much later. Tokens that stay have the results and bits of a stream that never saw the others.
  Index rollback = 16;
};

/// What a dilated_cache keeps beyond the rows that later queries see.
struct dilated_cache_options {
  /// So many of the last tokens can always be taken back, counted from the largest size that the stream has
  /// had: a segment that closes keeps its rows for that many tokens more. 16 cost at most one closed segment
  /// and 16 / r rows for each branch (w, r).
  Index rollback = 16;
};

/// What an infini_memory keeps beyond the memory and the open segment.
struct infini_memory_options {
  /// So many of the last tokens of a batch row can always be taken back, counted from the largest size that it
  /// has had. Unless 0 the stream keeps a second memory, M and z as they were at a segment border that is at
  /// least so old, and the rows since: 2 * segment + rollback of them at most. A segment is written a second
  /// time, to that memory, if rollback is longer than a segment.
  Index rollback = 0;
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Has the definition of a class been read? Functors make streams whose headers they do not include.
template <class T>
concept Complete = requires { sizeof(T); };

inline void check_stream_shape(std::string_view function, const StreamShape& shape) {
  const char* fault = fault_of_sizes({shape.batch, shape.heads, shape.head_dim});
  if (fault == nullptr) fault = fault_of_sizes({shape.batch, shape.heads, shape.value_dim});
  if (fault != nullptr) {
    refuse(function, "the shape [batch, heads, head_dim, value_dim]",
           shape_text(shape.batch, shape.heads, shape.head_dim, shape.value_dim), fault);
  }
  if (shape.kv_heads < 0 || (shape.kv_heads == 0 ? shape.heads != 0 : shape.heads % shape.kv_heads != 0)) {
    refuse(function, "the shape [batch, heads, kv_heads, head_dim]",
           shape_text(shape.batch, shape.heads, shape.kv_heads, shape.head_dim),
           "sizes of at least 0, with kv_heads a divisor of heads");
  }
}

/// Refuses a call whose tensors, checked against each other before, are not those of the stream.
template <class Call>
void check_stream_call(std::string_view function, const Call& call, const StreamShape& shape) {
  const StreamShape given{call.q.batch, call.q.heads, call.k.heads, call.head_dim(), call.value_dim()};
  if (!(given == shape)) {
    refuse(function, "q",
           shape_text(call.q) + " with " + std::to_string(given.kv_heads) + " KV heads and value_dim " +
               std::to_string(given.value_dim),
           shape_text(shape.batch, shape.heads, call.q.rows, shape.head_dim) + " with " +
               std::to_string(shape.kv_heads) + " and " + std::to_string(shape.value_dim));
  }
  if (call.k.rows != call.q.rows)
    refuse(function, "the number of rows of k", std::to_string(call.k.rows),
           std::to_string(call.q.rows) + " as q has");
}

/// Refuses keys and values that come without queries unless they are of `batch` rows of the stream.
template <class K, class V>
void check_tokens(std::string_view function, const K& k, const V& v, Index batch, const StreamShape& shape) {
  const auto wanted = [&](const auto& x, std::string_view what, Index cols) {
    check_view(function, what, x);
    if (x.batch != batch || x.heads != shape.kv_heads || x.rows != k.rows || x.cols != cols)
      refuse(function, what, shape_text(x), shape_text(batch, shape.kv_heads, k.rows, cols));
  };
  wanted(k, "k", shape.head_dim);
  wanted(v, "v", shape.value_dim);
}

/// Refuses a `reorder` that does not name a batch row of the stream for each of its batch rows.
inline void check_reorder(std::string_view function, std::span<const Index> rows, Index batch) {
  if (static_cast<Index>(rows.size()) != batch)
    refuse(function, "the number of rows", std::to_string(rows.size()), std::to_string(batch));
  for (const Index row : rows) {
    if (row < 0 || row >= batch)
      refuse(function, "a row", std::to_string(row), "0 to " + std::to_string(batch - 1));
  }
}

/// Rows [first, first + count) of a call, lse as well.
template <class Call>
Call part_of(const Call& call, Index first, Index count) {
  Call part = call;
  part.q = call.q.slice_rows(first, count);
  part.k = call.k.slice_rows(first, count);
  part.v = call.v.slice_rows(first, count);
  part.out = call.out.slice_rows(first, count);
  part.lse.rows = count;
  if (call.lse.data != nullptr) part.lse.data = call.lse.data + first * call.lse.row_stride;
  return part;
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
