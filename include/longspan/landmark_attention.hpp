// Landmark attention: a grouped softmax in which the landmark token of each block determines the weight of the block.
#pragma once

#include <optional>

#include "longspan/call_sizes.hpp"
#include "longspan/detail/attend.hpp"
#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/parts.hpp"
#include "longspan/detail/landmark/check_options.hpp"
#include "longspan/detail/landmark/forward.hpp"
#include "longspan/eigen.hpp"
#include "longspan/execution.hpp"
#include "longspan/landmarks.hpp"
#include "longspan/mask.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// How landmarks enter the softmax.
enum class LandmarkSoftmax : unsigned char {
  grouped,  ///< each landmark determines the weight of its block, as in the paper
  plain,    ///< landmarks are ordinary tokens
  ignored   ///< landmarks are hidden, and all other tokens are one group
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN

/// out[i] = sum_j g_ij v[j] + sum_m g_im o_m over the tokens j of i's own block and the other blocks m, with o_m =
/// sum_t softmax_t(s_it) v[t] over the tokens t of block m, and g the softmax over the group of the scores s_ij of
/// the tokens of i's own block and s_im of the landmarks of the other blocks; lse[i] is the log-sum-exp of that
/// group.
///
///   landmark_attention attend{landmarks::every(64)};  // causal
///   landmark_attention attend{landmarks::at(keys), everything{}, rotary(Pairing::half_split)};
///   attend(q, k, v, out, lse, execution);             // lse and execution as in softmax_attention
///
/// Shapes    q [batch, heads, q_len, head_dim]        k [batch, kv_heads, kv_len, head_dim]
///           v [batch, kv_heads, kv_len, value_dim]   out [batch, heads, q_len, value_dim]
///           lse [batch, heads, q_len]; kv_heads divides heads. Blocks may have any lengths.
/// Types     those of softmax_attention
/// Positions row i of q is at position `first_query` + i, key j at j. A query belongs to the block that
///           contains its position, and a landmark to the block that it closes.
/// Values    the values of landmarks have no effect, even if they are NaN.
/// Aliasing  out and lse overlap no input, nor each other.
/// Cost      that of softmax_attention with the same mask, plus 2 to 10 % for blocks of 64 keys. Every block
///           has a separate softmax and a separate product with its values, so blocks of 8 keys cost up to
///           50 % more. Scratch: that of softmax_attention, and 5 words for each block.
/// Error     |out - exact| <= 16 u (1 + a_i) sum_j w_ij |v_j|, w the weights of all tokens, a_i = sum_j w_ij
///           (a_ij + a_im), with a = scale sum_c |q_c k_c| of token and landmark; u = 2^-24 for float.
/// Masked    if a landmark is masked, its whole block is masked. A landmark whose block has no visible token is
///           dropped. The open block at the end is visible only to its own queries. A row that sees nothing has
///           out = 0 and lse = -infinity.
/// Bits      do not depend on the executor, on its number of threads, nor on the rest of the call.
/// Throws    Error if shapes or landmarks disagree, or an option or an array of a part does not fit them,
///           before anything is written.
/// Source    Mohtashami and Jaggi 2023 (arXiv 2305.16300), eq. 2-4, where G_ij = G_ii means "in the block of
///           i": a block is a partial whose log-sum-exp is replaced by the score of its landmark.
template <Mask M = causal, Score S = unchanged, Position P = no_position>
struct landmark_attention : detail::FunctorCalls<landmark_attention<M, S, P>, true> {
  longspan::landmarks landmarks;
  M mask{};
  S score{};
  P position{};
  std::optional<double> scale{};            ///< multiplies q.k; 1 / sqrt(head_dim) unless set
  Index first_query = queries_end_at_keys;  ///< position of row 0 of q; kv_len - q_len unless set
  LandmarkSoftmax softmax = LandmarkSoftmax::grouped;
  /// A landmark whose block has no visible token keeps its share of the weight, which is then lost, as in the authors'
  /// code.
  bool leak = false;
  /// [batch, heads, q_len, blocks]: factors of the weights of the blocks, applied after the softmax. For dropout of
  /// groups use 0 and 1 / (1 - rate); if null, all factors are 1.
  TensorView<const float> gate_keep{};
  landmark_control control{};
  /// Multiply in bfloat16 if q, k and v are bfloat16, the process may use matrix tiles (see request_amx), every block
  /// has at most 256 keys, and none is controlled. This takes 0.3 of the time of float, and 1.1 to 1.3 times that of
  /// softmax_attention on matrix tiles (blocks of 64 keys; with 8 keys twice that time). It adds 2^-8 sum_j w_ij |v_j|
  /// to the error of out, and 2e-4 to that of lse. Encoded rows are rounded as in softmax_attention.
  bool bf16_products = true;

  template <class... Parts>
  requires(std::is_same_v<M, detail::PartOf<detail::MaskPart, causal, Parts...>> &&
           std::is_same_v<S, detail::PartOf<detail::ScorePart, unchanged, Parts...>> &&
           std::is_same_v<P, detail::PartOf<detail::PositionPart, no_position, Parts...>>)
  explicit landmark_attention(longspan::landmarks at, Parts... parts)
      : landmarks(at),
        mask(detail::take_part<detail::MaskPart, M>(parts...)),
        score(detail::take_part<detail::ScorePart, S>(parts...)),
        position(detail::take_part<detail::PositionPart, P>(parts...)) {}

 private:
  friend detail::FunctorCalls<landmark_attention, true>;
  static constexpr const char* name = "landmark_attention";

  template <class Call>
  void check(const Call& call) const {
    position.check(call.head_dim());
    detail::check_landmark_options(name, call, landmarks, softmax == LandmarkSoftmax::grouped, gate_keep,
                                   control);
    detail::check_parts(*this, call.at(name, first_query, scale).sizes(name));
  }

  template <class Call, class E>
  void attend(const Call& call, const E& executor, Workspace& workspace) const {
    const bool plain = softmax == LandmarkSoftmax::plain;
    const detail::LandmarkOptions options{plain ? longspan::landmarks::none() : landmarks,
                                          softmax == LandmarkSoftmax::grouped, leak, gate_keep, control};
    detail::landmark_forward(call.at(name, first_query, scale), options, mask, score, position, executor,
                             workspace, bf16_products);
  }
};

template <class... Parts>
requires(sizeof...(Parts) > 0)
landmark_attention(landmarks, Parts...)
    -> landmark_attention<detail::PartOf<detail::MaskPart, causal, Parts...>,
                          detail::PartOf<detail::ScorePart, unchanged, Parts...>,
                          detail::PartOf<detail::PositionPart, no_position, Parts...>>;

LONGSPAN_NAMESPACE_END
