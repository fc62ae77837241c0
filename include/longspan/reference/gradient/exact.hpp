// The form of the references of gradients: a gradient again, naive and in double.
#pragma once

#include "longspan/detail/call/problem.hpp"
#include "longspan/eigen.hpp"
#include "longspan/gradient/gradient.hpp"
#include "longspan/reference/exact.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// The ways to call the reference of a gradient. Out and lse are not arguments, since it computes the forward pass
/// again in double:
///
///   reference::exact{gradient(attend)}(q, k, v, dout, dq, dk, dv);
///   reference::exact{gradient(attend)}(q, k, v, dout, dlse, dq, dk, dv);
///
/// Each calls Derived::differentiate_exactly(q, k, v, dout, dlse, dq, dk, dv) over views; dlse.data may be null.
template <class Derived>
struct ExactGradientCalls {
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Dout, TensorLike Dq, TensorLike Dk,
            TensorLike Dv>
  void operator()(const Q& q, const K& k, const V& v, const Dout& dout, Dq&& dq, Dk&& dk, Dv&& dv) const {
    self().differentiate_exactly(constant(view(q)), constant(view(k)), constant(view(v)),
                                 constant(view(dout)), detail::no_rows<const double>(), view(dq), view(dk),
                                 view(dv));
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Dout, RowsLike Dlse, TensorLike Dq,
            TensorLike Dk, TensorLike Dv>
  void operator()(const Q& q, const K& k, const V& v, const Dout& dout, const Dlse& dlse, Dq&& dq, Dk&& dk,
                  Dv&& dv) const {
    self().differentiate_exactly(constant(view(q)), constant(view(k)), constant(view(v)),
                                 constant(view(dout)), rows_view(dlse), view(dq), view(dk), view(dv));
  }

 private:
  template <class T>
  static TensorView<const T> constant(TensorView<T> x) {
    return x;
  }
  const Derived& self() const { return static_cast<const Derived&>(*this); }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
