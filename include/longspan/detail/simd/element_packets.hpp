// Loads and stores elements of any type as packets of float or double.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "longspan/detail/eigen_core.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(EIGEN_VECTORIZE_NEON) && defined(__aarch64__)
#include <arm_neon.h>

#include <cstring>
#define LONGSPAN_CONVERTS_BY_NEON 1
#endif

LONGSPAN_INTRINSICS_BEGIN

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

// Eigen 3.4 compiled by g++ converts half in software, because its test for F16C fails.
#if defined(__F16C__) && !defined(EIGEN_DONT_VECTORIZE)
inline constexpr bool converts_half = true;

LONGSPAN_INLINE Packet<float> load_half(const Eigen::half* from) {
#if defined(EIGEN_VECTORIZE_AVX512)
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
#elif defined(EIGEN_VECTORIZE_AVX)
  return {Packet<float>::Raw(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
#else
  return {Packet<float>::Raw(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))))};
#endif
}
LONGSPAN_INLINE void store_half(Eigen::half* to, Packet<float> x) {
  constexpr int nearest = 0;
#if defined(EIGEN_VECTORIZE_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, x.raw, nearest));
#elif defined(EIGEN_VECTORIZE_AVX)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x.raw, nearest));
#else
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(x.raw, nearest));
#endif
}
#elif defined(LONGSPAN_CONVERTS_BY_NEON)
inline constexpr bool converts_half = true;

LONGSPAN_INLINE Packet<float> load_half(const Eigen::half* from) {
  std::uint64_t bits;
  std::memcpy(&bits, static_cast<const void*>(from), sizeof bits);
  return {vcvt_f32_f16(vcreate_f16(bits))};
}
LONGSPAN_INLINE void store_half(Eigen::half* to, Packet<float> x) {
  const std::uint64_t bits = vget_lane_u64(vreinterpret_u64_f16(vcvt_f16_f32(x.raw)), 0);
  std::memcpy(static_cast<void*>(to), &bits, sizeof bits);
}
#else
inline constexpr bool converts_half = false;
Packet<float> load_half(const Eigen::half* from);
void store_half(Eigen::half* to, Packet<float> x);
#endif

// Eigen converts bfloat16 by packets where it has packets of it; for NEON it has none that are cast.
#if defined(LONGSPAN_CONVERTS_BY_NEON)
inline constexpr bool converts_bfloat16 = true;

LONGSPAN_INLINE Packet<float> load_bfloat16(const Eigen::bfloat16* from) {
  std::uint64_t bits;
  std::memcpy(&bits, static_cast<const void*>(from), sizeof bits);
  return {vreinterpretq_f32_u32(vshll_n_u16(vcreate_u16(bits), 16))};
}
/// Rounded to nearest, halves to even; NaN stays NaN.
LONGSPAN_INLINE void store_bfloat16(Eigen::bfloat16* to, Packet<float> x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x.raw),
                   odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))),
                   quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
  const uint16x4_t high = vshrn_n_u32(vbslq_u32(vceqq_f32(x.raw, x.raw), rounded, quiet), 16);
  const std::uint64_t out = vget_lane_u64(vreinterpret_u64_u16(high), 0);
  std::memcpy(static_cast<void*>(to), &out, sizeof out);
}
#else
inline constexpr bool converts_bfloat16 = false;
Packet<float> load_bfloat16(const Eigen::bfloat16* from);
void store_bfloat16(Eigen::bfloat16* to, Packet<float> x);
#endif

// Rounds two packets of floats to nearest bfloat16 and interleaves them: 32-bit lane i of the result has lane i of
// `first` in its lower half and lane i of `second` in its upper half.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(EIGEN_VECTORIZE_AVX512)
inline constexpr bool converts_pairs = true;

LONGSPAN_INLINE Packet<float> bfloat16_pairs(Packet<float> first, Packet<float> second) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i rounded = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second.raw, first.raw));
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave, rounded))};
}
#else
inline constexpr bool converts_pairs = false;
Packet<float> bfloat16_pairs(Packet<float> first, Packet<float> second);
#endif

#if defined(EIGEN_VECTORIZE_AVX512)
/// Rounds to nearest bfloat16.
LONGSPAN_INLINE __m256i bfloat16_bits(Packet<float> x) {
  return Eigen::internal::pcast<Eigen::internal::Packet16f, Eigen::internal::Packet16bf>(x.raw);
}
#endif

// Eigen has no packet of 8-bit integers with as few lanes as a packet of float.
#if defined(EIGEN_VECTORIZE_AVX2)
inline constexpr bool converts_int8 = true;

LONGSPAN_INLINE Packet<float> load_int8(const std::int8_t* from) {
#if defined(EIGEN_VECTORIZE_AVX512)
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
#else
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return {Packet<float>::Raw(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)))};
#endif
}
#elif defined(LONGSPAN_CONVERTS_BY_NEON)
inline constexpr bool converts_int8 = true;

LONGSPAN_INLINE Packet<float> load_int8(const std::int8_t* from) {
  std::int32_t bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))};
}
#else
inline constexpr bool converts_int8 = false;
Packet<float> load_int8(const std::int8_t* from);
#endif

/// True if Eigen has packets of both types with the same number of lanes, and a vectorised cast between them.
template <class From, class To>
inline constexpr bool casts_packets = !std::is_same_v<From, double> && !std::is_same_v<To, double> &&
                                      Eigen::internal::packet_traits<From>::size > 1 &&
                                      int(Eigen::internal::packet_traits<From>::size) ==
                                          int(Eigen::internal::packet_traits<To>::size) &&
                                      Eigen::internal::type_casting_traits<From, To>::VectorizedCast;

/// Loads `lanes` elements of any element type and converts them to Real.
template <class Real, class T>
LONGSPAN_INLINE Packet<Real> load_as(const T* from) {
  if constexpr (std::is_same_v<T, Real>) {
    return load(from);
  } else if constexpr (converts_half && std::is_same_v<T, Eigen::half> && std::is_same_v<Real, float>) {
    return load_half(from);
  } else if constexpr (converts_bfloat16 && std::is_same_v<T, Eigen::bfloat16> &&
                       std::is_same_v<Real, float>) {
    return load_bfloat16(from);
  } else if constexpr (converts_int8 && std::is_same_v<T, std::int8_t> && std::is_same_v<Real, float>) {
    return load_int8(from);
  } else if constexpr (casts_packets<T, Real>) {
    using Stored = typename Eigen::internal::packet_traits<T>::type;
    return {
        Eigen::internal::pcast<Stored, typename Packet<Real>::Raw>(Eigen::internal::ploadu<Stored>(from))};
  } else {
    alignas(64) Real buffer[std::size_t(lanes<Real>)];
    for (int i = 0; i < lanes<Real>; ++i) buffer[i] = static_cast<Real>(from[i]);
    return load(static_cast<const Real*>(buffer));
  }
}
/// True if rows of T are loaded two packets at a time: the elements of even index and those of odd index. A shift and a
/// mask separate two bfloat16 in 32 bits; a packet of consecutive elements would take an additional shuffle.
template <class Real, class T>
inline constexpr bool loads_in_pairs =
    std::is_same_v<T, Eigen::bfloat16> && std::is_same_v<Real, float> && (lanes<Real> > 1);

/// Loads two packets from memory: the elements of even index and the elements of odd index.
template <class Real, class T>
requires loads_in_pairs<Real, T>
LONGSPAN_INLINE void load_pairs(const T* from, Packet<Real>& even, Packet<Real>& odd) {
  using Raw = typename Packet<Real>::Raw;
  using Bits = typename Eigen::internal::unpacket_traits<Raw>::integer_packet;
  const Packet<Real> both =
      in_register(Packet<Real>{Eigen::internal::ploadu<Raw>(reinterpret_cast<const float*>(from))});
  const Bits bits = Eigen::internal::preinterpret<Bits>(both.raw);
  even.raw = Eigen::internal::preinterpret<Raw>(Eigen::internal::plogical_shift_left<16>(bits));
  odd.raw = Eigen::internal::preinterpret<Raw>(
      Eigen::internal::pand(bits, Eigen::internal::pset1<Bits>(static_cast<int>(0xffff0000u))));
}

/// The index at which the kernels for rows of T keep column `column` of `columns`.
template <class Real, class T>
constexpr Index interleaved_index(Index column, Index columns) {
  if constexpr (loads_in_pairs<Real, T>) {
    constexpr Index w = lanes<Real>;
    const Index first = column / (2 * w) * (2 * w), inside = column - first;
    if (first + 2 * w <= columns) return first + inside % 2 * w + inside / 2;
  }
  return column;
}

/// The column at index `place`: the inverse of interleaved_index.
template <class Real, class T>
constexpr Index column_of_index(Index place, Index columns) {
  if constexpr (loads_in_pairs<Real, T>) {
    constexpr Index w = lanes<Real>;
    const Index first = place / (2 * w) * (2 * w), inside = place - first;
    if (first + 2 * w <= columns) return first + inside % w * 2 + inside / w;
  }
  return place;
}

/// Loads the first `count` lanes from memory and sets the others to 0; reads nothing after those elements.
template <class Real, class T>
LONGSPAN_INLINE Packet<Real> load_part(const T* from, Index count) {
  alignas(64) Real buffer[std::size_t(lanes<Real>)] = {};
  for (Index i = 0; i < count; ++i) buffer[i] = static_cast<Real>(from[i]);
  return load(static_cast<const Real*>(buffer));
}
template <class Real, class T>
LONGSPAN_INLINE void store_as(T* to, Packet<Real> x) {
  if constexpr (std::is_same_v<T, Real>) {
    store(to, x);
  } else if constexpr (converts_half && std::is_same_v<T, Eigen::half> && std::is_same_v<Real, float>) {
    store_half(to, x);
  } else if constexpr (converts_bfloat16 && std::is_same_v<T, Eigen::bfloat16> &&
                       std::is_same_v<Real, float>) {
    store_bfloat16(to, x);
  } else if constexpr (casts_packets<Real, T>) {
    using Stored = typename Eigen::internal::packet_traits<T>::type;
    Eigen::internal::pstoreu(to, Eigen::internal::pcast<typename Packet<Real>::Raw, Stored>(x.raw));
  } else {
    alignas(64) Real buffer[std::size_t(lanes<Real>)];
    store(static_cast<Real*>(buffer), x);
    for (int i = 0; i < lanes<Real>; ++i) to[i] = static_cast<T>(buffer[i]);
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END

LONGSPAN_INTRINSICS_END
