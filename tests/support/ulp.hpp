// Units of errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "longspan/element.hpp"

namespace test {

/// The distance between the two numbers of type Real on either side of `exact`, including denormals.
template <class Real, class Exact>
Exact ulp(Exact exact) {
  constexpr int digits = std::numeric_limits<Real>::digits, lowest = std::numeric_limits<Real>::min_exponent;
  int exponent = 0;
  std::frexp(exact, &exponent);
  return std::ldexp(Exact(1), std::max(exponent, lowest) - digits);
}

/// The error of `got` in ulp of the exact value.
template <class Real, class Exact>
Exact ulps(Real got, Exact exact) {
  return std::abs(static_cast<Exact>(got) - exact) / ulp<Real>(exact);
}

/// u: the relative error of one rounding in the arithmetic of T.
template <class T>
constexpr double roundoff() {
  return std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
}

/// The additional error of storing x as T; 0 if T is the type of the arithmetic, whose rounding is counted separately.
template <class T>
double storing_error(double x) {
  if constexpr (std::is_same_v<T, longspan::Arithmetic<T>>) return 0;
  return std::is_same_v<T, Eigen::half> ? std::max(std::abs(x) * 0x1p-11, 0x1p-25) : std::abs(x) * 0x1p-8;
}

}  // namespace test
