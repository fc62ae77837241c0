// Naive softmax attention in double: the reference for the fast kernels.
#pragma once

#include <optional>
#include <vector>

#include "longspan/detail/call/parts.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/eigen.hpp"
#include "longspan/mask.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/softmax_rows.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// longspan::softmax_attention with the same parts and options. Outputs and lse may have any type; arithmetic is
/// double. The cost is 2 * q_len * kv_len * (head_dim + value_dim) scalar flop per head.
template <Mask M = everything, Score S = unchanged, Position P = no_position>
struct softmax_attention {
  M mask{};
  S score{};
  P position{};
  std::optional<double> scale{};
  Index first_query = queries_end_at_keys;

  softmax_attention() = default;

  template <class... Parts>
  requires(sizeof...(Parts) > 0 && detail::parts_are<M, S, P, Parts...>)
  explicit softmax_attention(Parts... parts)
      : mask(detail::take_part<detail::MaskPart, M>(parts...)),
        score(detail::take_part<detail::ScorePart, S>(parts...)),
        position(detail::take_part<detail::PositionPart, P>(parts...)) {}

  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out>
  void operator()(const Q& q, const K& k, const V& v, Out&& out) const {
    operator()(q, k, v, out, detail::no_rows<double>());
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse>
  void operator()(const Q& q, const K& k, const V& v, Out&& out, Lse&& lse) const {
    softmax_rows(*this, q, k, v, out, lse, [&, kv_len = view(k).rows](Index b, Index h, Index i) {
      std::vector<Index> seen;
      for (Index j = 0; j < kv_len; ++j) {
        if (sees(mask, b, h, i, j)) seen.push_back(j);
      }
      return seen;
    });
  }
};

template <class... Parts>
requires(sizeof...(Parts) > 0)
softmax_attention(Parts...) -> softmax_attention<detail::PartOf<detail::MaskPart, everything, Parts...>,
                                                 detail::PartOf<detail::ScorePart, unchanged, Parts...>,
                                                 detail::PartOf<detail::PositionPart, no_position, Parts...>>;

}  // namespace reference
LONGSPAN_NAMESPACE_END
