// The gradients of functors made of functors: merged, gated, per_head.
#pragma once

#include <cstddef>
#include <span>
#include <tuple>
#include <type_traits>
#include <utility>

#include "longspan/compose.hpp"
#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/composition.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/gradient/calls.hpp"
#include "longspan/detail/gradient/composition.hpp"
#include "longspan/detail/gradient/functor.hpp"
#include "longspan/detail/gradient/gates.hpp"
#include "longspan/execution.hpp"
#include "longspan/gates.hpp"
#include "longspan/gradient/gradient.hpp"
#include "longspan/gradient/partial.hpp"
#include "longspan/gradient/softmax_attention.hpp"
#include "longspan/partial.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// The gradient of merged: dq, dk and dv are the sums of those of the parts, in their order. A part that is
/// softmax_attention, or merged of these, gets dout, dlse, out and lse of the call itself: its weights exp(score -
/// lse) are then those of the union. For each other part out_n and lse_n are computed again, and merge_gradient
/// computes dout_n and dlse_n.
///
///   merged attend{softmax_attention{causal{} & window{.left = 511}}, dilated_attention{{{4096, 8}}, causal{}}};
///   attend(q, k, v, out, lse);                              // forward
///   gradient(attend)(q, k, v, out, lse, dout, dq, dk, dv);  // backward, dlse and execution are optional
///
/// Parts     each part needs a gradient, whose header is to be included; that of softmax_attention is included.
///           Options of their gradients are set in `parts`
/// Cost      the gradients of the parts, the forward calls of the parts that are computed again, and one pass over dq,
///           dk and dv for each part after the first. Scratch: dq, dk and dv once, twice if those of the caller are of
///           16 bits, and out_n, dout_n, lse_n and dlse_n of one part that is computed again
/// Error     the sum of those of the parts, with lse and D of the call. 16-bit gradients are rounded once
/// Masked    a part that sees no key of a query sends nothing to it and gets nothing from it
/// Bits      do not depend on the executor
/// Throws    Error as gradient.hpp says, or when a part refuses the call, before anything is written. A part that is
///           user-defined throws only when it is called
template <class... Parts>
struct gradient_of<merged<Parts...>> : detail::GradientCalls<gradient_of<merged<Parts...>>> {
  static_assert((detail::HasGradient<Parts> && ...),
                "longspan: a part of merged has no gradient; include its header of longspan/gradient/");

  merged<Parts...> attend{};
  std::tuple<gradient_of<Parts>...> parts{};  ///< of attend.parts: options of their gradients are set here

  gradient_of() = default;
  explicit gradient_of(merged<Parts...> functor)
      : attend(std::move(functor)),
        parts(std::apply([](const Parts&... of) { return std::tuple(gradient_of<Parts>(of)...); },
                         attend.parts)) {}

 private:
  friend detail::GradientCalls<gradient_of>;
  static constexpr const char* name = "gradient(merged)";
  static constexpr bool computes_again = !(detail::takes_lse_of_union<Parts> && ...);

  template <class Call>
  void check(const Call& call) const {
    attend.check_call(call.forward);
  }

  template <class Call, class E>
  void differentiate(const Call& call, const E& executor, Workspace& workspace) const {
    using Real = typename Call::Real;
    const auto& forward = call.forward;
    using Out = std::remove_const_t<typename std::remove_cvref_t<decltype(forward.out)>::Element>;
    const TensorView<const Out> result = forward.out;
    detail::SumOfGradients<Real> sums;
    TensorView<const Real> out, dout;
    detail::ForwardResult<Real> found, change;
    detail::take_scratch(workspace, [&](detail::Arena& arena) {
      sums = detail::SumOfGradients<Real>::take(call, sizeof...(Parts), arena);
      if constexpr (computes_again) {
        out = detail::input_or_scratch<Real>(result, arena);
        dout = detail::input_or_scratch<Real>(call.dout, arena);
        found = detail::ForwardResult<Real>::take(arena, forward.q, forward.value_dim());
        change = detail::ForwardResult<Real>::take(arena, forward.q, forward.value_dim());
      }
    });
    if constexpr (computes_again) {
      detail::copy_input(result, out, executor);
      detail::copy_input(call.dout, dout, executor);
    }
    detail::ExecutionRef<E> inner{executor, workspace.inner()};
    const RowsView<const Real> lse = forward.lse;
    const auto differentiate_part = [&]<class F>(const gradient_of<F>& part) {
      if constexpr (detail::takes_lse_of_union<F>) {
        detail::call_gradient(part, forward, result, lse, call.dout, call.dlse, sums.next(), inner);
      } else {
        part.attend(forward.q, forward.k, forward.v, found.out, found.lse, inner);
        merge_gradient<Real>({Partial<const Real>{found.out, found.lse}}, Partial<const Real>{out, lse},
                             Partial<const Real>{dout, call.dlse}, {Partial<Real>{change.out, change.lse}},
                             executor);
        detail::call_gradient(part, forward, TensorView<const Real>(found.out),
                              RowsView<const Real>(found.lse), TensorView<const Real>(change.out),
                              RowsView<const Real>(change.lse), sums.next(), inner);
      }
      sums.add(executor);
    };
    std::apply([&](const auto&... part) { (..., differentiate_part(part)); }, parts);
    sums.finish(call, executor);
  }
};

/// The gradient of gated: dq, dk and dv are the sums of those of a, from g dout, and of b, from (1 - g) dout; dbeta is
/// that of gate_gradient. gated returns no lse, so that there is no gradient of one, and its output is not needed.
///
///   gated attend{per_head_gate(beta), a, b};
///   attend(q, k, v, out);                          // forward
///   auto backward = gradient(attend);
///   backward.dbeta = {dbeta.data(), heads, 1, 1};  // optional
///   backward(q, k, v, dout, dq, dk, dv);           // execution is optional
///
/// Shapes    dout as out, dq as q, dk as k, dv as v; dbeta as beta, [1, 1] if beta is not set
/// Parts     a and b need gradients, whose headers are to be included; that of softmax_attention is included
/// Cost      the gradients of a and b, and their forward calls, which compute out and lse again; a functor without lse
///           is called forward only for dbeta. One pass over dout, dq, dk and dv. Scratch: dq, dk and dv once, twice
///           if those of the caller are of 16 bits, and out, dout and lse of both
/// Error     the sum of those of a and b. 16-bit gradients are rounded once
/// Masked    a side whose gate is 0 gets nothing
/// Bits      do not depend on the executor
/// Throws    Error as gradient.hpp says, when dbeta does not fit, or when gated refuses the call, before anything is
///           written
template <class A, class B>
struct gradient_of<gated<A, B>> : detail::GradientCallsWithoutLse<gradient_of<gated<A, B>>> {
  static_assert(detail::HasGradient<A> && detail::HasGradient<B>,
                "longspan: a functor of gated has no gradient; include its header of longspan/gradient/");

  gated<A, B> attend{};
  gradient_of<A> a{};  ///< of attend.a: options of its gradient are set here
  gradient_of<B> b{};
  MatrixView<float> dbeta{};  ///< overwritten if set

  gradient_of() = default;
  explicit gradient_of(gated<A, B> functor) : attend(std::move(functor)), a(attend.a), b(attend.b) {}

 private:
  friend detail::GradientCallsWithoutLse<gradient_of>;
  static constexpr const char* name = "gradient(gated)";

  template <class Call>
  void check(const Call& call) const {
    attend.check_call(call.forward);
    detail::check_dbeta(name, dbeta, detail::logits_of(attend.beta));
  }

  template <class Call, class E>
  void differentiate(const Call& call, const E& executor, Workspace& workspace) const {
    using Real = typename Call::Real;
    const auto& forward = call.forward;
    detail::SumOfGradients<Real> sums;
    TensorView<const Real> dout;
    detail::ForwardResult<Real> of_a, of_b;
    TensorView<Real> da, db;
    detail::take_scratch(workspace, [&](detail::Arena& arena) {
      sums = detail::SumOfGradients<Real>::take(call, 2, arena);
      dout = detail::input_or_scratch<Real>(call.dout, arena);
      of_a = detail::ForwardResult<Real>::take(arena, forward.q, forward.value_dim());
      of_b = detail::ForwardResult<Real>::take(arena, forward.q, forward.value_dim());
      da = detail::scratch_output<Real>(call.dout, arena);
      db = detail::scratch_output<Real>(call.dout, arena);
    });
    detail::copy_input(call.dout, dout, executor);
    detail::ExecutionRef<E> inner{executor, workspace.inner()};
    const bool wants_beta = dbeta.data != nullptr;
    of_a.attend(a.attend, forward.q, forward.k, forward.v, wants_beta, inner);
    of_b.attend(b.attend, forward.q, forward.k, forward.v, wants_beta, inner);
    gate_gradient(detail::logits_of(attend.beta), of_a.out, of_b.out, dout, dbeta, da, db, inner);
    const auto differentiate_side = [&](const auto& gradient, const auto& found, const auto& change) {
      const auto& to = sums.next();
      found.differentiate(gradient, forward.q, forward.k, forward.v, TensorView<const Real>(change), to.dq,
                          to.dk, to.dv, inner);
      sums.add(executor);
    };
    differentiate_side(a, of_a, da);
    differentiate_side(b, of_b, db);
    sums.finish(call, executor);
  }
};

namespace detail {

/// The overloads of the gradient of per_head: with lse if all of its functors return one.
template <class Derived, class... F>
using PerHeadGradientCalls =
    std::conditional_t<(LseFunctor<F> && ...), GradientCalls<Derived>, GradientCallsWithoutLse<Derived>>;

}  // namespace detail

/// The gradient of per_head: those of its functors, each for its own heads.
///
///   gradient(attend)(q, k, v, out, lse, dout, dq, dk, dv);  // all functors return an lse; dlse is optional
///   gradient(attend)(q, k, v, dout, dq, dk, dv);            // otherwise
///
/// Parts     each functor needs a gradient, whose header is to be included; that of softmax_attention is included.
///           Options of their gradients are set in `ranges`
/// Cost      that of the gradients. If some functors return no lse, the others are called forward again, with scratch
///           memory for out and lse of their heads; otherwise no additional scratch
/// Throws    Error as gradient.hpp says, or when per_head refuses the call, before anything is written
template <class... F>
struct gradient_of<per_head<F...>> : detail::PerHeadGradientCalls<gradient_of<per_head<F...>>, F...> {
  static_assert((detail::HasGradient<F> && ...),
                "longspan: a functor of per_head has no gradient; include its header of longspan/gradient/");

  per_head<F...> attend{};
  std::tuple<for_heads<gradient_of<F>>...> ranges{};  ///< of attend.ranges: their options are set here

  gradient_of() = default;
  explicit gradient_of(per_head<F...> functor)
      : attend(std::move(functor)),
        ranges(std::apply(
            [](const for_heads<F>&... of) {
              return std::tuple(for_heads<gradient_of<F>>{of.begin, of.end, gradient_of<F>(of.attend)}...);
            },
            attend.ranges)) {}

 private:
  static constexpr bool takes_lse = (LseFunctor<F> && ...);
  friend detail::PerHeadGradientCalls<gradient_of, F...>;
  static constexpr const char* name = "gradient(per_head)";

  template <class Call>
  void check(const Call& call) const {
    attend.check_call(call.forward);
  }

  template <class Call, class E>
  void differentiate(const Call& call, const E& executor, Workspace& workspace) const {
    using Real = typename Call::Real;
    const auto differentiate_range = [&](const auto& range) {
      const Call part = detail::heads_of(call, range.begin, range.end);
      const auto& forward = part.forward;
      detail::ExecutionRef<E> inner{executor, workspace.inner()};
      if constexpr (takes_lse) {
        using Out = std::remove_const_t<typename std::remove_cvref_t<decltype(forward.out)>::Element>;
        detail::call_gradient(range.attend, forward, TensorView<const Out>(forward.out),
                              RowsView<const Real>(forward.lse), part.dout, part.dlse, part, inner);
      } else {
        detail::ForwardResult<Real> found;
        detail::take_scratch(workspace, [&](detail::Arena& arena) {
          found = detail::ForwardResult<Real>::take(arena, forward.q, forward.value_dim());
        });
        found.attend(range.attend.attend, forward.q, forward.k, forward.v, false, inner);
        found.differentiate(range.attend, forward.q, forward.k, forward.v, part.dout, part.dq, part.dk,
                            part.dv, inner);
      }
    };
    std::apply([&](const auto&... range) { (..., differentiate_range(range)); }, ranges);
  }
};

LONGSPAN_NAMESPACE_END
