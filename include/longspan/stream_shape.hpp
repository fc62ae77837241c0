// The shape and the options of streams.
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

/// How a kv_cache stores its rows.
struct kv_cache_options {
  /// Tokens in a page. 0: all tokens are in one array, which grows by doubling. The kernels process every page
  /// separately, which costs time compared with one array. One token after 32768 (float, 32 heads, 8 KV heads,
  /// head_dim 128), pages of 256: 5 to 20 % more, of 64: 5 to 30 %, of 16: 15 to 50 %. A chunk of 512 tokens after
  /// 4096, pages of 256: 1 %, of 64: 5 %, of 16: 13 %.
  Index page_size = 0;
  /// Evict a page when the mask will not show any of its keys again. With `causal{} & window{W}`, or
  /// `causal{} & (window{W} | sinks{4})`, about (W + rollback) / page_size + 2 pages remain, however many tokens were
  /// appended: 38 MB with W 4096, pages of 256 and the sizes above. One array keeps everything.
  bool evict = true;
  /// `truncate` can remove the last `rollback` tokens before the largest size that the stream has had; pages are
  /// evicted so many tokens later. After that the stream has the results and bits of one that never saw the removed
  /// tokens.
  Index rollback = 16;
};

/// What a dilated_cache keeps in addition to the rows that later queries see.
struct dilated_cache_options {
  /// `truncate` can always remove so many of the last tokens, counted from the largest size that the stream has had: a
  /// closed segment keeps its rows for so many more tokens. A rollback of 16 costs at most one closed segment and
  /// 16 / r rows for each branch (w, r).
  Index rollback = 16;
};

/// What an infini_memory keeps in addition to the memory and the open segment.
struct infini_memory_options {
  /// `truncate` can always remove so many of the last tokens of a batch row, counted from the largest size that the row
  /// has had. If rollback is not 0, the stream keeps a second memory, M and z as they were at an earlier segment border
  /// at least so many tokens ago, and the rows since then, at most 2 * segment + rollback. If rollback is longer than a
  /// segment, each segment is written a second time, to this second memory.
  Index rollback = 0;
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// True if the definition of a class has been included: functors make streams whose headers they do not include.
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

/// Throws Error if the tensors of a call, which agree with each other, do not have the shape of the stream.
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

/// Throws Error if keys and values without queries are not rows for `batch` batch rows of the stream.
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

/// Throws Error unless `rows` names a batch row of the stream for each of its batch rows.
inline void check_reorder(std::string_view function, std::span<const Index> rows, Index batch) {
  if (static_cast<Index>(rows.size()) != batch)
    refuse(function, "the number of rows", std::to_string(rows.size()), std::to_string(batch));
  for (const Index row : rows) {
    if (row < 0 || row >= batch)
      refuse(function, "a row", std::to_string(row), "0 to " + std::to_string(batch - 1));
  }
}

/// The rows [first, first + count) of a call, including those of lse.
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
