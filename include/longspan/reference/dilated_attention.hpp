// Naive dilated attention in double: the reference for the fast kernels.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "longspan/detail/call/parts.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/dilation.hpp"
#include "longspan/eigen.hpp"
#include "longspan/mask.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/softmax_rows.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// longspan::dilated_attention with the same parts and options: for each query a list of the keys of every branch that
/// keeps it, one branch after the other, and one softmax over the list.
template <Mask M = everything, Score S = unchanged, Position P = no_position>
struct dilated_attention {
  std::vector<Branch> branches;
  M mask{};
  S score{};
  P position{};
  std::optional<double> scale{};
  Index first_query = queries_end_at_keys;
  Phase phase = Phase::modulo;
  Overlap overlap = Overlap::multiset;
  bool zero_pad_compat = false;

  template <class... Parts>
  requires detail::parts_are<M, S, P, Parts...>
  explicit dilated_attention(std::vector<Branch> wanted, Parts... parts)
      : branches(std::move(wanted)),
        mask(detail::take_part<detail::MaskPart, M>(parts...)),
        score(detail::take_part<detail::ScorePart, S>(parts...)),
        position(detail::take_part<detail::PositionPart, P>(parts...)) {}

  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out>
  void operator()(const Q& q, const K& k, const V& v, Out&& out) const {
    operator()(q, k, v, out, detail::no_rows<double>());
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse>
  void operator()(const Q& q, const K& k, const V& v, Out&& out, Lse&& lse) const {
    const Index heads = view(q).heads, kv_len = view(k).rows;
    softmax_rows(*this, q, k, v, out, lse, [&](Index b, Index h, Index i) {
      std::vector<Index> met;  // keys; an index >= kv_len means a key of zeros
      for (std::size_t n = 0; n < branches.size(); ++n) append_keys(n, b, h, heads, i, kv_len, met);
      return met;
    });
  }

 private:
  /// Appends the keys that query i sees in branch n.
  void append_keys(std::size_t n, Index b, Index h, Index heads, Index i, Index kv_len,
                   std::vector<Index>& met) const {
    const Index w = branches[n].segment, r = branches[n].dilation, s = head_offset(phase, h, heads, r);
    if (i < 0 || !covers(branches[n], s, i)) return;
    const std::size_t met_before = met.size();
    const Index begin = i / w * w;
    for (Index j = begin + s; j < kv_len && j - begin < w; j += r) {
      const auto behind = met.begin() + static_cast<std::ptrdiff_t>(met_before);
      if (overlap == Overlap::set && std::find(met.begin(), behind, j) != behind) continue;
      if (sees(mask, b, h, i, j)) met.push_back(j);
    }
    if (!zero_pad_compat || begin >= kv_len) return;
    // torchscale pads each segment that has a key to min(w, kv_len) rows, and these to a multiple of r.
    const Index rows = ((std::min)(w, kv_len) + r - 1) / r;
    for (Index t = kept_rows((std::min)(w, kv_len - begin), s, r); t < rows; ++t) {
      const Index j = begin + s + t * r;
      if (sees(mask, b, h, i, j)) met.push_back((std::max)(j, kv_len));
    }
  }
};

dilated_attention(std::vector<Branch>) -> dilated_attention<>;
template <class... Parts>
requires(sizeof...(Parts) > 0)
dilated_attention(std::vector<Branch>, Parts...)
    -> dilated_attention<detail::PartOf<detail::MaskPart, everything, Parts...>,
                         detail::PartOf<detail::ScorePart, unchanged, Parts...>,
                         detail::PartOf<detail::PositionPart, no_position, Parts...>>;

}  // namespace reference
LONGSPAN_NAMESPACE_END
