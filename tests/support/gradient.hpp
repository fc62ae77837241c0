// Gradients of softmax attention by their definition, in double or wider, and the error bounds of results.
//
// Shares no code with longspan/reference: everything is computed again from the Definition of a call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "longspan/gradient/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace test {

/// A forward call with all tensors of its backward call: dout as out, dlse as lse, and the gradients, which start as
/// NaN.
template <class Tq, class Tk = Tq, class Tv = Tk, class To = Tq, class Gq = Tq, class Gk = Tk, class Gv = Tv>
struct GradientCall {
  using Real = Arithmetic<Tq>;

  Call<Tq, Tk, Tv, To> forward;
  Tensor<To> dout;
  Rows<Real> dlse;
  bool has_dlse = false;
  Tensor<Gq> dq;
  Tensor<Gk> dk;
  Tensor<Gv> dv;

  GradientCall(const Shape& s, Values values, Random& random)
      : forward(s, values, random),
        dout(s.batch, s.heads, s.q_len, s.value_dim),
        dlse(s.batch, s.heads, s.q_len),
        dq(s.batch, s.heads, s.q_len, s.head_dim, static_cast<Gq>(NAN)),
        dk(s.batch, s.kv_heads, s.kv_len, s.head_dim, static_cast<Gk>(NAN)),
        dv(s.batch, s.kv_heads, s.kv_len, s.value_dim, static_cast<Gv>(NAN)) {
    fill_normal(dout, random);
    if (values == Values::log_normal) {
      for (To& x : dout.values) x = static_cast<To>(std::exp(static_cast<float>(x)));
    }
    for (Real& x : dlse.values) x = static_cast<Real>(random.normal());
  }

  /// The backward call; `forward` contains out and lse.
  template <class Attend, class E>
  void differentiate(const Attend& attend, E&& execution) {
    const auto& in = std::as_const(forward);
    const auto& of_out = std::as_const(dout);
    const auto& of_lse = std::as_const(dlse);
    if (has_dlse) {
      gradient(attend)(in.q.view(), in.k.view(), in.v.view(), in.out.view(), in.lse.view(), of_out.view(),
                       of_lse.view(), dq.view(), dk.view(), dv.view(), execution);
    } else {
      gradient(attend)(in.q.view(), in.k.view(), in.v.view(), in.out.view(), in.lse.view(), of_out.view(),
                       dq.view(), dk.view(), dv.view(), execution);
    }
  }
  /// Forward and backward.
  template <class Attend, class E>
  void run(const Attend& attend, E&& execution) {
    forward.run(attend, execution);
    differentiate(attend, execution);
  }
  template <class Attend>
  void run(const Attend& attend) {
    run(attend, longspan::serial{});
  }
  bool same_gradients(const GradientCall& other) const {
    return dq == other.dq && dk == other.dk && dv == other.dv;
  }
};

/// One gradient, and for each of its numbers the factor of 16 u in the error bound.
struct GaugedTensor {
  Index cols = 0;
  std::vector<double> value, gauge;

  GaugedTensor(Index rows, Index of_cols)
      : cols(of_cols),
        value(static_cast<std::size_t>(rows * of_cols)),
        gauge(static_cast<std::size_t>(rows * of_cols)) {}
};

/// The exact gradients of a call. Rows are numbered as in a compact tensor.
struct ExactGradient {
  GaugedTensor dq, dk, dv;
};

/// The matrix by which `what.encode` multiplies a row, [cols][cols]; empty without an encoding.
inline std::vector<double> encoding_matrix(const Definition& what, Index cols, Index position,
                                           bool is_query) {
  std::vector<double> matrix;
  if (!what.encode) return matrix;
  const auto n = static_cast<std::size_t>(cols);
  matrix.resize(n * n);
  std::vector<double> unit(n);
  for (std::size_t from = 0; from < n; ++from) {
    std::fill(unit.begin(), unit.end(), 0.0);
    unit[from] = 1;
    what.encode(unit.data(), cols, position, is_query);
    for (std::size_t to = 0; to < n; ++to) matrix[to * n + from] = unit[to];
  }
  return matrix;
}

/// Rows of a head after their encoding, and with |encoding| applied to |row|: the size of what is added up in each
/// number.
template <class Real>
struct EncodedRows {
  std::size_t cols;
  std::vector<std::vector<double>> matrix;  ///< of each row; empty without an encoding
  std::vector<Real> x, size;

  template <class T>
  EncodedRows(const Definition& what, longspan::MatrixView<const T> from, Index first, bool is_query)
      : cols(static_cast<std::size_t>(from.cols)) {
    for (Index i = 0; i < from.rows; ++i) {
      matrix.push_back(encoding_matrix(what, from.cols, first + i, is_query));
      for (std::size_t c = 0; c < cols; ++c) {
        Real sum = 0, sizes = 0;
        for (std::size_t d = matrix.back().empty() ? c : 0; d < cols; ++d) {
          const Real factor = matrix.back().empty() ? 1 : Real(matrix.back()[c * cols + d]);
          sum += factor * static_cast<Real>(from.row(i)[d]);
          sizes += std::abs(factor * static_cast<Real>(from.row(i)[d]));
          if (matrix.back().empty()) break;
        }
        x.push_back(sum);
        size.push_back(sizes);
      }
    }
  }
  const Real* row(Index i) const { return x.data() + static_cast<std::size_t>(i) * cols; }
  const Real* size_row(Index i) const { return size.data() + static_cast<std::size_t>(i) * cols; }

  /// Adds a gradient with respect to row i, taken back through its encoding, to row n of `to`.
  void add_back(Index i, const Real* change, const Real* gauge, GaugedTensor& to, Index n) const {
    const std::vector<double>& of_row = matrix[static_cast<std::size_t>(i)];
    double* value = to.value.data() + static_cast<std::size_t>(n) * cols;
    double* gauges = to.gauge.data() + static_cast<std::size_t>(n) * cols;
    for (std::size_t c = 0; c < cols; ++c) {
      if (of_row.empty()) {
        value[c] += double(change[c]);
        gauges[c] += double(gauge[c]);
        continue;
      }
      Real sum = 0, sizes = 0;
      for (std::size_t d = 0; d < cols; ++d) {
        sum += Real(of_row[d * cols + c]) * change[d];
        sizes += std::abs(Real(of_row[d * cols + c])) * gauge[d];
      }
      value[c] += double(sum);
      gauges[c] += double(sizes);
    }
  }
};

/// Additional errors that an option documents: those of out and lse in the forward call, and relative errors of the
/// weights and of their gradients in the backward call.
struct GradientAllowance {
  Allowance forward{};
  double weights = 0;
};

/// What a weight and its gradient contribute, with the factors of 16 u in their errors.
template <class Real>
struct PairGradient {
  Real p = 0, p_gauge = 0, ds = 0, ds_gauge = 0;
};

/// u: 2^-24 for float, 2^-53 for double; `lowest` is the smallest normal number, below which weights count as 0.
template <class Real>
inline constexpr double lowest_normal = static_cast<double>((std::numeric_limits<Real>::min)());

/// The row of pairs of one query, from its scores: `sizes` are the a_ij of the docstring, `dp` and `dp_size` are sums
/// over columns of dout v and |dout v|.
template <class Real, class Arith>
std::vector<PairGradient<Real>> pair_gradients(const std::vector<WeighedPair<Real>>& pairs,
                                               const std::vector<Real>& slope, const std::vector<Real>& dp,
                                               const std::vector<Real>& dp_size, Real dlse, Real rounded_out,
                                               GradientAllowance allowed) {
  constexpr Real nothing = -std::numeric_limits<Real>::infinity();
  constexpr double u = unit_roundoff<Arith>;
  const Real underflow = Real(lowest_normal<Arith>) / Real(16 * u);
  std::vector<PairGradient<Real>> row(pairs.size());
  Real top = nothing, sum = 0, condition = 0, delta = 0, size = 0;
  for (const auto& pair : pairs) top = std::max(top, pair.s);
  for (std::size_t j = 0; j < pairs.size(); ++j) {
    if (pairs[j].s == nothing) continue;
    row[j].p = std::exp(pairs[j].s - top);
    sum += row[j].p;
  }
  for (std::size_t j = 0; j < pairs.size(); ++j) {
    if (pairs[j].s == nothing) continue;
    row[j].p /= sum;
    condition += row[j].p * pairs[j].a;
    delta += row[j].p * dp[j];
    size += row[j].p * dp_size[j];
  }
  const Real lse = top + std::log(sum);
  delta -= dlse;
  for (std::size_t j = 0; j < pairs.size(); ++j) {
    if (pairs[j].s == nothing) continue;
    auto& [p, p_gauge, ds, ds_gauge] = row[j];
    const Real of_weight =
        1 + pairs[j].a + condition + std::abs(lse) + Real((allowed.forward.lse + allowed.weights) / (16 * u));
    const Real change = std::abs(dp[j]) + std::abs(delta);
    const Real of_dp = dp_size[j] + (1 + condition + Real(allowed.forward.out / (16 * u))) * size +
                       std::abs(dlse) + rounded_out / Real(16 * u);
    p_gauge = p * of_weight + underflow;
    ds = p * (dp[j] - delta) * slope[j];
    ds_gauge =
        std::max(Real(1), std::abs(slope[j])) * (p * (of_weight * change + of_dp) + underflow * (1 + change));
  }
  return row;
}

/// The gradients of a call by their definition. row_of(b, i, pairs, slope, dp, dp_size, dlse, rounded_out) returns the
/// PairGradients of the query at position i, from arguments as those of pair_gradients.
template <class Tq, class Tk, class Tv, class To, class Gq, class Gk, class Gv, class RowOf>
ExactGradient exact_gradient_of_rows(const Definition& what,
                                     const GradientCall<Tq, Tk, Tv, To, Gq, Gk, Gv>& call,
                                     const RowOf& row_of) {
  using Real = Wide<Tq>;
  using Arith = Arithmetic<Tq>;
  const auto& q = call.forward.q;
  const auto& out = call.forward.out;
  const auto& k = call.forward.k;
  const auto& v = call.forward.v;
  ExactGradient exact{{q.batch * q.heads * q.rows, q.cols},
                      {k.batch * k.heads * k.rows, k.cols},
                      {v.batch * v.heads * v.rows, v.cols}};
  const double scale = what.scale.value_or(1 / std::sqrt(static_cast<double>(std::max<Index>(1, q.cols))));
  const Index first =
      what.first_query != std::numeric_limits<Index>::min() ? what.first_query : k.rows - q.rows;
  const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
  const auto keys = static_cast<std::size_t>(k.rows), head_dim = static_cast<std::size_t>(q.cols),
             value_dim = static_cast<std::size_t>(v.cols);
  for (Index b = 0; b < k.batch; ++b) {
    for (Index kv = 0; kv < k.heads; ++kv) {
      const EncodedRows<Real> k_rows(what, k.view().matrix(b, kv), 0, false);
      std::vector<Real> dk(keys * head_dim), dk_gauge(keys * head_dim), dv(keys * value_dim),
          dv_gauge(keys * value_dim);
      for (Index h = kv * group; h < (kv + 1) * group; ++h) {
        const EncodedRows<Real> q_rows(what, q.view().matrix(b, h), first, true);
        for (Index i = 0; i < q.rows; ++i) {
          std::vector<WeighedPair<Real>> pairs(keys);
          std::vector<Real> slope(keys, Real(1)), dp(keys), dp_size(keys);
          const To* dout = call.dout.row(b, h, i);
          Real rounded_out = 0;
          for (std::size_t c = 0; c < value_dim; ++c)
            rounded_out += std::abs(static_cast<Real>(dout[c])) *
                           Real(storage_error<To, Arith>(static_cast<double>(out.row(b, h, i)[c])));
          for (std::size_t j = 0; j < keys; ++j) {
            const Index key = static_cast<Index>(j);
            if (what.sees && !what.sees(b, h, first + i, key)) continue;
            const Real *x = q_rows.row(i), *y = k_rows.row(key), *x_size = q_rows.size_row(i),
                       *y_size = k_rows.size_row(key);
            Real s = 0, a = 0;
            for (std::size_t c = 0; c < head_dim; ++c) {
              s += x[c] * y[c];
              a += x_size[c] * y_size[c];
            }
            s *= Real(scale);
            a *= Real(std::abs(scale) * what.encode_error);
            if (what.score) {
              if (what.derivative) slope[j] = Real(what.derivative(double(s), b, h, first + i, key));
              s = Real(what.score(double(s), b, h, first + i, key));
              a += std::isinf(s) ? Real(0) : std::abs(s);
            }
            pairs[j] = {s, a};
            for (std::size_t c = 0; c < value_dim; ++c) {
              const Real product = static_cast<Real>(dout[c]) * static_cast<Real>(v.row(b, kv, key)[c]);
              dp[j] += product;
              dp_size[j] += std::abs(product);
            }
          }
          const Real dlse = call.has_dlse ? Real(call.dlse(b, h, i)) : Real(0);
          const auto row = row_of(b, first + i, pairs, slope, dp, dp_size, dlse, rounded_out);
          std::vector<Real> dq(head_dim), dq_gauge(head_dim);
          for (std::size_t j = 0; j < keys; ++j) {
            if (row[j].p_gauge == 0 && row[j].ds_gauge == 0) continue;
            const Index key = static_cast<Index>(j);
            for (std::size_t c = 0; c < head_dim; ++c) {
              dq[c] += Real(scale) * row[j].ds * k_rows.row(key)[c];
              dq_gauge[c] +=
                  Real(std::abs(scale) * what.encode_error) * row[j].ds_gauge * k_rows.size_row(key)[c];
              dk[j * head_dim + c] += Real(scale) * row[j].ds * q_rows.row(i)[c];
              dk_gauge[j * head_dim + c] +=
                  Real(std::abs(scale) * what.encode_error) * row[j].ds_gauge * q_rows.size_row(i)[c];
            }
            for (std::size_t c = 0; c < value_dim; ++c) {
              dv[j * value_dim + c] += row[j].p * static_cast<Real>(dout[c]);
              dv_gauge[j * value_dim + c] += row[j].p_gauge * std::abs(static_cast<Real>(dout[c]));
            }
          }
          q_rows.add_back(i, dq.data(), dq_gauge.data(), exact.dq, (b * q.heads + h) * q.rows + i);
        }
      }
      const Index first_row = (b * k.heads + kv) * k.rows;
      for (Index j = 0; j < k.rows; ++j) {
        const auto n = static_cast<std::size_t>(j);
        k_rows.add_back(j, dk.data() + n * head_dim, dk_gauge.data() + n * head_dim, exact.dk, first_row + j);
      }
      for (std::size_t n = 0; n < keys * value_dim; ++n) {
        const std::size_t at = static_cast<std::size_t>(first_row) * value_dim + n;
        exact.dv.value[at] = double(dv[n]);
        exact.dv.gauge[at] = double(dv_gauge[n]);
      }
    }
  }
  return exact;
}

template <class Tq, class Tk, class Tv, class To, class Gq, class Gk, class Gv>
ExactGradient exact_gradient(const Definition& what, const GradientCall<Tq, Tk, Tv, To, Gq, Gk, Gv>& call,
                             GradientAllowance allowed = {}) {
  return exact_gradient_of_rows(what, call, [&](Index, Index, const auto&... row) {
    return pair_gradients<Wide<Tq>, Arithmetic<Tq>>(row..., allowed);
  });
}

/// The worst errors of gradients, in units of u times their gauge.
struct GradientErrors {
  double dq = 0, dk = 0, dv = 0;
  std::string worst_dq, worst_dk, worst_dv;
  bool minus_zero = false;  ///< an output to which no pair contributes is -0

  double worst() const { return std::max({dq, dk, dv}); }
};

/// `terms` is the number of products that are added up in each number: each may underflow.
template <class Arith, class T>
void take_errors(const GaugedTensor& exact, const Tensor<T>& got, Index terms, double& worst,
                 std::string& text, bool& minus_zero) {
  constexpr double u = unit_roundoff<Arith>;
  for (std::size_t n = 0; n < got.values.size(); ++n) {
    const double is = static_cast<double>(got.values[n]), wanted = exact.value[n];
    if (is == 0 && std::signbit(is) && exact.gauge[n] == 0) minus_zero = true;
    const double excess = std::abs(is - wanted) -
                          storage_error<T, Arith>(std::max(std::abs(is), std::abs(wanted))) -
                          4 * static_cast<double>(terms + 2) * lowest_normal<Arith>;
    const auto cols = static_cast<std::size_t>(got.cols);
    take_worse(worst, text, excess <= 0 ? 0 : excess / (u * exact.gauge[n]), n / cols,
               static_cast<Index>(n % cols), is, wanted);
  }
}

template <class Tq, class Tk, class Tv, class To, class Gq, class Gk, class Gv>
GradientErrors gradient_errors(const ExactGradient& exact,
                               const GradientCall<Tq, Tk, Tv, To, Gq, Gk, Gv>& call) {
  using Arith = Arithmetic<Tq>;
  GradientErrors errors;
  const auto& q = call.forward.q;
  const auto& k = call.forward.k;
  const Index rows = q.rows * (k.heads == 0 ? 1 : q.heads / k.heads);
  take_errors<Arith>(exact.dq, call.dq, k.rows, errors.dq, errors.worst_dq, errors.minus_zero);
  take_errors<Arith>(exact.dk, call.dk, rows, errors.dk, errors.worst_dk, errors.minus_zero);
  take_errors<Arith>(exact.dv, call.dv, rows, errors.dv, errors.worst_dv, errors.minus_zero);
  return errors;
}

/// CHECKs the error bound of the docstring for every number.
template <class C>
GradientErrors check_gradient(const Definition& what, const C& call, GradientAllowance allowed = {}) {
  const GradientErrors errors = gradient_errors(exact_gradient(what, call, allowed), call);
  INFO("dq: " << errors.dq << " at " << errors.worst_dq);
  INFO("dk: " << errors.dk << " at " << errors.worst_dk);
  INFO("dv: " << errors.dv << " at " << errors.worst_dv);
  CHECK(errors.worst() <= most_error);
  CHECK_FALSE(errors.minus_zero);
  return errors;
}

/// Runs one random call forward and backward, and checks the gradients within the documented error bound.
template <class C, class Attend>
GradientErrors check_gradient_call(const Shape& shape, Values values, Random& random, Attend attend,
                                   const Definition& what) {
  attend.scale = what.scale;
  attend.bf16_products = false;
  if (what.first_query != std::numeric_limits<Index>::min()) attend.first_query = what.first_query;
  C call(shape, values, random);
  call.has_dlse = random.chance(0.5);
  INFO(shape.text() << " values=" << text_of(values) << " scale=" << what.scale.value_or(0)
                    << " first_query=" << what.first_query << " dlse=" << call.has_dlse);
  call.run(attend, longspan::openmp{random.between(1, 3)});
  return check_gradient(what, call);
}

}  // namespace test
