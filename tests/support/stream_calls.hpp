// Extends a stream with the rows of a call, piece by piece.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "longspan/execution.hpp"
#include "longspan/stream_shape.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace test {

inline longspan::StreamShape stream_shape(const Shape& s) {
  return {s.batch, s.heads, s.kv_heads, s.head_dim, s.value_dim};
}

/// Extends the stream with the rows [first, first + count) of the call; with lse if the stream returns it.
template <class Stream, class C>
void extend(Stream& stream, C& call, Index first, Index count, Index threads = 2) {
  const auto q = std::as_const(call.q).view().slice_rows(first, count);
  const auto k = std::as_const(call.k).view().slice_rows(first, count);
  const auto v = std::as_const(call.v).view().slice_rows(first, count);
  const auto out = call.out.view().slice_rows(first, count);
  auto lse = call.lse.view();
  if (lse.data != nullptr) lse.data += first;  // null if there are no heads
  lse.rows = count;
  const longspan::openmp executor{threads};
  if constexpr (requires { stream.extend(q, k, v, out, lse, executor); }) {
    stream.extend(q, k, v, out, lse, executor);
  } else if constexpr (requires { stream.extend(q, k, v, out, lse); }) {  // an oracle
    stream.extend(q, k, v, out, lse);
  } else {
    stream.extend(q, k, v, out, executor);
  }
}

/// Extends the stream with the rows up to `end`, in pieces of `shortest` to `longest` rows.
template <class Stream, class C>
void extend_in_chunks(Stream& stream, C& call, Random& random, Index end, Index longest, Index shortest = 0) {
  while (stream.size() < end) {
    const Index left = end - stream.size();
    extend(stream, call, stream.size(), std::min(left, random.between(shortest, longest)));
  }
}

/// True if the rows [first, end) of the outputs of both calls have the same bits. An lse that no stream wrote is NaN.
template <class C>
bool same_rows(const C& a, const C& b, Index first, Index end) {
  for (Index n = 0; n < a.out.batch * a.out.heads; ++n) {
    const auto same = [&](const auto* x, const auto* y, Index count) {
      return count == 0 || std::memcmp(x, y, static_cast<std::size_t>(count) * sizeof(*x)) == 0;
    };
    const auto lse = [&](const C& call) { return call.lse.values.data() + n * call.lse.rows + first; };
    const Index count = end - first;
    if (!same(a.out.row(0, n, first), b.out.row(0, n, first), count * a.out.cols) ||
        !same(lse(a), lse(b), count))
      return false;
  }
  return true;
}

}  // namespace test
