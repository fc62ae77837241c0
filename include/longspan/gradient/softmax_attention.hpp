// The gradient of exact softmax attention, blocked and parallel.
#pragma once

#include <utility>

#include "longspan/detail/gradient/attend.hpp"
#include "longspan/detail/gradient/calls.hpp"
#include "longspan/execution.hpp"
#include "longspan/gradient/gradient.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// The gradient of softmax_attention: with p_ij = exp(s_ij - lse[i]), dp_ij = dout[i].v[j] and
/// D_i = dout[i].out[i] - dlse[i],
///
///   dv[j] = sum_i p_ij dout[i]
///   ds_ij = p_ij (dp_ij - D_i) score'(scale q[i].k[j])
///   dq[i] = scale sum_j ds_ij k[j]
///   dk[j] = scale sum_i ds_ij q[i]
///
/// where query heads that share a KV head are summed in dk and dv. With a position encoding q and k above are the
/// encoded rows, and dq and dk are taken back through the encoding. See gradient.hpp for the ways to call it, shapes
/// and types.
///
/// Parts     every mask; a score function needs a member `derivative` (score.hpp), which those of the library have; a
///           position encoding needs `encode_transposed` (position.hpp), which rotary and xpos have
/// Cost      five products: 2 * q_len * kv_len * (3 head_dim + 2 value_dim) flop per head, less what the mask skips in
///           blocks of queries. Scratch: for a few KV heads at a time and each query head of theirs up to 8 tensors of
///           the shape of dq, and the rows of q, k, v and dout where they are not of the arithmetic's type; none that
///           grows with q_len * kv_len
/// Error     with u = 2^-24 for float, a_ij = scale sum_c |q_ic k_jc| plus the size of what a score adds,
///           a_i = sum_j p_ij a_ij, w_ij = 1 + a_ij + a_i + |lse[i]|, and
///           e_ij = p_ij (w_ij (|dp_ij| + |D_i|) + sum_c |dout_ic| (|v_jc| + (1 + a_i) sum_t p_it |v_tc|) + |dlse[i]|):
///             dv within 16 u sum_i p_ij w_ij |dout[i]|,
///             dq within 16 u scale sum_j e_ij |k[j]|, dk within 16 u scale sum_i e_ij |q[i]|,
///           where e_ij is multiplied by the derivative of the score if that exceeds 1. The error does not grow with
///           q_len, and with kv_len only as |lse| <= a_i + log kv_len does. An out of 16 bits adds 2^-8 (bfloat16) or
///           2^-11 (half) of sum_c |dout_ic out_ic| to the error of D_i; what bf16_products adds to the errors of out
///           and lse enters likewise. 16-bit gradients are rounded once more. Weights below 2^-126 count as 0.
///           (2^-53 and 2^-1022 for double.) Matrix tiles, where bf16_products has them take the forward call and dout
///           is bfloat16 too, round p_ij and ds_ij to bfloat16: that adds 2^-8 + 7.5e-5 to 16 u w_ij.
/// Masked    what a query does not see gets nothing from it, even if q, k, v or dout hold NaN there. A row that sees no
///           key has gradient 0 and adds nothing to dk and dv.
/// Bits      do not depend on the executor, on how many threads it has, or on other batch rows and KV heads.
/// Throws    Error as gradient.hpp says, or when an option or an array of a part does not fit the call
/// Source    Dao 2023 (FlashAttention-2, arXiv 2307.08691), algorithm 2, with keys in the lanes; instead of atomic
///           additions to dq, the sums over fixed spans of keys are added in order
template <Mask M, Score S, Position P>
struct gradient_of<softmax_attention<M, S, P>>
    : detail::GradientCalls<gradient_of<softmax_attention<M, S, P>>, S, P> {
  softmax_attention<M, S, P> attend{};

  gradient_of() = default;
  explicit gradient_of(softmax_attention<M, S, P> functor) : attend(std::move(functor)) {}

 private:
  friend detail::GradientCalls<gradient_of, S, P>;
  static constexpr const char* name = "gradient(softmax_attention)";

  template <class Call>
  void check(const Call& call) const {
    attend.position.check(call.forward.head_dim());
    detail::check_parts(attend, call.forward.at(name, attend.first_query, attend.scale).sizes(name));
  }

  template <class Call, class E>
  void differentiate(const Call& call, const E& executor, Workspace& workspace) const {
    detail::differentiate(call.at(name, attend.first_query, attend.scale), attend.mask, attend.score,
                          attend.position, executor, workspace, attend.bf16_products);
  }
};

LONGSPAN_NAMESPACE_END
