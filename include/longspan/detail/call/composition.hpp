// What a functor made of functors needs: scratch outputs for the inner functors, and an output to merge them in.
#pragma once

#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/slices.hpp"
#include "longspan/partial.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <class Real, class T>
TensorView<Real> scratch_output(const TensorView<T>& like, Arena& arena) {
  return compact_view(arena.take<Real>(like.batch * like.heads * like.rows * like.cols), like.batch,
                      like.heads, like.rows, like.cols);
}

/// `out` itself if its element type is that of the arithmetic, otherwise scratch memory of its shape.
template <class Real, class T>
TensorView<Real> output_or_scratch(const TensorView<T>& out, Arena& arena) {
  if constexpr (std::is_same_v<T, Real>) {
    return out;
  } else {
    return scratch_output<Real>(out, arena);
  }
}

template <class Call>
auto scratch_lse(const Call& call, Arena& arena) {
  using Real = typename Call::Real;
  return compact_rows_view(arena.take<Real>(call.q.batch * call.q.heads * call.q.rows), call.q.batch,
                           call.q.heads, call.q.rows);
}

/// Rounds the tensor that output_or_scratch returned to the element type of `out`.
template <class Real, class T, class E>
void move_output(const TensorView<Real>& from, const TensorView<T>& out, const E& executor) {
  if constexpr (!std::is_same_v<T, Real>) {
    for_each_row(out, executor, [&](Index b, Index h, Index i) {
      const Real* x = from.row(b, h, i);
      T* y = out.row(b, h, i);
      for (Index c = 0; c < out.cols; ++c) y[c] = static_cast<T>(x[c]);
    });
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
