#include "longspan/detail/simd/score_strip.hpp"

#include <cstddef>
#include <type_traits>
#include <vector>

#include "longspan/score.hpp"
#include "support/catch.hpp"
#include "support/guarded_memory.hpp"
#include "support/random.hpp"

using longspan::additive_bias;
using longspan::Index;
using longspan::softcap;
namespace detail = longspan::detail;
using detail::lanes;
using detail::ScoreStrip;

namespace {

/// Checks that `score` changes the pairs of a random strip as it changes each pair alone, and nothing between them.
template <class Real, class S>
bool changes_its_pairs(const S& score, ScoreStrip<Real> strip, test::Random& random) {
  constexpr Index w = lanes<Real>;
  strip.stride = w * random.between(1, 3);
  std::vector<Real> scores(std::size_t(strip.keys * strip.stride));
  for (Real& s : scores) s = static_cast<Real>(random.normal());
  const std::vector<Real> before = scores;
  strip.scores = scores.data();
  detail::change_strip(score, strip);
  bool right = true;
  for (Index j = 0; j < strip.keys; ++j) {
    for (Index lane = 0; lane < strip.stride; ++lane) {
      const auto at = std::size_t(j * strip.stride + lane);
      const Real wanted =
          lane < w ? score(before[at], strip.batch, strip.head, strip.position(lane), strip.first_key + j)
                   : before[at];
      right = right && scores[at] == wanted;
    }
  }
  return right;
}

template <class Real, class T>
void check_bias() {
  test::for_each_case(150, [](test::Random& random) {
    const Index rows = random.pick<Index>({1, 3, 8, 21}), keys = random.between(1, 40);
    const test::GuardedArray<T> memory(2 * 2 * rows * keys, test::Guard::behind);
    for (Index n = 0; n < 2 * 2 * rows * keys; ++n)
      memory.data()[n] = static_cast<T>(static_cast<float>(random.normal()));
    const Index first = random.between(-9, 9);
    const additive_bias bias(longspan::compact_view<const T>(memory.data(), 2, 2, rows, keys), first);
    ScoreStrip<Real> strip;
    strip.batch = random.between(0, 1);
    strip.head = random.between(0, 1);
    strip.first_position = first + random.between(0, rows - 1);
    strip.queries = rows - (strip.first_position - first);
    strip.first_key = random.between(0, keys - 1);
    strip.keys = random.between(1, keys - strip.first_key);
    CHECK(changes_its_pairs<Real>(bias, strip, random));
    const auto doubled = [](Real s, Index, Index, Index, Index) { return 2 * s; };
    using longspan::operator|;
    CHECK(changes_its_pairs<Real>(bias | doubled, strip, random));
    CHECK(changes_its_pairs<Real>(doubled | bias | bias, strip, random));
  });
}

}  // namespace

TEMPLATE_TEST_CASE("change_strip: a bias changes each score of a strip as it changes a single score",
                   "[score_strip]", float, double) {
  check_bias<TestType, float>();
  check_bias<TestType, double>();
  check_bias<TestType, Eigen::bfloat16>();
  check_bias<TestType, Eigen::half>();
}

TEMPLATE_TEST_CASE("StripScore: satisfied by scores that contain a bias", "[score_strip]", float, double) {
  const auto lambda = [](float s, Index, Index, Index, Index) { return s; };
  STATIC_REQUIRE(detail::StripScore<additive_bias<float>, TestType>);
  STATIC_REQUIRE(detail::StripScore<decltype(softcap{} | additive_bias<float>{{}, 0}), TestType>);
  STATIC_REQUIRE(
      detail::StripScore<decltype(longspan::operator|(lambda, additive_bias<float>{{}, 0})), TestType>);
  STATIC_REQUIRE_FALSE(detail::StripScore<softcap, TestType>);
  STATIC_REQUIRE_FALSE(detail::StripScore<decltype(lambda), TestType>);
  STATIC_REQUIRE_FALSE(detail::StripScore<decltype(softcap{} | softcap{}), TestType>);
}
