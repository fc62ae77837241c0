// One call of an attention functor with checked shapes.
#pragma once

#include <cstddef>
#include <limits>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

#include "longspan/call_sizes.hpp"
#include "longspan/detail/call/check_view.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/options.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

namespace detail {

template <class Tq, class Tk, class Tv, class To>
struct Problem {
  using Real = Arithmetic<Tq>;
  using Key = Tk;
  using Value = Tv;

  TensorView<const Tq> q;
  TensorView<const Tk> k;
  TensorView<const Tv> v;
  TensorView<To> out;
  RowsView<Real> lse;  ///< data is null if the caller wants no lse
  Index first_query = 0;
  double scale = 1;

  Index group() const noexcept { return k.heads == 0 ? 1 : q.heads / k.heads; }
  Index q_len() const noexcept { return q.rows; }
  Index kv_len() const noexcept { return k.rows; }
  Index head_dim() const noexcept { return q.cols; }
  Index value_dim() const noexcept { return v.cols; }

  /// Multiplications and additions of the products q.k and p.v, without regard to the mask.
  double flop() const noexcept {
    return 2.0 * static_cast<double>(q.batch * q.heads) * static_cast<double>(q_len()) *
           static_cast<double>(kv_len()) * static_cast<double>(head_dim() + value_dim());
  }

  /// The same call with its two options resolved. Throws Error if the scale is not finite, or if the position of the
  /// first query is out of range.
  Problem at(std::string_view function, Index wanted_first_query, std::optional<double> wanted_scale) const {
    Problem p = *this;
    p.first_query = resolved_first_query(function, wanted_first_query, q_len(), kv_len());
    p.scale = resolved_scale(function, wanted_scale, head_dim());
    return p;
  }

  CallSizes sizes(std::string_view function) const {
    return {function, q.batch, q.heads, first_query, q_len(), kv_len()};
  }
};

/// The element type of the log-sum-exps of queries Q.
template <class Q>
using LseOf = Arithmetic<typename decltype(view(std::declval<const Q&>()))::Element>;

/// Means "no lse wanted": no view of a caller has this size.
inline constexpr Index no_size = (std::numeric_limits<Index>::min)();
template <class Real>
constexpr RowsView<Real> no_rows() {
  return {nullptr, no_size, no_size, no_size, 0, 0, 1};
}

/// x, with strides of 0 if it is empty: its data may then be null, and adding anything but 0 to a null pointer is
/// undefined.
template <class T>
TensorView<T> without_idle_strides(TensorView<T> x) noexcept {
  if (x.empty()) x.batch_stride = x.head_stride = x.row_stride = 0;
  return x;
}

/// The tensors of a call without the types of their elements: the checks are compiled once for all types.
struct CallTensors {
  TensorView<const std::byte> q, k, v, out;
  RowsView<const std::byte> lse;
};

/// x with elements of no type, whose strides nothing reads.
template <class T>
TensorView<const std::byte> untyped(const TensorView<T>& x) noexcept {
  return {reinterpret_cast<const std::byte*>(x.data), x.batch, x.heads, x.rows, x.cols, 0, 0, 0};
}
template <class T>
RowsView<const std::byte> untyped(const RowsView<T>& x) noexcept {
  return {reinterpret_cast<const std::byte*>(x.data), x.batch, x.heads, x.rows, 0, 0, 1};
}

/// Throws Error for the first tensor that does not fit the others.
[[noreturn]] LONGSPAN_COLD inline void refuse_tensors(std::string_view function, const CallTensors& call) {
  const auto& [q, k, v, out, lse] = call;
  if (k.batch != q.batch || k.cols != q.cols) {
    refuse(function, "k", shape_text(k),
           number_text("[#, kv_heads, kv_len, #] as q is [#, #, #, #]",
                       {q.batch, q.cols, q.batch, q.heads, q.rows, q.cols}));
  }
  if (k.heads > 0 ? q.heads % k.heads != 0 : q.heads != 0) {
    refuse(function, "the number of heads of k", number_text("#", {k.heads}),
           number_text("a divisor of the # heads of q", {q.heads}));
  }
  if (v.batch != k.batch || v.heads != k.heads || v.rows != k.rows) {
    refuse(function, "v", shape_text(v),
           number_text("[#, #, #, value_dim] as k is [#, #, #, #]",
                       {k.batch, k.heads, k.rows, k.batch, k.heads, k.rows, k.cols}));
  }
  if (out.batch != q.batch || out.heads != q.heads || out.rows != q.rows || out.cols != v.cols) {
    refuse(function, "out", shape_text(out), shape_text(q.batch, q.heads, q.rows, v.cols));
  }
  if (lse.batch != q.batch || lse.heads != q.heads || lse.rows != q.rows) {
    if (lse.batch != no_size) refuse(function, "lse", shape_text(lse), shape_text(q.batch, q.heads, q.rows));
  }
  refuse(function, "out", "the memory of an input", "memory of its own");
}

LONGSPAN_NOINLINE inline void check_tensors(std::string_view function, const CallTensors& call) {
  const auto& [q, k, v, out, lse] = call;
  const bool with_lse = lse.batch != no_size;
  check_view(function, "q", q);
  check_view(function, "k", k);
  check_view(function, "v", v);
  check_view(function, "out", out);
  if (with_lse) check_view(function, "lse", lse);
  const auto has_rows_of = [](const auto& x, const auto& y) {
    return x.batch == y.batch && x.heads == y.heads && x.rows == y.rows;
  };
  const bool heads_fit = k.heads > 0 ? q.heads % k.heads == 0 : q.heads == 0;
  const bool fits = k.batch == q.batch && k.cols == q.cols && heads_fit && has_rows_of(v, k) &&
                    has_rows_of(out, q) && out.cols == v.cols && (!with_lse || has_rows_of(lse, q));
  const bool overlaps = !out.empty() && (out.data == q.data || out.data == k.data || out.data == v.data);
  if (!fits || overlaps) refuse_tensors(function, call);
}

template <class Tq, class Tk, class Tv, class To, class Tl>
auto checked_problem(std::string_view function, TensorView<Tq> q, TensorView<Tk> k, TensorView<Tv> v,
                     TensorView<To> out, RowsView<Tl> lse) {
  static_assert(Element<Tq> && Element<Tk> && Element<Tv> && Element<To>,
                "longspan: the elements of a tensor must be float, double, Eigen::bfloat16 or Eigen::half");
  static_assert(!std::is_const_v<To>, "longspan: out must not be const: the call writes it");
  static_assert(!std::is_const_v<Tl>, "longspan: lse must not be const: the call writes it");
  using Real = Arithmetic<Tq>;
  static_assert(std::is_same_v<std::remove_const_t<Tl>, Real>,
                "longspan: the elements of lse must be double if those of q are, otherwise float");
  check_tensors(function, {untyped(q), untyped(k), untyped(v), untyped(out), untyped(lse)});
  return Problem<std::remove_const_t<Tq>, std::remove_const_t<Tk>, std::remove_const_t<Tv>, To>{
      without_idle_strides(q), without_idle_strides(k), without_idle_strides(v), without_idle_strides(out),
      lse.batch != no_size ? lse : RowsView<Real>{}};
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
