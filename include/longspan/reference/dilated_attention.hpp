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

/// For each query a list of the keys of every branch that keeps it, one branch after the other, and one softmax over
/// the list.
template <Mask M, Score S, Position P>
struct exact<dilated_attention<M, S, P>> : ExactCalls<exact<dilated_attention<M, S, P>>> {
  dilated_attention<M, S, P> attend;

  explicit exact(dilated_attention<M, S, P> functor) : attend(std::move(functor)) {}

  template <class Q, class K, class V, class Out, class Lse>
  void attend_exactly(Q q, K k, V v, Out out, Lse lse) const {
    softmax_rows(attend, q, k, v, out, lse, [&](Index b, Index h, Index i) {
      std::vector<Index> met;  // keys; an index >= kv_len means a key of zeros
      for (const Branch& branch : attend.branches) append_keys(branch, b, h, q.heads, i, k.rows, met);
      return met;
    });
  }

 private:
  /// Appends the keys that query i sees in a branch.
  void append_keys(const Branch& branch, Index b, Index h, Index heads, Index i, Index kv_len,
                   std::vector<Index>& met) const {
    const Index w = branch.segment, r = branch.dilation, s = head_offset(attend.phase, h, heads, r);
    if (i < 0 || !covers(branch, s, i)) return;
    const std::size_t met_before = met.size();
    const Index begin = i / w * w;
    for (Index j = begin + s; j < kv_len && j - begin < w; j += r) {
      const auto behind = met.begin() + static_cast<std::ptrdiff_t>(met_before);
      if (attend.overlap == Overlap::set && std::find(met.begin(), behind, j) != behind) continue;
      if (sees(attend.mask, b, h, i, j)) met.push_back(j);
    }
    if (!attend.zero_pad_compat || begin >= kv_len) return;
    // torchscale pads each segment that has a key to min(w, kv_len) rows, and these to a multiple of r.
    const Index rows = ((std::min)(w, kv_len) + r - 1) / r;
    for (Index t = kept_rows((std::min)(w, kv_len - begin), s, r); t < rows; ++t) {
      const Index j = begin + s + t * r;
      if (sees(attend.mask, b, h, i, j)) met.push_back((std::max)(j, kv_len));
    }
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
