// What the two bfloat16 policies share: weights that are rounded to bfloat16, two keys to a pair.
#pragma once

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(EIGEN_DONT_VECTORIZE)

#include <immintrin.h>

#include <cstdint>

#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_INTRINSICS_BEGIN

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// exp_score with a relative error of up to 7.5e-5, by a polynomial of degree 3: small beside the rounding of
/// weights to bfloat16. A call with degree 5 takes 2-4 % longer (Zen 5).
LONGSPAN_INLINE Packet<float> coarse_exp_score(Packet<float> x) {
  const Packet<float> rest = rest_of_floor(x);
  Packet<float> p = broadcast(0.0780244f);
  p = fma(p, rest, broadcast(0.22606731f));
  p = fma(p, rest, broadcast(0.69583347f));
  p = fma(p, rest, broadcast(0.99992523f));
  return times_exp2_of_floor(p, x);
}

/// The lanes whose row max is huge. A row max is a rounded product, and a fused product minus its own rounding is
/// not 0. That difference is the same for all keys of a lane and cancels in the division by the row sum, unless it
/// is so large that weights leave the range of float: from a score of 1e9 on it is -100 for the highest score
/// itself. In these lanes products are rounded first.
LONGSPAN_INLINE __mmask16 huge_lanes(__m512 row_max) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(row_max), _mm512_set1_ps(0x1p20f), _CMP_NLT_UQ);
}

/// The weights of key j for one packet of queries. Row j / 2 of `pairs` has those of two keys.
LONGSPAN_INLINE Packet<float> weight_of_pair(const std::uint32_t* pairs, Index j, Index stride) {
  const __m512i both = _mm512_loadu_si512(pairs + j / 2 * stride);
  const __m512i high =
      j % 2 == 0 ? _mm512_slli_epi32(both, 16) : _mm512_and_si512(both, _mm512_set1_epi32(-65536));
  return {_mm512_castsi512_ps(high)};
}

}  // namespace detail
LONGSPAN_NAMESPACE_END

LONGSPAN_INTRINSICS_END

#endif
