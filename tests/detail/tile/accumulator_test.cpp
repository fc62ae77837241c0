#include "longspan/detail/tile/accumulator.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using namespace longspan::detail;
using longspan::Index;
using test::Random;

/// An accumulator that owns its memory.
template <class Real>
struct Owned {
  static constexpr Index columns = 3, stride = 2 * lanes<Real>;
  std::vector<std::byte> memory = std::vector<std::byte>(4096);
  Accumulator<Real> state;

  Owned() {
    const auto at = reinterpret_cast<std::uintptr_t>(memory.data());
    Arena arena(memory.data() + (64 - at % 64) % 64);
    state = Accumulator<Real>::take(arena, columns, stride);
    REQUIRE(arena.used() <= memory.size() - 64);
    state.clear();
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  void randomise(Random& random) {
    for (Index i = 0; i < columns * stride; ++i) state.o[i] = static_cast<Real>(random.normal());
    for (Index i = 0; i < stride; ++i) {
      state.row_max[i] = static_cast<Real>(10 * random.normal());
      state.sum[i] = static_cast<Real>(1 + random.uniform());
    }
  }
  void copy(const Owned& other) {
    std::copy_n(other.state.o, columns * stride, state.o);
    std::copy_n(other.state.row_max, stride, state.row_max);
    std::copy_n(other.state.sum, stride, state.sum);
  }
  bool operator==(const Owned& other) const {
    return std::equal(state.o, state.o + columns * stride, other.state.o) &&
           std::equal(state.row_max, state.row_max + stride, other.state.row_max) &&
           std::equal(state.sum, state.sum + stride, other.state.sum);
  }
  /// The sum of the exponentials of the scores, in double: the meaning of `sum` and `o`.
  double sum_at(Index lane, double row_max) const { return double(state.sum[lane]) * scaled(lane, row_max); }
  double o_at(Index column, Index lane, double row_max) const {
    return double(state.o[column * stride + lane]) * scaled(lane, row_max);
  }

 private:
  double scaled(Index lane, double row_max) const {
    return std::exp((double(state.row_max[lane]) - row_max) / double(score_unit<Real>));
  }
};

template <class Real>
double worst_difference(const Owned<Real>& got, const Owned<Real>& a, const Owned<Real>& b) {
  double worst = 0;
  for (Index lane = 0; lane < Owned<Real>::stride; ++lane) {
    const double row_max = double(got.state.row_max[lane]);
    if (got.state.row_max[lane] != std::max(a.state.row_max[lane], b.state.row_max[lane])) return INFINITY;
    const double sum = a.sum_at(lane, row_max) + b.sum_at(lane, row_max);
    worst = std::max(worst, std::abs(double(got.state.sum[lane]) - sum) / sum);
    for (Index column = 0; column < Owned<Real>::columns; ++column) {
      const double x = a.o_at(column, lane, row_max), y = b.o_at(column, lane, row_max);
      worst = std::max(worst, std::abs(double(got.state.o[column * Owned<Real>::stride + lane]) - (x + y)) /
                                  (std::abs(x) + std::abs(y)));
    }
  }
  return worst;
}

}  // namespace

TEMPLATE_TEST_CASE("accumulator: merge adds the keys that both have absorbed", "[accumulator]", float,
                   double) {
  test::for_each_case(50, [](Random& random) {
    Owned<TestType> a, b, both, swapped;
    a.randomise(random);
    b.randomise(random);
    both.copy(a);
    both.state.merge(b.state);
    swapped.copy(b);
    swapped.state.merge(a.state);
    // Row maxima differ by up to about 50; the exponential of a float difference of this size has an error of 50 u.
    const double bound = 100 * double(std::numeric_limits<TestType>::epsilon());
    CHECK(worst_difference(both, a, b) <= bound);
    CHECK(worst_difference(swapped, a, b) <= bound);
  });
}

TEMPLATE_TEST_CASE("accumulator: merging an empty accumulator changes no bit", "[accumulator]", float,
                   double) {
  Random random(1);
  Owned<TestType> a, nothing, merged;
  a.randomise(random);
  merged.copy(a);
  merged.state.merge(nothing.state);
  CHECK(merged == a);
  merged.copy(nothing);
  merged.state.merge(a.state);
  CHECK(merged == a);
  merged.copy(nothing);
  merged.state.merge(nothing.state);
  CHECK(merged == nothing);
}

TEMPLATE_TEST_CASE("accumulator: NaN in a lane stays in that lane", "[accumulator]", float, double) {
  Random random(2);
  for (const bool in_other : {false, true}) {
    Owned<TestType> a, b, clean;
    a.randomise(random);
    b.randomise(random);
    clean.copy(a);
    clean.state.merge(b.state);
    (in_other ? b : a).state.row_max[1] = std::numeric_limits<TestType>::quiet_NaN();
    a.state.merge(b.state);
    for (Index lane = 0; lane < a.stride; ++lane) {
      CHECK((lane == 1 ? std::isnan(a.state.sum[lane]) : a.state.sum[lane] == clean.state.sum[lane]));
      CHECK((lane == 1 ? std::isnan(a.state.o[lane]) : a.state.o[lane] == clean.state.o[lane]));
    }
  }
}

TEMPLATE_TEST_CASE("accumulator: log-sum-exp of a lane", "[accumulator]", float, double) {
  CHECK(lse_of<TestType>(empty_max<TestType>, 0) == -std::numeric_limits<TestType>::infinity());
  CHECK(lse_of<TestType>(0, 1) == 0);
  CHECK(lse_of<TestType>(0, 8) == static_cast<TestType>(std::log(8.0)));
  CHECK(std::abs(lse_of<TestType>(3 * score_unit<TestType>, 1) - 3) <=
        3 * std::numeric_limits<TestType>::epsilon());
}

namespace {

/// One number for each key, absorbed by key blocks as in a tile; row_max is 0, so that everything is
/// exact.
struct Levels {
  std::vector<std::byte> memory = std::vector<std::byte>(std::size_t{1} << 16);
  LeveledAccumulator<float> state;

  explicit Levels(Index kv_len) {
    const auto at = reinterpret_cast<std::uintptr_t>(memory.data());
    Arena arena(memory.data() + (64 - at % 64) % 64);
    state = LeveledAccumulator<float>::take(arena, 1, lanes<float>, kv_len);
    REQUIRE(arena.used() <= memory.size() - 64);
    state.clear(lanes<float>);
  }
  void absorb(Index first_key, float value) {
    const Accumulator<float>& now = state.at_key(first_key);
    for (Index lane = 0; lane < now.stride; ++lane) {
      now.row_max[lane] = 0;
      now.sum[lane] += 1;
      now.o[lane] += value;
    }
  }
};

}  // namespace

TEST_CASE("accumulator: every key block enters the result exactly once", "[accumulator]") {
  for (const Index kv_len : {Index{1}, Index{128}, keys_in_chunk, keys_in_chunk + 1, 3 * keys_in_chunk,
                             keys_in_span, keys_in_span + 1, 2 * keys_in_span + keys_in_chunk + 5}) {
    for (const Index step :
         {Index{128}, Index{640}, Index{5 * 2048}, Index{1 << 17}}) {  // masks may skip blocks
      INFO("kv_len=" << kv_len << " step=" << step);
      Levels levels(kv_len);
      float blocks = 0, values = 0;
      for (Index first = 0; first < kv_len; first += step) {
        const float value = static_cast<float>(first / 128 % 64);
        levels.absorb(first, value);
        blocks += 1;
        values += value;
      }
      const Accumulator<float>& whole = levels.state.whole();
      CHECK(whole.sum[0] == blocks);
      CHECK(whole.o[lanes<float> - 1] == values);
      CHECK(whole.row_max[0] == 0);
    }
  }
}

TEST_CASE("accumulator: key chunks are summed separately, then together", "[accumulator]") {
  // 2^24 + 1 is 2^24 in float: a 1 is lost next to 2^24 in the same key chunk, but not in the next one, where the ones
  // are added first.
  Levels levels(2 * keys_in_chunk);
  levels.absorb(0, 0x1p24f);
  levels.absorb(128, 1);
  levels.absorb(256, 1);
  levels.absorb(keys_in_chunk, 1);
  levels.absorb(keys_in_chunk + 128, 1);
  CHECK(levels.state.whole().o[0] == 0x1p24f + 2);

  Levels spans(2 * keys_in_span);
  spans.absorb(0, 0x1p24f);
  spans.absorb(keys_in_chunk, 1);
  spans.absorb(keys_in_span, 1);
  spans.absorb(keys_in_span + keys_in_chunk, 1);
  CHECK(spans.state.whole().o[0] == 0x1p24f + 2);
}
