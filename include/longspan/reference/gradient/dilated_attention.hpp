// The naive gradient of dilated attention in double: the reference for the fast kernels.
#pragma once

#include <utility>
#include <vector>

#include "longspan/dilation.hpp"
#include "longspan/gradient/dilated_attention.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/dilated_attention.hpp"
#include "longspan/reference/gradient/exact.hpp"
#include "longspan/reference/gradient/softmax_rows.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// The gradient of one softmax over the keys of all branches; with mixing = detached each branch has its own D.
template <Mask M, Score S, Position P>
struct exact<gradient_of<dilated_attention<M, S, P>>>
    : ExactGradientCalls<exact<gradient_of<dilated_attention<M, S, P>>>> {
  gradient_of<dilated_attention<M, S, P>> gradient;

  explicit exact(gradient_of<dilated_attention<M, S, P>> of) : gradient(std::move(of)) {}

  template <class Q, class K, class V, class Dout, class Dlse, class Dq, class Dk, class Dv>
  void differentiate_exactly(Q q, K k, V v, Dout dout, Dlse dlse, Dq dq, Dk dk, Dv dv) const {
    softmax_gradient_rows(gradient.attend, q, k, v, dout, dlse, dq, dk, dv, [&](Index b, Index h, Index i) {
      std::vector<std::vector<Index>> keys = dilated_keys(gradient.attend, b, h, q.heads, i, k.rows);
      if (gradient.mixing == Mixing::detached) return keys;
      std::vector<Index> all;
      for (const auto& of_branch : keys) all.insert(all.end(), of_branch.begin(), of_branch.end());
      return std::vector<std::vector<Index>>{all};
    });
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
