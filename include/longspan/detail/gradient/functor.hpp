// Forward and backward calls of a functor inside the gradient of another one.
#pragma once

#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/functor.hpp"
#include "longspan/options.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

template <class Functor>
struct gradient_of;

namespace detail {

/// Functors with a gradient whose header is included.
template <class F>
concept HasGradient = Complete<gradient_of<F>>;

/// True if the functor returns an lse, which its gradient then takes.
template <class F>
inline constexpr bool returns_lse = LseFunctor<F> || LseFunctor<F, double>;

/// Out and lse of a functor, as its gradient needs them. They are not used if the functor returns no lse.
template <class Real>
struct ForwardResult {
  TensorView<Real> out{};
  RowsView<Real> lse{};

  /// Scratch memory for the result of a call with these queries.
  template <class Tq>
  static ForwardResult take(Arena& arena, const TensorView<const Tq>& q, Index value_dim) {
    return {compact_view(arena.take<Real>(q.batch * q.heads * q.rows * value_dim), q.batch, q.heads, q.rows,
                         value_dim),
            compact_rows_view(arena.take<Real>(q.batch * q.heads * q.rows), q.batch, q.heads, q.rows)};
  }

  /// Computes the result. A functor without lse is called only if `wants_out`.
  template <class F, class Q, class K, class V, class E>
  void attend(const F& functor, const Q& q, const K& k, const V& v, bool wants_out, E& execution) const {
    if constexpr (returns_lse<F>) {
      functor(q, k, v, out, lse, execution);
    } else {
      if (wants_out) functor(q, k, v, out, execution);
    }
  }

  /// Writes dq, dk and dv from dout.
  template <class F, class Q, class K, class V, class Dout, class Dq, class Dk, class Dv, class E>
  void differentiate(const gradient_of<F>& gradient, const Q& q, const K& k, const V& v, const Dout& dout,
                     const Dq& dq, const Dk& dk, const Dv& dv, E& execution) const {
    if constexpr (returns_lse<F>) {
      gradient(q, k, v, TensorView<const Real>(out), RowsView<const Real>(lse), dout, dq, dk, dv, execution);
    } else {
      gradient(q, k, v, dout, dq, dk, dv, execution);
    }
  }
};

/// Calls work(gradient) with a gradient whose functor has its last query at the position of the last key.
template <class Gradient, class Work>
void with_queries_at_end(const Gradient& gradient, const Work& work) {
  if constexpr (requires { gradient.attend.first_query; }) {
    if (gradient.attend.first_query != queries_end_at_keys) {
      auto copy = gradient;
      copy.attend.first_query = queries_end_at_keys;
      return work(copy);
    }
  }
  work(gradient);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
