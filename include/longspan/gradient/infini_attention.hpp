// The gradient of Infini-attention, through the segments and their compressive memory.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "longspan/detail/attend.hpp"
#include "longspan/detail/call/check_view.hpp"
#include "longspan/detail/gradient/calls.hpp"
#include "longspan/detail/gradient/functor.hpp"
#include "longspan/detail/gradient/gates.hpp"
#include "longspan/detail/gradient/infini_pass.hpp"
#include "longspan/detail/infini/local.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/gates.hpp"
#include "longspan/gradient/gradient.hpp"
#include "longspan/gradient/softmax_attention.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// bptt_segments: gradients flow back through the memory to the first segment.
inline constexpr Index all_segments = Index{1} << 60;

/// The gradient of infini_attention, from the last segment to the first. With g = sigmoid(beta), the memory M, z
/// before a segment, the gradient dM, dz with respect to the memory after it, and phi' the derivative of the feature
/// map,
///
///   local  dlocal = (1 - g) dout, from which the gradient of `local` computes its share of dq, dk and dv
///   gate   dbeta += g (1 - g) sum dout (read - local),          dread = g dout
///   read   dn = dread / (phi(q) z),  dnorm = -dread.read / (phi(q) z)
///          dq += (dn M^T + dnorm z) phi'(q),                    dM' += phi(q)^T dn,  dz' += phi(q)^T dnorm
///   write  du = phi(k) dM,  dv += du,  dk += (u dM^T + dz) phi'(k),  where u = v for InfiniRule::linear
///   delta  u = v - r, r = phi(k) M / (phi(k) z): r is a read whose gradient is -du, as above with k in place of q
///   before the segment: dM + dM' and dz + dz'.
///
///   infini_attention attend;
///   attend(q, k, v, out);                       // forward
///   auto backward = gradient(attend);
///   backward.dbeta = {dbeta.data(), heads, 1, 1};  // optional
///   backward(q, k, v, dout, dq, dk, dv, execution);  // execution is optional
///
/// infini_attention returns no lse, so that there is no gradient of one, and its output is not needed.
///
/// Shapes    dout as out, dq as q, dk as k, dv as v; dbeta as beta, [1, 1] if beta is not set. States are float, as
///           beta is: m [batch, kv_heads, head_dim, value_dim], z [batch, kv_heads, head_dim]
/// Local     any functor that has a gradient, whose header is to be included. Those of softmax_attention are included
/// Feature   a feature map needs a member `derivative` (infini_options.hpp), which elu_plus_one has
/// Memory    `initial` is the memory before the first segment; with it the first segment is gated as all others. The
///           final memory is the one after the last whole segment: a shorter last segment is not written. `dfinal` is
///           the gradient of the loss with respect to it, `dinitial` receives the gradient with respect to `initial`.
///           With these two a long document can be processed in chunks of whole segments: forward with infini_memory,
///           backward from the last chunk to the first
/// Truncated `bptt_segments` = n stops the gradient of the memory at the segments 0, n, 2n, ...: what a segment writes
///           gets gradients from the reads of its own n segments alone. With 1 no k or v gets anything from the memory,
///           except from dfinal. dinitial is not stopped
/// Cost      the gradient of `local` for each segment, and its forward call, which computes out and lse again (7
///           products instead of 5 for softmax_attention; a local functor without lse is called forward only for
///           dbeta). The memory takes 6 head_dim * (value_dim + 1) flop for each token and query head, and for each
///           token and KV head 6 head_dim * value_dim flop with InfiniRule::linear and 14 with delta.
///           `checkpoint_segments` = n keeps one memory of n and computes the others again, which takes another 2
///           (delta: 4) of these
/// Scratch   segments / n + n memories of batch * kv_heads * head_dim * (value_dim + 1) numbers, n =
///           checkpoint_segments. The following are for one segment: out, dout and lse, tensors like dq, dk and dv if
///           they are of 16 bits, and at most 16 sums of head_dim * (value_dim + 1) numbers for each query head and
///           each KV head
/// Error     that of the gradient of `local`, plus the rounding of the products above: their sums are made in blocks
///           of 96 rows, then of at most 16 spans of a segment, then of segments. On random tensors at most 131 u of
///           the largest number of each gradient was measured, with both rules, u = 2^-24 for float and 2^-53 for
///           double
/// Masked    with `lengths`, rows after the length of a batch row get a gradient of 0 and have no effect, even if they
///           or their dout contain NaN. A side whose gate is 0 gets nothing. A norm below infini_least_norm has no
///           gradient, and a memory of norm 0 returns 0 and has none
/// Bits      do not depend on the executor, on how many threads it has, on checkpoint_segments, or on other batch rows
///           and KV heads (dbeta is a sum over batch rows)
/// Throws    Error as gradient.hpp says, when infini_attention refuses the call, or when dbeta, a state or a number of
///           segments does not fit, before anything is written
/// Source    Munkhdalai et al. 2024 (arXiv 2404.07143 v2), eq. 6-11, differentiated
template <class Local, FeatureMap F>
struct gradient_of<infini_attention<Local, F>>
    : detail::GradientCallsWithoutLse<gradient_of<infini_attention<Local, F>>> {
  static_assert(detail::HasGradient<Local>,
                "longspan: the local functor has no gradient; include its header of longspan/gradient/");
  static_assert(DifferentiableFeatureMap<F>,
                "longspan: the gradient needs the derivative of the feature map: a member double "
                "derivative(double x) const (infini_options.hpp)");

  infini_attention<Local, F> attend{};
  gradient_of<Local> local{};          ///< of attend.local: options of its gradient are set here
  MatrixView<float> dbeta{};           ///< overwritten if set
  InfiniState<const float> initial{};  ///< empty unless set
  InfiniState<const float> dfinal{};   ///< 0 unless set
  InfiniState<float> dinitial{};       ///< overwritten if set
  Index bptt_segments = all_segments;
  Index checkpoint_segments = 1;

  gradient_of() = default;
  explicit gradient_of(infini_attention<Local, F> functor)
      : attend(std::move(functor)), local(attend.local) {}

 private:
  friend detail::GradientCallsWithoutLse<gradient_of>;
  static constexpr const char* name = "gradient(infini_attention)";

  template <class Call>
  void check(const Call& call) const {
    attend.check_call(call.forward);
    detail::check_dbeta(name, dbeta, detail::logits_of(attend.beta));
    const auto& k = call.forward.k;
    const auto check_state = [&](const std::string& argument, const auto& state) {
      if (state.m.data == nullptr && state.z.data == nullptr) return;
      detail::check_like(name, argument + ".m", state.m, k.batch, k.heads, k.cols, call.forward.value_dim());
      detail::check_view(name, argument + ".z", state.z);
      if (state.z.batch != k.batch || state.z.heads != k.heads || state.z.rows != k.cols) {
        detail::refuse(name, argument + ".z", detail::shape_text(state.z),
                       detail::shape_text(k.batch, k.heads, k.cols));
      }
    };
    check_state("initial", initial);
    check_state("dfinal", dfinal);
    check_state("dinitial", dinitial);
    const auto check_number = [](const char* argument, Index number) {
      if (number < 1) detail::refuse(name, argument, std::to_string(number), "at least 1");
    };
    check_number("bptt_segments", bptt_segments);
    check_number("checkpoint_segments", checkpoint_segments);
  }

  template <class Call, class E>
  void differentiate(const Call& call, const E& executor, Workspace& workspace) const {
    const auto tokens =
        static_cast<double>(call.forward.q.batch * call.forward.q.heads * call.forward.q_len());
    const double flop = 12 * tokens * static_cast<double>(call.forward.head_dim() * call.forward.value_dim());
    detail::run_where_it_pays(flop, detail::least_parallel_tile_flop, executor, [&](const auto& where) {
      detail::InfiniBackward<Call, gradient_of>(call, *this, detail::logits_of(attend.beta))
          .run(where, workspace);
    });
  }
};

LONGSPAN_NAMESPACE_END
