// The masses of a landmark_cache compared with its reference, and caches of 16-bit types.
#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <utility>

#include "longspan/reference/landmark_cache.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using namespace longspan;

using Options = landmark_cache_options;

const StreamShape shape{2, 6, 2, 40, 35};

Call<float> drawn_call(Random& random) {
  return Call<float>(Shape{2, 6, 2, 120, 120, 40, 35}, Values::normal, random);
}

double largest_difference(const Call<float>& x, const Call<float>& y) {
  double most = 0;
  for (std::size_t n = 0; n < x.out.values.size(); ++n)
    most = std::max(most, std::abs(double(x.out.values[n]) - double(y.out.values[n])));
  return most;
}

/// Compares logarithms of sums; the log of an empty sum is -infinity.
bool near(double got, double wanted) { return got == wanted || std::abs(got - wanted) < 2e-5; }

}  // namespace

TEST_CASE("landmark_cache: masses match the reference", "[stream][oracle][slow]") {
  for_each_case(12, [](Random& random) {
    const Options options{.block_size = random.between(2, 11),
                          .top_k = random.between(0, 3),
                          .window_blocks = random.between(0, 1),
                          .capacity = random.chance(0.3) ? 6 : 0,
                          .mass_sample = random.between(1, 12)};
    Call<float> call = drawn_call(random), exact = call.unrun();
    const auto check = [&](auto cache, auto reference) {
      for (Index first = 0; first < 120;) {
        const Index count = std::min(120 - first, random.between(1, 30));
        extend(cache, call, first, count);
        extend(reference, exact, first, count);
        for (Index h = 0; h < 6; ++h) {
          for (Index i = 0; i < count; ++i) {
            const LandmarkMass got = cache.mass(1, h, i), wanted = reference.mass(1, h, i);
            INFO(got.attended << ' ' << wanted.attended << ' ' << got.dropped << ' ' << wanted.dropped);
            REQUIRE(near(got.attended, wanted.attended));
            REQUIRE(near(got.dropped, wanted.dropped));
          }
        }
        first += count;
      }
    };
    const rotary turned(Pairing::interleaved, 100);
    check(landmark_cache<float, rotary>(shape, options, turned),
          reference::landmark_cache<rotary>(shape, options, turned));
    check(landmark_cache<float, rotary, exact_positions>(shape, options, turned),
          reference::landmark_cache<rotary, exact_positions>(shape, options, turned));
  });
}

TEST_CASE("landmark_cache: with a sample of all tokens the mass is that of softmax attention",
          "[stream][law]") {
  Random random(2);
  Call<float> call = drawn_call(random);
  const Options options{.block_size = 8, .top_k = 2, .mass_sample = 7};
  landmark_cache<float, rotary, exact_positions> cache(shape, options, rotary(Pairing::half_split));
  extend(cache, call, 0, 119);
  extend(cache, call, 119, 1);
  // Landmarks do not count as tokens.
  Call<float> tokens = call.unrun();
  for (Index i = 7; i < 120; i += 8) {
    for (Index b = 0; b < 2; ++b) {
      for (Index h = 0; h < 2; ++h)
        std::fill_n(tokens.k.row(b, h, i), 40, std::numeric_limits<float>::quiet_NaN());
    }
  }
  struct text_only {
    bool sees(Index i, Index j) const { return j <= i && (j + 1) % 8 != 0; }
  };
  tokens.run(softmax_attention{text_only{}, rotary(Pairing::half_split)});
  for (Index h = 0; h < 6; ++h) {
    const LandmarkMass mass = cache.mass(0, h, 0);
    const double whole = double(std::as_const(tokens.lse).view()(0, h, 119));
    CHECK(std::abs(std::log(std::exp(mass.attended) + std::exp(mass.dropped)) - whole) < 1e-5);
    CHECK(std::abs(mass.dropped_share() - std::exp(mass.dropped - whole)) < 1e-5);
    CHECK(mass.dropped_share() > 0.1);
  }
  landmark_cache<float> without(shape, {});
  CHECK(refusal([&] { without.mass(0, 0, 0); }).find("mass_sample is 0") != std::string::npos);
  CHECK(refusal([&] { landmark_cache<float>(shape, {.mass_sample = -1}); }).find("mass_sample is -1") !=
        std::string::npos);
}

TEST_CASE("landmark_cache: the tokens of a sample are spread over the block", "[stream][law]") {
  for (Index tokens = 0; tokens < 40; ++tokens) {
    for (Index wanted = 0; wanted < 45; ++wanted) {
      const auto sample = TokenSample::of(tokens, wanted);
      REQUIRE(sample.count == std::min(tokens, wanted));
      if (sample.count == 0) continue;
      const Index last = sample.first + (sample.count - 1) * sample.stride;
      REQUIRE(sample.first >= 0);
      REQUIRE(last < tokens);
      REQUIRE(std::abs(sample.first - (tokens - 1 - last)) <= 1);
    }
  }
}

TEMPLATE_TEST_CASE("landmark_cache: with 16-bit numbers 16-bit blocks change nothing", "[stream][types]",
                   Eigen::bfloat16, Eigen::half) {
  Random random(3);
  Call<float> call = drawn_call(random);
  for (auto* values : {&call.k.values, &call.v.values}) {
    for (float& x : *values) x = static_cast<float>(static_cast<TestType>(x));
  }
  Call<float> own = call.unrun();
  const Options options{.block_size = 7, .top_k = 3, .capacity = 9, .mass_sample = 2};
  landmark_cache<float> wide(shape, options);
  landmark_cache<TestType> narrow(shape, options);
  for (Index i = 0; i < 120; i += 15) {
    extend(wide, call, i, 15);
    extend(narrow, own, i, 15);
    for (Index h = 0; h < 6; ++h) {
      const auto x = wide.retrieved(1, h, 14), y = narrow.retrieved(1, h, 14);
      REQUIRE(std::equal(x.begin(), x.end(), y.begin(), y.end()));
      REQUIRE(near(wide.mass(1, h, 14).dropped, narrow.mass(1, h, 14).dropped));
    }
  }
  CHECK(largest_difference(call, own) < 2e-6);
  CHECK(2 * narrow.bytes() == wide.bytes());

  // The state can be saved and loaded, but not by a cache of another type.
  std::stringstream file;
  narrow.save(file);
  landmark_cache<TestType> loaded(shape, options);
  loaded.load(file);
  CHECK(loaded.blocks() == narrow.blocks());
  file.clear();
  file.seekg(0);
  CHECK(file_refusal([&] { wide.load(file); }).find("in the file, wanted float") != std::string::npos);
}

TEMPLATE_TEST_CASE("landmark_cache: 16-bit blocks with positions are within one more rounding",
                   "[stream][types]", Eigen::bfloat16, Eigen::half) {
  Random random(4);
  Call<float> call = drawn_call(random), exact = call.unrun();
  const rotary turned(Pairing::half_split);
  const Options options{.block_size = 7, .top_k = 100};
  landmark_cache<TestType, rotary> cache(shape, options, turned);
  reference::landmark_cache<rotary> reference(shape, options, turned);
  for (Index i = 0; i < 120; i += 15) {
    extend(cache, call, i, 15);
    extend(reference, exact, i, 15);
  }
  // Roundings of k, of the encoded k and of v, half an ulp each; scores are about 1.
  const double ulp = std::ldexp(1.0, 1 - std::numeric_limits<TestType>::digits);
  CHECK(largest_difference(call, exact) < 8 * ulp);
}
