#include "longspan/detail/simd/exp2.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/lanes.hpp"
#include "support/random.hpp"
#include "support/ulp.hpp"

using longspan::Index;
using longspan::detail::exp_score;
using longspan::detail::lanes;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

template <class Real>
void weigh(std::vector<Real>& x) {
  const auto width = static_cast<std::size_t>(lanes<Real>);
  x.resize((x.size() + width - 1) / width * width);
  for (std::size_t i = 0; i < x.size(); i += width) {
    longspan::detail::store(x.data() + i, exp_score(longspan::detail::load<Real>(x.data() + i)));
  }
}

/// exp_score of x, computed with x in every lane.
template <class Real>
Real weight_of(Real x) {
  std::vector<Real> all(static_cast<std::size_t>(lanes<Real>), x);
  weigh(all);
  for (const Real y : all) {
    if (std::memcmp(&y, all.data(), sizeof y) != 0) return Real(-1);
  }
  return all.front();
}

std::uint32_t bits(float x) { return std::bit_cast<std::uint32_t>(x); }

struct Worst {
  double ulps = 0;
  float at = 0;
};

/// The worst error for the floats whose bits are first, first + step, ... up to last: with the sign bit set,
/// these are negative numbers of rising magnitude.
Worst worst_of(std::uint32_t first, std::uint32_t last, std::uint32_t step) {
  constexpr std::uint64_t at_once = 1 << 14;
  Worst worst;
  std::vector<float> y;
  for (std::uint64_t from = first; from <= last; from += at_once * step) {
    y.clear();
    for (std::uint64_t b = from; b <= last && b < from + at_once * step; b += step) {
      y.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(b)));
    }
    const std::vector<float> x = y;
    weigh(y);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double error = test::ulps(y[i], std::exp2(static_cast<double>(x[i])));
      if (!(error <= worst.ulps)) worst = {error, x[i]};
    }
  }
  return worst;
}

/// Without fused multiply-add each step of the polynomial is rounded twice.
constexpr double most_ulps = longspan::detail::has_fused_multiply_add ? 1.0 : 1.3;

}  // namespace

TEST_CASE("exp_score: float within 1 ulp down to 2^-126, sampled in every binade", "[exp2]") {
  const Worst worst = worst_of(bits(-0.0f), bits(-126.0f), 977);
  INFO("worst at " << worst.at);
  CHECK(worst.ulps <= most_ulps);
  CHECK(worst.ulps > 0.4);  // a rounded result cannot be better: the oracle is independent of the function
}

TEST_CASE("exp_score: float within 1 ulp at every number of two intervals", "[exp2]") {
  for (const float from : {-0.4995f, -0.5f, -0.9995f, -1.0f, -1.4995f, -17.0f, -87.4999f, -125.4995f}) {
    const Worst worst = worst_of(bits(from), bits(from) + 20000, 1);
    INFO("worst at " << worst.at);
    CHECK(worst.ulps <= most_ulps);
  }
}

TEST_CASE("exp_score: within 1 ulp at every negative float", "[.][long]") {
  const Worst worst = worst_of(bits(-0.0f), bits(-126.0f), 1);
  INFO("worst at " << worst.at);
  CHECK(worst.ulps <= most_ulps);
}

TEST_CASE("exp_score: exactly a power of two at every integer", "[exp2]") {
  CHECK(weight_of(0.0f) == 1.0f);
  CHECK(weight_of(-0.0f) == 1.0f);
  for (int n = 0; n >= -126; --n) CHECK(weight_of(static_cast<float>(n)) == std::ldexp(1.0f, n));
}

TEST_CASE("exp_score: 1 or the float below it for tiny arguments", "[exp2]") {
  for (const float x : {-std::numeric_limits<float>::denorm_min(), -std::numeric_limits<float>::min(),
                        -0x1p-40f, -0x1p-27f, -0x1p-26f}) {
    CHECK(weight_of(x) == 1.0f);
  }
  const float y = weight_of(-0x1p-23f);
  CHECK((y == 1.0f || y == std::nextafter(1.0f, 0.0f)));
}

TEST_CASE("exp_score: exactly 0 for arguments below -126.5", "[exp2]") {
  for (const float x : {std::nextafter(-126.5f, -200.0f), -126.75f, -127.0f, -127.5f, -128.0f, -150.0f, -1e4f,
                        -1e30f, std::numeric_limits<float>::lowest(), -infinity}) {
    const float y = weight_of(x);
    INFO(x);
    CHECK(bits(y) == 0);
  }
  // Between -126 and -126.5 a result is denormal, or 0 if the processor flushes denormals.
  for (const float x : {-126.01f, -126.25f, -126.49f}) {
    const float y = weight_of(x);
    CHECK((y == 0.0f || test::ulps(y, std::exp2(static_cast<double>(x))) <= 1.0));
  }
}

TEST_CASE("exp_score: never above 1, never below 0", "[exp2]") {
  test::Random random(1);
  std::vector<float> x(100000);
  for (float& value : x) value = static_cast<float>(-std::exp(10 * random.normal()));
  weigh(x);
  bool within = true;
  for (const float y : x) within &= y >= 0.0f && y <= 1.0f;
  CHECK(within);
}

TEST_CASE("exp_score: NaN stays NaN, whatever its payload", "[exp2]") {
  for (const std::uint32_t sign : {0u, 0x80000000u}) {
    // All payloads of a single bit and of all bits up to it, quiet and signalling: the low 8 bits become an
    // exponent.
    for (int shift = 0; shift < 23; ++shift) {
      const std::uint32_t one = 1u << shift, ones = (2u << shift) - 1;
      for (const std::uint32_t payload : {one, ones, one | 0x400000u, ones | 0x400000u}) {
        float x = std::bit_cast<float>(sign | 0x7f800000u | payload);
        std::vector<float> y(static_cast<std::size_t>(lanes<float>));
        for (float& value : y) std::memcpy(&value, &x, sizeof x);
        weigh(y);
        bool all_nan = true;
        for (const float value : y) all_nan &= std::isnan(value);
        INFO(std::hex << (sign | 0x7f800000u | payload));
        CHECK(all_nan);
      }
    }
  }
  CHECK(std::isnan(weight_of(std::numeric_limits<double>::quiet_NaN())));
}

TEMPLATE_TEST_CASE("exp_score: each lane is independent", "[exp2]", float, double) {
  const auto width = static_cast<std::size_t>(lanes<TestType>);
  const std::vector<TestType> special{TestType(0),
                                      TestType(-1.25),
                                      TestType(-90),
                                      -std::numeric_limits<TestType>::infinity(),
                                      std::numeric_limits<TestType>::lowest(),
                                      std::numeric_limits<TestType>::quiet_NaN()};
  for (const TestType beside : special) {
    for (const TestType x : special) {
      const TestType wanted = weight_of(x);
      for (std::size_t lane = 0; lane < width; ++lane) {
        std::vector<TestType> packet(width, beside);
        packet[lane] = x;
        weigh(packet);
        CHECK((packet[lane] == wanted || (std::isnan(packet[lane]) && std::isnan(wanted))));
      }
    }
  }
}

TEST_CASE("exp_score: double is e^x within 2 ulp, exactly 0 below -708", "[exp2]") {
  std::vector<double> x;
  for (double value = -708; value < -1e-300; value *= 0.9997) x.push_back(value);
  test::Random random(2);
  for (int n = 0; n < 100000; ++n) x.push_back(-708 * random.uniform());
  std::vector<double> y = x;
  weigh(y);
  long double worst = 0, at = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const long double error = test::ulps(y[i], std::exp(static_cast<long double>(x[i])));
    if (!(error <= worst)) worst = error, at = x[i];
  }
  INFO("worst at " << at);
  CHECK(worst <= 2);
  CHECK(weight_of(0.0) == 1.0);
  CHECK(weight_of(-0.0) == 1.0);
  for (const double zero :
       {std::nextafter(-708.0, -709.0), -745.0, -1e5, std::numeric_limits<double>::lowest(),
        -std::numeric_limits<double>::infinity()}) {
    CHECK(std::bit_cast<std::uint64_t>(weight_of(zero)) == 0);
  }
}

TEST_CASE("score_unit: the unit of exp_score", "[exp2]") {
  CHECK(longspan::detail::score_unit<float> == static_cast<float>(1 / std::log(2.0)));
  CHECK(longspan::detail::score_unit<double> == 1.0);
}

TEST_CASE("rest_of_rounding: 2^rest times 2^round(x) is 2^x, and 0 below 2^-126", "[exp2]") {
  if constexpr (longspan::detail::takes_rests) {
    test::Random random(6);
    bool right = true;
    for (int round = 0; round < 2000; ++round) {
      test::Lanes<float> x(test::width<float>), p(test::width<float>);
      for (float& value : x)
        value = random.chance(0.2) ? 0.5f * static_cast<float>(random.between(-260, 0))
                                   : -130 * static_cast<float>(random.uniform());
      for (float& value : p) value = 1 + static_cast<float>(random.uniform());
      const auto rest = test::lanes_of(longspan::detail::rest_of_rounding(test::packet(x))),
                 scaled =
                     test::lanes_of(longspan::detail::times_exp2_of_round(test::packet(p), test::packet(x)));
      for (std::size_t i = 0; i < x.size(); ++i) {
        const float nearest = std::nearbyint(x[i]);
        right &= rest[i] == x[i] - nearest;
        right &= scaled[i] == (x[i] < -126 ? 0 : std::ldexp(p[i], static_cast<int>(nearest)));
      }
    }
    CHECK(right);
    const auto odd_nan =
        longspan::detail::broadcast(std::bit_cast<float>(0x7fc12345u));  // its payload in the low bits
    for (const float y : test::lanes_of(
             longspan::detail::times_exp2_of_round(longspan::detail::rest_of_rounding(odd_nan), odd_nan)))
      CHECK(std::isnan(y));
  } else {
    SUCCEED("this instruction set does not have the instruction");
  }
}
