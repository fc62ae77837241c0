// Functors made of functors: merged, gated, per_head.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/composition.hpp"
#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/functor.hpp"
#include "longspan/gates.hpp"
#include "longspan/partial.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// Softmax attention over the union of the keys of all parts:
///
///   lse = log sum_n exp(lse_n),  out = sum_n exp(lse_n - lse) out_n.
///
///   merged attend{softmax_attention{causal{} & sinks{4}},
///                 dilated_attention{{{2048, 1}, {8192, 4}}, causal{} & !sinks{4}}};
///   attend(q, k, v, out, lse, execution);  // lse and execution are optional
///
/// Shapes    those of the parts
/// Types     out_n is stored in the type of the arithmetic, whatever the type of out is
/// Keys      a key that n parts see counts n times; disjoint masks avoid that
/// Aliasing  out and lse overlap no input, nor each other
/// Cost      that of the parts, and one pass over their outputs. Scratch: an output and an lse for each part
///           except the last
/// Error     that of each part, plus that of `merge`
/// Exact     two parts produce the same bits in either order; a part that sees no key changes nothing
/// Throws    what the parts throw, before anything is written
template <class... Parts>
struct merged : detail::FunctorCalls<merged<Parts...>, true> {
  static_assert(sizeof...(Parts) > 0 && sizeof...(Parts) <= 64);
  static_assert((LseFunctor<Parts> && ...), "longspan: each part of merged must return an lse");

  std::tuple<Parts...> parts;

  merged() = default;
  explicit merged(Parts... of) : parts(std::move(of)...) {}

 private:
  friend detail::FunctorCalls<merged, true>;
  static constexpr const char* name = "merged";

  template <class Call>
  void check(const Call& call) const {
    std::apply([&](const auto&... part) { (..., detail::check_call(part, call)); }, parts);
  }

  template <class Call, class E>
  void attend(const Call& call, const E& executor, Workspace& workspace) const {
    using Real = typename Call::Real;
    constexpr std::size_t count = sizeof...(Parts);
    std::array<Partial<Real>, count> found;
    const auto take = [&](detail::Arena& arena) {
      for (std::size_t n = 0; n < count; ++n) {
        const bool is_last = n + 1 == count;
        found[n] = {is_last ? detail::output_or_scratch<Real>(call.out, arena)
                            : detail::scratch_output<Real>(call.out, arena),
                    is_last && call.lse.data != nullptr ? call.lse : detail::scratch_lse(call, arena)};
      }
    };
    detail::take_scratch(workspace, take);
    // Only the last part may write to out; a part that rejects the call throws before that.
    detail::ExecutionRef<E> inner{executor, workspace.inner()};
    std::size_t n = 0;
    std::apply(
        [&](const auto&... part) {
          (..., (part(call.q, call.k, call.v, found[n].out, found[n].lse, inner), ++n));
        },
        parts);
    const std::array<Partial<const Real>, count> from = [&]<std::size_t... i>(std::index_sequence<i...>) {
      return std::array<Partial<const Real>, count>{found[i]...};
    }(std::make_index_sequence<count>{});
    merge(std::span<const Partial<const Real>>(from), found.back(), executor);
    detail::move_output(found.back().out, call.out, executor);
  }
};

template <class... Parts>
merged(Parts...) -> merged<Parts...>;

/// out = g * a + (1 - g) * b, g = sigmoid(beta): the gate of Infini-attention between any two functors.
///
///   gated attend{MatrixView<const float>{beta.data(), heads, 1, 1}, memory, local};
///   attend(q, k, v, out, execution);  // execution is optional; there is no lse
///
/// Shapes    those of a and b; beta as for `gate` in gates.hpp: 1 or heads rows, 1 or value_dim columns; 0 if omitted
/// Aliasing  out overlaps no input
/// Cost      that of a and b, and one pass. Scratch: one output, two if out is not of the arithmetic's type
/// Error     that of `gate`. A functor whose gate is 0 has no effect, even if its output is NaN
/// Throws    what a and b throw, and Error if beta does not fit, before anything is written
/// Source    Munkhdalai et al. 2024 (arXiv 2404.07143), eq. 10
template <class A, class B>
struct gated : detail::FunctorCalls<gated<A, B>, false> {
  static_assert(AttentionFunctor<A> && AttentionFunctor<B>);

  MatrixView<const float> beta{};
  A a;
  B b;

  gated() = default;
  gated(MatrixView<const float> logits, A first, B second)
      : beta(logits), a(std::move(first)), b(std::move(second)) {}

 private:
  friend detail::FunctorCalls<gated, false>;
  static constexpr const char* name = "gated";

  template <class Call>
  void check(const Call& call) const {
    detail::check_gate(name, detail::logits_of(beta), call.out);
    detail::check_call(a, call);
    detail::check_call(b, call);
  }

  template <class Call, class E>
  void attend(const Call& call, const E& executor, Workspace& workspace) const {
    using Real = typename Call::Real;
    TensorView<Real> of_a, of_b;
    detail::take_scratch(workspace, [&](detail::Arena& arena) {
      of_a = detail::scratch_output<Real>(call.out, arena);
      of_b = detail::output_or_scratch<Real>(call.out, arena);
    });
    detail::ExecutionRef<E> inner{executor, workspace.inner()};
    a(call.q, call.k, call.v, of_a, inner);
    b(call.q, call.k, call.v, of_b, inner);
    gate(detail::logits_of(beta), of_a, of_b, of_b, executor);
    detail::move_output(of_b, call.out, executor);
  }
};

template <class A, class B>
gated(MatrixView<const float>, A, B) -> gated<A, B>;

/// A functor for the query heads [begin, end).
template <class F>
struct for_heads {
  Index begin = 0;
  Index end = 0;
  F attend;
};
template <class F>
for_heads(Index, Index, F) -> for_heads<F>;

/// Different functors for different heads, as in models that mix heads with a window and heads with the whole context.
///
///   per_head attend{for_heads{0, 24, softmax_attention{causal{} & window{.left = 1023}}},
///                   for_heads{24, 32, softmax_attention{causal{}}}};
///   attend(q, k, v, out, lse, execution);  // lse (available if all functors return one) and execution are optional
///
/// Shapes    the ranges follow one another from head 0 to the last; each consists of whole groups of query
///           heads that share a KV head. A functor numbers its heads (for slopes, gates, offsets) from the
///           beginning of its range
/// Aliasing  out and lse overlap no input, nor each other
/// Cost      that of the functors. No copies and no additional scratch
/// Throws    Error if the ranges do not fit, and what the functors throw, before anything is written. A
///           user-defined functor throws only when it is called for its heads
template <class... F>
struct per_head : detail::FunctorCalls<per_head<F...>, (LseFunctor<F> && ...)> {
  static_assert((AttentionFunctor<F> && ...));

  std::tuple<for_heads<F>...> ranges;

  per_head() = default;
  explicit per_head(for_heads<F>... of) : ranges(std::move(of)...) {}

 private:
  friend detail::FunctorCalls<per_head, (LseFunctor<F> && ...)>;
  static constexpr const char* name = "per_head";

  template <class Call>
  void check(const Call& call) const {
    const Index group = call.group();
    Index reached = 0;
    const auto check_range = [&](Index begin, Index end) {
      if (begin != reached || end < begin || end > call.q.heads || begin % group != 0 || end % group != 0) {
        detail::refuse(name, "a range of heads",
                       "[" + std::to_string(begin) + ", " + std::to_string(end) + ")",
                       "[" + std::to_string(reached) + ", at most " + std::to_string(call.q.heads) +
                           "), a multiple of the " + std::to_string(group) + " query heads of a KV head");
      }
      reached = end;
    };
    std::apply([&](const auto&... range) { (..., check_range(range.begin, range.end)); }, ranges);
    if (reached != call.q.heads) {
      detail::refuse(name, "the end of the last range of heads", std::to_string(reached),
                     "the " + std::to_string(call.q.heads) + " heads of q");
    }
    std::apply(
        [&](const auto&... range) {
          (..., detail::check_call(range.attend, heads_of(call, range.begin, range.end)));
        },
        ranges);
  }

  /// The call of the query heads [begin, end).
  template <class Call>
  static Call heads_of(Call call, Index begin, Index end) {
    const Index group = call.group();
    call.q = detail::slice_heads(call.q, begin, end - begin);
    call.out = detail::slice_heads(call.out, begin, end - begin);
    if (call.lse.data != nullptr) call.lse = detail::slice_heads(call.lse, begin, end - begin);
    call.k = detail::slice_heads(call.k, begin / group, (end - begin) / group);
    call.v = detail::slice_heads(call.v, begin / group, (end - begin) / group);
    return call;
  }

  template <class Call, class E>
  void attend(const Call& call, const E& executor, Workspace& workspace) const {
    detail::ExecutionRef<E> inner{executor, workspace.inner()};
    const auto run = [&](const auto& range) {
      const Call part = heads_of(call, range.begin, range.end);
      if constexpr ((LseFunctor<F> && ...)) {
        if (part.lse.data != nullptr) return range.attend(part.q, part.k, part.v, part.out, part.lse, inner);
      }
      range.attend(part.q, part.k, part.v, part.out, inner);
    };
    std::apply([&](const auto&... range) { (..., run(range)); }, ranges);
  }
};

template <class... F>
per_head(for_heads<F>...) -> per_head<F...>;

LONGSPAN_NAMESPACE_END
