// Naive landmark attention in double: the reference for the fast kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "longspan/landmark_attention.hpp"
#include "longspan/landmarks.hpp"
#include "longspan/mask.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/exact.hpp"
#include "longspan/reference/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// Scores are computed one by one.
template <Mask M, Score S, Position P>
struct exact<landmark_attention<M, S, P>> : ExactCalls<exact<landmark_attention<M, S, P>>> {
  landmark_attention<M, S, P> attend;

  explicit exact(landmark_attention<M, S, P> functor) : attend(std::move(functor)) {}

  template <class Q, class K, class V, class Out, class Lse>
  void attend_exactly(Q q, K k, V v, Out out, Lse lse) const {
    using To = typename Out::Element;
    using Tl = typename Lse::Element;
    const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
    const Index first = attend.first_query == queries_end_at_keys ? k.rows - q.rows : attend.first_query;
    const double scale = detail::resolved_scale("reference", attend.scale, q.cols);
    using ScoreValue = detail::ScoreValue<decltype(attend.score), double>;

    for (Index b = 0; b < q.batch; ++b) {
      for (Index h = 0; h < q.heads; ++h) {
        const auto encoded_q = encoded(q.matrix(b, h), attend.position, first, Role::query);
        const auto encoded_k = encoded(k.matrix(b, h / group), attend.position, 0, Role::key);
        for (Index row = 0; row < q.rows; ++row) {
          std::vector<double> scores(static_cast<std::size_t>(k.rows));
          for (Index j = 0; j < k.rows; ++j) {
            double s = 0;
            for (Index c = 0; c < q.cols; ++c)
              s += encoded_q[at(row, c, q.cols)] * encoded_k[at(j, c, q.cols)];
            scores[at(0, j, 0)] = sees(attend.mask, b, h, first + row, j)
                                      ? static_cast<double>(attend.score(static_cast<ScoreValue>(scale * s),
                                                                         b, h, first + row, j))
                                      : nothing;
          }
          Row sums{b, h, row, first + row, std::vector<double>(static_cast<std::size_t>(v.cols))};
          const double log_sum = attend_row(scores, v.matrix(b, h / group), sums);
          for (Index c = 0; c < v.cols; ++c) out.row(b, h, row)[c] = static_cast<To>(sums.out[at(0, c, 0)]);
          if (lse.data != nullptr) lse(b, h, row) = static_cast<Tl>(log_sum);
        }
      }
    }
  }

 private:
  static constexpr double nothing = -std::numeric_limits<double>::infinity();

  struct Row {
    Index b, h, row, i;
    std::vector<double> out;
  };

  static std::size_t at(Index i, Index c, Index cols) { return static_cast<std::size_t>(i * cols + c); }

  /// log sum exp of the scores of the keys of a group; -infinity if the query sees none of them.
  static double log_sum_exp_of(const std::vector<double>& scores, const std::vector<Index>& keys) {
    double top = nothing, sum = 0;
    for (const Index j : keys) top = std::fmax(top, scores[at(0, j, 0)]);
    for (const Index j : keys) sum += top == nothing ? 0 : std::exp(scores[at(0, j, 0)] - top);
    return sum == 0 ? nothing : top + std::log(sum);
  }

  /// Equations 2 to 4 for one query; returns the log-sum-exp of its group.
  template <class Tv>
  double attend_row(const std::vector<double>& scores, MatrixView<const Tv> v, Row& row) const {
    const Index kv_len = v.rows;
    const auto where = attend.softmax == LandmarkSoftmax::plain ? landmarks::none() : attend.landmarks;
    const bool grouped = attend.softmax == LandmarkSoftmax::grouped;
    const Index own_block = where.block_of(row.b, row.i, kv_len), count = where.count(row.b, kv_len);

    std::vector<std::vector<Index>> tokens(static_cast<std::size_t>(count + 1));  // of each block
    std::vector<Index> own, reached, controlled;  // tokens; landmarks of other blocks, free and controlled
    for (Index m = 0; m <= count; ++m) {
      const Index begin = m == 0 ? 0 : where.key(row.b, m - 1) + 1,
                  end = m < count ? where.key(row.b, m) : kv_len;
      auto& of_block = tokens[at(0, m, 0)];
      for (Index j = begin; j < end; ++j) {
        if (scores[at(0, j, 0)] != nothing) of_block.push_back(j);
      }
      if (!grouped || m == own_block) {
        own.insert(own.end(), of_block.begin(), of_block.end());
      } else if (m < count && scores[at(0, end, 0)] != nothing && (attend.leak || !of_block.empty())) {
        const bool is_controlled =
            attend.control.cmt.data != nullptr &&
            attend.control.blocks.row(attend.control.blocks.rows == 1 ? 0 : row.b)[m] != 0;
        (is_controlled ? controlled : reached).push_back(m);
      }
    }

    std::vector<Index> group = own, controlled_group;
    for (const Index m : reached) group.push_back(where.key(row.b, m));
    for (const Index m : controlled) controlled_group.push_back(where.key(row.b, m));
    double log_sum = log_sum_exp_of(scores, group), of_cmt = 0;
    if (attend.control.cmt.data != nullptr) {
      const double logit = static_cast<double>(attend.control.cmt(row.b, row.h, row.row));
      const double top = std::fmax(log_sum, logit);
      if (top != nothing) log_sum = top + std::log(std::exp(log_sum - top) + std::exp(logit - top));
      of_cmt = logit == nothing ? 0 : std::exp(logit - log_sum);
      if (of_cmt < attend.control.cutoff) of_cmt = 0;
    }
    for (const Index j : own) add(v, j, std::exp(scores[at(0, j, 0)] - log_sum), row);
    for (const Index m : reached) {
      add_block(scores, v, m, tokens[at(0, m, 0)], std::exp(scores[at(0, where.key(row.b, m), 0)] - log_sum),
                row);
    }
    const double controlled_sum = log_sum_exp_of(scores, controlled_group);
    for (const Index m : controlled) {
      add_block(scores, v, m, tokens[at(0, m, 0)],
                of_cmt * std::exp(scores[at(0, where.key(row.b, m), 0)] - controlled_sum), row);
    }
    return log_sum;
  }

  template <class Tv>
  void add_block(const std::vector<double>& scores, MatrixView<const Tv> v, Index m,
                 const std::vector<Index>& tokens, double gate, Row& row) const {
    if (attend.gate_keep.data != nullptr)
      gate *= static_cast<double>(attend.gate_keep.row(row.b, row.h, row.row)[m]);
    const double log_sum = log_sum_exp_of(scores, tokens);
    for (const Index j : tokens) add(v, j, gate * std::exp(scores[at(0, j, 0)] - log_sum), row);
  }

  template <class Tv>
  static void add(MatrixView<const Tv> v, Index j, double weight, Row& row) {
    for (Index c = 0; c < v.cols; ++c) row.out[at(0, c, 0)] += weight * static_cast<double>(v.row(j)[c]);
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
