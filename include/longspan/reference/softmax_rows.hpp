// Naive softmax in double over a list of keys for each query: the common part of the oracles.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "longspan/detail/call/problem.hpp"
#include "longspan/eigen.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// Writes out and lse of all queries. keys_of(b, h, i) returns the list of keys of the query at position i; a key
/// counts as often as it is in the list, and an index of kv_len or more is a key and a value of zeros. `parts`
/// provides score, position, scale and first_query.
template <class Parts, TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse, class KeysOf>
void softmax_rows(const Parts& parts, const Q& queries, const K& keys, const V& values, Out&& output,
                  Lse&& log_sum_exp, const KeysOf& keys_of) {
  const auto q = view(queries);
  const auto k = view(keys);
  const auto v = view(values);
  const auto out = view(output);
  const auto lse = rows_view(log_sum_exp);
  using To = typename std::remove_cvref_t<decltype(out)>::Element;
  using Tl = typename std::remove_cvref_t<decltype(lse)>::Element;
  using ScoreValue = detail::ScoreValue<std::remove_cvref_t<decltype(parts.score)>, double>;
  constexpr double absent = -std::numeric_limits<double>::infinity();
  const auto at = [](Index i) { return static_cast<std::size_t>(i); };

  const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
  const Index first = parts.first_query == queries_end_at_keys ? k.rows - q.rows : parts.first_query;
  const double scale = detail::resolved_scale("reference", parts.scale, q.cols);
  for (Index b = 0; b < q.batch; ++b) {
    for (Index h = 0; h < q.heads; ++h) {
      const auto encoded_q = encoded(q.matrix(b, h), parts.position, first, Role::query);
      const auto encoded_k = encoded(k.matrix(b, h / group), parts.position, 0, Role::key);
      for (Index row = 0; row < q.rows; ++row) {
        const std::vector<Index> met = keys_of(b, h, first + row);
        std::vector<double> scores;
        double top = absent, sum = 0;
        for (const Index j : met) {
          double s = 0;
          for (Index c = 0; c < q.cols && j < k.rows; ++c)
            s += encoded_q[at(row * q.cols + c)] * encoded_k[at(j * q.cols + c)];
          s = static_cast<double>(parts.score(static_cast<ScoreValue>(scale * s), b, h, first + row, j));
          if (s > top || std::isnan(s)) top = s;
          scores.push_back(s);
        }
        std::vector<double> o(at(v.cols), 0.0);
        for (std::size_t n = 0; n < met.size(); ++n) {
          if (scores[n] == absent) continue;  // a hidden key does not count, even if its value is NaN
          const double weight = std::exp(scores[n] - top);
          sum += weight;
          for (Index c = 0; c < v.cols && met[n] < k.rows; ++c)
            o[at(c)] += weight * static_cast<double>(v.row(b, h / group, met[n])[c]);
        }
        for (Index c = 0; c < v.cols; ++c)
          out.row(b, h, row)[c] = static_cast<To>(sum == 0 ? 0.0 : o[at(c)] / sum);
        if (lse.data != nullptr) lse(b, h, row) = static_cast<Tl>(sum == 0 ? top : top + std::log(sum));
      }
    }
  }
}

}  // namespace reference
LONGSPAN_NAMESPACE_END
