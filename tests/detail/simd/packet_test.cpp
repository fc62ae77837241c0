#include "longspan/detail/simd/packet.hpp"

#include <algorithm>
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
namespace detail = longspan::detail;
using detail::lanes;
using detail::Packet;
using test::Lanes;
using test::lanes_of;
using test::packet;
using test::random_lanes;
using test::same;
using test::width;

namespace {

/// Compares on_packets(a, b) with on_lanes(a[i], b[i]) for random lanes.
template <class Real, class OnPackets, class OnLanes>
bool agree(const OnPackets& on_packets, const OnLanes& on_lanes) {
  test::Random random(1);
  for (int round = 0; round < 200; ++round) {
    const auto a = random_lanes<Real>(random), b = random_lanes<Real>(random);
    Lanes<Real> wanted(width<Real>);
    for (std::size_t i = 0; i < wanted.size(); ++i) wanted[i] = on_lanes(a[i], b[i]);
    if (!same(lanes_of(on_packets(packet(a), packet(b))), wanted)) return false;
  }
  return true;
}

}  // namespace

TEMPLATE_TEST_CASE("Packet: numbers of lanes and registers", "[simd]", float, double) {
  STATIC_REQUIRE(lanes<TestType> >= 1);
  STATIC_REQUIRE((lanes<TestType> & (lanes<TestType> - 1)) == 0);
  STATIC_REQUIRE((sizeof(Packet<TestType>) == width<TestType> * sizeof(TestType)));
  STATIC_REQUIRE((detail::vector_registers == 16 || detail::vector_registers == 32));
}

TEMPLATE_TEST_CASE("load, store: any element-aligned address, and nothing next to it", "[simd]", float,
                   double) {
  constexpr std::size_t w = width<TestType>;
  alignas(64) TestType from[3 * w + 1], to[3 * w + 1];
  for (std::size_t i = 0; i < 3 * w + 1; ++i) from[i] = static_cast<TestType>(i + 1);
  for (std::size_t shift = 0; shift <= w; ++shift) {
    std::fill_n(to, 3 * w + 1, TestType(0));
    detail::store(static_cast<TestType*>(to) + w - shift + 1,
                  detail::load(static_cast<const TestType*>(from) + shift));
    bool right = true;
    for (std::size_t i = 0; i < 3 * w + 1; ++i) {
      const bool inside = i >= w - shift + 1 && i < 2 * w - shift + 1;
      right &= to[i] == (inside ? from[shift + i - (w - shift + 1)] : TestType(0));
    }
    CHECK(right);
  }
}

TEMPLATE_TEST_CASE("broadcast: the same number in every lane", "[simd]", float, double) {
  const TestType x = TestType(-3.25);
  CHECK(lanes_of(detail::broadcast(x)) == Lanes<TestType>(width<TestType>, x));
  CHECK(lanes_of(detail::broadcast(&x)) == Lanes<TestType>(width<TestType>, x));
}

TEMPLATE_TEST_CASE("arithmetic: each lane equals the scalar operation", "[simd]", float, double) {
  using Real = TestType;
  CHECK(agree<Real>([](auto a, auto b) { return a + b; }, [](Real a, Real b) { return a + b; }));
  CHECK(agree<Real>([](auto a, auto b) { return a - b; }, [](Real a, Real b) { return a - b; }));
  CHECK(agree<Real>([](auto a, auto b) { return a * b; }, [](Real a, Real b) { return a * b; }));
  CHECK(agree<Real>([](auto a, auto b) { return a / b; }, [](Real a, Real b) { return a / b; }));
  CHECK(agree<Real>([](auto a, auto) { return detail::abs(a); }, [](Real a, Real) { return std::abs(a); }));
}

TEMPLATE_TEST_CASE("lane_max: the first operand if either is NaN", "[simd]", float, double) {
  using Real = TestType;
  const auto of_lanes = [](Real a, Real b) { return std::isnan(a) || std::isnan(b) || a >= b ? a : b; };
  // Zeros of both signs are equal, and either may be returned.
  const auto without_sign_of_zero = [](auto x) { return x + detail::broadcast(Real(0)); };
  CHECK(agree<Real>([&](auto a, auto b) { return without_sign_of_zero(detail::lane_max(a, b)); },
                    [&](Real a, Real b) { return of_lanes(a, b) + Real(0); }));
}

TEMPLATE_TEST_CASE("less, equal, &, select: each lane is independent", "[simd]", float, double) {
  using Real = TestType;
  const auto choose = [](auto condition, auto a, auto b) { return detail::select(condition, a, b); };
  CHECK(agree<Real>([&](auto a, auto b) { return choose(detail::less(a, b), a, b); },
                    [](Real a, Real b) { return a < b ? a : b; }));
  CHECK(
      agree<Real>([&](auto a, auto b) { return choose(detail::equal(a, b), detail::broadcast(Real(7)), b); },
                  [](Real a, Real b) { return a == b ? Real(7) : b; }));
  CHECK(agree<Real>([&](auto a, auto) { return choose(detail::equal(a, a), a, detail::broadcast(Real(5))); },
                    [](Real a, Real) { return std::isnan(a) ? Real(5) : a; }));
  const auto zero = [] { return detail::broadcast(Real(0)); };
  CHECK(agree<Real>(
      [&](auto a, auto b) { return choose(detail::less(zero(), a) & detail::less(zero(), b), a, b); },
      [](Real a, Real b) { return Real(0) < a && Real(0) < b ? a : b; }));
  // A condition also selects by `&`: the result is the number itself, or +0.
  CHECK(agree<Real>([&](auto a, auto b) { return detail::less(a, b) & a; },
                    [](Real a, Real b) { return a < b ? a : Real(0); }));
}

TEMPLATE_TEST_CASE("fma: one rounding with fused multiply-add, otherwise at most two", "[simd]", float,
                   double) {
  test::Random random(3);
  bool right = true;
  for (int round = 0; round < 500; ++round) {
    const auto a = random_lanes<TestType>(random), b = random_lanes<TestType>(random),
               c = random_lanes<TestType>(random);
    const auto got = lanes_of(detail::fma(packet(a), packet(b), packet(c)));
    for (std::size_t i = 0; i < got.size(); ++i) {
      volatile const TestType product = a[i] * b[i];  // rounded, whatever the compiler may contract
      const bool fused = same(got[i], std::fma(a[i], b[i], c[i]));
      right &=
          fused || (!detail::has_fused_multiply_add && same(got[i], static_cast<TestType>(product + c[i])));
    }
  }
  CHECK(right);
}

TEMPLATE_TEST_CASE("exp, tanh: within a few ulp of the standard library", "[simd]", float, double) {
  test::Random random(4);
  long double worst_exp = 0, worst_tanh = 0;
  for (int round = 0; round < 5000; ++round) {
    Lanes<TestType> x(width<TestType>);
    for (TestType& value : x)
      value = static_cast<TestType>(random.normal() * std::exp2(random.between(-10, 4)));
    const auto e = lanes_of(detail::exp(packet(x))), t = lanes_of(detail::tanh(packet(x)));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const auto exact = static_cast<long double>(x[i]);
      worst_exp = std::max(worst_exp, test::ulps(e[i], std::exp(exact)));
      worst_tanh = std::max(worst_tanh, test::ulps(t[i], std::tanh(exact)));
    }
  }
  CHECK(worst_exp <= 4);
  CHECK(worst_tanh <= 16);  // 8.2 for double in Eigen 5.0
}

TEMPLATE_TEST_CASE("tanh: 1 at infinity, NaN for NaN", "[simd]", float, double) {
  using Limits = std::numeric_limits<TestType>;
  for (const TestType x : {TestType(50), Limits::max(), Limits::infinity()}) {
    CHECK(lanes_of(detail::tanh(detail::broadcast(x))) == Lanes<TestType>(width<TestType>, TestType(1)));
    CHECK(lanes_of(detail::tanh(detail::broadcast(-x))) == Lanes<TestType>(width<TestType>, TestType(-1)));
  }
  for (const TestType y : lanes_of(detail::tanh(detail::broadcast(Limits::quiet_NaN()))))
    CHECK(std::isnan(y));
  CHECK(lanes_of(detail::tanh(detail::broadcast(TestType(0)))) ==
        Lanes<TestType>(width<TestType>, TestType(0)));
}

TEST_CASE("exponent_field_of_low_bits: shifts the bits of each lane by 23", "[simd]") {
  test::Random random(5);
  bool right = true;
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::uint32_t> from(width<float>), to(width<float>);
    for (std::uint32_t& bits : from) bits = static_cast<std::uint32_t>(random.bits());
    Lanes<float> x(width<float>);
    std::memcpy(x.data(), from.data(), x.size() * sizeof(float));
    detail::store(x.data(), detail::exponent_field_of_low_bits(packet(x)));
    std::memcpy(to.data(), x.data(), x.size() * sizeof(float));
    for (std::size_t i = 0; i < to.size(); ++i) right &= to[i] == from[i] << 23;
  }
  CHECK(right);
}

TEMPLATE_TEST_CASE("bits_of: one bit for each lane of a condition", "[simd]", float, double) {
  constexpr std::size_t w = width<TestType>;
  test::Random random(8);
  bool right = true;
  for (int round = 0; round < 300; ++round) {
    const unsigned wanted = static_cast<unsigned>(random.bits()) & ((1u << w) - 1);
    Lanes<TestType> x(w);
    for (std::size_t i = 0; i < w; ++i) x[i] = (wanted >> i & 1u) != 0 ? TestType(1) : TestType(-1);
    right &= detail::bits_of(detail::less(detail::broadcast(TestType(0)), packet(x))) == wanted;
  }
  CHECK(right);
}

TEMPLATE_TEST_CASE("transpose: swaps lane and row", "[simd]", float, double) {
  constexpr std::size_t w = width<TestType>;
  Packet<TestType> rows[w];
  Lanes<TestType> row(w);
  for (std::size_t i = 0; i < w; ++i) {
    for (std::size_t lane = 0; lane < w; ++lane) row[lane] = static_cast<TestType>(100 * i + lane);
    rows[i] = packet(row);
  }
  detail::transpose(rows);
  bool right = true;
  for (std::size_t i = 0; i < w; ++i) {
    const auto y = lanes_of(rows[i]);
    for (std::size_t lane = 0; lane < w; ++lane) right &= y[lane] == static_cast<TestType>(100 * lane + i);
  }
  CHECK(right);
}

TEMPLATE_TEST_CASE("sum_of_lanes: adds every lane once, NaN stays", "[simd]", float, double) {
  TestType x[64];
  TestType total = 0;
  for (int i = 0; i < detail::lanes<TestType>; ++i) total += x[i] = static_cast<TestType>(1 << i % 20);
  CHECK(detail::sum_of_lanes(detail::load(static_cast<const TestType*>(x))) == total);
  for (int i = 0; i < lanes<TestType>; ++i) {
    TestType with_nan[64];
    std::copy_n(x, lanes<TestType>, with_nan);
    with_nan[i] = std::numeric_limits<TestType>::quiet_NaN();
    CHECK(std::isnan(detail::sum_of_lanes(detail::load(static_cast<const TestType*>(with_nan)))));
  }
}

TEMPLATE_TEST_CASE("sums_of_rows: lane i is the sum of row i", "[simd]", float, double) {
  constexpr std::size_t w = width<TestType>;
  Packet<TestType> rows[w];
  Lanes<TestType> row(w), sums(w);
  for (std::size_t i = 0; i < w; ++i) {
    for (std::size_t lane = 0; lane < w; ++lane) {
      row[lane] = static_cast<TestType>((i * i + 7 * lane) % 31);  // small whole numbers: every sum is exact
      sums[i] += row[lane];
    }
    rows[i] = packet(row);
  }
  CHECK(lanes_of(detail::sums_of_rows(rows)) == sums);
}

TEMPLATE_TEST_CASE("sums_of_rows: has the bits of sum_in_pairs for each row", "[simd][bits]", float, double) {
  constexpr std::size_t w = width<TestType>;
  test::Random random(9);
  bool right = true;
  for (int round = 0; round < 200; ++round) {
    Packet<TestType> rows[w];
    Lanes<TestType> sums(w);
    for (std::size_t i = 0; i < w; ++i) {
      rows[i] = packet(random_lanes<TestType>(random, false));
      sums[i] = detail::sum_in_pairs(rows[i]);
    }
    right &= same(lanes_of(detail::sums_of_rows(rows)), sums);
  }
  CHECK(right);
}

TEMPLATE_TEST_CASE("in_register: the same packet, including NaN and -0", "[simd]", float, double) {
  test::Random random(11);
  const Lanes<TestType> x = random_lanes<TestType>(random, true);
  CHECK(same(lanes_of(detail::in_register(packet(x))), x));
}

TEST_CASE("prefetch: an invalid address does nothing", "[simd]") {
  detail::prefetch(nullptr, 1000);
  const float x = 1;
  detail::prefetch(&x, 0);
  detail::prefetch(&x, -5);
  detail::prefetch<true>(nullptr, 1000);
  detail::prefetch_line(0);
  CHECK(x == 1);
}
