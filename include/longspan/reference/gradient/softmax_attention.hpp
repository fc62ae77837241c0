// The naive gradient of softmax attention in double: the reference for the fast kernels.
#pragma once

#include <utility>
#include <vector>

#include "longspan/gradient/softmax_attention.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/gradient/exact.hpp"
#include "longspan/reference/gradient/softmax_rows.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// The cost is 2 * q_len * kv_len * (2 head_dim + 2 value_dim) scalar flop per head.
template <Mask M, Score S, Position P>
struct exact<gradient_of<softmax_attention<M, S, P>>>
    : ExactGradientCalls<exact<gradient_of<softmax_attention<M, S, P>>>> {
  softmax_attention<M, S, P> attend;

  explicit exact(gradient_of<softmax_attention<M, S, P>> of) : attend(std::move(of.attend)) {}

  template <class Q, class K, class V, class Dout, class Dlse, class Dq, class Dk, class Dv>
  void differentiate_exactly(Q q, K k, V v, Dout dout, Dlse dlse, Dq dq, Dk dk, Dv dv) const {
    softmax_gradient_rows(attend, q, k, v, dout, dlse, dq, dk, dv, [&](Index b, Index h, Index i) {
      std::vector<Index> seen;
      for (Index j = 0; j < k.rows; ++j) {
        if (sees(attend.mask, b, h, i, j)) seen.push_back(j);
      }
      return std::vector<std::vector<Index>>{seen};
    });
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
