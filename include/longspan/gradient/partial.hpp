// The gradients of merge and gate.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/check_view.hpp"
#include "longspan/detail/call/composition.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/gradient/gates.hpp"
#include "longspan/detail/gradient/rows.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/partial.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

namespace detail {

/// to[c] = factor * from[c]; 0 for a factor of 0, even if `from` contains NaN.
template <class Real, class From, class To>
void scale_row(Real factor, const From* from, To* to, Index cols) {
  if (factor == Real(0)) return static_cast<void>(std::fill_n(to, cols, To(0)));
  for (Index c = 0; c < cols; ++c) to[c] = static_cast<To>(factor * static_cast<Real>(from[c]));
}

}  // namespace detail

/// The vector-Jacobian product of `merge`. With the weight w_n = exp(lse_n - lse) of part n,
///
///   dout_n = w_n dout,  dlse_n = w_n (dout.out_n - dout.out + dlse).
///
///   merge({a, b}, merged);                              // forward
///   merge_gradient({a, b}, merged, dmerged, {da, db});  // backward
///
/// A gradient is a Partial too: its `out` is the gradient with respect to an output, its `lse` that with respect to an
/// lse. The gradient of the functor that computed part n takes dout_n and dlse_n. After `with_lse`, dlse_n is the
/// gradient with respect to the other log-weight.
///
/// Shapes    the same for every part, merged, dmerged and every result. dmerged.lse is {} if the loss does not depend
///           on the lse; the lse of a result may be {} if it is not wanted
/// Aliasing  no result overlaps an input or another result
/// Cost      one pass over the parts and the results
/// Error     with u = 2^-24 for float and r = u (8 + 2 |lse_n| + 2 |lse|): dout_n within r w_n |dout|, dlse_n within
///           (r + cols u) w_n (sum_c |dout_c| (|out_nc| + |out_c|) + |dlse|). 16-bit results are rounded once more
/// Masked    a part whose lse is -infinity, or whose weight is 0, gets gradients of 0, even if its output contains
///           NaN. So does every part of a row whose merged lse is -infinity
/// Bits      do not depend on the executor
/// Throws    Error if shapes disagree, before anything is written
template <MutableElement T, ExecutionLike E = openmp>
void merge_gradient(std::type_identity_t<std::span<const Partial<const T>>> parts,
                    std::type_identity_t<Partial<const T>> merged,
                    std::type_identity_t<Partial<const T>> dmerged, std::span<const Partial<T>> dparts,
                    E&& execution = E{}) {
  using Real = Arithmetic<T>;
  constexpr std::string_view name = "merge_gradient";
  const TensorView<const T>& out = merged.out;
  const TensorView<T> like{nullptr, out.batch, out.heads, out.rows, out.cols, 0, 0, 0};
  const auto check = [&](const std::string& argument, Partial<const T> part, bool needs_lse) {
    if (!needs_lse && part.lse.data == nullptr) part.lse = merged.lse;
    detail::check_partial(name, argument, part, like);
  };
  if (dparts.size() != parts.size()) {
    detail::refuse(name, "the number of gradients", std::to_string(dparts.size()),
                   std::to_string(parts.size()) + ", one for each part");
  }
  check("the merged partial", merged, true);
  check("its gradient", dmerged, false);
  for (std::size_t n = 0; n < parts.size(); ++n) {
    check("part " + std::to_string(n), parts[n], true);
    check("the gradient of part " + std::to_string(n), dparts[n], false);
  }
  const auto differentiate_row = [&](Index b, Index h, Index i) {
    const Real lse = merged.lse(b, h, i);
    const bool is_empty = detail::is_minus_infinity(lse);
    const T* dout = dmerged.out.row(b, h, i);
    const Real dlse = dmerged.lse.data == nullptr || is_empty ? Real(0) : dmerged.lse(b, h, i);
    const Real delta = is_empty ? Real(0) : detail::delta_of(dout, out.row(b, h, i), out.cols, dlse);
    for (std::size_t n = 0; n < parts.size(); ++n) {
      const Real of_part = parts[n].lse(b, h, i);
      const bool is_absent = is_empty || detail::is_minus_infinity(of_part);
      const Real weight = is_absent ? Real(0) : std::exp(of_part - lse);
      detail::scale_row(weight, dout, dparts[n].out.row(b, h, i), out.cols);
      if (dparts[n].lse.data == nullptr) continue;
      dparts[n].lse(b, h, i) =
          weight == Real(0)
              ? Real(0)
              : weight * (detail::delta_of(dout, parts[n].out.row(b, h, i), out.cols, Real(0)) - delta);
    }
  };
  detail::with_executor(
      execution, [&](const auto& executor) { detail::for_each_row(like, executor, differentiate_row); });
}

/// merge_gradient({a, b}, merged, dmerged, {da, db}).
template <MutableElement T, ExecutionLike E = openmp>
void merge_gradient(std::initializer_list<std::type_identity_t<Partial<const T>>> parts,
                    std::type_identity_t<Partial<const T>> merged,
                    std::type_identity_t<Partial<const T>> dmerged, std::initializer_list<Partial<T>> dparts,
                    E&& execution = E{}) {
  merge_gradient<T>(std::span<const Partial<const T>>(parts.begin(), parts.size()), merged, dmerged,
                    std::span<const Partial<T>>(dparts.begin(), dparts.size()), execution);
}

/// The vector-Jacobian product of `gate`:
///
///   da = g dout,  db = (1 - g) dout,  dbeta = g (1 - g) sum dout (a - b),  g = sigmoid(beta),
///
/// where the sum goes over all elements that share a logit.
///
///   gate(beta, a, b, out);                             // forward
///   gate_gradient(beta, a, b, dout, dbeta, da, db);    // backward
///
/// Shapes    a, b, dout, da, db [batch, heads, rows, cols]; dbeta as beta: 1 or heads rows, 1 or cols columns. dbeta
///           is {} if it is not wanted
/// Aliasing  db may be dout; otherwise no result overlaps an input or another result
/// Cost      one pass. Scratch: 2 heads * cols numbers, and for dbeta cols numbers for every 256 rows
/// Error     with u = 2^-24 for float: da within 5 u |da|, db within 5 u |db|, dbeta within 270 u g (1 - g) sum |dout|
///           (|a| + |b|): the sums of 256 rows are added in double. 16-bit results are rounded once more
/// Masked    a side whose gate is exactly 0 gets a gradient of 0, and no logit of such a gate gets anything, even if
///           the tensors contain NaN
/// Bits      do not depend on the executor
/// Throws    Error if shapes disagree, before anything is written
/// Source    Munkhdalai et al. 2024 (arXiv 2404.07143), eq. 10
template <TensorLike A, TensorLike B, TensorLike Dout, class Real, TensorLike Da, TensorLike Db,
          ExecutionLike E = openmp>
void gate_gradient(MatrixView<const Real> beta, const A& a, const B& b, const Dout& dout,
                   std::type_identity_t<MatrixView<Real>> dbeta, Da&& da, Db&& db, E&& execution = E{}) {
  constexpr std::string_view name = "gate_gradient";
  const auto to_a = view(da), to_b = view(db);
  using T = typename std::remove_cvref_t<decltype(to_a)>::Element;
  using Sum = Arithmetic<T>;
  static_assert(std::is_same_v<Real, float> || std::is_same_v<Real, Sum>,
                "longspan: the elements of beta must be float, or double if those of the tensors are");
  const TensorView<const T> of_a = view(a), of_b = view(b), of_out = view(dout);
  for (const auto& [argument, x] : {std::pair{"dout", of_out},
                                    {"a", of_a},
                                    {"b", of_b},
                                    {"da", TensorView<const T>(to_a)},
                                    {"db", TensorView<const T>(to_b)}}) {
    if (x.batch != of_out.batch || x.heads != of_out.heads || x.rows != of_out.rows ||
        x.cols != of_out.cols) {
      detail::refuse(name, argument, detail::shape_text(x), detail::shape_text(of_out));
    }
    detail::check_view(name, argument, x);
  }
  detail::check_gate(name, beta, of_out);
  detail::check_dbeta(name, dbeta, beta);
  constexpr Index rows_in_task = 256;
  const Index chunks = detail::divide_up(of_out.rows, rows_in_task), cols = of_out.cols;
  detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
    const bool wants_beta = dbeta.data != nullptr;
    const Index tasks = of_out.batch * of_out.heads * chunks;
    Sum *gates = nullptr, *rests = nullptr, *sums = nullptr;
    detail::take_scratch(workspace, [&](detail::Arena& arena) {
      gates = arena.take<Sum>(of_out.heads * cols);
      rests = arena.take<Sum>(of_out.heads * cols);
      sums = arena.take<Sum>(wants_beta ? tasks * cols : 0);
    });
    detail::fill_gates(beta, of_out.heads, cols, gates, rests);
    executor.for_each(tasks, [&](Index task, Index) {
      const Index batch = task / chunks / of_out.heads, h = task / chunks % of_out.heads;
      const Index first = task % chunks * rows_in_task;
      const Sum *g = gates + h * cols, *rest = rests + h * cols;
      Sum* sum = wants_beta ? sums + task * cols : nullptr;
      if (wants_beta) std::fill_n(sum, cols, Sum(0));
      for (Index i = first; i < (std::min)(of_out.rows, first + rows_in_task); ++i) {
        const T *x = of_a.row(batch, h, i), *y = of_b.row(batch, h, i), *change = of_out.row(batch, h, i);
        T *dx = to_a.row(batch, h, i), *dy = to_b.row(batch, h, i);
        for (Index c = 0; c < cols; ++c) {
          const Sum of = static_cast<Sum>(change[c]), both = g[c] * rest[c];
          if (wants_beta && both != Sum(0))
            sum[c] += both * of * (static_cast<Sum>(x[c]) - static_cast<Sum>(y[c]));
          dx[c] = static_cast<T>(g[c] == Sum(0) ? Sum(0) : g[c] * of);
          dy[c] = static_cast<T>(rest[c] == Sum(0) ? Sum(0) : rest[c] * of);
        }
      }
    });
    if (!wants_beta) return;
    const auto sum_of = [&](Index h, Index c) {
      double sum = 0;
      for (Index batch = 0; batch < of_out.batch; ++batch) {
        for (Index chunk = 0; chunk < chunks; ++chunk)
          sum += static_cast<double>(sums[((batch * of_out.heads + h) * chunks + chunk) * cols + c]);
      }
      return sum;
    };
    detail::write_beta_gradient(sum_of, of_out.heads, cols, dbeta);
  });
}

LONGSPAN_NAMESPACE_END
