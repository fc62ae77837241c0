// Naive softmax attention in double: the reference for the fast kernels.
#pragma once

#include <utility>
#include <vector>

#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/exact.hpp"
#include "longspan/reference/softmax_rows.hpp"
#include "longspan/score.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// The cost is 2 * q_len * kv_len * (head_dim + value_dim) scalar flop per head.
template <Mask M, Score S, Position P>
struct exact<softmax_attention<M, S, P>> : ExactCalls<exact<softmax_attention<M, S, P>>> {
  softmax_attention<M, S, P> attend;

  explicit exact(softmax_attention<M, S, P> functor) : attend(std::move(functor)) {}

  template <class Q, class K, class V, class Out, class Lse>
  void attend_exactly(Q q, K k, V v, Out out, Lse lse) const {
    softmax_rows(attend, q, k, v, out, lse, [&](Index b, Index h, Index i) {
      std::vector<Index> seen;
      for (Index j = 0; j < k.rows; ++j) {
        if (sees(attend.mask, b, h, i, j)) seen.push_back(j);
      }
      return seen;
    });
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
