// Distinguishes finite numbers from infinities and NaN by their bits: under the options that exclude infinities and NaN
// (such as -ffinite-math-only) a compiler assumes that every number is finite.
#pragma once

#include <bit>
#include <cstdint>

#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Neither infinite nor NaN.
constexpr bool is_finite(double x) noexcept {
  constexpr std::uint64_t exponent = 0x7ff;
  return (std::bit_cast<std::uint64_t>(x) >> 52 & exponent) != exponent;
}
constexpr bool is_finite(float x) noexcept {
  constexpr std::uint32_t exponent = 0xff;
  return (std::bit_cast<std::uint32_t>(x) >> 23 & exponent) != exponent;
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
