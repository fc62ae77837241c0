// Random test cases that can be replayed; the random numbers are the same with every standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <numbers>
#include <span>
#include <vector>

#include "longspan/view.hpp"
#include "support/catch.hpp"

namespace test {

using longspan::Index;

/// SplitMix64 (Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    state_ += 0x9e3779b97f4a7c15u;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// A number in [0, 1).
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }
  bool chance(double probability) { return uniform() < probability; }
  /// A number from low to high, both included.
  Index between(Index low, Index high) {
    return low + static_cast<Index>(bits() % static_cast<std::uint64_t>(high - low + 1));
  }
  template <class T>
  T pick(std::span<const T> list) {
    return list[static_cast<std::size_t>(between(0, static_cast<Index>(list.size()) - 1))];
  }
  template <class T>
  T pick(const std::vector<T>& list) {
    return pick(std::span<const T>(list));
  }
  template <class T>
  T pick(std::initializer_list<T> list) {
    return pick(std::span<const T>(list.begin(), list.size()));
  }

 private:
  std::uint64_t state_;
};

inline std::int64_t environment_number(const char* name, std::int64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoll(text, nullptr, 10);
}

/// Calls body(random) for each of `cases` cases. `random` depends only on the seed and the number of the case. A
/// failure prints both: the environment variables LONGSPAN_SEED and LONGSPAN_CASE run this case again. LONGSPAN_CASES
/// (for instance 10 or 0.5) multiplies the number of cases.
template <class Body>
void for_each_case(std::int64_t cases, const Body& body) {
  const std::int64_t seed = environment_number("LONGSPAN_SEED", 1),
                     only = environment_number("LONGSPAN_CASE", -1);
  const char* times = std::getenv("LONGSPAN_CASES");
  const std::int64_t count =
      times == nullptr ? cases
                       : static_cast<std::int64_t>(std::ceil(std::strtod(times, nullptr) * double(cases)));
  for (std::int64_t n = 0; n < count; ++n) {
    if (only >= 0 && n != only) continue;
    INFO("replay: LONGSPAN_SEED=" << seed << " LONGSPAN_CASE=" << n);
    Random random(Random(static_cast<std::uint64_t>(seed)).bits() + static_cast<std::uint64_t>(n));
    body(random);
  }
  if (only >= count) SUCCEED("this law has fewer cases than LONGSPAN_CASE");
}

}  // namespace test
