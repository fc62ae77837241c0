// The references of functors made of functors: merged, gated, per_head.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>
#include <vector>

#include "longspan/compose.hpp"
#include "longspan/detail/call/slices.hpp"
#include "longspan/partial.hpp"
#include "longspan/reference/exact.hpp"
#include "longspan/reference/partial.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// The result of a reference, which owns its memory.
struct ExactPartial {
  std::vector<double> out_values, lse_values;
  Partial<double> views;

  template <class Out>
  explicit ExactPartial(const Out& like)
      : out_values(static_cast<std::size_t>(like.batch * like.heads * like.rows * like.cols)),
        lse_values(static_cast<std::size_t>(like.batch * like.heads * like.rows)),
        views{compact_view(out_values.data(), like.batch, like.heads, like.rows, like.cols),
              compact_rows_view(lse_values.data(), like.batch, like.heads, like.rows)} {}
  ExactPartial(ExactPartial&&) = default;
};

/// Writes a result in the types of the caller; lse.data may be null.
template <class Out, class Lse>
void write_partial(const Partial<double>& from, const Out& out, const Lse& lse) {
  for (Index b = 0; b < out.batch; ++b) {
    for (Index h = 0; h < out.heads; ++h) {
      for (Index i = 0; i < out.rows; ++i) {
        for (Index c = 0; c < out.cols; ++c)
          out.row(b, h, i)[c] = static_cast<typename Out::Element>(from.out.row(b, h, i)[c]);
        if (lse.data != nullptr) lse(b, h, i) = static_cast<typename Lse::Element>(from.lse(b, h, i));
      }
    }
  }
}

/// The query heads [begin, end) of q, k and v, as a call of `work` with the three slices.
template <class Q, class K, class V, class Work>
void with_heads(const Q& q, const K& k, const V& v, Index begin, Index end, const Work& work) {
  const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
  const auto of_keys = [&](const auto& x) {
    return detail::slice_heads(x, begin / group, (end - begin) / group);
  };
  work(detail::slice_heads(q, begin, end - begin), of_keys(k), of_keys(v));
}

template <class... Parts>
struct exact<merged<Parts...>> : ExactCalls<exact<merged<Parts...>>> {
  merged<Parts...> attend;

  explicit exact(merged<Parts...> functor) : attend(std::move(functor)) {}

  template <class Q, class K, class V, class Out, class Lse>
  void attend_exactly(Q q, K k, V v, Out out, Lse lse) const {
    std::vector<ExactPartial> parts;
    std::vector<Partial<const double>> views;
    const auto run = [&](const auto& part) {
      parts.emplace_back(out);
      exact<std::remove_cvref_t<decltype(part)>>{part}(q, k, v, parts.back().views.out,
                                                       parts.back().views.lse);
      views.push_back(parts.back().views);
    };
    std::apply([&](const auto&... part) { (..., run(part)); }, attend.parts);
    const ExactPartial all(out);
    merge(views, all.views);
    write_partial(all.views, out, lse);
  }
};

template <class A, class B>
struct exact<gated<A, B>> : ExactCalls<exact<gated<A, B>>> {
  gated<A, B> attend;

  explicit exact(gated<A, B> functor) : attend(std::move(functor)) {}

  /// The logits of the gate in double.
  static std::vector<double> logits(const MatrixView<const float>& beta) {
    std::vector<double> values;
    if (beta.data == nullptr) return {0.0};
    for (Index r = 0; r < beta.rows; ++r) values.insert(values.end(), beta.row(r), beta.row(r) + beta.cols);
    return values;
  }

  template <class Q, class K, class V, class Out, class Lse>
  void attend_exactly(Q q, K k, V v, Out out, Lse) const {
    const ExactPartial of_a(out), of_b(out);
    exact<A>{attend.a}(q, k, v, of_a.views.out);
    exact<B>{attend.b}(q, k, v, of_b.views.out);
    const std::vector<double> beta = logits(attend.beta);
    const bool given = attend.beta.data != nullptr;
    gate({beta.data(), given ? attend.beta.rows : 1, given ? attend.beta.cols : 1,
          given ? attend.beta.cols : 1},
         of_a.views.out, of_b.views.out, of_a.views.out);
    write_partial(of_a.views, out, RowsView<double>{});
  }
};

template <class... F>
struct exact<per_head<F...>> : ExactCalls<exact<per_head<F...>>> {
  per_head<F...> attend;

  explicit exact(per_head<F...> functor) : attend(std::move(functor)) {}

  template <class Q, class K, class V, class Out, class Lse>
  void attend_exactly(Q q, K k, V v, Out out, Lse lse) const {
    const auto run = [&](const auto& range) {
      const Index heads = range.end - range.begin;
      with_heads(q, k, v, range.begin, range.end, [&](auto of_q, auto of_k, auto of_v) {
        const auto to = detail::slice_heads(out, range.begin, heads);
        const exact<std::remove_cvref_t<decltype(range.attend)>> reference{range.attend};
        if (lse.data != nullptr) {
          reference(of_q, of_k, of_v, to, detail::slice_heads(lse, range.begin, heads));
        } else {
          reference(of_q, of_k, of_v, to);
        }
      });
    };
    std::apply([&](const auto&... range) { (..., run(range)); }, attend.ranges);
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
