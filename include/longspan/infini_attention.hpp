// Infini-attention: attention within segments, and a compressive memory of all earlier segments.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "longspan/detail/call/check_view.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/infini/pass.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/functor.hpp"
#include "longspan/gates.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/mask.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

template <Element T, class Local, FeatureMap F>
class infini_memory;

/// Cuts the sequence into segments of `segment` tokens. In each of them,
///
///   out = g * phi(q) M / (phi(q) z) + (1 - g) * local(q, k, v),   g = sigmoid(beta),
///
/// with M and z as written by the earlier segments. Then the segment is written:
///
///   M += phi(K)^T V                                     InfiniRule::linear
///   M += phi(K)^T (V - phi(K) M / (phi(K) z))           InfiniRule::delta,    z += sum of phi(K).
///
///   infini_attention attend;                                       // local: softmax_attention{causal{}}
///   infini_attention attend{softmax_attention{causal{}, rotary(Pairing::half_split)}};
///   infini_attention attend{dilated_attention{{{512, 1}, {1024, 2}}, causal{}}};
///   infini_attention attend{landmark_attention{landmarks::every(64)}};
///   attend.segment = 1024;
///   attend.beta = per_head_gate(beta);                              // a logit for each head, see gates.hpp
///   attend(q, k, v, out, execution);                               // execution is optional
///
/// infini_memory (stream/infini_memory.hpp) keeps M, z and the open segment from call to call.
///
/// Shapes    q [batch, heads, length, head_dim]      k [batch, kv_heads, length, head_dim]
///           v [batch, kv_heads, length, value_dim]  out [batch, heads, length, value_dim]
///           kv_heads divides heads; a KV head has one M [head_dim, value_dim] and one z [head_dim], which its
///           query heads share. The length need not be a multiple of the segment. There is no lse.
/// Types     those of softmax_attention; M and z are double if q is, otherwise float.
/// Local     any AttentionFunctor (functor.hpp), called for each segment with the rows of that segment only:
///           dilated segments and landmark blocks start anew in every segment and do not cross its border.
///           The memory contains every row, including the rows of landmarks.
/// Positions the local functor, its mask and its score count positions from the beginning of the segment
///           (for rotary this makes no difference except rounding); `absolute_positions` changes that for
///           softmax_attention. The memory uses q and k without position encoding unless
///           `memory_uses_positions`.
/// Aliasing  out overlaps no input.
/// Cost      that of local for each segment: causal softmax attention takes segment * (head_dim + value_dim)
///           flop for each token and query head. A read from the memory takes 2 head_dim * value_dim flop for
///           each token and query head; a write takes as much for each token and KV head, and twice that with
///           the delta rule. The memory has batch * kv_heads * head_dim * (value_dim + 1) numbers.
/// Error     that of local, plus 16 u (head_dim + 128) g sum_j p_j |v_j| with p the weights of the linear
///           memory: all of them are positive, and each segment is summed separately before it is added.
/// Masked    with `lengths` the rows after the length of a batch row are neither seen nor written, even if
///           they contain NaN; their own outputs are unspecified. A side whose gate is 0 has no effect.
/// Bits      do not depend on the executor, nor on its number of threads.
/// Throws    Error if shapes or options disagree, including those of the local functor, before anything is
///           written. A user-defined local functor without an lse throws only when it is called for a segment.
/// Source    Munkhdalai et al. 2024 (arXiv 2404.07143 v2), eq. 6-11. Not specified by the paper: M and z begin
///           as 0, the gate also applies in the first segment (see `empty_memory`), and a norm below 1e-10 is replaced
///           by 1e-10.
template <class Local = softmax_attention<causal>, FeatureMap F = elu_plus_one>
struct infini_attention {
  static_assert(AttentionFunctor<Local> || AttentionFunctor<Local, double>,
                "longspan: the local functor must be callable with q, k, v, out and an execution");

  Local local{};
  F feature{};
  Index segment = 2048;
  MatrixView<const float> beta{};  ///< [1 or heads][1 or value_dim], see gates.hpp; 0 unless set
  InfiniRule rule = InfiniRule::linear;
  EmptyMemory empty_memory = EmptyMemory::gate;
  std::span<const Index> lengths{};    ///< of each batch row; kv_len unless set
  bool memory_uses_positions = false;  ///< the memory uses q and k with the position encoding of local
  bool absolute_positions = false;  ///< softmax_attention and the memory use positions in the whole sequence

  infini_attention() = default;
  explicit infini_attention(Local within, F map = {}) : local(std::move(within)), feature(std::move(map)) {}

  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out>
  void operator()(const Q& q, const K& k, const V& v, Out&& out) const {
    operator()(q, k, v, out, openmp{});
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, ExecutionLike E>
  void operator()(const Q& q, const K& k, const V& v, Out&& out, E&& execution) const {
    const auto call = detail::checked_problem("infini_attention", view(q), view(k), view(v), view(out),
                                              detail::no_rows<detail::LseOf<Q>>());
    check_call(call);
    if (call.out.empty()) return;
    detail::with_workspace(
        execution, [&](const auto& executor, Workspace& workspace) { run(call, executor, workspace); });
  }

  /// A stream of this functor: an infini_memory<T, Local, F>, which stores its open segment as T. Include
  /// longspan/stream/infini_memory.hpp before the call.
  template <Element T = float>
  auto stream(const StreamShape& shape, const infini_memory_options& options = {}) const {
    using Stream = infini_memory<T, Local, F>;
    constexpr bool has_header = detail::Complete<Stream>;
    static_assert(has_header,
                  "longspan: infini_attention::stream needs #include <longspan/stream/infini_memory.hpp>");
    if constexpr (has_header) return Stream(*this, shape, options);
  }

  /// For functors that contain this one: throws Error if a call would throw it.
  template <class Call>
  void check_call(const Call& call) const {
    if (call.q_len() != call.kv_len()) {
      detail::refuse("infini_attention", "the number of rows of q", std::to_string(call.q_len()),
                     "the " + std::to_string(call.kv_len()) + " of k");
    }
    check("infini_attention", call.q.batch, call.q.heads, call.head_dim(), call.value_dim());
    for_each_segment(call, [&](const auto& part, Index, const auto& rows_of) {
      detail::InfiniPass<typename Call::Real, Local, F>::check_sizes(local, part, rows_of);
    });
  }

  /// Throws Error if the local functor does not fit a whole segment of a stream of that shape.
  void check_segment(const StreamShape& shape) const {
    const Index rows = (std::min)(segment, Index{1} << 60);
    const auto of = [&](Index heads, Index cols) {
      return compact_view<const float>(nullptr, shape.batch, heads, rows, cols);
    };
    const TensorView<float> out{nullptr, shape.batch, shape.heads, rows, shape.value_dim, 0, 0, 0};
    const detail::Problem<float, float, float, float> call{of(shape.heads, shape.head_dim),
                                                           of(shape.kv_heads, shape.head_dim),
                                                           of(shape.kv_heads, shape.value_dim),
                                                           out,
                                                           {}};
    detail::InfiniPass<float, Local, F>::check_sizes(local, call, [&](Index) { return rows; });
  }

  /// Throws Error if the options do not fit tensors of these sizes.
  void check(std::string_view function, Index batch, Index heads, Index head_dim, Index value_dim) const {
    if (segment < 1) detail::refuse(function, "the segment", std::to_string(segment), "at least 1");
    detail::position_of(local).check(head_dim);
    if (beta.data != nullptr) detail::check_view(function, "beta", beta);
    const auto fits = [](Index size, Index wanted) { return size == 1 || size == wanted; };
    if (beta.data != nullptr && (!fits(beta.rows, heads) || !fits(beta.cols, value_dim))) {
      detail::refuse(function, "beta", detail::shape_text(beta),
                     "[1 or " + std::to_string(heads) + ", 1 or " + std::to_string(value_dim) + "]");
    }
    if constexpr (requires { local.gate_keep, local.control; }) {
      if (local.gate_keep.data != nullptr || local.control.cmt.data != nullptr)
        detail::refuse(function, "gate_keep or control of the local attention", "given",
                       "none, because they index rows of one call and each segment is a separate call");
    }
    if (!lengths.empty() && static_cast<Index>(lengths.size()) != batch) {
      detail::refuse(function, "the number of lengths", std::to_string(lengths.size()),
                     std::to_string(batch) + ", one for each batch row");
    }
    for (const Index length : lengths) {
      if (length < 0) detail::refuse(function, "one of the lengths", std::to_string(length), "at least 0");
    }
  }

 private:
  /// Calls work(part, begin, rows_of) for each segment: its call, its first position, and the rows of each batch row.
  template <class Call, class Work>
  void for_each_segment(const Call& call, const Work& work) const {
    for (Index begin = 0; begin < call.kv_len();) {
      const auto part = detail::part_of(call, begin, (std::min)(segment, call.kv_len() - begin));
      work(part, begin, [&](Index b) {
        return lengths.empty()
                   ? part.kv_len()
                   : std::clamp<Index>(lengths[static_cast<std::size_t>(b)] - begin, 0, part.kv_len());
      });
      begin += part.kv_len();
    }
  }

  template <class Call, class E>
  void run(const Call& call, const E& executor, Workspace& workspace) const {
    using Real = typename Call::Real;
    detail::MemoryView<Real> memory{nullptr,      nullptr,         call.k.batch,
                                    call.k.heads, call.head_dim(), call.value_dim()};
    const Index rows = (std::min)(segment, call.kv_len());
    const auto scratch = detail::take_scratch(workspace, [&](detail::Arena& arena) {
      memory.m = arena.take<Real>(memory.m_size());
      memory.z = arena.take<Real>(memory.z_size());
      return detail::InfiniScratch<Real>::take(arena, memory, call.q.heads, rows, rule);
    });
    memory.clear();
    detail::InfiniPass<Real, Local, F> pass{local, feature, rule, memory_uses_positions, absolute_positions,
                                            memory};
    pass.gate = detail::gate_shares(beta, call.q.heads, call.value_dim(), memory.stride(), scratch.gate[0],
                                    scratch.gate[1]);
    if (rule == InfiniRule::delta) {
      pass.difference =
          detail::difference_shares(memory.stride(), scratch.difference[0], scratch.difference[1]);
    }
    if constexpr (!requires { local.check_call(call); }) {
      for_each_segment(call, [&](const auto& part, Index, const auto& rows_of) {
        pass.check(part.q, part.k, part.v, part.out, executor, workspace, rows_of);
      });
    }
    for_each_segment(call, [&](const auto& part, Index begin, const auto& rows_of) {
      const bool known = begin > 0 || empty_memory == EmptyMemory::gate;
      pass.attend(part.q, part.k, part.v, part.out, begin, known, executor, workspace, rows_of);
      if (part.kv_len() == call.kv_len() - begin) return;
      pass.write(part.k, part.v,
                 compact_view(scratch.change, part.k.batch, part.k.heads, part.kv_len(), part.value_dim()),
                 begin, executor, workspace, rows_of);
    });
  }
};

template <class Local, FeatureMap F = elu_plus_one>
infini_attention(Local, F = {}) -> infini_attention<Local, F>;
infini_attention() -> infini_attention<>;

LONGSPAN_NAMESPACE_END
