// Estimates how much of the softmax over all tokens a query of a landmark cache has attended.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "longspan/detail/decode/row_kernel.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/landmark_retrieval.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The running sum of exp(score).
template <class Real>
struct ScoreMass {
  Real row_max = empty_max<Real>;
  Real sum = 0;

  /// Adds scores, each of which counts `times` times.
  void add(const Real* scores, Index count, Real times) {
    constexpr Index w = lanes<Real>;
    const Real now = (std::max)(row_max, *std::max_element(scores, scores + count));
    alignas(64) Real p[std::size_t(w)];
    store<Real>(p, exp_score(broadcast(row_max - now)));
    sum *= p[0];
    for (Index j = 0; j < count; j += w) {
      const Index used = (std::min)(w, count - j);
      store<Real>(p, exp_score(load_part<Real>(scores + j, used) - broadcast(now)));
      for (Index i = 0; i < used; ++i) sum += times * p[i];
    }
    row_max = now;
  }
  double lse() const { return static_cast<double>(lse_of(row_max, sum)); }
};

/// Adds the products of a query with sampled keys, which represent `tokens` keys. `scores` has room for the sample and
/// one more packet.
template <class T, class Real>
void add_sample(const Real* q, Index q_stride, const KeyRun<T, T>& keys, const TokenSample& sample,
                Index tokens, Real* scores, ScoreMass<Real>& to) {
  if (sample.count == 0) return;
  score_keys<1>(keys.k.row(sample.first), sample.stride * keys.k.row_stride, sample.count, q, q_stride,
                keys.k.cols, scores);
  if constexpr (std::is_same_v<T, std::int8_t>) {
    for (Index s = 0; s < sample.count; ++s) scores[s] *= keys.k_scale[sample.first + s * sample.stride];
  }
  to.add(scores, sample.count, static_cast<Real>(tokens) / static_cast<Real>(sample.count));
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
