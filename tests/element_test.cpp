#include "longspan/element.hpp"

#include <cstdint>
#include <type_traits>

#include "support/catch.hpp"

using longspan::Arithmetic;
using longspan::Element;

TEST_CASE("Element: the four storage types, const or not", "[element]") {
  STATIC_REQUIRE(Element<float>);
  STATIC_REQUIRE(Element<double>);
  STATIC_REQUIRE(Element<Eigen::bfloat16>);
  STATIC_REQUIRE(Element<Eigen::half>);
  STATIC_REQUIRE(Element<const float>);
  STATIC_REQUIRE(Element<const Eigen::half>);
}

TEST_CASE("Element: no other type", "[element]") {
  STATIC_REQUIRE_FALSE(Element<int>);
  STATIC_REQUIRE_FALSE(Element<std::int8_t>);
  STATIC_REQUIRE_FALSE(Element<std::uint16_t>);
  STATIC_REQUIRE_FALSE(Element<bool>);
  STATIC_REQUIRE_FALSE(Element<long double>);
  STATIC_REQUIRE_FALSE(Element<float&>);
  STATIC_REQUIRE_FALSE(Element<float*>);
  STATIC_REQUIRE_FALSE(Element<void>);
}

TEST_CASE("Arithmetic: double for double, float for all others", "[element]") {
  STATIC_REQUIRE(std::is_same_v<Arithmetic<float>, float>);
  STATIC_REQUIRE(std::is_same_v<Arithmetic<const float>, float>);
  STATIC_REQUIRE(std::is_same_v<Arithmetic<double>, double>);
  STATIC_REQUIRE(std::is_same_v<Arithmetic<const double>, double>);
  STATIC_REQUIRE(std::is_same_v<Arithmetic<Eigen::bfloat16>, float>);
  STATIC_REQUIRE(std::is_same_v<Arithmetic<Eigen::half>, float>);
  STATIC_REQUIRE(std::is_same_v<Arithmetic<const Eigen::half>, float>);
}
