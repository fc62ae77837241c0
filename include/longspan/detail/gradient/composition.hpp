// What the gradients of functors made of functors share: inputs of the arithmetic's type, and sums of gradients.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/composition.hpp"
#include "longspan/detail/call/slices.hpp"
#include "longspan/detail/gradient/functor.hpp"
#include "longspan/mask.hpp"
#include "longspan/partial.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

template <class... Parts>
struct merged;

namespace detail {

/// True if the weights of the functor's gradient are exp(score - lse) of whatever lse it is called with. Called with
/// out and lse of attention over more keys, such a gradient computes the share of its own keys.
template <class F>
inline constexpr bool takes_lse_of_union = false;
template <Mask M, Score S, Position P>
inline constexpr bool takes_lse_of_union<softmax_attention<M, S, P>> = true;
template <class... Parts>
inline constexpr bool takes_lse_of_union<merged<Parts...>> = (takes_lse_of_union<Parts> && ...);

/// x itself if its elements are of type Real, otherwise scratch memory of its shape, into which `copy_input` converts
/// it.
template <class Real, class T>
TensorView<const Real> input_or_scratch(const TensorView<const T>& x, Arena& arena) {
  if constexpr (std::is_same_v<T, Real>) {
    return x;
  } else {
    return compact_view(arena.take<Real>(x.batch * x.heads * x.rows * x.cols), x.batch, x.heads, x.rows,
                        x.cols);
  }
}
template <class Real, class T, class E>
void copy_input(const TensorView<const T>& from, const TensorView<const Real>& to, const E& executor) {
  if constexpr (!std::is_same_v<T, Real>) {
    for_each_row(to, executor, [&](Index b, Index h, Index i) {
      Real* y = const_cast<Real*>(to.row(b, h, i));  // scratch memory
      for (Index c = 0; c < to.cols; ++c) y[c] = static_cast<Real>(from.row(b, h, i)[c]);
    });
  }
}

/// Calls a gradient that takes an lse, with dlse unless it is null.
template <class Gradient, class Call, class Out, class Lse, class Dout, class Dlse, class Gradients, class E>
void call_gradient(const Gradient& gradient, const Call& call, const Out& out, const Lse& lse,
                   const Dout& dout, const Dlse& dlse, const Gradients& to, E& execution) {
  if (dlse.data == nullptr) {
    gradient(call.q, call.k, call.v, out, lse, dout, to.dq, to.dk, to.dv, execution);
  } else {
    gradient(call.q, call.k, call.v, out, lse, dout, dlse, to.dq, to.dk, to.dv, execution);
  }
}

/// The sums of dq, dk and dv over parts, in the order in which they are added. The sums are in the caller's tensors if
/// their elements are of type Real.
template <class Real>
class SumOfGradients {
 public:
  struct Gradients {
    TensorView<Real> dq{}, dk{}, dv{};
  };

  template <class Call>
  static SumOfGradients take(const Call& call, std::size_t parts, Arena& arena) {
    SumOfGradients sums;
    sums.sum_ = {output_or_scratch<Real>(call.dq, arena), output_or_scratch<Real>(call.dk, arena),
                 output_or_scratch<Real>(call.dv, arena)};
    if (parts > 1) {
      sums.next_ = {scratch_output<Real>(call.dq, arena), scratch_output<Real>(call.dk, arena),
                    scratch_output<Real>(call.dv, arena)};
    }
    return sums;
  }

  /// Where the next part writes its gradients.
  const Gradients& next() const { return is_first_ ? sum_ : next_; }
  /// Adds them.
  template <class E>
  void add(const E& executor) {
    if (!is_first_) {
      add_rows(next_.dq, sum_.dq, executor);
      add_rows(next_.dk, sum_.dk, executor);
      add_rows(next_.dv, sum_.dv, executor);
    }
    is_first_ = false;
  }
  /// Writes the sums.
  template <class Call, class E>
  void finish(const Call& call, const E& executor) const {
    move_output(sum_.dq, call.dq, executor);
    move_output(sum_.dk, call.dk, executor);
    move_output(sum_.dv, call.dv, executor);
  }

 private:
  template <class E>
  static void add_rows(const TensorView<Real>& from, const TensorView<Real>& to, const E& executor) {
    for_each_row(to, executor, [&](Index b, Index h, Index i) {
      const Real* x = from.row(b, h, i);
      Real* y = to.row(b, h, i);
      for (Index c = 0; c < to.cols; ++c) y[c] += x[c];
    });
  }

  Gradients sum_{}, next_{};
  bool is_first_ = true;
};

/// The query heads [begin, end) of a call of a gradient, and their KV heads.
template <class Call>
Call heads_of(Call call, Index begin, Index end) {
  const Index group = call.forward.group();
  const auto of_queries = [&](auto& x) { x = slice_heads(x, begin, end - begin); };
  const auto of_keys = [&](auto& x) { x = slice_heads(x, begin / group, (end - begin) / group); };
  of_queries(call.forward.q);
  of_queries(call.forward.out);
  if (call.forward.lse.data != nullptr) of_queries(call.forward.lse);
  of_queries(call.dout);
  if (call.dlse.data != nullptr) of_queries(call.dlse);
  of_queries(call.dq);
  of_keys(call.forward.k);
  of_keys(call.forward.v);
  of_keys(call.dk);
  of_keys(call.dv);
  return call;
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
