// The overloads of a gradient's call, written once.
#pragma once

#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/gradient/problem.hpp"
#include "longspan/eigen.hpp"
#include "longspan/execution.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The overloads of a gradient's call. Each one calls Derived::check(problem), which throws Error if the functor
/// rejects the call, and then Derived::differentiate(problem, executor, workspace), which writes dq, dk and dv. S and
/// P are the score function and the position encoding of the functor.
template <class Derived, class S = unchanged, class P = no_position>
struct GradientCalls {
  static_assert(DifferentiableScore<S>,
                "longspan: the gradient needs the derivative of the score function: a member float "
                "derivative(float s, Index b, Index h, Index i, Index j) const (score.hpp)");
  static_assert(TransposablePosition<P>,
                "longspan: the gradient needs a member encode_transposed of the position encoding "
                "(position.hpp)");

  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse, TensorLike Dout,
            TensorLike Dq, TensorLike Dk, TensorLike Dv>
  void operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse& lse, const Dout& dout,
                  Dq&& dq, Dk&& dk, Dv&& dv) const {
    run(q, k, v, out, lse, dout, no_rows<const LseOf<Q>>(), dq, dk, dv, openmp{});
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse, TensorLike Dout,
            TensorLike Dq, TensorLike Dk, TensorLike Dv, ExecutionLike E>
  void operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse& lse, const Dout& dout,
                  Dq&& dq, Dk&& dk, Dv&& dv, E&& execution) const {
    run(q, k, v, out, lse, dout, no_rows<const LseOf<Q>>(), dq, dk, dv, execution);
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse, TensorLike Dout,
            RowsLike Dlse, TensorLike Dq, TensorLike Dk, TensorLike Dv>
  void operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse& lse, const Dout& dout,
                  const Dlse& dlse, Dq&& dq, Dk&& dk, Dv&& dv) const {
    run(q, k, v, out, lse, dout, rows_view(dlse), dq, dk, dv, openmp{});
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse, TensorLike Dout,
            RowsLike Dlse, TensorLike Dq, TensorLike Dk, TensorLike Dv, ExecutionLike E>
  void operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse& lse, const Dout& dout,
                  const Dlse& dlse, Dq&& dq, Dk&& dk, Dv&& dv, E&& execution) const {
    run(q, k, v, out, lse, dout, rows_view(dlse), dq, dk, dv, execution);
  }

 private:
  template <class Q, class K, class V, class Out, class Lse, class Dout, class Dlse, class Dq, class Dk,
            class Dv, class E>
  void run(const Q& q, const K& k, const V& v, const Out& out, const Lse& lse, const Dout& dout, Dlse dlse,
           Dq& dq, Dk& dk, Dv& dv, E&& execution) const {
    const auto& self = static_cast<const Derived&>(*this);
    const auto call = checked_gradient(Derived::name, view(q), view(k), view(v), view(out), rows_view(lse),
                                       view(dout), dlse, view(dq), view(dk), view(dv));
    self.check(call);
    with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
      self.differentiate(call, executor, workspace);
    });
  }
};

/// The same for functors that return no lse, whose gradients compute again what they need of the forward call.
template <class Derived>
struct GradientCallsWithoutLse {
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Dout, TensorLike Dq, TensorLike Dk,
            TensorLike Dv>
  void operator()(const Q& q, const K& k, const V& v, const Dout& dout, Dq&& dq, Dk&& dk, Dv&& dv) const {
    operator()(q, k, v, dout, dq, dk, dv, openmp{});
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Dout, TensorLike Dq, TensorLike Dk,
            TensorLike Dv, ExecutionLike E>
  void operator()(const Q& q, const K& k, const V& v, const Dout& dout, Dq&& dq, Dk&& dk, Dv&& dv,
                  E&& execution) const {
    const auto& self = static_cast<const Derived&>(*this);
    const auto call =
        checked_gradient(Derived::name, view(q), view(k), view(v), view(dout), view(dq), view(dk), view(dv));
    self.check(call);
    with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
      self.differentiate(call, executor, workspace);
    });
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
