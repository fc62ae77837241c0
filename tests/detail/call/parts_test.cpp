#include "longspan/detail/call/parts.hpp"

#include <type_traits>

#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"

using longspan::causal;
using longspan::everything;
using longspan::Index;
using longspan::no_position;
using longspan::Pairing;
using longspan::rotary;
using longspan::softcap;
using longspan::unchanged;
using longspan::window;
namespace detail = longspan::detail;
using detail::MaskPart;
using detail::PositionPart;
using detail::ScorePart;

TEST_CASE("parts: each kind recognises its own parts", "[parts]") {
  STATIC_REQUIRE(MaskPart::is<causal>);
  STATIC_REQUIRE_FALSE(MaskPart::is<softcap>);
  STATIC_REQUIRE_FALSE(MaskPart::is<rotary>);
  STATIC_REQUIRE(ScorePart::is<softcap>);
  STATIC_REQUIRE_FALSE(ScorePart::is<causal>);
  STATIC_REQUIRE_FALSE(ScorePart::is<rotary>);
  STATIC_REQUIRE(PositionPart::is<rotary>);
  STATIC_REQUIRE_FALSE(PositionPart::is<causal>);
  STATIC_REQUIRE_FALSE(PositionPart::is<softcap>);
}

TEST_CASE("PartOf: the part of a kind in any order, or the default", "[parts]") {
  const auto lambda = [](float s, Index, Index, Index, Index) { return s; };
  using Lambda = std::remove_const_t<decltype(lambda)>;
  STATIC_REQUIRE(std::is_same_v<detail::PartOf<MaskPart, everything>, everything>);
  STATIC_REQUIRE(std::is_same_v<detail::PartOf<MaskPart, everything, causal>, causal>);
  STATIC_REQUIRE(std::is_same_v<detail::PartOf<MaskPart, everything, softcap, rotary, causal>, causal>);
  STATIC_REQUIRE(std::is_same_v<detail::PartOf<ScorePart, unchanged, rotary, Lambda, causal>, Lambda>);
  STATIC_REQUIRE(std::is_same_v<detail::PartOf<PositionPart, no_position, softcap, causal>, no_position>);
  STATIC_REQUIRE(detail::parts_are<causal, softcap, rotary, rotary, causal, softcap>);
  STATIC_REQUIRE(detail::parts_are<causal, unchanged, no_position, causal>);
  STATIC_REQUIRE_FALSE(detail::parts_are<everything, unchanged, no_position, causal>);
  STATIC_REQUIRE_FALSE(detail::parts_are<causal, softcap, no_position, causal>);
}

TEST_CASE("take_part: the given part, or a default one", "[parts]") {
  const window narrow{.left = 3};
  const softcap cap{7};
  const rotary turned(Pairing::half_split, 500);
  CHECK(detail::take_part<MaskPart, window>(cap, turned, narrow).left == 3);
  CHECK(detail::take_part<ScorePart, softcap>(cap, turned, narrow).cap == 7);
  CHECK(detail::take_part<PositionPart, rotary>(cap, turned, narrow).base == 500);
  CHECK(detail::take_part<MaskPart, window>(cap).left == window::unlimited);
  CHECK(detail::take_part<ScorePart, softcap>().cap == 50);
}

TEST_CASE("take_part: works with a part that can only be copied", "[parts]") {
  float table[3] = {1, 2, 3};
  const auto score = [&table](float s, Index, Index, Index, Index j) { return s + table[j]; };
  const auto taken = detail::take_part<ScorePart, std::remove_const_t<decltype(score)>>(causal{}, score);
  table[2] = 10;
  CHECK(taken(0.5f, 0, 0, 0, 2) == 10.5f);
}

TEST_CASE("parts: class template argument deduction copies a functor", "[parts]") {
  const longspan::softmax_attention attend{causal{}, softcap{30}};
  const longspan::softmax_attention copy = attend, other{attend};
  STATIC_REQUIRE(std::is_same_v<decltype(copy), decltype(attend)>);
  STATIC_REQUIRE(std::is_same_v<decltype(other), decltype(attend)>);
  CHECK(copy.score.cap == 30);
}
