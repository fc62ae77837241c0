// The naive gradient of landmark attention in double: the reference for the fast kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "longspan/detail/call/problem.hpp"
#include "longspan/gradient/landmark_attention.hpp"
#include "longspan/landmarks.hpp"
#include "longspan/mask.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/gradient/exact.hpp"
#include "longspan/reference/gradient/softmax_rows.hpp"
#include "longspan/reference/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// Also writes the gradient of the CMT if gradient_of::dcmt is set.
template <Mask M, Score S, Position P>
struct exact<gradient_of<landmark_attention<M, S, P>>>
    : ExactGradientCalls<exact<gradient_of<landmark_attention<M, S, P>>>> {
  landmark_attention<M, S, P> attend;
  RowsView<float> dcmt;

  explicit exact(gradient_of<landmark_attention<M, S, P>> of) : attend(std::move(of.attend)), dcmt(of.dcmt) {}

  template <class Q, class K, class V, class Dout, class Dlse, class Dq, class Dk, class Dv>
  void differentiate_exactly(Q q, K k, V v, Dout dout, Dlse dlse, Dq dq, Dk dk, Dv dv) const {
    const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
    const Index first = attend.first_query == queries_end_at_keys ? k.rows - q.rows : attend.first_query;
    const double scale = detail::resolved_scale("reference", attend.scale, q.cols);
    DoubleTensor to_q(q.batch, q.heads, q.rows, q.cols), to_k(k.batch, k.heads, k.rows, k.cols),
        to_v(v.batch, v.heads, v.rows, v.cols);
    for (Index b = 0; b < q.batch; ++b) {
      for (Index h = 0; h < q.heads; ++h) {
        const Index kv_head = h / group;
        const auto encoded_q = encoded(q.matrix(b, h), attend.position, first, Role::query);
        const auto encoded_k = encoded(k.matrix(b, kv_head), attend.position, 0, Role::key);
        for (Index n = 0; n < q.rows; ++n) {
          const double* query = encoded_q.data() + n * q.cols;
          Row row;
          row.b = b, row.h = h, row.row = n, row.i = first + n;
          row.dlse = dlse.data == nullptr ? 0.0 : static_cast<double>(dlse(b, h, n));
          for (Index j = 0; j < k.rows; ++j) {
            add_pair(row, j, scale, query, encoded_k.data() + j * q.cols, q.cols, dout.row(b, h, n),
                     v.row(b, kv_head, j), v.cols);
          }
          differentiate_row(row);
          if (dcmt.data != nullptr) dcmt(b, h, n) = static_cast<float>(row.dcmt);
          for (Index j = 0; j < k.rows; ++j) {
            if (row.ds[at(j)] != 0) {
              const double ds = scale * row.ds[at(j)] * row.slopes[at(j)];
              for (Index c = 0; c < q.cols; ++c) {
                to_q.row(b, h, n)[c] += ds * encoded_k[at(j * q.cols + c)];
                to_k.row(b, kv_head, j)[c] += ds * query[c];
              }
            }
            for (Index c = 0; c < v.cols && row.weights[at(j)] != 0; ++c)
              to_v.row(b, kv_head, j)[c] += row.weights[at(j)] * static_cast<double>(dout.row(b, h, n)[c]);
          }
        }
      }
    }
    to_q.write(attend.position, first, Role::query, dq);
    to_k.write(attend.position, 0, Role::key, dk);
    to_v.write(no_position{}, 0, Role::key, dv);
  }

 private:
  /// One query: what its gradients are made of, for each key.
  struct Row {
    Index b = 0, h = 0, row = 0, i = 0;  ///< i is the position
    double dlse = 0;
    std::vector<double> scores, slopes, dp;  ///< a hidden key has the score -infinity
    std::vector<double> weights, ds;         ///< of the values, and the gradients of the scores
    double dcmt = 0;
  };

  /// The weights and gradients of one query, from its scores and dP.
  void differentiate_row(Row& row) const {
    const auto kv_len = static_cast<Index>(row.scores.size());
    row.weights.assign(row.scores.size(), 0.0);
    row.ds.assign(row.scores.size(), 0.0);
    const auto where = attend.softmax == LandmarkSoftmax::plain ? landmarks::none() : attend.landmarks;
    const bool grouped = attend.softmax == LandmarkSoftmax::grouped;
    const Index own_block = where.block_of(row.b, row.i, kv_len), count = where.count(row.b, kv_len);

    std::vector<Index> own;
    std::vector<Block> reached, controlled;
    for (Index m = 0; m <= count; ++m) {
      const Index begin = m == 0 ? 0 : where.key(row.b, m - 1) + 1,
                  end = m < count ? where.key(row.b, m) : kv_len;
      std::vector<Index> tokens;
      for (Index j = begin; j < end; ++j) {
        if (row.scores[at(j)] != nothing) tokens.push_back(j);
      }
      if (!grouped || m == own_block) {
        own.insert(own.end(), tokens.begin(), tokens.end());
      } else if (m < count && row.scores[at(end)] != nothing && (attend.leak || !tokens.empty())) {
        const bool is_controlled =
            attend.control.cmt.data != nullptr &&
            attend.control.blocks.row(attend.control.blocks.rows == 1 ? 0 : row.b)[m] != 0;
        (is_controlled ? controlled : reached).push_back(block_of(row, m, end, tokens));
      }
    }

    std::vector<Index> group = own, controlled_group;
    for (const Block& block : reached) group.push_back(block.landmark);
    for (const Block& block : controlled) controlled_group.push_back(block.landmark);
    double log_sum = log_sum_exp_of(row.scores, group), of_cmt = 0, kept_of_cmt = 0;
    if (attend.control.cmt.data != nullptr) {
      const double logit = static_cast<double>(attend.control.cmt(row.b, row.h, row.row));
      const double top = std::fmax(log_sum, logit);
      if (top != nothing) log_sum = top + std::log(std::exp(log_sum - top) + std::exp(logit - top));
      of_cmt = logit == nothing ? 0 : std::exp(logit - log_sum);
      kept_of_cmt = of_cmt < attend.control.cutoff ? 0 : of_cmt;
    }
    const double controlled_sum = log_sum_exp_of(row.scores, controlled_group);

    // The gradients of the weights g: those of tokens are dP, those of landmarks the mean of dP over their block.
    double delta = -row.dlse, of_controlled = 0;
    for (const Index j : own) delta += std::exp(row.scores[at(j)] - log_sum) * row.dp[at(j)];
    for (const Block& block : reached) delta += gate(row, block, log_sum) * block.keep * block.mean;
    for (const Block& block : controlled)
      of_controlled += gate(row, block, controlled_sum) * block.keep * block.mean;
    if (kept_of_cmt != 0) delta += kept_of_cmt * of_controlled;

    for (const Index j : own) {
      row.weights[at(j)] = std::exp(row.scores[at(j)] - log_sum);
      row.ds[at(j)] = row.weights[at(j)] * (row.dp[at(j)] - delta);
    }
    for (const Block& block : reached) add(block, gate(row, block, log_sum), delta, row);
    for (const Block& block : controlled) {
      if (kept_of_cmt != 0) add(block, kept_of_cmt * gate(row, block, controlled_sum), of_controlled, row);
    }
    row.dcmt = of_cmt == 0 ? 0 : of_cmt * ((kept_of_cmt == 0 ? 0 : of_controlled) - delta);
  }

  static constexpr double nothing = -std::numeric_limits<double>::infinity();

  /// A block that the query reaches through its landmark.
  struct Block {
    Index landmark = 0;
    std::vector<Index> tokens;  ///< those that it sees
    double log_sum = nothing;   ///< of their scores
    double mean = 0;            ///< of their dP under their softmax; 0 without tokens
    double keep = 1;
  };

  static std::size_t at(Index i) { return static_cast<std::size_t>(i); }

  static double log_sum_exp_of(const std::vector<double>& scores, const std::vector<Index>& keys) {
    double top = nothing, sum = 0;
    for (const Index j : keys) top = std::fmax(top, scores[at(j)]);
    for (const Index j : keys) sum += top == nothing ? 0 : std::exp(scores[at(j)] - top);
    return sum == 0 ? nothing : top + std::log(sum);
  }

  Block block_of(const Row& row, Index m, Index landmark, const std::vector<Index>& tokens) const {
    Block block{landmark, tokens, log_sum_exp_of(row.scores, tokens), 0, 1};
    for (const Index t : tokens) block.mean += std::exp(row.scores[at(t)] - block.log_sum) * row.dp[at(t)];
    if (attend.gate_keep.data != nullptr)
      block.keep = static_cast<double>(attend.gate_keep.row(row.b, row.h, row.row)[m]);
    return block;
  }

  static double gate(const Row& row, const Block& block, double log_sum) {
    return std::exp(row.scores[at(block.landmark)] - log_sum);
  }

  /// A block with the weight `gate`, where `delta` is the mean of the gradients of the weights of its group.
  static void add(const Block& block, double gate, double delta, Row& row) {
    for (const Index t : block.tokens) {
      row.weights[at(t)] = gate * block.keep * std::exp(row.scores[at(t)] - block.log_sum);
      row.ds[at(t)] = row.weights[at(t)] * (row.dp[at(t)] - block.mean);
    }
    row.ds[at(block.landmark)] = gate * (block.keep * block.mean - delta);
  }

  template <class Td, class Tv>
  void add_pair(Row& row, Index j, double scale, const double* query, const double* key, Index head_dim,
                const Td* dout, const Tv* value, Index value_dim) const {
    using Value = detail::ScoreValue<S, double>;
    double s = 0, dp = 0;
    for (Index c = 0; c < head_dim; ++c) s += query[c] * key[c];
    for (Index c = 0; c < value_dim; ++c) dp += static_cast<double>(dout[c]) * static_cast<double>(value[c]);
    const Value raw = static_cast<Value>(scale * s);
    const bool is_seen = sees(attend.mask, row.b, row.h, row.i, j);
    row.scores.push_back(is_seen ? static_cast<double>(attend.score(raw, row.b, row.h, row.i, j)) : nothing);
    row.slopes.push_back(is_seen ? static_cast<double>(attend.score.derivative(raw, row.b, row.h, row.i, j))
                                 : 0.0);
    row.dp.push_back(dp);
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
