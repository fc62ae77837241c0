// One call of a gradient with checked shapes.
#pragma once

#include <optional>
#include <string_view>
#include <type_traits>

#include "longspan/detail/call/check_view.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The forward call and the gradients of its tensors.
template <class ForwardCall, class Td, class Gq, class Gk, class Gv>
struct GradientProblem {
  using Forward = ForwardCall;
  using Real = typename Forward::Real;

  Forward forward;  ///< its out and lse are only read
  TensorView<const Td> dout;
  RowsView<const Real> dlse;  ///< data is null if the loss does not depend on lse
  TensorView<Gq> dq;
  TensorView<Gk> dk;
  TensorView<Gv> dv;

  /// The same call with the options of the functor resolved.
  GradientProblem at(std::string_view function, Index first_query, std::optional<double> scale) const {
    GradientProblem p = *this;
    p.forward = forward.at(function, first_query, scale);
    return p;
  }
};

template <class T>
void check_like(std::string_view function, std::string_view argument, const TensorView<T>& got, Index batch,
                Index heads, Index rows, Index cols) {
  check_view(function, argument, got);
  if (got.batch != batch || got.heads != heads || got.rows != rows || got.cols != cols)
    refuse(function, argument, shape_text(got), shape_text(batch, heads, rows, cols));
}

/// The call of a gradient whose forward call has been checked. `out` is the memory of the output, null if the gradient
/// does not use it.
template <class Forward, class Td, class Tdl, class Gq, class Gk, class Gv>
auto gradient_problem(std::string_view function, const Forward& forward, const void* out, TensorView<Td> dout,
                      RowsView<Tdl> dlse, TensorView<Gq> dq, TensorView<Gk> dk, TensorView<Gv> dv) {
  static_assert(Element<Td> && Element<Gq> && Element<Gk> && Element<Gv>,
                "longspan: the elements of a tensor must be float, double, Eigen::bfloat16 or Eigen::half");
  static_assert(!std::is_const_v<Gq> && !std::is_const_v<Gk> && !std::is_const_v<Gv>,
                "longspan: dq, dk and dv must not be const: the call writes them");
  using Real = typename Forward::Real;
  static_assert(std::is_same_v<std::remove_const_t<Tdl>, Real>,
                "longspan: the elements of dlse must be double if those of q are, otherwise float");
  const auto& q = forward.q;
  const auto& k = forward.k;
  const auto& v = forward.v;
  check_like(function, "dout", dout, q.batch, q.heads, q.rows, v.cols);
  if (dlse.batch != no_size) {
    check_view(function, "dlse", dlse);
    if (dlse.batch != q.batch || dlse.heads != q.heads || dlse.rows != q.rows)
      refuse(function, "dlse", shape_text(dlse), shape_text(q.batch, q.heads, q.rows));
  }
  check_like(function, "dq", dq, q.batch, q.heads, q.rows, q.cols);
  check_like(function, "dk", dk, k.batch, k.heads, k.rows, k.cols);
  check_like(function, "dv", dv, v.batch, v.heads, v.rows, v.cols);

  struct Output {
    std::string_view name;
    const void* data;
    bool empty;
  };
  const Output outputs[] = {
      {"dq", dq.data, dq.empty()}, {"dk", dk.data, dk.empty()}, {"dv", dv.data, dv.empty()}};
  const void* inputs[] = {q.data, k.data, v.data, out, dout.data};
  for (const Output& output : outputs) {
    if (output.empty) continue;
    for (const void* input : inputs) {
      if (output.data == input) refuse(function, output.name, "the memory of an input", "memory of its own");
    }
    for (const Output& other : outputs) {
      if (&other != &output && !other.empty && other.data == output.data)
        refuse(function, output.name, "the memory of another gradient", "memory of its own");
    }
  }
  return GradientProblem<Forward, std::remove_const_t<Td>, Gq, Gk, Gv>{
      forward,
      without_idle_strides(TensorView<const std::remove_const_t<Td>>(dout)),
      dlse.batch == no_size ? RowsView<const Real>{} : RowsView<const Real>(dlse),
      without_idle_strides(dq),
      without_idle_strides(dk),
      without_idle_strides(dv)};
}

template <class Tq, class Tk, class Tv, class To, class Tl, class Td, class Tdl, class Gq, class Gk, class Gv>
auto checked_gradient(std::string_view function, TensorView<Tq> q, TensorView<Tk> k, TensorView<Tv> v,
                      TensorView<To> out, RowsView<Tl> lse, TensorView<Td> dout, RowsView<Tdl> dlse,
                      TensorView<Gq> dq, TensorView<Gk> dk, TensorView<Gv> dv) {
  using Out = std::remove_const_t<To>;
  using Lse = std::remove_const_t<Tl>;
  const auto forward =
      checked_problem(function, q, k, v,
                      TensorView<Out>{const_cast<Out*>(out.data), out.batch, out.heads, out.rows, out.cols,
                                      out.batch_stride, out.head_stride, out.row_stride},
                      RowsView<Lse>{const_cast<Lse*>(lse.data), lse.batch, lse.heads, lse.rows,
                                    lse.batch_stride, lse.head_stride, lse.row_stride});
  return gradient_problem(function, forward, out.data, dout, dlse, dq, dk, dv);
}

/// The same for a gradient that uses neither out nor lse; those of the forward call must not be used.
template <class Tq, class Tk, class Tv, class Td, class Gq, class Gk, class Gv>
auto checked_gradient(std::string_view function, TensorView<Tq> q, TensorView<Tk> k, TensorView<Tv> v,
                      TensorView<Td> dout, TensorView<Gq> dq, TensorView<Gk> dk, TensorView<Gv> dv) {
  using Real = Arithmetic<Tq>;
  static Real no_output;  // the check of the forward call wants an output that has memory
  const TensorView<Real> out{&no_output, q.batch, q.heads, q.rows, v.cols, 0, 0, 0};
  const auto forward = checked_problem(function, q, k, v, out, no_rows<Real>());
  return gradient_problem(function, forward, nullptr, dout, no_rows<const Real>(), dq, dk, dv);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
