// Partial attention results and the three ways to combine them: merge, with_lse, gate.
//
// Softmax attention over any subset of the keys gives each query a partial: its normalised output and the log-sum-exp
// of its scores. Partials over disjoint sets of keys form a commutative monoid under `merge`; its identity is out =
// 0, lse = -infinity, which is the result of attention over no keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "longspan/detail/call/check_view.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/gates.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// The result of attention over some of the keys: out [batch, heads, q_len, value_dim], lse [batch, heads,
/// q_len]. Owns nothing.
template <Element T>
struct Partial {
  using Real = std::conditional_t<std::is_const_v<T>, const Arithmetic<T>, Arithmetic<T>>;

  TensorView<T> out;
  RowsView<Real> lse;

  LONGSPAN_INLINE operator Partial<const T>() const noexcept
  requires(!std::is_const_v<T>)
  {
    return {out, lse};
  }
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN

/// A partial of two tensors; a constant one if either of them is constant.
template <TensorLike Out, RowsLike Lse>
auto partial(Out&& out, Lse&& lse) {
  const auto values = view(out);
  const auto rows = rows_view(lse);
  using Of = typename std::remove_cvref_t<decltype(values)>::Element;
  constexpr bool is_constant = std::is_const_v<std::remove_pointer_t<decltype(rows.data)>>;
  return Partial<std::conditional_t<is_constant, const Of, Of>>{values, rows};
}

/// The same output with another log-weight. Landmark attention is a merge in which each block has the logit of its
/// landmark instead of its own log-sum-exp.
template <Element T, RowsLike Lse>
Partial<const T> with_lse(const Partial<T>& part, Lse&& lse) {
  return {part.out, rows_view(lse)};
}

namespace detail {

template <class T>
void check_partial(std::string_view function, const std::string& argument, const Partial<T>& part,
                   const TensorView<std::remove_const_t<T>>& wanted) {
  const TensorView<T>& out = part.out;
  if (fault_of(out) != nullptr) refuse_view(function, "the output of " + argument, out);
  if (out.batch != wanted.batch || out.heads != wanted.heads || out.rows != wanted.rows ||
      out.cols != wanted.cols) {
    refuse(function, "the output of " + argument, shape_text(out), shape_text(wanted));
  }
  if (part.lse.batch != out.batch || part.lse.heads != out.heads || part.lse.rows != out.rows) {
    refuse(function, "the lse of " + argument, shape_text(part.lse),
           shape_text(out.batch, out.heads, out.rows));
  }
  if (fault_of(part.lse) != nullptr) refuse_view(function, "the lse of " + argument, part.lse);
}

/// Calls work(b, h, i) for each row of a tensor, with a few hundred rows in each task.
template <class T, class E, class Work>
void for_each_row(const TensorView<T>& like, const E& executor, const Work& work) {
  constexpr Index rows_in_task = 256;
  const Index chunks = (like.rows + rows_in_task - 1) / rows_in_task;
  executor.for_each(like.batch * like.heads * chunks, [&](Index task, Index) {
    const Index head = task / chunks, first = task % chunks * rows_in_task;
    for (Index i = first; i < (std::min)(like.rows, first + rows_in_task); ++i) {
      work(head / like.heads, head % like.heads, i);
    }
  });
}

/// to[c] = sum over n of weight[n] * from[n][c]. `to` may be one of `from`.
///
/// Each product is rounded before it is added: it is an fma with 0, which no compiler fuses with the addition. Two
/// parts therefore produce the same bits in either order.
template <class T, class Real>
void weighted_sum(std::span<const T* const> from, std::span<const Real> weights, T* to, Index cols) {
  const auto sum_at = [&](const auto& load_at) {
    Packet<Real> sum = broadcast(Real(0));
    for (std::size_t n = 0; n < from.size(); ++n) {
      // A part of weight 0 is absent, even if it contains NaN.
      if (weights[n] == Real(0)) continue;
      sum = sum + fma(broadcast(weights[n]), load_at(from[n]), broadcast(Real(0)));
    }
    return sum;
  };
  Index c = 0;
  for (; c + lanes<Real> <= cols; c += lanes<Real>) {
    store_as(to + c, sum_at([c](const T* row) { return load_as<Real>(row + c); }));
  }
  if (c == cols) return;
  alignas(64) Real last[std::size_t(lanes<Real>)];
  store<Real>(last, sum_at([&](const T* row) { return load_part<Real>(row + c, cols - c); }));
  for (const Real* x = last; c < cols; ++c, ++x) to[c] = static_cast<T>(*x);
}

}  // namespace detail

/// The partial over the union of the keys: lse = log sum_n exp(lse_n), out = sum_n exp(lse_n - lse) * out_n.
///
/// Shapes    the same for every part and `into`
/// Aliasing  `into` may be one of the parts; otherwise it overlaps none of them
/// Cost      one pass over the parts
/// Error     out within (parts + 4) u of sum_n weight_n |out_n|, lse within 2 u (1 + |lse|); u = 2^-24 for
///           float
/// Exact     two parts produce the same bits in either order; a part with lse = -infinity changes nothing,
///           whatever its output contains
/// NaN       a row and its lse become NaN if the lse of one of its parts is NaN
/// Throws    Error if shapes disagree or there are more than 64 parts, before anything is written
template <MutableElement T, ExecutionLike E = openmp>
void merge(std::type_identity_t<std::span<const Partial<const T>>> parts, const Partial<T>& into,
           E&& execution = E{}) {
  using Real = Arithmetic<T>;
  constexpr std::size_t most = 64;
  if (parts.size() > most)
    detail::refuse("merge", "the number of parts", std::to_string(parts.size()), "at most 64");
  detail::check_partial<T>("merge", "the result", into, into.out);
  for (std::size_t n = 0; n < parts.size(); ++n) {
    detail::check_partial<const T>("merge", "part " + std::to_string(n), parts[n], into.out);
  }
  const auto merge_row = [&](Index b, Index h, Index i) {
    const Real nothing = detail::minus_infinity<Real>();
    Real weights[most], top = nothing;
    const T* rows[most];
    for (std::size_t n = 0; n < parts.size(); ++n) {
      weights[n] = parts[n].lse(b, h, i);
      rows[n] = parts[n].out.row(b, h, i);
      top = (std::max)(top, weights[n]);  // NaN does not raise the maximum, but makes the sum NaN
    }
    Real sum = 0;
    for (std::size_t n = 0; n < parts.size(); ++n) {
      // lse - top would be NaN for a part that saw no key if the other parts saw none either.
      weights[n] = detail::is_minus_infinity(weights[n]) ? Real(0) : std::exp(weights[n] - top);
      sum += weights[n];
    }
    for (std::size_t n = 0; n < parts.size(); ++n)
      weights[n] = weights[n] == Real(0) ? Real(0) : weights[n] / sum;
    detail::weighted_sum<T, Real>({rows, parts.size()}, {weights, parts.size()}, into.out.row(b, h, i),
                                  into.out.cols);
    into.lse(b, h, i) = sum == Real(0) ? nothing : top + std::log(sum);
  };
  detail::with_executor(execution,
                        [&](const auto& executor) { detail::for_each_row(into.out, executor, merge_row); });
}

/// The same for parts in a vector or an array that `partial` made from tensors of mutable elements.
template <MutableElement T, ExecutionLike E = openmp>
void merge(std::type_identity_t<std::span<const Partial<T>>> parts, const Partial<T>& into,
           E&& execution = E{}) {
  const std::vector<Partial<const T>> constant(parts.begin(), parts.end());
  merge<T>(std::span<const Partial<const T>>(constant), into, execution);
}

/// merge({a, b}, into): each part may be a Partial<T> or a Partial<const T>.
template <MutableElement T, ExecutionLike E = openmp>
void merge(std::initializer_list<std::type_identity_t<Partial<const T>>> parts, const Partial<T>& into,
           E&& execution = E{}) {
  merge<T>(std::span<const Partial<const T>>(parts.begin(), parts.size()), into, execution);
}

namespace detail {

template <class Real, class T>
void check_gate(std::string_view function, const MatrixView<const Real>& beta, const TensorView<T>& out) {
  check_view(function, "beta", beta);
  if ((beta.rows != 1 && beta.rows != out.heads) || (beta.cols != 1 && beta.cols != out.cols)) {
    refuse(function, "beta", shape_text(beta),
           "[1 or " + std::to_string(out.heads) + ", 1 or " + std::to_string(out.cols) + "]");
  }
}

}  // namespace detail

/// out = g * a + (1 - g) * b with g = sigmoid(beta): the gate of Infini-attention, where a is the output of the
/// memory and b the output of local attention.
///
/// Shapes    a, b, out [batch, heads, rows, cols]; beta [1], [heads] or [heads, cols], as a view of
///           1 or heads rows and 1 or cols columns: scalar_gate(logit), per_head_gate(logits)
/// Aliasing  out may be a or b
/// Cost      one pass
/// Error     6 u (g |a| + (1 - g) |b|). A side whose gate is 0 has no effect, even if it contains NaN
/// Throws    Error if shapes disagree, before anything is written
/// Source    Munkhdalai et al. 2024 (arXiv 2404.07143), eq. 10
template <TensorLike A, TensorLike B, TensorLike Out, class Real, ExecutionLike E = openmp>
void gate(MatrixView<const Real> beta, const A& a, const B& b, Out&& out, E&& execution = E{}) {
  const auto memory = view(a);
  const auto local = view(b);
  const auto to = view(out);
  using T = typename std::remove_cvref_t<decltype(to)>::Element;
  static_assert(std::is_same_v<Real, float> || std::is_same_v<Real, Arithmetic<T>>,
                "longspan: the elements of beta must be float, or double if those of the tensors are");
  detail::check_view("gate", "out", to);
  for (const auto& [name, x] :
       {std::pair{"a", TensorView<const T>(memory)}, {"b", TensorView<const T>(local)}}) {
    if (x.batch != to.batch || x.heads != to.heads || x.rows != to.rows || x.cols != to.cols) {
      detail::refuse("gate", name, detail::shape_text(x), detail::shape_text(to));
    }
    detail::check_view("gate", name, x);
  }
  detail::check_gate("gate", beta, to);
  using Sum = Arithmetic<T>;
  const auto gate_row = [&](Index batch, Index h, Index i) {
    const Real* of_head = beta.row(beta.rows == 1 ? 0 : h);
    const T *x = memory.row(batch, h, i), *y = local.row(batch, h, i);
    T* z = to.row(batch, h, i);
    for (Index c = 0; c < to.cols; ++c) {
      const auto logit = static_cast<Sum>(of_head[beta.cols == 1 ? 0 : c]);
      // Each from its own exponential: computed as 1 - g, a small number would lose all of its digits.
      const Sum g = 1 / (1 + std::exp(-logit)), rest = 1 / (1 + std::exp(logit));
      const Sum from_memory = g == Sum(0) ? Sum(0) : g * static_cast<Sum>(x[c]);
      const Sum from_local = rest == Sum(0) ? Sum(0) : rest * static_cast<Sum>(y[c]);
      z[c] = static_cast<T>(from_memory + from_local);
    }
  };
  detail::with_executor(execution,
                        [&](const auto& executor) { detail::for_each_row(to, executor, gate_row); });
}

LONGSPAN_NAMESPACE_END
