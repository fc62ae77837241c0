#include "longspan/score.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "longspan/element.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/ulp.hpp"

using longspan::additive_bias;
using longspan::alibi;
using longspan::alibi_slopes;
using longspan::compact_view;
using longspan::Index;
using longspan::softcap;
using longspan::TensorView;
using longspan::unchanged;
namespace detail = longspan::detail;
using detail::lanes;
using detail::Packet;

namespace {

const std::vector<float> slopes{0.5f, 0.25f, 2.0f};

/// Compares a score on random packets of one head with the same score lane by lane: the worst error, in ulp of
/// the score or of `least`, whichever is larger.
template <class Real, class S>
Real worst_lane(const S& score, double spread, Real least = 0) {
  constexpr auto w = static_cast<std::size_t>(lanes<Real>);
  Real worst = 0;
  test::Random random(1);
  for (int round = 0; round < 2000; ++round) {
    const Index h = random.between(0, 2), j = random.between(0, 100000);
    std::vector<Real> s(w), distance(w), got(w);
    std::vector<Index> query(w);
    for (std::size_t lane = 0; lane < w; ++lane) {
      s[lane] = static_cast<Real>(spread * random.normal());
      query[lane] = j + random.between(-5000, 5000);
      distance[lane] = static_cast<Real>(query[lane] - j);
    }
    detail::store(got.data(),
                  score.on_packet(detail::load<Real>(s.data()), h, detail::load<Real>(distance.data())));
    for (std::size_t lane = 0; lane < w; ++lane) {
      const Real wanted = score(s[lane], Index{0}, h, query[lane], j);
      worst =
          std::max(worst, std::abs(got[lane] - wanted) / test::ulp<Real>(std::max(std::abs(wanted), least)));
    }
  }
  return worst;
}

}  // namespace

TEST_CASE("unchanged: returns every score, to the bit", "[score]") {
  STATIC_REQUIRE(unchanged{}(1.5f, 0, 0, 0, 0) == 1.5f);
  CHECK(unchanged{}(-0.0, 1, 2, 3, 4) == 0.0);
  CHECK(std::isnan(unchanged{}(std::numeric_limits<float>::quiet_NaN(), 0, 0, 0, 0)));
}

TEST_CASE("softcap: cap * tanh(s / cap)", "[score]") {
  CHECK(softcap{}.cap == 50);
  const softcap cap{2};
  CHECK(cap(0.0f, 0, 0, 0, 0) == 0.0f);
  CHECK(std::abs(cap(2.0, 0, 0, 0, 0) - 1.5231883119115297) < 1e-15);  // 2 tanh 1
  CHECK(cap(-3.0f, 0, 0, 0, 0) == -cap(3.0f, 0, 0, 0, 0));
  CHECK(cap(1000.0f, 0, 0, 0, 0) == 2.0f);
  CHECK(cap(-std::numeric_limits<float>::infinity(), 0, 0, 0, 0) == -2.0f);
  CHECK(std::abs(cap(1e-4, 0, 0, 0, 0) - 1e-4) < 1e-12);
  CHECK(std::isnan(cap(std::numeric_limits<double>::quiet_NaN(), 0, 0, 0, 0)));
}

TEST_CASE("alibi: subtracts the slope of the head for each step of distance, on both sides", "[score]") {
  const alibi score{slopes};
  CHECK(score(1.0f, 0, 0, 10, 10) == 1.0f);
  CHECK(score(1.0f, 0, 0, 10, 6) == -1.0f);
  CHECK(score(1.0f, 0, 0, 6, 10) == -1.0f);
  CHECK(score(1.0, 7, 1, 10, 6) == 0.0);
  CHECK(score(1.0, 0, 2, -3, 2) == -9.0);
}

TEST_CASE("alibi_slopes: follows the rule of the paper for every number of heads", "[score]") {
  CHECK(alibi_slopes(0).empty());
  CHECK(alibi_slopes(1) == std::vector<float>{0x1p-8f});
  CHECK(alibi_slopes(2) == std::vector<float>{0x1p-4f, 0x1p-8f});
  CHECK(alibi_slopes(8) ==
        std::vector<float>{0x1p-1f, 0x1p-2f, 0x1p-3f, 0x1p-4f, 0x1p-5f, 0x1p-6f, 0x1p-7f, 0x1p-8f});
  // 3 heads: the slopes of 2 heads, then the first of 4 heads. 6 heads: those of 4, then every second of 8.
  CHECK(alibi_slopes(3) == std::vector<float>{0x1p-4f, 0x1p-8f, 0x1p-2f});
  CHECK(alibi_slopes(6) == std::vector<float>{0x1p-2f, 0x1p-4f, 0x1p-6f, 0x1p-8f, 0x1p-1f, 0x1p-3f});

  const auto of_power = [](Index heads) {
    // A geometric sequence that starts at its own ratio.
    std::vector<double> row;
    const double ratio = std::pow(2.0, -8.0 / static_cast<double>(heads));
    for (double slope = ratio; static_cast<Index>(row.size()) < heads; slope *= ratio) row.push_back(slope);
    return row;
  };
  for (Index heads = 1; heads <= 40; ++heads) {
    Index power = 1;
    while (2 * power <= heads) power *= 2;
    std::vector<double> wanted = of_power(power);
    const std::vector<double> twice = of_power(2 * power);
    for (std::size_t n = 0; wanted.size() < static_cast<std::size_t>(heads); n += 2)
      wanted.push_back(twice[n]);
    const std::vector<float> got = alibi_slopes(heads);
    REQUIRE(got.size() == wanted.size());
    double worst = 0;
    for (std::size_t n = 0; n < got.size(); ++n) worst = std::max(worst, test::ulps(got[n], wanted[n]));
    INFO(heads << " heads");
    CHECK(worst <= 0.51);
  }
}

TEMPLATE_TEST_CASE("packet scores: each lane equals the scalar score", "[score]", float, double) {
  CHECK(worst_lane<TestType>(softcap{30}, 40) <= 16);
  CHECK(worst_lane<TestType>(softcap{0.5f}, 0.1) <= 16);
  CHECK(worst_lane<TestType>(alibi{slopes}, 10) <= 1);
  // If cap and slope cancel, the error is that of the capped score.
  CHECK(worst_lane<TestType>(softcap{30} | alibi{slopes}, 40, 30) <= 16);
  CHECK(worst_lane<TestType>(alibi{slopes} | softcap{1e6f}, 10) <= 16);
}

TEST_CASE("piped: applies the first score, then the second", "[score]") {
  const alibi slope{slopes};
  const softcap cap{2};
  CHECK((slope | cap)(5.0, 0, 0, 8, 0) == cap(1.0, 0, 0, 8, 0));
  CHECK((cap | slope)(5.0, 0, 0, 8, 0) == cap(5.0, 0, 0, 8, 0) - 4.0);
  const auto twice = [](float s, Index, Index, Index, Index) { return 2 * s; };
  const auto plus_key = [](float s, Index, Index, Index, Index j) { return s + static_cast<float>(j); };
  CHECK(longspan::operator|(twice, plus_key)(3.0f, 0, 0, 0, 1) == 7.0f);
  CHECK(longspan::operator|(plus_key, twice)(3.0f, 0, 0, 0, 1) == 8.0f);
  CHECK((slope | twice | plus_key)(5.0f, 0, 0, 8, 0) == 2.0f);
  CHECK((unchanged{} | plus_key)(5.0f, 0, 0, 8, 2) == 7.0f);
}

TEST_CASE("score: a lambda receives every index", "[score]") {
  const auto score = [](float s, Index b, Index h, Index i, Index j) {
    return s + static_cast<float>(1000 * b + 100 * h + 10 * i + j);
  };
  CHECK((unchanged{} | score)(0.5f, 1, 2, 3, 4) == 1234.5f);
}

TEMPLATE_TEST_CASE("additive_bias: may have any element type", "[score]", float, double, Eigen::bfloat16,
                   Eigen::half) {
  std::vector<TestType> memory;
  for (int n = 0; n < 2 * 3 * 4 * 5; ++n) memory.push_back(static_cast<TestType>(static_cast<float>(n)));
  const TensorView<const TestType> tensor = compact_view<const TestType>(memory.data(), 2, 3, 4, 5);
  const additive_bias bias(tensor);  // row 0 belongs to position 5 - 4 = 1
  STATIC_REQUIRE(std::is_same_v<decltype(bias), const additive_bias<TestType>>);
  CHECK(bias.first_query == 1);
  CHECK(bias(0.5f, 0, 0, 1, 0) == 0.5f);
  CHECK(bias(0.5f, 1, 2, 4, 3) == 118.5f);
  CHECK(bias(0.5, 1, 0, 2, 1) == 66.5);
  const additive_bias at_10(tensor, 10);
  CHECK(at_10(0.0f, 1, 2, 13, 3) == 118.0f);
}

TEST_CASE("additive_bias: a dimension of 1 is repeated", "[score]") {
  std::vector<float> memory{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  const auto bias = [&](Index batch, Index heads, Index rows, Index cols) {
    return additive_bias(compact_view(memory.data(), batch, heads, rows, cols), 0);
  };
  CHECK(bias(1, 1, 3, 4)(0.0f, 5, 7, 2, 3) == 11);
  CHECK(bias(1, 3, 1, 4)(0.0f, 5, 2, 9, 1) == 9);
  CHECK(bias(3, 1, 1, 4)(0.0f, 2, 7, 9, 1) == 9);
  CHECK(bias(3, 2, 1, 2)(0.0f, 2, 1, 9, 1) == 11);
  CHECK(bias(1, 1, 1, 12)(0.0f, 5, 7, 100, 11) == 11);
  CHECK(additive_bias(compact_view(memory.data(), 1, 1, 1, 12)).first_query == 11);
}

TEST_CASE("additive_bias: -infinity hides a key, and strides are used", "[score]") {
  std::vector<float> memory(64, 3.0f);
  const TensorView<float> rows_apart{memory.data() + 1, 1, 2, 2, 3, 0, 30, 10};
  memory[1 + 30 + 10 + 2] = -std::numeric_limits<float>::infinity();
  const additive_bias bias(rows_apart);
  CHECK(bias(1.0f, 0, 1, 2, 2) == -std::numeric_limits<float>::infinity());
  CHECK(bias(1.0f, 0, 1, 2, 1) == 4.0f);
}

TEST_CASE("ScoreValue: the type that a score function declares, or that of the arithmetic", "[score]") {
  const auto of_float = [](float s, Index, Index, Index, Index) { return s; };
  const auto of_double = [](const double& s, Index, Index, Index, Index) noexcept { return s; };
  const auto of_any = [](auto s, Index, Index, Index, Index) { return s; };
  struct overloaded {
    float operator()(float s, Index, Index, Index, Index) const { return s; }
    double operator()(double s, Index, Index, Index, Index) const { return s; }
  };
  STATIC_REQUIRE(std::is_same_v<detail::ScoreValue<decltype(of_float), double>, float>);
  STATIC_REQUIRE(std::is_same_v<detail::ScoreValue<std::remove_const_t<decltype(of_float)>, double>, float>);
  STATIC_REQUIRE(std::is_same_v<detail::ScoreValue<std::remove_const_t<decltype(of_double)>, float>, double>);
  STATIC_REQUIRE(std::is_same_v<detail::ScoreValue<std::remove_const_t<decltype(of_any)>, float>, float>);
  STATIC_REQUIRE(std::is_same_v<detail::ScoreValue<std::remove_const_t<decltype(of_any)>, double>, double>);
  STATIC_REQUIRE(std::is_same_v<detail::ScoreValue<overloaded, double>, double>);
  STATIC_REQUIRE(std::is_same_v<detail::ScoreValue<softcap, double>, double>);
  STATIC_REQUIRE(std::is_same_v<detail::ScoreValue<softcap, float>, float>);
}

TEMPLATE_TEST_CASE("PacketScore: only if every part satisfies it", "[score]", float, double) {
  using P = Packet<TestType>;
  const auto lambda = [](float s, Index, Index, Index, Index) { return s; };
  STATIC_REQUIRE(detail::PacketScore<softcap, P>);
  STATIC_REQUIRE(detail::PacketScore<alibi, P>);
  STATIC_REQUIRE(detail::PacketScore<decltype(softcap{} | alibi{}), P>);
  STATIC_REQUIRE(detail::PacketScore<decltype(softcap{} | alibi{} | softcap{}), P>);
  STATIC_REQUIRE_FALSE(detail::PacketScore<decltype(lambda), P>);
  STATIC_REQUIRE_FALSE(detail::PacketScore<decltype(softcap{} | lambda), P>);
  STATIC_REQUIRE_FALSE(detail::PacketScore<additive_bias<float>, P>);
}

namespace {

std::string refused(const auto& score, const longspan::CallSizes& sizes) {
  return test::refusal([&] { detail::check_part(score, sizes); });
}

}  // namespace

TEST_CASE("softcap: a cap that is not a positive finite number is refused", "[score][errors]") {
  const longspan::CallSizes sizes{"softmax_attention", 1, 2, 0, 3, 3};
  CHECK(refused(softcap{0}, sizes) ==
        "longspan: softmax_attention: softcap.cap is 0, wanted a positive finite number; a model "
        "without "
        "a cap omits softcap");
  for (const float cap : {-1.0f, -0.0f, std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()})
    CHECK(refused(softcap{cap}, sizes).find("softcap.cap is ") != std::string::npos);
  for (const float cap : {50.0f, std::numeric_limits<float>::min(), std::numeric_limits<float>::max()})
    CHECK(refused(softcap{cap}, sizes) == "");
}

TEST_CASE("alibi: needs one finite slope for each query head", "[score][errors]") {
  const longspan::CallSizes sizes{"softmax_attention", 1, 3, 0, 3, 3};
  CHECK(refused(alibi{slopes}, sizes) == "");
  const std::vector<float> four(4), odd{1, std::numeric_limits<float>::quiet_NaN(), 1},
      far{1, 1, -std::numeric_limits<float>::infinity()};
  CHECK(refused(alibi{}, sizes) ==
        "longspan: softmax_attention: the number of alibi.slopes is 0, wanted 3, one for each query head");
  CHECK(refused(alibi{four}, sizes) ==
        "longspan: softmax_attention: the number of alibi.slopes is 4, wanted 3, one for each query head");
  CHECK(refused(alibi{odd}, sizes) ==
        "longspan: softmax_attention: one of alibi.slopes is nan, wanted a finite number");
  CHECK(refused(alibi{far}, sizes) != "");
  // Composed scores check both parts, and a score without `check` accepts every call.
  const auto lambda = [](float s, Index, Index, Index, Index) { return s; };
  CHECK(refused(softcap{} | alibi{four}, sizes) == refused(alibi{four}, sizes));
  CHECK(refused(alibi{four} | lambda, sizes) == refused(alibi{four}, sizes));
  CHECK(refused(unchanged{} | lambda, sizes) == "");
}

TEST_CASE("additive_bias: refused if it lacks a number for some query and key of a call", "[score][errors]") {
  const std::vector<float> memory(2 * 3 * 8 * 9);
  const auto text = [&](std::vector<Index> shape, Index first_query, longspan::CallSizes sizes) {
    return refused(
        additive_bias(compact_view(memory.data(), shape[0], shape[1], shape[2], shape[3]), first_query),
        sizes);
  };
  // 4 queries at positions 2 .. 5 against 6 keys
  const longspan::CallSizes sizes{"softmax_attention", 2, 3, 2, 4, 6};
  CHECK(text({2, 3, 4, 6}, 2, sizes) == "");
  CHECK(text({1, 1, 1, 6}, -99, sizes) == "");
  CHECK(text({2, 3, 8, 9}, 0, sizes) == "");
  CHECK(text({2, 3, 8, 9}, -2, sizes) == "");
  CHECK(text({2, 3, 4, 5}, 2, sizes) ==
        "longspan: softmax_attention: additive_bias.bias is [2, 3, 4, 5], wanted [1 or 2, 1 or 3, 1 or "
        "q_len, at "
        "least 6]");
  CHECK(text({1, 1, 1, 5}, 2, sizes) != "");
  CHECK(text({2, 2, 4, 6}, 2, sizes) != "");
  CHECK(text({0, 3, 4, 6}, 2, sizes) != "");
  CHECK(text({2, 3, 3, 6}, 2, sizes) ==
        "longspan: softmax_attention: additive_bias.bias is [2, 3, 3, 6] with first_query 2, wanted a row "
        "for each "
        "of the 4 queries from position 2 on");
  CHECK(text({2, 3, 4, 6}, 1, sizes) != "");
  CHECK(text({2, 3, 4, 6}, 3, sizes) != "");
  CHECK(text({2, 3, 8, 9}, -3, sizes) != "");
  CHECK(text({2, 3, 8, 9}, std::numeric_limits<Index>::min(), sizes) != "");
  CHECK(text({2, 3, 8, 9}, std::numeric_limits<Index>::max(), sizes) != "");
  CHECK(text({2, 3, -4, 6}, 2, sizes) ==
        "longspan: softmax_attention: additive_bias.bias is [2, 3, -4, 6], wanted no negative size");
  CHECK(refused(additive_bias(TensorView<const float>{nullptr, 1, 1, 4, 6, 0, 0, 6}, 2), sizes) ==
        "longspan: softmax_attention: additive_bias.bias is [1, 1, 4, 6], wanted memory for its elements, "
        "not null");
  // The constructor of a stream checks with no query and no key.
  CHECK(text({2, 3, 8, 9}, 0, {"kv_cache", 2, 3, 0, 0, 0}) == "");
  CHECK(text({2, 2, 8, 9}, 0, {"kv_cache", 2, 3, 0, 0, 0}) != "");
}

TEST_CASE("Score: the types that satisfy it", "[score]") {
  const auto lambda = [](float s, Index, Index, Index, Index) { return s; };
  const auto of_double = [](double s, Index, Index, Index, Index) { return s; };
  const auto too_few = [](float s, Index, Index) { return s; };
  const auto no_number = [](float, Index, Index, Index, Index) { return "text"; };
  STATIC_REQUIRE(longspan::Score<unchanged>);
  STATIC_REQUIRE(longspan::Score<decltype(lambda)>);
  STATIC_REQUIRE(longspan::Score<decltype(of_double)>);
  STATIC_REQUIRE(longspan::Score<additive_bias<Eigen::half>>);
  STATIC_REQUIRE_FALSE(longspan::Score<decltype(too_few)>);
  STATIC_REQUIRE_FALSE(longspan::Score<decltype(no_number)>);
  STATIC_REQUIRE_FALSE(longspan::Score<longspan::causal>);
  STATIC_REQUIRE_FALSE(longspan::Score<float>);
}
