// Softmax attention by its definition, in double or wider, and the error bounds of results.
//
// Shares no code with longspan/reference: the test writes masks, scores and encodings again as plain functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"
#include "support/tensor.hpp"

namespace test {

/// What a call has to compute. An empty function means the identity, or "sees everything".
struct Definition {
  std::function<bool(Index b, Index h, Index i, Index j)> sees = {};
  std::function<double(double s, Index b, Index h, Index i, Index j)> score = {};
  std::function<void(double* row, Index cols, Index position, bool is_query)> encode = {};
  double encode_error = 1;                                ///< error of an encoded row, in u of its length
  std::optional<double> scale{};                          ///< 1 / sqrt(head_dim) unless set
  Index first_query = std::numeric_limits<Index>::min();  ///< the lowest Index means kv_len - q_len
  /// The derivative of `score` with respect to s, for gradients.
  std::function<double(double s, Index b, Index h, Index i, Index j)> derivative = {};
};

/// The exact results of a call, with what the error bound needs.

struct Exact {
  Index batch, heads, q_len, value_dim;
  std::vector<double> out, gauge;      ///< [batch, heads, q_len, value_dim]; gauge = sum_j p_j |v_j|
  std::vector<double> lse, condition;  ///< [batch, heads, q_len]; condition = sum_j p_j a_j, see WeighedPair
  std::vector<double> entropy;  ///< of p, as a share of log(number of visible keys); NaN for 0 or 1 keys
};

/// The type of the oracle's sums: long double if the tested arithmetic is double, otherwise double.
template <class Tq>
using Wide = std::conditional_t<std::is_same_v<Tq, double>, long double, double>;

template <class T>
std::vector<double> encoded_rows(const Definition& what, TensorView<const T> x, Index b, Index h, Index first,
                                 bool is_query) {
  std::vector<double> rows(static_cast<std::size_t>(x.rows * x.cols));
  for (Index i = 0; i < x.rows; ++i) {
    double* row = rows.data() + i * x.cols;
    for (Index c = 0; c < x.cols; ++c) row[c] = static_cast<double>(x.row(b, h, i)[c]);
    if (what.encode) what.encode(row, x.cols, first + i, is_query);
  }
  return rows;
}

/// The score s of a pair, -infinity if it is hidden, and a, the sum of the magnitudes that make up the score.
template <class Real>
struct WeighedPair {
  Real s = -std::numeric_limits<Real>::infinity();
  Real a = 0;
};

template <class Real>
WeighedPair<Real> weigh(const Definition& what, const double* q, const double* k, Index cols, double scale,
                        Index b, Index h, Index i, Index j) {
  Real s = 0, a = 0, q_square = 0, k_square = 0;
  for (Index c = 0; c < cols; ++c) {
    s += Real(q[c]) * Real(k[c]);
    a += std::abs(Real(q[c]) * Real(k[c]));
    q_square += Real(q[c]) * Real(q[c]);
    k_square += Real(k[c]) * Real(k[c]);
  }
  // The error of a rotated number is that of its whole pair.
  if (what.encode) a = Real(what.encode_error) * std::sqrt(q_square * k_square);
  s *= Real(scale);
  a *= Real(std::abs(scale));
  if (what.score) {
    s = Real(what.score(double(s), b, h, i, j));
    a += std::isinf(s) ? Real(0) : std::abs(s);
  }
  return {s, a};
}

/// Computes row n of `exact` from the pairs of one query and the values v.
template <class Real, class Tv>
void average(const std::vector<WeighedPair<Real>>& pairs, longspan::MatrixView<const Tv> v, std::size_t n,
             Exact& exact) {
  constexpr Real nothing = -std::numeric_limits<Real>::infinity();
  Real top = nothing, sum = 0, seen = 0, mean_score = 0, condition = 0;
  for (const auto& pair : pairs) {
    if (pair.s > top) top = pair.s;
    seen += pair.s != nothing;
  }
  const auto cols = static_cast<std::size_t>(v.cols);
  std::vector<Real> out(cols), gauge(cols);
  for (std::size_t j = 0; j < pairs.size(); ++j) {
    if (pairs[j].s == nothing) continue;
    const Real p = std::exp(pairs[j].s - top);
    sum += p;
    condition += p * pairs[j].a;
    mean_score += p * (pairs[j].s - top);
    const Tv* row = v.row(static_cast<Index>(j));
    for (std::size_t c = 0; c < cols; ++c) {
      out[c] += p * static_cast<Real>(row[c]);
      gauge[c] += p * std::abs(static_cast<Real>(row[c]));
    }
  }
  exact.entropy[n] = double((std::log(sum) - mean_score / sum) / std::log(seen));
  if (sum == 0) return;
  exact.condition[n] = double(condition / sum);
  exact.lse[n] = double(top + std::log(sum));
  for (std::size_t c = 0; c < cols; ++c) {
    exact.out[n * cols + c] = double(out[c] / sum);
    exact.gauge[n * cols + c] = double(gauge[c] / sum);
  }
}

template <class Tq, class Tk, class Tv>
Exact exact_attention(const Definition& what, TensorView<const Tq> q, TensorView<const Tk> k,
                      TensorView<const Tv> v) {
  const auto rows = static_cast<std::size_t>(q.batch * q.heads * q.rows),
             cols = static_cast<std::size_t>(v.cols);
  Exact exact{q.batch,
              q.heads,
              q.rows,
              v.cols,
              std::vector<double>(rows * cols),
              std::vector<double>(rows * cols),
              std::vector<double>(rows, -std::numeric_limits<double>::infinity()),
              std::vector<double>(rows),
              std::vector<double>(rows)};
  const double scale = what.scale.value_or(1 / std::sqrt(static_cast<double>(std::max<Index>(1, q.cols))));
  const Index first =
      what.first_query != std::numeric_limits<Index>::min() ? what.first_query : k.rows - q.rows;
  const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
  std::vector<WeighedPair<Wide<Tq>>> pairs(static_cast<std::size_t>(k.rows));
  std::size_t n = 0;
  for (Index b = 0; b < q.batch; ++b) {
    for (Index h = 0; h < q.heads; ++h) {
      const auto q_rows = encoded_rows(what, q, b, h, first, true);
      const auto k_rows = encoded_rows(what, k, b, h / group, 0, false);
      for (Index i = first; i < first + q.rows; ++i, ++n) {
        const double* query = q_rows.data() + (i - first) * q.cols;
        for (Index j = 0; j < k.rows; ++j) {
          auto& pair = pairs[static_cast<std::size_t>(j)];
          pair = {};
          if (what.sees && !what.sees(b, h, i, j)) continue;
          pair = weigh<Wide<Tq>>(what, query, k_rows.data() + j * q.cols, q.cols, scale, b, h, i, j);
        }
        average(pairs, v.matrix(b, h / group), n, exact);
      }
    }
  }
  return exact;
}

template <class Tq, class Tk, class Tv, class To>
Exact exact_attention(const Definition& what, const Call<Tq, Tk, Tv, To>& call) {
  return exact_attention<Tq, Tk, Tv>(what, call.q.view(), call.k.view(), call.v.view());
}

/// u: 2^-24 for float, 2^-53 for double.
template <class Real>
inline constexpr double unit_roundoff = static_cast<double>(std::numeric_limits<Real>::epsilon()) / 2;

/// An upper bound of half an ulp of T at x if T is narrower than the arithmetic, otherwise 0.
template <class T, class Real>
double storage_error(double x) {
  if constexpr (std::is_same_v<T, Eigen::bfloat16>) return 0x1p-8 * std::abs(x);
  if constexpr (std::is_same_v<T, Eigen::half>) return std::max(0x1p-25, 0x1p-11 * std::abs(x));
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Real, double>) return 0x1p-24 * std::abs(x);
  return 0;
}

/// Additional errors that an option documents: for out relative to the gauge, for lse absolute.
struct Allowance {
  double out = 0;
  double lse = 0;
};

/// The worst errors of a result: out in units of u (1 + a) sum_j p_j |v_j|, lse in units of u (1 + a + |lse|). Infinite
/// if only one of result and exact result is NaN or infinite.
struct Errors {
  double out = 0;
  double lse = 0;
  std::string worst_out, worst_lse;
};

inline void take_worse(double& worst, std::string& text, double ratio, std::size_t row, Index column,
                       double got, double wanted) {
  if (got == wanted || (std::isnan(got) && std::isnan(wanted)) || ratio <= worst) return;
  worst = std::isfinite(ratio) ? ratio : std::numeric_limits<double>::infinity();
  std::ostringstream line;
  line.precision(17);
  line << "row " << row << " column " << column << " is " << got << ", wanted " << wanted;
  text = line.str();
}

template <class To, class Real>
Errors errors_of(const Exact& exact, TensorView<const To> out, RowsView<const Real> lse,
                 Allowance allowed = {}) {
  constexpr double u = unit_roundoff<Real>;
  Errors errors;
  for (std::size_t n = 0; n < exact.lse.size(); ++n) {
    const Index row = static_cast<Index>(n), i = row % exact.q_len, h = row / exact.q_len % exact.heads;
    const Index b = row / exact.q_len / exact.heads;
    for (Index c = 0; c < exact.value_dim; ++c) {
      const std::size_t at = n * static_cast<std::size_t>(exact.value_dim) + static_cast<std::size_t>(c);
      const double got = static_cast<double>(out.row(b, h, i)[c]), wanted = exact.out[at],
                   gauge = exact.gauge[at];
      const double excess = std::abs(got - wanted) - allowed.out * gauge -
                            storage_error<To, Real>(std::max(std::abs(got), std::abs(wanted)));
      take_worse(errors.out, errors.worst_out,
                 excess <= 0 ? 0 : excess / (u * (1 + exact.condition[n]) * gauge), n, c, got, wanted);
    }
    if (lse.data == nullptr) continue;
    const double got = static_cast<double>(lse(b, h, i)), wanted = exact.lse[n];
    const double excess = std::abs(got - wanted) - allowed.lse;
    take_worse(errors.lse, errors.worst_lse,
               excess <= 0 ? 0 : excess / (u * (1 + exact.condition[n] + std::abs(wanted))), n, 0, got,
               wanted);
  }
  return errors;
}

/// The bound in the docstring of softmax_attention, in these units.
inline constexpr double most_error = 16;

template <class Tq, class Tk, class Tv, class To>
Errors check_against(const Exact& exact, const Call<Tq, Tk, Tv, To>& call, Allowance allowed = {}) {
  const Errors errors = errors_of<To, Arithmetic<Tq>>(exact, call.out.view(), call.lse.view(), allowed);
  INFO("out: " << errors.worst_out);
  INFO("lse: " << errors.worst_lse);
  CHECK(errors.out <= most_error);
  CHECK(errors.lse <= most_error);
  return errors;
}

/// Measures how much a series of random checks proves: outputs that are mostly 0, or softmaxes that are all flat or all
/// concentrated on one key, would prove little.
class Trust {
 public:
  /// Rows that see no key, whose outputs are 0, do not count.
  void add(const Exact& exact) {
    for (std::size_t n = 0; n < exact.lse.size(); ++n) {
      if (!std::isfinite(exact.lse[n])) continue;
      const auto cols = static_cast<std::size_t>(exact.value_dim);
      for (std::size_t c = 0; c < cols; ++c) zeros_ += exact.out[n * cols + c] == 0;
      outputs_ += cols;
      if (!std::isfinite(exact.entropy[n])) continue;
      ++rows_;
      healthy_ += exact.entropy[n] > 0.05 && exact.entropy[n] < 0.95;
    }
  }
  bool outputs_are_mostly_nonzero() const { return outputs_ > 0 && 10 * zeros_ <= outputs_; }
  bool half_of_the_softmaxes_are_healthy() const { return rows_ > 0 && 2 * healthy_ >= rows_; }

 private:
  std::size_t zeros_ = 0, outputs_ = 0, rows_ = 0, healthy_ = 0;
};

}  // namespace test
