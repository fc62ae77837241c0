#include "longspan/detail/simd/element_packets.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "longspan/element.hpp"
#include "support/catch.hpp"
#include "support/lanes.hpp"
#include "support/random.hpp"

using longspan::Index;
namespace detail = longspan::detail;
using detail::lanes;
using detail::Packet;
using test::Lanes;
using test::lanes_of;
using test::packet;
using test::same;
using test::same_bits;
using test::width;

TEMPLATE_TEST_CASE("load_as, store_as: convert every element type like static_cast", "[element_packets]",
                   float, double, Eigen::bfloat16, Eigen::half) {
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

TEMPLATE_TEST_CASE("load_as: every 16-bit number", "[element_packets]", Eigen::bfloat16, Eigen::half) {
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

TEMPLATE_TEST_CASE("load_part: zeros after `count` elements, which are not read", "[element_packets]", float,
                   double, Eigen::bfloat16, Eigen::half) {
  using Real = longspan::Arithmetic<TestType>;
  for (Index count = 0; count <= lanes<Real>; ++count) {
    // The vector has exactly `count` elements, so that a sanitizer notices a read after them.
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

TEMPLATE_TEST_CASE("interleaved_index, column_of_index: inverse to each other, and the order of load_pairs",
                   "[element_packets]", float, Eigen::bfloat16) {
  constexpr Index w = lanes<float>;
  for (Index columns = 0; columns <= 5 * w; ++columns) {
    bool right = true;
    for (Index c = 0; c < columns; ++c) {
      const Index place = detail::interleaved_index<float, TestType>(c, columns);
      right &= place >= 0 && place < columns && detail::column_of_index<float, TestType>(place, columns) == c;
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
      const Index place = detail::interleaved_index<float, TestType>(c, 2 * w);
      right &= lanes_of(packets[place / w])[static_cast<std::size_t>(place % w)] == static_cast<float>(c);
    }
    CHECK(right);
  }
}
