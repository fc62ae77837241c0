// The form of all references: a functor again, naive and in double.
#pragma once

#include "longspan/detail/call/problem.hpp"
#include "longspan/eigen.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// A functor with its parts and options, computed again in loops that read as the definition: what the fast
/// kernels are compared with. Arithmetic is in double, inputs and outputs are of any type, nothing is checked, and
/// everything runs on the calling thread.
///
///   reference::exact{attend}(q, k, v, out, lse);  // lse is optional; infini_attention has none
///
/// Include the header of reference/ that has the name of the functor: softmax_attention.hpp,
/// dilated_attention.hpp, landmark_attention.hpp or infini_attention.hpp.
template <class Functor>
struct exact;

template <class Functor>
exact(Functor) -> exact<Functor>;

/// The ways to call a reference, each as Derived::attend_exactly(q, k, v, out, lse) over views.
template <class Derived>
struct ExactCalls {
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out>
  void operator()(const Q& q, const K& k, const V& v, Out&& out) const {
    self().attend_exactly(constant(view(q)), constant(view(k)), constant(view(v)), view(out),
                          detail::no_rows<double>());
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse>
  void operator()(const Q& q, const K& k, const V& v, Out&& out, Lse&& lse) const {
    self().attend_exactly(constant(view(q)), constant(view(k)), constant(view(v)), view(out), rows_view(lse));
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
