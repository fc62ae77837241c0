// Packets as vectors of their lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "longspan/detail/simd/packet.hpp"
#include "support/random.hpp"

namespace test {

template <class Real>
inline constexpr std::size_t width = static_cast<std::size_t>(longspan::detail::lanes<Real>);

template <class Real>
using Lanes = std::vector<Real>;

template <class Real>
longspan::detail::Packet<Real> packet(const Lanes<Real>& x) {
  return longspan::detail::load(x.data());
}
template <class Real>
Lanes<Real> lanes_of(longspan::detail::Packet<Real> x) {
  Lanes<Real> y(width<Real>);
  longspan::detail::store(y.data(), x);
  return y;
}

template <class T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}
/// True if both have the same bits, or both are NaN: the payload of NaN depends on the processor.
template <class T>
bool same(T a, T b) {
  const auto x = static_cast<double>(a), y = static_cast<double>(b);
  return (std::isnan(x) && std::isnan(y)) || same_bits(a, b);
}
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](T x, T y) { return same(x, y); });
}

/// Random numbers of every size, and sometimes a special one: 0, infinity, NaN, the largest or the smallest number.
template <class Real>
Lanes<Real> random_lanes(Random& random, bool with_special = true) {
  using Limits = std::numeric_limits<Real>;
  Lanes<Real> x(width<Real>);
  for (Real& value : x) {
    value = static_cast<Real>(random.normal() * std::exp2(random.between(-20, 20)));
    if (with_special && random.chance(0.2)) {
      value = random.pick({Real(0), -Real(0), Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN(),
                           (Limits::max)(), Limits::lowest(), (Limits::min)()});
    }
  }
  return x;
}

}  // namespace test
