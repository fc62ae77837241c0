#include "longspan/detail/simd.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "longspan/element.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/ulp.hpp"

using longspan::Index;
namespace detail = longspan::detail;
using detail::lanes;
using detail::Packet;

namespace {

template <class Real>
inline constexpr std::size_t width = static_cast<std::size_t>(lanes<Real>);

template <class Real>
using Lanes = std::vector<Real>;

template <class Real>
Packet<Real> packet(const Lanes<Real>& x) {
  return detail::load(x.data());
}
template <class Real>
Lanes<Real> lanes_of(Packet<Real> x) {
  Lanes<Real> y(width<Real>);
  detail::store(y.data(), x);
  return y;
}

template <class T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}
/// The same bits, or NaN both: a NaN's payload is the processor's business.
template <class T>
bool same(T a, T b) {
  const auto x = static_cast<double>(a), y = static_cast<double>(b);
  return (std::isnan(x) && std::isnan(y)) || same_bits(a, b);
}
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](T x, T y) { return same(x, y); });
}

/// Ordinary numbers of every size, and now and then one of the numbers that are none.
template <class Real>
Lanes<Real> random_lanes(test::Random& random, bool with_special = true) {
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

/// on_packets(a, b) against on_lanes(a[i], b[i]) on random lanes.
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

TEMPLATE_TEST_CASE("Packet: lanes, registers", "[simd]", float, double) {
  STATIC_REQUIRE(lanes<TestType> >= 1);
  STATIC_REQUIRE((lanes<TestType> & (lanes<TestType> - 1)) == 0);
  STATIC_REQUIRE((sizeof(Packet<TestType>) == width<TestType> * sizeof(TestType)));
  STATIC_REQUIRE((detail::vector_registers == 16 || detail::vector_registers == 32));
}

TEMPLATE_TEST_CASE("load, store: any element-aligned address, nothing beside it", "[simd]", float, double) {
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

TEMPLATE_TEST_CASE("arithmetic: each lane as the scalar operation", "[simd]", float, double) {
  using Real = TestType;
  CHECK(agree<Real>([](auto a, auto b) { return a + b; }, [](Real a, Real b) { return a + b; }));
  CHECK(agree<Real>([](auto a, auto b) { return a - b; }, [](Real a, Real b) { return a - b; }));
  CHECK(agree<Real>([](auto a, auto b) { return a * b; }, [](Real a, Real b) { return a * b; }));
  CHECK(agree<Real>([](auto a, auto b) { return a / b; }, [](Real a, Real b) { return a / b; }));
  CHECK(agree<Real>([](auto a, auto) { return detail::abs(a); }, [](Real a, Real) { return std::abs(a); }));
}

TEMPLATE_TEST_CASE("max: the first where either is NaN", "[simd]", float, double) {
  using Real = TestType;
  const auto of_lanes = [](Real a, Real b) { return std::isnan(a) || std::isnan(b) || a >= b ? a : b; };
  // Zeros of two signs are equal, and either may come.
  const auto without_sign_of_zero = [](auto x) { return x + detail::broadcast(Real(0)); };
  CHECK(agree<Real>([&](auto a, auto b) { return without_sign_of_zero(detail::max(a, b)); },
                    [&](Real a, Real b) { return of_lanes(a, b) + Real(0); }));
}

TEMPLATE_TEST_CASE("less, equal, &, select: each lane alone", "[simd]", float, double) {
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
  // A condition hides by `&` too: what is left is the number itself, or +0.
  CHECK(agree<Real>([&](auto a, auto b) { return detail::less(a, b) & a; },
                    [](Real a, Real b) { return a < b ? a : Real(0); }));
}

TEMPLATE_TEST_CASE("fma: one rounding where the processor fuses, at most two elsewhere", "[simd]", float,
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

TEMPLATE_TEST_CASE("exp, tanh: within a few ulp of the library's", "[simd]", float, double) {
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

TEST_CASE("rest_of_rounding: with 2^round(x) it makes up 2^x, 0 below 2^-126", "[simd]") {
  if constexpr (detail::takes_rests) {
    test::Random random(6);
    bool right = true;
    for (int round = 0; round < 2000; ++round) {
      Lanes<float> x(width<float>), p(width<float>);
      for (float& value : x)
        value = random.chance(0.2) ? 0.5f * static_cast<float>(random.between(-260, 0))
                                   : -130 * static_cast<float>(random.uniform());
      for (float& value : p) value = 1 + static_cast<float>(random.uniform());
      const auto rest = lanes_of(detail::rest_of_rounding(packet(x))),
                 scaled = lanes_of(detail::times_exp2_of_round(packet(p), packet(x)));
      for (std::size_t i = 0; i < x.size(); ++i) {
        const float nearest = std::nearbyint(x[i]);
        right &= rest[i] == x[i] - nearest;
        right &= scaled[i] == (x[i] < -126 ? 0 : std::ldexp(p[i], static_cast<int>(nearest)));
      }
    }
    CHECK(right);
    const auto odd_nan = detail::broadcast(std::bit_cast<float>(0x7fc12345u));  // its payload in the low bits
    for (const float y : lanes_of(detail::times_exp2_of_round(detail::rest_of_rounding(odd_nan), odd_nan)))
      CHECK(std::isnan(y));
  }
}

TEMPLATE_TEST_CASE("bits_of: a bit to each lane of a condition", "[simd]", float, double) {
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
  detail::transpose<TestType>(rows);
  bool right = true;
  for (std::size_t i = 0; i < w; ++i) {
    const auto y = lanes_of(rows[i]);
    for (std::size_t lane = 0; lane < w; ++lane) right &= y[lane] == static_cast<TestType>(100 * lane + i);
  }
  CHECK(right);
}

TEMPLATE_TEST_CASE("sum_of_lanes: every lane once, NaN stays", "[simd]", float, double) {
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

TEMPLATE_TEST_CASE("sums_of_rows: lane i holds the sum of row i", "[simd]", float, double) {
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

TEMPLATE_TEST_CASE("sums_of_rows: the bits of sum_in_pairs, row by row", "[simd][bits]", float, double) {
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

TEMPLATE_TEST_CASE("load_as, store_as: every element type, as static_cast", "[simd]", float, double,
                   Eigen::bfloat16, Eigen::half) {
  const auto check = [](auto real) {
    using Real = decltype(real);
    constexpr std::size_t w = width<Real>;
    test::Random random(6);
    bool loads = true, stores = true;
    for (int round = 0; round < 3000; ++round) {
      const std::size_t shift = static_cast<std::size_t>(random.between(0, 3));
      std::vector<TestType> stored(w + 5);
      Lanes<Real> x(w);
      for (Real& value : x) {
        value = static_cast<Real>(random.normal() * std::exp2(random.between(-45, 20)));
        if (random.chance(0.1))
          value = random.pick({Real(0), -Real(0), std::numeric_limits<Real>::infinity(),
                               std::numeric_limits<Real>::quiet_NaN(), Real(65520), Real(3e38)});
      }
      detail::store_as(stored.data() + shift, packet(x));
      for (std::size_t i = 0; i < w; ++i) stores &= same(stored[shift + i], static_cast<TestType>(x[i]));
      for (std::size_t i = 0; i < stored.size(); ++i) {
        stores &= (i >= shift && i < shift + w) || same_bits(stored[i], TestType(0));
      }
      const auto back = lanes_of(detail::load_as<Real>(static_cast<const TestType*>(stored.data() + shift)));
      for (std::size_t i = 0; i < w; ++i) loads &= same(back[i], static_cast<Real>(stored[shift + i]));
    }
    CHECK(loads);
    CHECK(stores);
  };
  check(float{});
  if constexpr (!std::is_same_v<TestType, float>) check(double{});
}

TEMPLATE_TEST_CASE("load_as: every 16-bit number", "[simd]", Eigen::bfloat16, Eigen::half) {
  std::vector<TestType> all(65536);
  for (std::size_t b = 0; b < all.size(); ++b) {
    all[b] = Eigen::numext::bit_cast<TestType>(static_cast<std::uint16_t>(b));
  }
  bool right = true;
  for (std::size_t first = 0; first < all.size(); first += width<float>) {
    const auto x = lanes_of(detail::load_as<float>(static_cast<const TestType*>(all.data() + first)));
    for (std::size_t i = 0; i < x.size(); ++i) right &= same(x[i], static_cast<float>(all[first + i]));
  }
  CHECK(right);
}

TEMPLATE_TEST_CASE("load_part: zeros behind, nothing read there", "[simd]", float, double, Eigen::bfloat16,
                   Eigen::half) {
  using Real = longspan::Arithmetic<TestType>;
  for (Index count = 0; count <= lanes<Real>; ++count) {
    // No element more than `count`: a sanitizer sees any read behind.
    std::vector<TestType> from(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<TestType>(static_cast<float>(i) + 1);
    const auto x = lanes_of(detail::load_part<Real>(static_cast<const TestType*>(from.data()), count));
    bool right = true;
    for (std::size_t i = 0; i < x.size(); ++i) {
      right &= x[i] == (i < from.size() ? static_cast<Real>(i) + 1 : Real(0));
    }
    CHECK(right);
  }
}

TEST_CASE("prefetch: of memory that is not there does nothing", "[simd]") {
  detail::prefetch(nullptr, 1000);
  const float x = 1;
  detail::prefetch(&x, 0);
  detail::prefetch(&x, -5);
  CHECK(x == 1);
}

TEMPLATE_TEST_CASE("place_of, column_at: inverse of one another, and the order of load_pairs", "[simd]",
                   float, Eigen::bfloat16) {
  constexpr Index w = lanes<float>;
  for (Index columns = 0; columns <= 5 * w; ++columns) {
    bool right = true;
    for (Index c = 0; c < columns; ++c) {
      const Index place = detail::place_of<float, TestType>(c, columns);
      right &= place >= 0 && place < columns && detail::column_at<float, TestType>(place, columns) == c;
    }
    INFO("columns=" << columns);
    CHECK(right);
  }
  if constexpr (detail::loads_in_pairs<float, TestType>) {
    std::vector<TestType> row;
    for (Index c = 0; c < 2 * w; ++c) row.push_back(static_cast<TestType>(static_cast<float>(c)));
    Packet<float> packets[2];
    detail::load_pairs(row.data(), packets[0], packets[1]);
    bool right = true;
    for (Index c = 0; c < 2 * w; ++c) {
      const Index place = detail::place_of<float, TestType>(c, 2 * w);
      right &= lanes_of(packets[place / w])[static_cast<std::size_t>(place % w)] == static_cast<float>(c);
    }
    CHECK(right);
  }
}
