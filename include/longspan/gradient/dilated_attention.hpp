// The gradient of LongNet's dilated attention.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "longspan/call_sizes.hpp"
#include "longspan/detail/gradient/calls.hpp"
#include "longspan/detail/gradient/dilated.hpp"
#include "longspan/dilated_attention.hpp"
#include "longspan/dilation.hpp"
#include "longspan/execution.hpp"
#include "longspan/gradient/gradient.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// The gradient of dilated_attention. For each branch n, and each pair of a query i and a key j that it keeps, with
/// p_ij = exp(s_ij - lse[i]) and dp_ij = dout[i].v[j],
///
///   ds_ij = p_ij (dp_ij - D_i) score'(scale q[i].k[j]),
///
/// and dq, dk and dv are the sums over the branches of those of softmax_attention.
///
///   gradient(attend)(q, k, v, out, lse, dout, dq, dk, dv, execution);  // as in gradient.hpp
///
///   mixing = exact      D_i = dout[i].out[i] - dlse[i]: the gradient of the functor
///   mixing = detached   D_i = dout[i].o_n[i], with the output o_n of branch n alone: the weights of the branches
///                       count as constants, as in the training code of torchscale. dlse must not be given
///
/// Parts     as for the gradient of softmax_attention
/// Cost      2 (3 head_dim + 2 value_dim) flop per pair, for `detached` 2 (4 head_dim + 3 value_dim). The heads of one
///           KV head and the segments of a branch are tasks; a segment is not cut. Scratch: for a few KV heads at a
///           time tensors of the shapes of dq, dk and dv, and rows of q, k, v and dout where they are not of the
///           arithmetic's type
/// Error     that of the gradient of softmax_attention, with the keys of all branches as one set
/// Masked    as there. A query that no branch keeps has gradient 0
/// Bits      do not depend on the executor, on its number of threads, nor on the other batch rows and KV heads
/// Throws    Error as gradient.hpp says, or when the functor refuses the call
/// Source    Ding et al. 2023 (arXiv 2307.02486), eq. 9 and 10; the paper does not say whether the weights of the
///           branches are constants
template <Mask M, Score S, Position P>
struct gradient_of<dilated_attention<M, S, P>>
    : detail::GradientCalls<gradient_of<dilated_attention<M, S, P>>, S, P> {
  dilated_attention<M, S, P> attend;
  Mixing mixing = Mixing::exact;

  explicit gradient_of(dilated_attention<M, S, P> functor, Mixing of_branches = Mixing::exact)
      : attend(std::move(functor)), mixing(of_branches) {}

 private:
  friend detail::GradientCalls<gradient_of, S, P>;
  static constexpr const char* name = "gradient(dilated_attention)";

  template <class Call>
  void check(const Call& call) const {
    detail::check_branches(name, attend.branches);
    attend.position.check(call.forward.head_dim());
    CallSizes sizes = call.forward.at(name, attend.first_query, attend.scale).sizes(name);
    if (attend.zero_pad_compat) sizes.kv_len = detail::padded_length(attend.branches, sizes.kv_len);
    detail::check_parts(attend, sizes);
    detail::check_dilated_first_query(name, sizes.first_query);
    if (mixing == Mixing::detached && call.dlse.data != nullptr) {
      detail::refuse(name, "dlse", "a tensor", "none with mixing = detached, where lse counts as a constant");
    }
  }

  template <class Call, class E>
  void differentiate(const Call& call, const E& executor, Workspace& workspace) const {
    const detail::Dilation dilation{attend.branches, attend.phase, attend.overlap, attend.zero_pad_compat};
    detail::differentiate_dilated(call.at(name, attend.first_query, attend.scale), dilation,
                                  mixing == Mixing::detached, attend.mask, attend.score, attend.position,
                                  executor, workspace, attend.bf16_products);
  }
};

/// The gradient of dilated attention with a choice of how the weights of its branches count.
template <Mask M, Score S, Position P>
auto gradient(dilated_attention<M, S, P> attend, Mixing mixing) {
  return gradient_of<dilated_attention<M, S, P>>(std::move(attend), mixing);
}

LONGSPAN_NAMESPACE_END
