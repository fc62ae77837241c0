// LongNet's dilated attention: softmax attention within dilated segments, merged over branches.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "longspan/call_sizes.hpp"
#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/parts.hpp"
#include "longspan/detail/dilated/forward.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/dilation.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN

template <StoredElement T, Mask M, Score S, Position P>
class dilated_cache;

/// A branch (w, r) keeps, of each segment of w tokens, those whose index in the segment is s plus a multiple of r,
/// where s is the head's offset (h mod r). A kept query attends to the kept keys of its segment,
///
///   out_i = sum_j exp(s_j - lse_i) v_j,  lse_i = log sum_j exp(s_j),  s_j = score(scale * q.k_j),
///
/// and the branches that keep it are merged: lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i.
///
///   dilated_attention attend{{{2048, 1}, {4096, 2}, {8192, 4}}, causal{}};  // (w, r) ..., then parts
///   dilated_attention attend{geometric_branches_to({2048, 1}, 2, length), causal{}};
///   attend(q, k, v, out, lse, execution);  // lse and execution are optional, as in softmax_attention
///
/// Shapes    those of softmax_attention; q_len is kv_len, or less if q contains only some of the positions.
///           Lengths, segments and dilations need not divide one another; the last segment is short
/// Types     those of softmax_attention
/// Positions row i of q is at position `first_query` + i, key j at j. Mask, score and position encoding use
///           positions in the whole sequence. A query after the last key sees the keys of its segment, if there
///           are any. A position encoding costs more here than encode_positions before the call, because every row is
///           encoded several times
/// Aliasing  out and lse overlap no input, nor each other
/// Cost      2 (head_dim + value_dim) flop per pair, kv_len sum_i w_i / r_i^2 pairs per head, about half of that with
///           a causal mask (dilated_flop counts them). Scratch per worker: that of softmax_attention plus
///           256 KB. Rows are not gathered, and branches have no buffers of their own
/// Error     that of softmax_attention, with the keys of all branches as one set
/// Masked    as in softmax_attention. A query that no branch keeps has out = 0 and lse = -infinity
/// Bits      do not depend on the executor, on its number of threads, nor on the other batch rows, heads and
///           queries of the call
/// Throws    Error if shapes disagree, a branch is not positive, or an option or an array of a part does not
///           fit, before anything is written
/// Source    Ding et al. 2023 (arXiv 2307.02486), eq. 3-10 and 13-15. The paper does not say how often a key
///           counts that several branches keep: here as often as in eq. 9 and 10 taken literally, see `overlap`
template <Mask M = everything, Score S = unchanged, Position P = no_position>
struct dilated_attention : detail::FunctorCalls<dilated_attention<M, S, P>, true> {
  std::vector<Branch> branches;
  M mask{};
  S score{};
  P position{};
  std::optional<double> scale{};            ///< multiplies q.k; 1 / sqrt(head_dim) unless set
  Index first_query = queries_end_at_keys;  ///< position of row 0 of q; kv_len - q_len unless set
  Phase phase = Phase::modulo;
  /// `set` counts each key once, in the first branch that keeps it. This is slower than `multiset`, unless the segment
  /// and dilation of each branch are multiples of those of the branch before.
  Overlap overlap = Overlap::multiset;
  /// As in torchscale, which pads short segments with zeros that queries see: needed to reproduce a model trained that
  /// way. Has an effect only without a causal mask. Masks and scores are also called for the zeros, as keys after the
  /// last one.
  bool zero_pad_compat = false;
  bool bf16_products = true;  ///< as in softmax_attention

  template <class... Parts>
  requires detail::parts_are<M, S, P, Parts...>
  explicit dilated_attention(std::vector<Branch> wanted, Parts... parts)
      : branches(std::move(wanted)),
        mask(detail::take_part<detail::MaskPart, M>(parts...)),
        score(detail::take_part<detail::ScorePart, S>(parts...)),
        position(detail::take_part<detail::PositionPart, P>(parts...)) {}

  /// A causal stream of this functor, for rows that arrive in chunks or one by one: a dilated_cache<T, M, S, P>, which
  /// stores rows as T. Include longspan/stream/dilated_cache.hpp before the call.
  template <StoredElement T = float>
  auto stream(const StreamShape& shape, const dilated_cache_options& options = {}) const {
    using Stream = dilated_cache<T, M, S, P>;
    constexpr bool has_header = detail::Complete<Stream>;
    static_assert(has_header,
                  "longspan: dilated_attention::stream needs #include <longspan/stream/dilated_cache.hpp>");
    if constexpr (has_header) return Stream(*this, shape, options);
  }

 private:
  friend detail::FunctorCalls<dilated_attention, true>;
  static constexpr const char* name = "dilated_attention";

  template <class Call>
  void check(const Call& call) const {
    detail::check_branches(name, branches);
    position.check(call.head_dim());
    CallSizes sizes = call.at(name, first_query, scale).sizes(name);
    if (zero_pad_compat) sizes.kv_len = detail::padded_length(branches, sizes.kv_len);
    detail::check_parts(*this, sizes);
  }

  template <class Call, class E>
  void attend(const Call& call, const E& executor, Workspace& workspace) const {
    const detail::Dilation dilation{branches, phase, overlap, zero_pad_compat};
    const auto resolved = call.at(name, first_query, scale);
    detail::check_dilated_first_query(name, resolved.first_query);
    detail::dilated_forward(resolved, dilation, mask, score, position, executor, workspace, bf16_products);
  }
};

dilated_attention(std::vector<Branch>) -> dilated_attention<>;
template <class... Parts>
requires(sizeof...(Parts) > 0)
dilated_attention(std::vector<Branch>, Parts...)
    -> dilated_attention<detail::PartOf<detail::MaskPart, everything, Parts...>,
                         detail::PartOf<detail::ScorePart, unchanged, Parts...>,
                         detail::PartOf<detail::PositionPart, no_position, Parts...>>;

LONGSPAN_NAMESPACE_END
