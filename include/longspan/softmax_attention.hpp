// Exact softmax attention, blocked and parallel.
#pragma once

#include <optional>
#include <utility>

#include "longspan/call_sizes.hpp"
#include "longspan/detail/attend.hpp"
#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/parts.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/eigen.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN

template <StoredElement T, Mask M, Score S, Position P>
class kv_cache;

/// out[i] = sum_j p_ij v[j],  p_ij = exp(s_ij - lse[i]),  s_ij = score(scale * q[i].k[j]),
/// lse[i] = log sum_j exp(s_ij), over the keys j that the mask lets query i see.
///
///   softmax_attention attend{causal{}, softcap{50}};  // a mask, a score, a position encoding, in any order
///   attend(q, k, v, out);
///   attend(q, k, v, out, lse);
///   attend(q, k, v, out, lse, execution);             // an Execution, or an executor alone
///
/// Shapes    q [batch, heads, q_len, head_dim]        k [batch, kv_heads, kv_len, head_dim]
///           v [batch, kv_heads, kv_len, value_dim]   out [batch, heads, q_len, value_dim]
///           lse [batch, heads, q_len], natural logarithm
///           kv_heads divides heads; query head h reads KV head h / (heads / kv_heads). Any size may be 0.
/// Types     each tensor float, double, Eigen::bfloat16 or Eigen::half; arithmetic and lse are double when q
///           is, else float.
/// Positions row i of q stands at position `first_query` + i, key j at j.
/// Aliasing  out and lse overlap no input, nor each other.
/// Cost      2 * q_len * kv_len * (head_dim + value_dim) flop per head, less what the mask skips in blocks of
///           keys. Scratch for each worker about 16 * (head_dim + value_dim + 128) packets, none per key; with
///           matrix tiles up to 4 MB more, for the transposed values of a head.
///           For one token a softcap costs at most 13 % of the call, alibi 6 %, a bias or a cheap lambda 20 %
///           (Zen 3, one thread).
/// Error     |out - exact| <= 16 u (1 + a_i) sum_j p_ij |v_j|, a_i = sum_j p_ij scale sum_c |q_ic k_jc|, plus
///           the size of what a score adds, with u = 2^-24 for float: it does not grow with kv_len. 16-bit
///           outputs are rounded once more.
///           Where all roundings go one way (equal scores, one value everywhere) the 16 becomes up to 80.
///           Numbers below 2^-126 in magnitude, read or computed, count as 0 (2^-1022 for double): that adds at most
///           2^-125 (kv_len + 2) to out, and to a score 2^-126 sum_c (1 + |scale q_ic| + (1 + |scale|) |k_jc|).
/// Domain    the above holds while |scale q_ic| <= 2^127, sum_c |scale q_ic k_jc| and the changed score are at most
///           2^125, and kv_len |v_jc| <= 2^127 (2^1022, 2^1021 and 2^1022 for double). Beyond it, a key whose score is
///           below -2^125 may count as hidden, a score that overflows makes its row NaN, and a sum of values that
///           overflows makes its output infinite or NaN.
/// Masked    what a query does not see has no effect on its row, even if it holds NaN. A row that sees no key
///           gives 0 and lse = -infinity. A score of -infinity hides the key.
/// Bits      do not depend on the executor, on how many threads it has, on other batch rows and KV heads, nor on
///           the other queries of the call: up to 8 to a KV head (q_len * heads / kv_heads) have the bits of
///           each alone, under every mask and score. More than 8, and calls with a position encoding, run
///           another kernel.
/// Throws    Error when shapes disagree, or an option or an array of a part does not fit them, before anything is
///           written. What an executor throws passes through.
/// Source    Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; blocked as Dao et al. 2022 (arXiv 2205.14135),
///           algorithm 1, with queries in the lanes.
template <Mask M = everything, Score S = unchanged, Position P = no_position>
struct softmax_attention : detail::FunctorCalls<softmax_attention<M, S, P>, true> {
  M mask{};
  S score{};
  P position{};
  std::optional<double> scale{};            ///< multiplies q.k; 1 / sqrt(head_dim) unless set
  Index first_query = queries_end_at_keys;  ///< position of row 0 of q; kv_len - q_len unless set
  /// Multiply in bfloat16 if q, k and v are bfloat16 and the processor is fast at it: with matrix tiles if the process
  /// may use them (see request_amx; out is bfloat16 or float), otherwise with bfloat16 pairs on AMD processors with
  /// AVX512-BF16 (out is bfloat16, no score, no position encoding). The scores are those of exact products. Weights are
  /// rounded, which adds 2^-8 sum_j p_ij |v_j| to the error of out, and 1e-4 to that of lse. With matrix tiles a value
  /// of 2^111 / kv_len or more may make an output infinite.
  /// With matrix tiles rows are position-encoded in float and then rounded to bfloat16: the result is that for the
  /// rounded rows. It changes a score by up to 2^-7 scale sum_c |q_ic k_jc|, q and k encoded.
  /// Matrix tiles also multiply bfloat16 queries with the int8 rows of a kv_cache, which are exact in bfloat16.
  bool bf16_products = true;

  softmax_attention() = default;

  template <class... Parts>
  requires(sizeof...(Parts) > 0 && detail::parts_are<M, S, P, Parts...>)
  explicit softmax_attention(Parts... parts)
      : mask(detail::take_part<detail::MaskPart, M>(parts...)),
        score(detail::take_part<detail::ScorePart, S>(parts...)),
        position(detail::take_part<detail::PositionPart, P>(parts...)) {}

  /// The same for rows that come in chunks or one by one, causal where the mask does not limit the keys after a
  /// query: a kv_cache<T, M, S, P>, which keeps rows as T. Include longspan/stream/kv_cache.hpp
  /// before the call.
  template <StoredElement T = float>
  auto stream(const StreamShape& shape, const kv_cache_options& options = {}) const {
    using Stream = kv_cache<T, M, S, P>;
    constexpr bool has_header = detail::Complete<Stream>;
    static_assert(has_header,
                  "longspan: softmax_attention::stream needs #include <longspan/stream/kv_cache.hpp>");
    if constexpr (has_header) return Stream(*this, shape, options);
  }

 private:
  friend detail::FunctorCalls<softmax_attention, true>;
  static constexpr const char* name = "softmax_attention";

  template <class Call>
  void check(const Call& call) const {
    position.check(call.head_dim());
    detail::check_parts(*this, call.at(name, first_query, scale).sizes(name));
  }

  template <class Call, class E>
  void attend(const Call& call, const E& executor, Workspace& workspace) const {
    detail::attend(call.at(name, first_query, scale), mask, score, position, executor, workspace,
                   bf16_products);
  }
};

template <class... Parts>
requires(sizeof...(Parts) > 0)
softmax_attention(Parts...) -> softmax_attention<detail::PartOf<detail::MaskPart, everything, Parts...>,
                                                 detail::PartOf<detail::ScorePart, unchanged, Parts...>,
                                                 detail::PartOf<detail::PositionPart, no_position, Parts...>>;

LONGSPAN_NAMESPACE_END
