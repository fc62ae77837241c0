// Softmax attention again, naive and in double: what the fast kernels are held to.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "longspan/detail/parts.hpp"
#include "longspan/detail/problem.hpp"
#include "longspan/eigen.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"

LONGSPAN_BEGIN
namespace reference {

/// longspan::softmax_attention with the same parts and options. Outputs and lse of any type, arithmetic in
/// double; cost 2 * q_len * kv_len * (head_dim + value_dim) scalar flop per head.
template <Mask M = everything, Score S = unchanged, Position P = no_position>
struct softmax_attention {
  M mask{};
  S score{};
  P position{};
  double scale = default_scale;
  Index first_query = queries_end_at_keys;

  softmax_attention() = default;

  template <class... Parts>
  requires(sizeof...(Parts) > 0 &&
           detail::parts_are<M, S, P, Parts...>) explicit softmax_attention(Parts... parts)
      : mask(detail::take_part<detail::MaskPart, M>(parts...)),
        score(detail::take_part<detail::ScorePart, S>(parts...)),
        position(detail::take_part<detail::PositionPart, P>(parts...)) {}

  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out>
  void operator()(const Q& q, const K& k, const V& v, Out&& out) const {
    operator()(q, k, v, out, detail::no_rows<double>());
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse>
  void operator()(const Q& queries, const K& keys, const V& values, Out&& output, Lse&& log_sum_exp) const {
    const auto q = view(queries);
    const auto k = view(keys);
    const auto v = view(values);
    const auto out = view(output);
    const auto lse = rows_view(log_sum_exp);
    const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
    const Index first = first_query == queries_end_at_keys ? k.rows - q.rows : first_query;
    const double factor =
        scale != default_scale ? scale : 1 / std::sqrt(static_cast<double>(std::max<Index>(1, q.cols)));
    using ScoreValue = detail::ScoreValue<S, double>;
    using To = typename std::remove_cvref_t<decltype(out)>::Element;
    using Tl = typename std::remove_cvref_t<decltype(lse)>::Element;

    for (Index b = 0; b < q.batch; ++b) {
      for (Index h = 0; h < q.heads; ++h) {
        const auto encoded_q = encoded(q.matrix(b, h), position, first, Role::query);
        const auto encoded_k = encoded(k.matrix(b, h / group), position, 0, Role::key);
        for (Index row = 0; row < q.rows; ++row) {
          const Index i = first + row;
          std::vector<double> p(static_cast<std::size_t>(k.rows), 0.0),
              o(static_cast<std::size_t>(v.cols), 0.0);
          double top = -std::numeric_limits<double>::infinity();
          for (Index j = 0; j < k.rows; ++j) {
            double& s = p[static_cast<std::size_t>(j)];
            for (Index c = 0; c < q.cols; ++c)
              s += at(encoded_q, row, c, q.cols) * at(encoded_k, j, c, q.cols);
            s = sees(mask, b, h, i, j)
                    ? static_cast<double>(score(static_cast<ScoreValue>(factor * s), b, h, i, j))
                    : -std::numeric_limits<double>::infinity();
            if (s > top || std::isnan(s)) top = s;
          }
          double sum = 0;
          for (Index j = 0; j < k.rows; ++j) {
            double& s = p[static_cast<std::size_t>(j)];
            if (s == -std::numeric_limits<double>::infinity()) continue;  // absent, whatever v[j] holds
            const double weight = std::exp(s - top);
            sum += weight;
            for (Index c = 0; c < v.cols; ++c) {
              o[static_cast<std::size_t>(c)] += weight * static_cast<double>(v.row(b, h / group, j)[c]);
            }
          }
          for (Index c = 0; c < v.cols; ++c) {
            out.row(b, h, row)[c] = static_cast<To>(sum == 0 ? 0.0 : o[static_cast<std::size_t>(c)] / sum);
          }
          if (lse.data != nullptr) lse(b, h, row) = static_cast<Tl>(sum == 0 ? top : top + std::log(sum));
        }
      }
    }
  }

 private:
  static double at(const std::vector<double>& rows, Index i, Index c, Index cols) {
    return rows[static_cast<std::size_t>(i * cols + c)];
  }
};

template <class... Parts>
requires(sizeof...(Parts) > 0) softmax_attention(Parts...)
->softmax_attention<detail::PartOf<detail::MaskPart, everything, Parts...>,
                    detail::PartOf<detail::ScorePart, unchanged, Parts...>,
                    detail::PartOf<detail::PositionPart, no_position, Parts...>>;

}  // namespace reference
LONGSPAN_END
