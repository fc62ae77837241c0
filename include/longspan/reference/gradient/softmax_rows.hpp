// The naive gradient of a softmax in double over a list of keys for each query: the common part of the references.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "longspan/detail/call/problem.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// A compact [batch, heads, rows, cols] tensor of doubles.
struct DoubleTensor {
  Index batch, heads, rows, cols;
  std::vector<double> values;

  DoubleTensor(Index of_batch, Index of_heads, Index of_rows, Index of_cols)
      : batch(of_batch),
        heads(of_heads),
        rows(of_rows),
        cols(of_cols),
        values(static_cast<std::size_t>(of_batch * of_heads * of_rows * of_cols)) {}

  double* row(Index b, Index h, Index i) { return values.data() + ((b * heads + h) * rows + i) * cols; }

  /// Writes the rows of every head, each taken back through the position encoding first.
  template <Position P, class T>
  void write(const P& position, Index first_position, Role role, TensorView<T> to) {
    for (Index b = 0; b < batch; ++b) {
      for (Index h = 0; h < heads; ++h) {
        for (Index i = 0; i < rows; ++i) {
          double* x = row(b, h, i);
          encode_row_transposed(x, cols, position, first_position + i, role);
          for (Index c = 0; c < cols; ++c) to.row(b, h, i)[c] = static_cast<T>(x[c]);
        }
      }
    }
  }
};

/// The softmax weights of one query, and the gradients of its scores: with P_j = exp(s_j - lse) and dP_j = dout.v_j,
///
///   ds_j = P_j (dP_j - D + dlse),  D = sum_j P_j dP_j / sum_j P_j,
///
/// where D is the mean over all keys, or over each part of them alone if the weights of the parts count as constants;
/// `ends` holds the end of each part. A score of -infinity hides its key: P and ds are 0.
struct QueryGradient {
  std::vector<double> p, ds;

  QueryGradient(const std::vector<double>& scores, const std::vector<double>& dp, double dlse,
                const std::vector<std::size_t>& ends)
      : p(scores.size(), 0.0), ds(scores.size(), 0.0) {
    constexpr double hidden = -std::numeric_limits<double>::infinity();
    double top = hidden, sum = 0;
    for (const double s : scores) top = s > top || std::isnan(s) ? s : top;
    for (const double s : scores) sum += s == hidden ? 0 : std::exp(s - top);
    std::size_t begin = 0;
    for (const std::size_t end : ends) {
      double mean = 0, of_part = 0;
      for (std::size_t n = begin; n < end; ++n) {
        if (scores[n] == hidden) continue;
        p[n] = std::exp(scores[n] - top) / sum;
        mean += p[n] * dp[n];
        of_part += p[n];
      }
      for (std::size_t n = begin; n < end; ++n) {
        if (scores[n] != hidden) ds[n] = p[n] * (dp[n] - mean / of_part + dlse);
      }
      begin = end;
    }
  }
};

/// Writes dq, dk and dv:
///
///   dq_i = scale sum_j ds'_ij k_j,  dk_j = scale sum_i ds'_ij q_i,  dv_j = sum_i P_ij dout_i,
///
/// where ds' is ds times the derivative of the score function. parts_of(b, h, i) returns lists of keys of the query at
/// position i, one for each part of the keys that has a D of its own (see QueryGradient); a key counts as often as it
/// is in the lists, and an index of kv_len or more is a key and a value of zeros. `options` provides score, position,
/// scale and first_query.
template <class Options, class Tq, class Tk, class Tv, class Td, class Tl, class Gq, class Gk, class Gv,
          class PartsOf>
void softmax_gradient_rows(const Options& options, TensorView<Tq> q, TensorView<Tk> k, TensorView<Tv> v,
                           TensorView<Td> dout, RowsView<Tl> dlse, TensorView<Gq> dq, TensorView<Gk> dk,
                           TensorView<Gv> dv, const PartsOf& parts_of) {
  using Value = detail::ScoreValue<std::remove_cvref_t<decltype(options.score)>, double>;
  const auto at = [](Index i) { return static_cast<std::size_t>(i); };
  const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
  const Index first = options.first_query == queries_end_at_keys ? k.rows - q.rows : options.first_query;
  const double scale = detail::resolved_scale("reference", options.scale, q.cols);
  DoubleTensor to_q(q.batch, q.heads, q.rows, q.cols), to_k(k.batch, k.heads, k.rows, k.cols),
      to_v(v.batch, v.heads, v.rows, v.cols);
  for (Index b = 0; b < q.batch; ++b) {
    for (Index h = 0; h < q.heads; ++h) {
      const Index kv_head = h / group;
      const auto encoded_q = encoded(q.matrix(b, h), options.position, first, Role::query);
      const auto encoded_k = encoded(k.matrix(b, kv_head), options.position, 0, Role::key);
      for (Index row = 0; row < q.rows; ++row) {
        const double* query = encoded_q.data() + row * q.cols;
        std::vector<Index> met;
        std::vector<std::size_t> ends;
        for (const std::vector<Index>& part : parts_of(b, h, first + row)) {
          met.insert(met.end(), part.begin(), part.end());
          ends.push_back(met.size());
        }
        std::vector<double> scores, dp, slopes;
        for (const Index j : met) {
          double s = 0, of_value = 0;
          for (Index c = 0; c < q.cols && j < k.rows; ++c) s += query[c] * encoded_k[at(j * q.cols + c)];
          for (Index c = 0; c < v.cols && j < v.rows; ++c)
            of_value +=
                static_cast<double>(dout.row(b, h, row)[c]) * static_cast<double>(v.row(b, kv_head, j)[c]);
          const Value raw = static_cast<Value>(scale * s);
          scores.push_back(static_cast<double>(options.score(raw, b, h, first + row, j)));
          slopes.push_back(static_cast<double>(options.score.derivative(raw, b, h, first + row, j)));
          dp.push_back(of_value);
        }
        const QueryGradient of(scores, dp, dlse.data == nullptr ? 0.0 : static_cast<double>(dlse(b, h, row)),
                               ends);
        for (std::size_t n = 0; n < met.size(); ++n) {
          const Index j = met[n];
          if (of.p[n] == 0 || j >= k.rows) continue;  // a hidden key gets nothing, even from NaN
          const double ds = scale * of.ds[n] * slopes[n];
          for (Index c = 0; c < q.cols; ++c) {
            to_q.row(b, h, row)[c] += ds * encoded_k[at(j * q.cols + c)];
            to_k.row(b, kv_head, j)[c] += ds * query[c];
          }
          for (Index c = 0; c < v.cols; ++c)
            to_v.row(b, kv_head, j)[c] += of.p[n] * static_cast<double>(dout.row(b, h, row)[c]);
        }
      }
    }
  }
  to_q.write(options.position, first, Role::query, dq);
  to_k.write(options.position, 0, Role::key, dk);
  to_v.write(no_position{}, 0, Role::key, dv);
}

}  // namespace reference
LONGSPAN_NAMESPACE_END
