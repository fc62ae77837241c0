// A call whose rows go through a stream piece by piece.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "longspan/execution.hpp"
#include "longspan/stream_shape.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace test {

inline longspan::StreamShape stream_shape(const Shape& s) {
  return {s.batch, s.heads, s.kv_heads, s.head_dim, s.value_dim};
}

/// Rows [first, first + count) of the call, lse where the stream gives it.
template <class Stream, class C>
void extend(Stream& stream, C& call, Index first, Index count, Index threads = 2) {
  const auto q = std::as_const(call.q).view().slice_rows(first, count);
  const auto k = std::as_const(call.k).view().slice_rows(first, count);
  const auto v = std::as_const(call.v).view().slice_rows(first, count);
  const auto out = call.out.view().slice_rows(first, count);
  auto lse = call.lse.view();
  lse.data += first;
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

/// Rows up to `end`, in pieces of `shortest` to `longest`.
template <class Stream, class C>
void extend_in_chunks(Stream& stream, C& call, Random& random, Index end, Index longest, Index shortest = 0) {
  while (stream.size() < end) {
    const Index left = end - stream.size();
    extend(stream, call, stream.size(), std::min(left, random.between(shortest, longest)));
  }
}

/// Are rows [first, end) of the outputs of both calls the same, to the bit? An lse that no stream wrote is NaN.
template <class C>
bool same_rows(const C& a, const C& b, Index first, Index end) {
  const auto same = [](auto x, auto y) { return x == y || (std::isnan(x) && std::isnan(y)); };
  for (Index n = 0; n < a.out.batch * a.out.heads; ++n) {
    for (Index i = first; i < end; ++i) {
      const auto *x = a.out.row(0, n, i), *y = b.out.row(0, n, i);
      if (!std::equal(x, x + a.out.cols, y) || !same(a.lse(0, n, i), b.lse(0, n, i))) return false;
    }
  }
  return true;
}

}  // namespace test
