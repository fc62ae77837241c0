// The gradient of landmark attention by its definition, in double or wider, and the error bounds of results.
//
// Shares no code with longspan/reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "support/gradient.hpp"
#include "support/landmark_oracle.hpp"
#include "support/tensor.hpp"

namespace test {

/// The row of pairs of one query, with the grouped softmax over the blocks that end at `keys`.
///
/// A weight is the product of the softmax of its block, with the relative error of the token's score and of the mean of
/// the block's, and of a gate, with that of the landmark's score and of lse. D_m is a sum over the tokens of its block.
template <class Real, class Arith>
std::vector<PairGradient<Real>> landmark_pair_gradients(const std::vector<Index>& keys, Index i,
                                                        const std::vector<WeighedPair<Real>>& pairs,
                                                        const std::vector<Real>& slope,
                                                        const std::vector<Real>& dp,
                                                        const std::vector<Real>& dp_size, Real dlse,
                                                        Real rounded_out) {
  constexpr Real nothing = -std::numeric_limits<Real>::infinity();
  constexpr double u = unit_roundoff<Arith>;
  const Real underflow = Real(lowest_normal<Arith>) / Real(16 * u);
  std::vector<PairGradient<Real>> row(pairs.size());
  const auto at = [](Index j) { return static_cast<std::size_t>(j); };

  /// A block that another block's query reaches, or the query's own block.
  struct Block {
    Index begin, end;
    bool own;
    Real log_sum, a, mean, mean_gauge, size;  ///< of its visible tokens under their softmax
  };
  std::vector<Block> blocks;
  Real top = nothing, sum = 0;
  Index begin = 0;
  for (std::size_t m = 0; m <= keys.size(); ++m) {
    const bool closed = m < keys.size();
    const Index end = closed ? keys[m] : static_cast<Index>(pairs.size());
    Block block{begin, end, begin <= i && (i <= end || !closed), nothing, 0, 0, 0, 0};
    begin = end + 1;
    Real highest = nothing, weights = 0;
    for (Index j = block.begin; j < end; ++j) highest = std::max(highest, pairs[at(j)].s);
    if (highest == nothing || (!block.own && (!closed || pairs[at(end)].s == nothing))) continue;
    for (Index j = block.begin; j < end; ++j) weights += std::exp(pairs[at(j)].s - highest);
    block.log_sum = highest + std::log(weights);
    const auto p_of = [&](Index j) { return std::exp(pairs[at(j)].s - block.log_sum); };
    for (Index j = block.begin; j < end; ++j) block.a += p_of(j) * pairs[at(j)].a;
    for (Index j = block.begin; j < end; ++j) {
      if (pairs[at(j)].s == nothing) continue;
      block.mean += p_of(j) * dp[at(j)];
      block.size += p_of(j) * dp_size[at(j)];
      block.mean_gauge += p_of(j) * (1 + pairs[at(j)].a + block.a) * dp_size[at(j)];
    }
    blocks.push_back(block);
    top = std::max(top, block.own ? highest : pairs[at(end)].s);
  }
  const auto log_weight = [&](const Block& block) {
    return block.own ? block.log_sum : pairs[at(block.end)].s;
  };
  for (const Block& block : blocks) sum += std::exp(log_weight(block) - top);
  const Real lse = top + std::log(sum);
  Real delta = -dlse, condition = 0, size = 0;
  for (const Block& block : blocks) {
    const Real gate = std::exp(log_weight(block) - lse);
    delta += gate * block.mean;
    size += gate * block.size;
    condition += gate * (block.a + (block.own ? Real(0) : pairs[at(block.end)].a));
  }
  const Real of_delta = (1 + condition) * size + std::abs(dlse) + rounded_out / Real(16 * u);
  for (const Block& block : blocks) {
    const Real gate = std::exp(log_weight(block) - lse);
    const WeighedPair<Real> landmark = block.own ? WeighedPair<Real>{0, 0} : pairs[at(block.end)];
    const Real of_gate = 1 + landmark.a + condition + std::abs(lse);
    const Real mean = block.own ? delta : block.mean, of_mean = block.own ? of_delta : block.mean_gauge;
    for (Index j = block.begin; j < block.end; ++j) {
      if (pairs[at(j)].s == nothing) continue;
      auto& [p, p_gauge, ds, ds_gauge] = row[at(j)];
      p = gate * std::exp(pairs[at(j)].s - block.log_sum);
      const Real of_weight = of_gate + pairs[at(j)].a + (block.own ? Real(0) : block.a);
      const Real change = std::abs(dp[at(j)]) + std::abs(mean);
      p_gauge = p * of_weight + underflow;
      ds = p * (dp[at(j)] - mean) * slope[at(j)];
      ds_gauge = std::max(Real(1), std::abs(slope[at(j)])) *
                 (p * (of_weight * change + dp_size[at(j)] + of_mean) + underflow * (1 + change));
    }
    if (block.own) continue;
    auto& of_landmark = row[at(block.end)];
    const Real change = std::abs(block.mean) + std::abs(delta);
    of_landmark.ds = gate * (block.mean - delta) * slope[at(block.end)];
    of_landmark.ds_gauge =
        std::max(Real(1), std::abs(slope[at(block.end)])) *
        (gate * (of_gate * change + block.mean_gauge + of_delta) + underflow * (1 + change));
  }
  return row;
}

/// CHECKs the error bound of the docstring for every number.
template <class Tq, class... Types>
GradientErrors check_landmark_gradient(const Definition& what, const Landmarks& at,
                                       const GradientCall<Tq, Types...>& call) {
  const ExactGradient exact = exact_gradient_of_rows(what, call, [&](Index b, Index i, const auto&... row) {
    return landmark_pair_gradients<Wide<Tq>, Arithmetic<Tq>>(at.of_row[static_cast<std::size_t>(b)], i,
                                                             row...);
  });
  const GradientErrors errors = gradient_errors(exact, call);
  INFO("dq: " << errors.dq << " at " << errors.worst_dq);
  INFO("dk: " << errors.dk << " at " << errors.worst_dk);
  INFO("dv: " << errors.dv << " at " << errors.worst_dv);
  CHECK(errors.worst() <= most_error);
  CHECK_FALSE(errors.minus_zero);
  return errors;
}

}  // namespace test
