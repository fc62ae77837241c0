// The gradient of landmark attention.
#pragma once

#include <utility>

#include "longspan/detail/call/check_view.hpp"
#include "longspan/detail/gradient/calls.hpp"
#include "longspan/detail/gradient/landmark_backward.hpp"
#include "longspan/detail/landmark/check_options.hpp"
#include "longspan/execution.hpp"
#include "longspan/gradient/gradient.hpp"
#include "longspan/landmark_attention.hpp"
#include "longspan/landmarks.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// The gradient of landmark_attention: with the weights g_ij = exp(s_ij - lse[i]) of the tokens j of i's own block and
/// g_im = exp(s_im - lse[i]) of the landmarks of the other blocks m, the softmax p_it of the scores of the tokens t of
/// block m, dp_ij = dout[i].v[j], D_im = sum_t p_it dp_it and D_i = dout[i].out[i] - dlse[i],
///
///   own token j     w_ij = g_ij         ds_ij = w_ij (dp_ij - D_i)
///   other token t   w_it = g_im p_it    ds_it = w_it (dp_it - D_im)
///   landmark m      w_im = 0            ds_im = g_im (D_im - D_i);  0 for the landmark of i's own block
///
/// and dq, dk and dv are those of softmax_attention with w in the place of p.
///
///   gradient(attend)(q, k, v, out, lse, dout, dq, dk, dv, execution);  // as in gradient.hpp
///
///   auto backward = gradient(attend);
///   backward.dcmt = view_of_dcmt;  // [batch, heads, q_len]: written too, if control is used
///
/// Parts     as for the gradient of softmax_attention; all options of landmark_attention. A weight of the CMT below
///           `cutoff` counts as the constant 0
/// Cost      that of the gradient of softmax_attention, plus 10 to 20 % for blocks of 64 keys (Intel AMX, causal, 2048
///           tokens, head_dim 128 and 64) and 40 to 80 % for blocks of 8. Blocks of more keys than a group of key tiles
///           (192 with AVX-512 and float) and the keys of calls with `control` are scored twice: seven products where
///           there were five. With `control` the heads of one KV head are one task. Scratch: that of softmax_attention,
///           5 words for each block and, where keys are scored twice, 8 for each query
/// Error     with u = 2^-24 for float, a_ij = scale sum_c |q_ic k_jc| plus the size of what a score adds, b_ij =
///           sum_c |dout_ic v_jc|, A_im = sum_t p_it a_it and B_im = sum_t p_it b_it over the tokens of block m; a_i is
///           the sum of g_ij a_ij over own tokens and of g_im (a_im + A_im) over landmarks, b_i that of g_ij b_ij and
///           of g_im B_im; l_i = 1 + a_i + |lse[i]|, E_i = (1 + a_i) b_i + |dlse[i]|, and
///           E_im = sum_t p_it (1 + a_it + A_im) b_it. Let
///             own token j    f = l_i + a_ij                  e = w_ij (f (|dp_ij| + |D_i|) + b_ij + E_i)
///             other token t  f = l_i + a_im + A_im + a_it    e = w_it (f (|dp_it| + |D_im|) + b_it + E_im)
///             landmark m     f = l_i + a_im                  e = g_im (f (|D_im| + |D_i|) + E_im + E_i)
///           Then dv is within 16 u sum_i w_ij f_ij |dout[i]|, dq within 16 u scale sum_j e_ij |k[j]|, and dk within
///           16 u scale sum_i e_ij |q[i]|. Derivatives of scores, tensors of 16 bits and small weights count as for
///           softmax_attention
/// Masked    as in landmark_attention: what a query does not see, and the key of the landmark of its own block, get
///           nothing from it, even if q, k, v or dout hold NaN there. The dv of a landmark is 0
/// Bits      do not depend on the executor, on its number of threads, nor on the other batch rows and KV heads
/// Throws    Error as gradient.hpp says, when the functor refuses its options, or when dcmt does not fit
/// Source    Mohtashami and Jaggi 2023 (arXiv 2305.16300), eq. 2-4, differentiated
template <Mask M, Score S, Position P>
struct gradient_of<landmark_attention<M, S, P>>
    : detail::GradientCalls<gradient_of<landmark_attention<M, S, P>>, S, P> {
  landmark_attention<M, S, P> attend;
  RowsView<float> dcmt{};  ///< the gradient with respect to control.cmt; null if it is not wanted

  explicit gradient_of(landmark_attention<M, S, P> functor) : attend(std::move(functor)) {}

 private:
  friend detail::GradientCalls<gradient_of, S, P>;
  static constexpr const char* name = "gradient(landmark_attention)";

  template <class Call>
  void check(const Call& call) const {
    attend.position.check(call.forward.head_dim());
    detail::check_landmark_options(name, call.forward, attend.landmarks,
                                   attend.softmax == LandmarkSoftmax::grouped, attend.gate_keep,
                                   attend.control);
    detail::check_parts(attend, call.forward.at(name, attend.first_query, attend.scale).sizes(name));
    if (dcmt.data == nullptr) return;
    if (attend.control.cmt.data == nullptr)
      detail::refuse(name, "dcmt", "a tensor", "none in a call without control");
    const auto& q = call.forward.q;
    if (dcmt.batch != q.batch || dcmt.heads != q.heads || dcmt.rows != q.rows)
      detail::refuse(name, "dcmt", detail::shape_text(dcmt), detail::shape_text(q.batch, q.heads, q.rows));
  }

  template <class Call, class E>
  void differentiate(const Call& call, const E& executor, Workspace& workspace) const {
    const bool plain = attend.softmax == LandmarkSoftmax::plain;
    const detail::LandmarkOptions options{plain ? landmarks::none() : attend.landmarks,
                                          attend.softmax == LandmarkSoftmax::grouped, attend.leak,
                                          attend.gate_keep, attend.control};
    detail::differentiate_landmarks(call.at(name, attend.first_query, attend.scale), options, dcmt,
                                    attend.mask, attend.score, attend.position, executor, workspace);
  }
};

LONGSPAN_NAMESPACE_END
