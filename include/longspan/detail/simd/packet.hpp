// One packet of float or double, built on Eigen's packet math: 0-2 % slower than AVX-512 intrinsics, and for every
// instruction set that Eigen supports. Only this file and element_packets.hpp use Eigen::internal.
#pragma once

#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "longspan/detail/call/finite.hpp"
#include "longspan/detail/eigen_core.hpp"
#include "longspan/detail/simd/prefetch_line.hpp"
#include "longspan/detail/tuning.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

#if defined(EIGEN_VECTORIZE_AVX512)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define LONGSPAN_UNROLL _Pragma("clang loop unroll(full)")
#define LONGSPAN_UNROLL_BY_2 _Pragma("clang loop unroll_count(2)")
#define LONGSPAN_UNROLL_BY_4 _Pragma("clang loop unroll_count(4)")
#define LONGSPAN_NO_UNROLL _Pragma("clang loop unroll(disable)")
#elif defined(__GNUC__)
#define LONGSPAN_UNROLL _Pragma("GCC unroll 32")
#define LONGSPAN_UNROLL_BY_2 _Pragma("GCC unroll 2")
#define LONGSPAN_UNROLL_BY_4 _Pragma("GCC unroll 4")
#define LONGSPAN_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define LONGSPAN_UNROLL
#define LONGSPAN_UNROLL_BY_2
#define LONGSPAN_UNROLL_BY_4
#define LONGSPAN_NO_UNROLL
#endif

LONGSPAN_INTRINSICS_BEGIN

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// As many Reals as one vector register holds, one in each lane.
template <class Real>
struct Packet {
  using Raw = typename Eigen::internal::packet_traits<Real>::type;
  static constexpr int lanes = Eigen::internal::unpacket_traits<Raw>::size;

  Raw raw;
};

template <class Real>
inline constexpr int lanes = Packet<Real>::lanes;

/// An unsigned integer as long as a Real.
template <class Real>
using BitsOf = std::conditional_t<sizeof(Real) == 4, std::uint32_t, std::uint64_t>;

/// x, with its value hidden from the optimiser. Otherwise, if a user compiles with -ffast-math, the compiler replaces
/// (x + y) - y by x and x * 0 by 0, and removes tests for infinity. `x` is a number, or the raw form of a packet.
template <class T>
LONGSPAN_INLINE T opaque(T x) {
#if defined(__GNUC__) || defined(__clang__)
#if defined(__SSE2__)
  asm("" : "+v"(x));
#elif defined(__aarch64__) || defined(__ARM_NEON)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
#endif
  return x;
}
template <class Real>
LONGSPAN_INLINE Packet<Real> opaque(Packet<Real> x) {
  return {opaque(x.raw)};
}

// These tests look at the bits of a number: with -ffinite-math-only a compiler assumes that there is no infinity and no
// NaN, and would remove comparisons with them.

template <std::floating_point Real>
LONGSPAN_INLINE Real minus_infinity() {
  return opaque(-std::numeric_limits<Real>::infinity());
}
template <std::floating_point Real>
LONGSPAN_INLINE bool is_minus_infinity(Real x) {
  return std::bit_cast<BitsOf<Real>>(x) ==
         std::bit_cast<BitsOf<Real>>(-std::numeric_limits<Real>::infinity());
}
template <std::floating_point Real>
LONGSPAN_INLINE bool is_nan(Real x) {
  constexpr auto infinity = std::bit_cast<BitsOf<Real>>(std::numeric_limits<Real>::infinity());
  return (std::bit_cast<BitsOf<Real>>(x) & ~(BitsOf<Real>{1} << (8 * sizeof(Real) - 1))) > infinity;
}

/// The number of vector registers of the processor: 32 with AVX-512, NEON and AltiVec, otherwise 16.
inline constexpr int vector_registers = LONGSPAN_VECTOR_REGISTERS;
#if defined(EIGEN_VECTORIZE_FMA) || defined(EIGEN_VECTORIZE_NEON) || defined(EIGEN_VECTORIZE_ALTIVEC)
inline constexpr bool has_fused_multiply_add = true;
#else
inline constexpr bool has_fused_multiply_add = false;
#endif

template <class Real>
LONGSPAN_INLINE Packet<Real> load(const Real* from) {
  return {Eigen::internal::ploadu<typename Packet<Real>::Raw>(from)};
}
template <class Real>
LONGSPAN_INLINE void store(Real* to, Packet<Real> x) {
  Eigen::internal::pstoreu(to, x.raw);
}
template <class Real>
LONGSPAN_INLINE Packet<Real> broadcast(Real x) {
  return {Eigen::internal::pset1<typename Packet<Real>::Raw>(x)};
}
template <class Real>
LONGSPAN_INLINE Packet<Real> broadcast(const Real* from) {
  return {Eigen::internal::pload1<typename Packet<Real>::Raw>(from)};
}
template <class Real>
LONGSPAN_INLINE Packet<Real> operator+(Packet<Real> a, Packet<Real> b) {
  return {LONGSPAN_VECTOR_OPERATION(padd, a.raw, +, b.raw)};
}
template <class Real>
LONGSPAN_INLINE Packet<Real> operator-(Packet<Real> a, Packet<Real> b) {
  return {LONGSPAN_VECTOR_OPERATION(psub, a.raw, -, b.raw)};
}
template <class Real>
LONGSPAN_INLINE Packet<Real> operator*(Packet<Real> a, Packet<Real> b) {
  return {LONGSPAN_VECTOR_OPERATION(pmul, a.raw, *, b.raw)};
}
template <class Real>
LONGSPAN_INLINE Packet<Real> fma(Packet<Real> a, Packet<Real> b, Packet<Real> c) {
  if constexpr (!has_fused_multiply_add) return a * b + c;
  return {Eigen::internal::pmadd(a.raw, b.raw, c.raw)};
}
template <class Real>
LONGSPAN_INLINE Packet<Real> operator/(Packet<Real> a, Packet<Real> b) {
  return {Eigen::internal::pdiv(a.raw, b.raw)};
}
template <class Real>
LONGSPAN_INLINE Packet<Real> abs(Packet<Real> a) {
  return {Eigen::internal::pabs(a.raw)};
}
template <class Real>
LONGSPAN_INLINE Packet<Real> tanh(Packet<Real> a) {
  if constexpr (bool(Eigen::internal::packet_traits<Real>::HasTanh)) {
    const Packet<Real> result{Eigen::internal::ptanh(a.raw)};
#if defined(EIGEN_VECTORIZE_NEON)
    // Eigen's is off by an ulp at infinity there; from 9.02 on the nearest float is 1.
    const Packet<Real> least = broadcast(Real(9.02));
    return select(less(least, a), broadcast(Real(1)),
                  select(less(a, broadcast(Real(-9.02))), broadcast(Real(-1)), result));
#else
    return result;
#endif
  } else {  // double in Eigen 3.4
    alignas(64) Real of_lane[std::size_t(lanes<Real>)];
    store(static_cast<Real*>(of_lane), a);
    for (Real& x : of_lane) x = std::tanh(x);
    return load(static_cast<const Real*>(of_lane));
  }
}
template <class Real>
LONGSPAN_INLINE Packet<Real> exp(Packet<Real> a) {
  return {Eigen::internal::pexp(a.raw)};
}
/// The float whose exponent field is the low 8 bits of x and whose sign and fraction are 0: the bits of x shifted left
/// by 23.
template <std::same_as<float> Real>
LONGSPAN_INLINE Packet<Real> exponent_field_of_low_bits(Packet<Real> x) {
  using Raw = typename Packet<Real>::Raw;
  if constexpr (lanes < Real >> 1) {
    using Bits = typename Eigen::internal::unpacket_traits<Raw>::integer_packet;
    const auto bits = Eigen::internal::preinterpret<Bits>(x.raw);
    return {Eigen::internal::preinterpret<Raw>(Eigen::internal::plogical_shift_left<23>(bits))};
  } else {
    return {std::bit_cast<float>(std::bit_cast<std::uint32_t>(x.raw) << 23)};
  }
}
/// The larger number in each lane; that of `a` if either is NaN, so that NaN in `a` stays.
template <class Real>
LONGSPAN_INLINE Packet<Real> lane_max(Packet<Real> a, Packet<Real> b) {
#if defined(EIGEN_VECTORIZE_NEON)
  return select(less(a, b), b, a);  // the instruction gives NaN if either is NaN
#else
  return {Eigen::internal::pmax(a.raw, b.raw)};
#endif
}
// In packets of one lane a true condition (all bits set) is NaN, which Eigen would compare with 0. The functions below
// therefore look at its bits.

/// All bits set in the lanes where a < b: a condition for `select` and `&`.
template <class Real>
LONGSPAN_INLINE Packet<Real> less(Packet<Real> a, Packet<Real> b) {
  if constexpr (lanes<Real> == 1) {
    return {std::bit_cast<Real>(a.raw < b.raw ? ~BitsOf<Real>{0} : BitsOf<Real>{0})};
  } else {
    return {Eigen::internal::pcmp_lt(a.raw, b.raw)};
  }
}
template <class Real>
LONGSPAN_INLINE Packet<Real> equal(Packet<Real> a, Packet<Real> b) {
  if constexpr (lanes<Real> == 1) {
    return {std::bit_cast<Real>(a.raw == b.raw ? ~BitsOf<Real>{0} : BitsOf<Real>{0})};
  } else {
    return {Eigen::internal::pcmp_eq(a.raw, b.raw)};
  }
}
template <class Real>
LONGSPAN_INLINE Packet<Real> operator&(Packet<Real> a, Packet<Real> b) {
  if constexpr (lanes<Real> == 1) {
    return {std::bit_cast<Real>(std::bit_cast<BitsOf<Real>>(a.raw) & std::bit_cast<BitsOf<Real>>(b.raw))};
  } else {
    return {Eigen::internal::pand(a.raw, b.raw)};
  }
}
template <class Real>
LONGSPAN_INLINE Packet<Real> select(Packet<Real> condition, Packet<Real> yes, Packet<Real> no) {
  if constexpr (lanes<Real> == 1) {
    return std::bit_cast<BitsOf<Real>>(condition.raw) != 0 ? yes : no;
  } else {
    return {Eigen::internal::pselect(condition.raw, yes.raw, no.raw)};
  }
}

/// Bit i is 1 if the condition is true in lane i.
template <class Real>
LONGSPAN_INLINE unsigned bits_of(Packet<Real> condition) {
  alignas(64) Real lane[std::size_t(lanes<Real>)];
  store<Real>(lane, condition);
  unsigned bits = 0;
  LONGSPAN_UNROLL
  for (int i = 0; i < lanes<Real>; ++i) {
    bits |= static_cast<unsigned>(std::bit_cast<BitsOf<Real>>(lane[i]) >> (8 * sizeof(Real) - 1)) << i;
  }
  return bits;
}
#if defined(EIGEN_VECTORIZE_AVX512DQ)
LONGSPAN_INLINE unsigned bits_of(Packet<float> condition) {
  return _mm512_movepi32_mask(_mm512_castps_si512(condition.raw));
}
#endif

template <class Real>
LONGSPAN_INLINE Real sum_of_lanes(Packet<Real> x) {
  return Eigen::internal::predux(x.raw);
}

template <class Real>
LONGSPAN_INLINE Real max_of_lanes(Packet<Real> x) {
  return Eigen::internal::predux_max(x.raw);
}

/// Forces x into a register. Otherwise compilers repeat the load in every instruction that uses x, and so many loads
/// leave no room for the out-of-order execution to run ahead. 4 queries, keys of bfloat16, head_dim 64, from DRAM:
/// without 12 GB/s, with 36 GB/s. (Before AVX an instruction overwrites one of the registers that it reads; the copies
/// would cost more than repeated loads.)
template <class Real>
LONGSPAN_INLINE Packet<Real> in_register(Packet<Real> x) {
#if (defined(__GNUC__) || defined(__clang__)) && defined(EIGEN_VECTORIZE_AVX)
  asm("" : "+v"(x.raw));
#endif
  return x;
}

/// Transposes the square matrix whose rows are `lanes` packets.
template <class Real>
LONGSPAN_INLINE void transpose(Packet<Real> (&rows)[std::size_t(lanes<Real>)]) {
  if constexpr (lanes < Real >> 1) {
    Eigen::internal::PacketBlock<typename Packet<Real>::Raw, lanes<Real>> block;
    LONGSPAN_UNROLL
    for (int i = 0; i < lanes<Real>; ++i) block.packet[i] = rows[i].raw;
    Eigen::internal::ptranspose(block);
    LONGSPAN_UNROLL
    for (int i = 0; i < lanes<Real>; ++i) rows[i].raw = block.packet[i];
  }
}

#if defined(EIGEN_VECTORIZE_AVX512)
/// 64 shuffles, where Eigen needs 144: the first step permutes within quarters of a register, the second whole
/// quarters.
LONGSPAN_INLINE void transpose(Packet<float> (&rows)[16]) {
  __m512 quarters[16];
  LONGSPAN_UNROLL
  for (int g = 0; g < 16; g += 4) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[g].raw, rows[g + 1].raw)),
                  high01 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[g].raw, rows[g + 1].raw)),
                  low23 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[g + 2].raw, rows[g + 3].raw)),
                  high23 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[g + 2].raw, rows[g + 3].raw));
    quarters[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    quarters[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    quarters[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    quarters[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
  LONGSPAN_UNROLL
  for (int k = 0; k < 4; ++k) {
    constexpr int even = 0x88, odd = 0xdd;  // quarters 0 and 2, or 1 and 3, of two registers
    const __m512 even01 = _mm512_shuffle_f32x4(quarters[k], quarters[4 + k], even),
                 odd01 = _mm512_shuffle_f32x4(quarters[k], quarters[4 + k], odd),
                 even23 = _mm512_shuffle_f32x4(quarters[8 + k], quarters[12 + k], even),
                 odd23 = _mm512_shuffle_f32x4(quarters[8 + k], quarters[12 + k], odd);
    rows[k].raw = _mm512_shuffle_f32x4(even01, even23, even);
    rows[4 + k].raw = _mm512_shuffle_f32x4(odd01, odd23, even);
    rows[8 + k].raw = _mm512_shuffle_f32x4(even01, even23, odd);
    rows[12 + k].raw = _mm512_shuffle_f32x4(odd01, odd23, odd);
  }
}
#endif

/// The order in which the lanes of a row are summed, the same in all functions below: first lanes at a distance of 2,
/// then of 1, then of 4, 8, ... The sum of a row therefore does not depend on the rows that are summed with it.
template <class Real, class Add>
LONGSPAN_INLINE void for_each_pair_of_lanes(const Add& add) {
  constexpr int w = lanes<Real>;
  const auto add_all = [&](int apart, int step) {
    LONGSPAN_UNROLL
    for (int i = 0; i < w; i += step) add(i, i + apart);
  };
  if constexpr (w == 2) return add_all(1, 2);
  if constexpr (w > 2) {
    LONGSPAN_UNROLL
    for (int i = 0; i < w; i += 4) add(i, i + 2), add(i + 1, i + 3);
    add_all(1, 4);
    LONGSPAN_UNROLL
    for (int apart = 4; apart < w; apart *= 2) add_all(apart, 2 * apart);
  }
}

/// Lane i of the result is the sum of the lanes of rows[i]. Overwrites `rows`.
template <class Real>
LONGSPAN_INLINE Packet<Real> sums_of_rows(Packet<Real> (&rows)[std::size_t(lanes<Real>)]) {
  transpose(rows);
  for_each_pair_of_lanes<Real>([&](int i, int j) { rows[i] = rows[i] + rows[j]; });
  return rows[0];
}

#if defined(EIGEN_VECTORIZE_AVX512)
/// Adds two rows into one before the next shuffle: 45 instructions; a transposition takes 79.
LONGSPAN_INLINE Packet<float> sums_of_rows(Packet<float> (&rows)[16]) {
  LONGSPAN_UNROLL
  for (int i = 0; i < 8; ++i) {
    const __m512 a = rows[2 * i].raw, b = rows[2 * i + 1].raw;
    rows[i].raw = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  LONGSPAN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(rows[2 * i].raw), b = _mm512_castps_pd(rows[2 * i + 1].raw);
    rows[i].raw =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  LONGSPAN_UNROLL
  for (int left = 2; left > 0; left /= 2) {
    LONGSPAN_UNROLL
    for (int i = 0; i < left; ++i) {
      const __m512 a = rows[2 * i].raw, b = rows[2 * i + 1].raw;
      rows[i].raw = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
  }
  return rows[0];
}
#endif

/// The sum of the lanes of one packet, in the order of sums_of_rows.
template <class Real>
LONGSPAN_INLINE Real sum_in_pairs(Packet<Real> x) {
  alignas(64) Real lane[std::size_t(lanes<Real>)];
  store<Real>(lane, x);
  for_each_pair_of_lanes<Real>([&](int i, int j) { lane[i] += lane[j]; });
  return lane[0];
}

}  // namespace detail
LONGSPAN_NAMESPACE_END

LONGSPAN_INTRINSICS_END
