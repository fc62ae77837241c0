// Packs bytes into bits: bit n of the result is 1 if byte n is not 0.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "longspan/version.hpp"
#include "longspan/view.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The bits of 8 bytes.
inline std::uint64_t bits_of_8_bytes(const unsigned char* bytes) noexcept {
  if constexpr (std::endian::native == std::endian::little) {
    constexpr std::uint64_t low_seven = 0x7f7f7f7f7f7f7f7f, gather = 0x0102040810204080;
    std::uint64_t x;
    std::memcpy(&x, bytes, sizeof x);
    const std::uint64_t is_set =
        (((x & low_seven) + low_seven) | x) & ~low_seven;  // in the top bit of each byte
    return ((is_set >> 7) * gather) >> 56;
  } else {
    std::uint64_t bits = 0;
    for (int n = 0; n < 8; ++n) bits |= std::uint64_t{bytes[n] != 0} << n;
    return bits;
  }
}

/// The bits of 64 bytes.
inline std::uint64_t bits_of_64_bytes(const unsigned char* bytes) noexcept {
  std::uint64_t bits = 0;
#if defined(__SSE2__)
  for (int n = 0; n < 64; n += 16) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + n));
    const int is_zero = _mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_setzero_si128()));
    bits |= static_cast<std::uint64_t>(static_cast<std::uint16_t>(~is_zero)) << n;
  }
#else
  for (int n = 0; n < 64; n += 8) bits |= bits_of_8_bytes(bytes + n) << n;
#endif
  return bits;
}

/// The bits of the first `count` bytes, at most 64; reads nothing after them.
inline std::uint64_t bits_of_bytes(const unsigned char* bytes, Index count) noexcept {
  if (count == 64) return bits_of_64_bytes(bytes);
  std::uint64_t bits = 0;
  Index n = 0;
  for (; n + 8 <= count; n += 8) bits |= bits_of_8_bytes(bytes + n) << n;
  for (; n < count; ++n) bits |= std::uint64_t{bytes[n] != 0} << n;
  return bits;
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
