// Tensors that own their memory, the calls made of them, and random values.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/element.hpp"
#include "longspan/execution.hpp"
#include "longspan/view.hpp"
#include "support/random.hpp"

namespace test {

using longspan::Arithmetic;
using longspan::RowsView;
using longspan::TensorView;

/// A compact [batch, heads, rows, cols] tensor.
template <class T>
struct Tensor {
  Index batch, heads, rows, cols;
  std::vector<T> values;

  Tensor(Index of_batch, Index of_heads, Index of_rows, Index of_cols, T value = T(0))
      : batch(of_batch),
        heads(of_heads),
        rows(of_rows),
        cols(of_cols),
        values(static_cast<std::size_t>(of_batch * of_heads * of_rows * of_cols), value) {}

  TensorView<T> view() { return longspan::compact_view(values.data(), batch, heads, rows, cols); }
  TensorView<const T> view() const { return longspan::compact_view(values.data(), batch, heads, rows, cols); }
  /// Head h of batch row b as a tensor with one head.
  TensorView<const T> head(Index b, Index h) const {
    return longspan::compact_view(view().row(b, h, 0), 1, 1, rows, cols);
  }
  T* row(Index b, Index h, Index i) { return view().row(b, h, i); }
  const T* row(Index b, Index h, Index i) const { return view().row(b, h, i); }
  bool operator==(const Tensor& other) const { return same_bits(values, other.values); }

  static bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
  }
};

/// A compact [batch, heads, rows] tensor.
template <class T>
struct Rows {
  Index batch, heads, rows;
  std::vector<T> values;

  Rows(Index of_batch, Index of_heads, Index of_rows, T value = T(0))
      : batch(of_batch),
        heads(of_heads),
        rows(of_rows),
        values(static_cast<std::size_t>(of_batch * of_heads * of_rows), value) {}

  RowsView<T> view() { return longspan::compact_rows_view(values.data(), batch, heads, rows); }
  RowsView<const T> view() const { return longspan::compact_rows_view(values.data(), batch, heads, rows); }
  T operator()(Index b, Index h, Index i) const { return view()(b, h, i); }
  bool operator==(const Rows& other) const { return Tensor<T>::same_bits(values, other.values); }
};

/// How q, k and v are filled.
enum class Values {
  normal,      ///< scores of about 1
  flat,        ///< nearly equal scores: every key counts the same
  peaked,      ///< scores of about 6: a few keys count
  huge,        ///< scores of about 40: exponentials overflow unless the maximum is subtracted
  rising,      ///< scores rise with the key: the running maximum changes all the time
  log_normal,  ///< values of one sign: errors add up
};
inline const std::vector<Values> all_values{Values::normal, Values::flat,   Values::peaked,
                                            Values::huge,   Values::rising, Values::log_normal};

inline std::string text_of(Values values) {
  static const char* const names[] = {"normal", "flat", "peaked", "huge", "rising", "log-normal"};
  return names[static_cast<int>(values)];
}

template <class T>
void fill_normal(Tensor<T>& x, Random& random, double factor = 1) {
  for (T& value : x.values) value = static_cast<T>(static_cast<float>(factor * random.normal()));
}

template <class Tq, class Tk, class Tv>
void fill(Tensor<Tq>& q, Tensor<Tk>& k, Tensor<Tv>& v, Values values, Random& random) {
  fill_normal(q, random,
              values == Values::flat     ? 1e-3
              : values == Values::peaked ? 6
              : values == Values::huge   ? 40
                                         : 1);
  fill_normal(k, random);
  fill_normal(v, random);
  if (values == Values::log_normal) {
    for (Tv& x : v.values) x = static_cast<Tv>(std::exp(static_cast<float>(x)));
  }
  if (values == Values::rising && q.cols > 0) {
    const double root = std::sqrt(static_cast<double>(q.cols));
    for (Index n = 0; n < q.batch * q.heads * q.rows; ++n)
      q.row(0, 0, n)[0] = static_cast<Tq>(static_cast<float>(root));
    for (Index n = 0; n < k.batch * k.heads * k.rows; ++n) {
      k.row(0, 0, n)[0] = static_cast<Tk>(static_cast<float>(n % k.rows) / 32.0f);
    }
  }
}

template <class T>
inline constexpr const char* type_text = std::is_same_v<T, float>         ? "float"
                                         : std::is_same_v<T, double>      ? "double"
                                         : std::is_same_v<T, Eigen::half> ? "half"
                                                                          : "bfloat16";

/// The shapes of a call.
struct Shape {
  Index batch = 1, heads = 1, kv_heads = 1, q_len = 1, kv_len = 1, head_dim = 1, value_dim = 1;

  std::string text() const {
    const auto n = [](Index x) { return std::to_string(x); };
    return "batch=" + n(batch) + " heads=" + n(heads) + " kv_heads=" + n(kv_heads) + " q_len=" + n(q_len) +
           " kv_len=" + n(kv_len) + " head_dim=" + n(head_dim) + " value_dim=" + n(value_dim);
  }
  Index work() const { return batch * heads * (q_len + 1) * (kv_len + 1) * (head_dim + value_dim + 8); }
};

/// All tensors of one call. Outputs start as NaN, so that a test notices numbers that were never written.
template <class Tq, class Tk = Tq, class Tv = Tk, class To = Tq>
struct Call {
  using Real = Arithmetic<Tq>;

  Tensor<Tq> q;
  Tensor<Tk> k;
  Tensor<Tv> v;
  Tensor<To> out;
  Rows<Real> lse;

  explicit Call(const Shape& s)
      : q(s.batch, s.heads, s.q_len, s.head_dim),
        k(s.batch, s.kv_heads, s.kv_len, s.head_dim),
        v(s.batch, s.kv_heads, s.kv_len, s.value_dim),
        out(s.batch, s.heads, s.q_len, s.value_dim, static_cast<To>(NAN)),
        lse(s.batch, s.heads, s.q_len, static_cast<Real>(NAN)) {}
  Call(const Shape& s, Values values, Random& random) : Call(s) { fill(q, k, v, values, random); }

  template <class Attend, class E>
  void run(const Attend& attend, E&& execution) {
    attend(std::as_const(q).view(), std::as_const(k).view(), std::as_const(v).view(), out.view(), lse.view(),
           execution);
  }
  template <class Attend>
  void run(const Attend& attend) {
    run(attend, longspan::serial{});
  }
  /// A copy with the same inputs and outputs of NaN.
  Call unrun() const {
    Call copy = *this;
    for (To& x : copy.out.values) x = static_cast<To>(NAN);
    for (Real& x : copy.lse.values) x = static_cast<Real>(NAN);
    return copy;
  }
  bool same_outputs(const Call& other) const { return out == other.out && lse == other.lse; }
};

}  // namespace test
