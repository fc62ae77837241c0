// Dilated attention again, naive and in double: what the fast kernels are held to.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "longspan/detail/parts.hpp"
#include "longspan/detail/problem.hpp"
#include "longspan/dilation.hpp"
#include "longspan/eigen.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"

LONGSPAN_BEGIN
namespace reference {

/// longspan::dilated_attention with the same parts and options: for each query the keys of every branch that
/// keeps it, one behind the other, and one softmax over all of them.
template <Mask M = everything, Score S = unchanged, Position P = no_position>
struct dilated_attention {
  std::vector<Branch> branches;
  M mask{};
  S score{};
  P position{};
  double scale = default_scale;
  Index first_query = queries_end_at_keys;
  Phase phase = Phase::modulo;
  Overlap overlap = Overlap::multiset;
  bool zero_pad_compat = false;

  template <class... Parts>
  requires detail::parts_are<M, S, P, Parts...>
  explicit dilated_attention(std::vector<Branch> wanted, Parts... parts)
      : branches(std::move(wanted)),
        mask(detail::take_part<detail::MaskPart, M>(parts...)),
        score(detail::take_part<detail::ScorePart, S>(parts...)),
        position(detail::take_part<detail::PositionPart, P>(parts...)) {}

  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out>
  void operator()(const Q& q, const K& k, const V& v, Out&& out) const {
    operator()(q, k, v, out, detail::no_rows<double>());
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse>
  void operator()(const Q& queries, const K& keys, const V& values, Out&& output, Lse&& log_sum_exp) const {
    const auto q = view(queries);
    const auto k = view(keys);
    const auto v = view(values);
    const auto out = view(output);
    const auto lse = rows_view(log_sum_exp);
    const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
    const Index first = first_query == queries_end_at_keys ? k.rows - q.rows : first_query;
    const double factor =
        scale != default_scale ? scale : 1 / std::sqrt(static_cast<double>(std::max<Index>(1, q.cols)));
    using ScoreValue = detail::ScoreValue<S, double>;
    using To = typename std::remove_cvref_t<decltype(out)>::Element;
    using Tl = typename std::remove_cvref_t<decltype(lse)>::Element;

    for (Index b = 0; b < q.batch; ++b) {
      for (Index h = 0; h < q.heads; ++h) {
        const auto encoded_q = encoded(q.matrix(b, h), position, first, Role::query);
        const auto encoded_k = encoded(k.matrix(b, h / group), position, 0, Role::key);
        for (Index row = 0; row < q.rows; ++row) {
          const Index i = first + row;
          std::vector<Index> met;  // keys; those from k.rows on are zeros
          for (std::size_t n = 0; n < branches.size(); ++n) append_keys(n, b, h, q.heads, i, k.rows, met);
          std::vector<double> scores;
          double top = -std::numeric_limits<double>::infinity(), sum = 0;
          for (const Index j : met) {
            double s = 0;
            for (Index c = 0; c < q.cols && j < k.rows; ++c)
              s += encoded_q[static_cast<std::size_t>(row * q.cols + c)] *
                   encoded_k[static_cast<std::size_t>(j * q.cols + c)];
            scores.push_back(static_cast<double>(score(static_cast<ScoreValue>(factor * s), b, h, i, j)));
            if (scores.back() > top || std::isnan(scores.back())) top = scores.back();
          }
          std::vector<double> o(static_cast<std::size_t>(v.cols), 0.0);
          for (std::size_t n = 0; n < met.size(); ++n) {
            if (scores[n] == -std::numeric_limits<double>::infinity()) continue;  // absent
            const double weight = std::exp(scores[n] - top);
            sum += weight;
            for (Index c = 0; c < v.cols && met[n] < k.rows; ++c)
              o[static_cast<std::size_t>(c)] += weight * static_cast<double>(v.row(b, h / group, met[n])[c]);
          }
          for (Index c = 0; c < v.cols; ++c)
            out.row(b, h, row)[c] = static_cast<To>(sum == 0 ? 0.0 : o[static_cast<std::size_t>(c)] / sum);
          if (lse.data != nullptr) lse(b, h, row) = static_cast<Tl>(sum == 0 ? top : top + std::log(sum));
        }
      }
    }
  }

 private:
  /// Appends the keys that query i sees in branch n.
  void append_keys(std::size_t n, Index b, Index h, Index heads, Index i, Index kv_len,
                   std::vector<Index>& met) const {
    const Index w = branches[n].segment, r = branches[n].dilation, s = head_offset(phase, h, heads, r);
    if (i < 0 || !covers(branches[n], s, i)) return;
    const std::size_t met_before = met.size();
    const Index begin = i / w * w;
    for (Index j = begin + s; j < kv_len && j - begin < w; j += r) {
      const auto behind = met.begin() + static_cast<std::ptrdiff_t>(met_before);
      if (overlap == Overlap::set && std::find(met.begin(), behind, j) != behind) continue;
      if (sees(mask, b, h, i, j)) met.push_back(j);
    }
    if (!zero_pad_compat) return;
    // torchscale: min(w, kv_len) rows to each segment, and these filled up to a multiple of r.
    const Index rows = (std::min(w, kv_len) + r - 1) / r;
    for (Index t = kept_rows(std::min(w, kv_len - begin), s, r); t < rows; ++t) {
      const Index j = begin + s + t * r;
      if (sees(mask, b, h, i, j)) met.push_back(std::max(j, kv_len));
    }
  }
};

dilated_attention(std::vector<Branch>)->dilated_attention<>;
template <class... Parts>
requires(sizeof...(Parts) > 0) dilated_attention(std::vector<Branch>, Parts...)
->dilated_attention<detail::PartOf<detail::MaskPart, everything, Parts...>,
                    detail::PartOf<detail::ScorePart, unchanged, Parts...>,
                    detail::PartOf<detail::PositionPart, no_position, Parts...>>;

}  // namespace reference
LONGSPAN_END
