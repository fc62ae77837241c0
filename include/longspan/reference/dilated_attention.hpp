// Naive dilated attention in double: the reference for the fast kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "longspan/dilation.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/exact.hpp"
#include "longspan/reference/softmax_rows.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// The keys that the query at position i of head h sees in each branch. An index of kv_len or more stands for a key of
/// zeros.
template <Mask M, Score S, Position P>
std::vector<std::vector<Index>> dilated_keys(const dilated_attention<M, S, P>& attend, Index b, Index h,
                                             Index heads, Index i, Index kv_len) {
  std::vector<std::vector<Index>> of_branches;
  for (const Branch& branch : attend.branches) {
    std::vector<Index>& met = of_branches.emplace_back();
    const Index w = branch.segment, r = branch.dilation, s = head_offset(attend.phase, h, heads, r);
    if (i < 0 || !covers(branch, s, i)) continue;
    const Index begin = i / w * w;
    const auto was_met = [&](Index j) {
      return std::any_of(of_branches.begin(), of_branches.end() - 1, [j](const std::vector<Index>& earlier) {
        return std::find(earlier.begin(), earlier.end(), j) != earlier.end();
      });
    };
    for (Index j = begin + s; j < kv_len && j - begin < w; j += r) {
      if (attend.overlap == Overlap::set && was_met(j)) continue;
      if (sees(attend.mask, b, h, i, j)) met.push_back(j);
    }
    if (!attend.zero_pad_compat || begin >= kv_len) continue;
    // torchscale pads each segment that has a key to min(w, kv_len) rows, and these to a multiple of r.
    const Index rows = ((std::min)(w, kv_len) + r - 1) / r;
    for (Index t = kept_rows((std::min)(w, kv_len - begin), s, r); t < rows; ++t) {
      const Index j = begin + s + t * r;
      if (sees(attend.mask, b, h, i, j)) met.push_back((std::max)(j, kv_len));
    }
  }
  return of_branches;
}

/// One softmax over the keys of every branch that keeps the query.
template <Mask M, Score S, Position P>
struct exact<dilated_attention<M, S, P>> : ExactCalls<exact<dilated_attention<M, S, P>>> {
  dilated_attention<M, S, P> attend;

  explicit exact(dilated_attention<M, S, P> functor) : attend(std::move(functor)) {}

  template <class Q, class K, class V, class Out, class Lse>
  void attend_exactly(Q q, K k, V v, Out out, Lse lse) const {
    softmax_rows(attend, q, k, v, out, lse, [&](Index b, Index h, Index i) {
      std::vector<Index> met;
      for (const auto& of_branch : dilated_keys(attend, b, h, q.heads, i, k.rows))
        met.insert(met.end(), of_branch.begin(), of_branch.end());
      return met;
    });
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
