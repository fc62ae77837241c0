// Landmark attention by matrix tiles, emulated and on the hardware where there is one, against its definition.
#include "longspan/detail/landmark/amx_tile.hpp"

#include "longspan/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"
#include "support/landmark_oracle.hpp"
#include "support/tile_calls.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using namespace test;
using namespace longspan;
using Eigen::bfloat16;

template <class Unit, Mask M, Score S = unchanged, class E = serial>
void attend(Bf16Call<float>& call, const detail::LandmarkOptions& options, const M& mask, const S& score = {},
            const E& executor = {}) {
  run_on_tiles<Unit>(call, scale_of(call), executor, [&](const auto& problem, Index workers) {
    return detail::LandmarkForward<detail::AmxArithmetic<Unit>, bfloat16, bfloat16, bfloat16, float, M, S,
                                   no_position>(
        problem, options, mask, score, no_position{},
        detail::widest_block(options.landmarks, call.k.batch, call.k.rows), workers);
  });
}

detail::LandmarkOptions options_of(const landmarks& at) {
  detail::LandmarkOptions options;
  options.landmarks = at;
  return options;
}

constexpr Allowance rounded_weights{0x1p-8 + 3e-4, 2e-4};

}  // namespace

TEST_CASE("landmark by tiles: within the bound, for blocks of many lengths", "[amx]") {
  for_each_unit([]<class Unit>() {
    for_each_case(20, [](Random& random) {
      Shape shape = draw_shape(random);
      shape.q_len = std::min<Index>(shape.q_len, 100);
      if (random.chance(0.3)) shape.kv_len = random.between(129, 400);
      const Index mean = random.pick<Index>({1, 2, 3, 8, 17, 40, 64});
      const Landmarks at = random.chance(0.5) ? every(mean, shape.batch, shape.kv_len)
                                              : drawn_landmarks(mean, shape.batch, shape.kv_len, random);
      const LandmarkLists lists(at);
      if (detail::widest_block(lists.at(), shape.batch, shape.kv_len) > detail::tuning::keys_in_tile_block)
        return;
      const Values values = random.pick(all_values);
      INFO(shape.text() << " mean " << mean << " values=" << text_of(values));
      Bf16Call<float> call(shape, values, random);
      attend<Unit>(call, options_of(lists.at()), causal{});
      const Definition what{.sees = [](Index, Index, Index i, Index j) { return j <= i; }};
      check_against(exact_landmark_attention(what, at, call), call, rounded_weights);
      Bf16Call<float> open = call.unrun();
      attend<Unit>(open, options_of(lists.at()), window{.left = 60});
      const Definition narrow{.sees = [](Index, Index, Index i, Index j) { return i - 60 <= j; }};
      check_against(exact_landmark_attention(narrow, at, open), open, rounded_weights);
    });
  });
}

TEST_CASE("landmark by tiles: scores", "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(2);
    const Shape shape{1, 4, 2, 70, 150, 16, 24};
    const Landmarks at = drawn_landmarks(16, 1, shape.kv_len, random);
    const LandmarkLists lists(at);
    Bf16Call<float> call(shape, Values::normal, random);
    attend<Unit>(call, options_of(lists.at()), causal{}, softcap{3});
    Definition what{.sees = [](Index, Index, Index i, Index j) { return j <= i; }};
    what.score = [](double s, Index, Index, Index, Index) { return 3 * std::tanh(s / 3); };
    check_against(exact_landmark_attention(what, at, call), call, rounded_weights);
  });
}

TEST_CASE("landmark by tiles: NaN and infinity in what a query does not see, or in landmarks, have no effect",
          "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(3);
    Bf16Call<float> clean(Shape{1, 2, 1, 60, 300, 32, 16}, Values::normal, random);
    Bf16Call<float> spoilt = clean;
    for (const Index j : {270, 280, 299}) {
      for (Index c = 0; c < 32; ++c) spoilt.k.row(0, 0, j)[c] = static_cast<bfloat16>(NAN);
      spoilt.v.row(0, 0, j)[3] = static_cast<bfloat16>(INFINITY);
    }
    for (Index j = 24; j < 300; j += 25)
      spoilt.v.row(0, 0, j)[5] = static_cast<bfloat16>(NAN);  // of landmarks
    const detail::LandmarkOptions options = options_of(landmarks::every(25));
    attend<Unit>(clean, options, causal{});
    attend<Unit>(spoilt, options, causal{});
    Index wrong = 0;
    for (Index h = 0; h < 2; ++h) {
      for (Index i = 0; i < 30; ++i) {  // at the positions 240 to 269
        wrong += spoilt.lse(0, h, i) != clean.lse(0, h, i);
        for (Index c = 0; c < 16; ++c) wrong += spoilt.out.row(0, h, i)[c] != clean.out.row(0, h, i)[c];
      }
      for (Index i = 30; i < 60; ++i) wrong += !std::isnan(spoilt.out.row(0, h, i)[3]);
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("landmark by tiles: bits do not depend on threads", "[amx][bits]") {
  for_each_unit([]<class Unit>() {
    Random random(4);
    Bf16Call<float> one(Shape{2, 4, 2, 300, 300, 64, 64}, Values::peaked, random), five = one;
    const detail::LandmarkOptions options = options_of(landmarks::every(48));
    attend<Unit>(one, options, causal{});
    attend<Unit>(five, options, causal{}, unchanged{}, openmp{5});
    CHECK(one.same_outputs(five));
  });
}

TEST_CASE("landmark by tiles: blocks whose scores are far from those of their neighbours", "[amx][bits]") {
  for_each_unit([]<class Unit>() {
    Random random(6);
    const Index block = 23, n = 400;
    Bf16Call<float> call(Shape{1, 2, 1, 300, n, 32, 16}, Values::normal, random);
    // Scores of hundreds, above or below 0, in every third block each, and of thousands in one block.
    for (Index j = 0; j < n; ++j) {
      const float by = j / block == 7 ? 3000.0f : j / block % 3 == 0 ? 1.0f : 120.0f;
      for (Index c = 0; c < 32; ++c) {
        bfloat16& x = call.k.row(0, 0, j)[c];
        x = static_cast<bfloat16>(static_cast<float>(x) * by);
      }
    }
    const detail::LandmarkOptions options = options_of(landmarks::every(block));
    attend<Unit>(call, options, causal{});
    const Landmarks at = every(block, 1, n);
    const Definition what{.sees = [](Index, Index, Index i, Index j) { return j <= i; }};
    check_against(exact_landmark_attention(what, at, call), call, rounded_weights);

    // Fewer queries: other lanes, so other tiles seek the maximum of a block.
    Bf16Call<float> last(Shape{1, 2, 1, 41, n, 32, 16}, Values::normal, random);
    last.k = call.k;
    last.v = call.v;
    Index different = 0;
    for (Index h = 0; h < 2; ++h) {
      for (Index i = 0; i < 41; ++i) std::copy_n(call.q.row(0, h, 259 + i), 32, last.q.row(0, h, i));
    }
    attend<Unit>(last, options, causal{});
    for (Index h = 0; h < 2; ++h) {
      for (Index i = 0; i < 41; ++i) {
        different += last.lse(0, h, i) != call.lse(0, h, 259 + i);
        different +=
            !std::equal(last.out.row(0, h, i), last.out.row(0, h, i) + 16, call.out.row(0, h, 259 + i));
      }
    }
    CHECK(different == 0);
  });
}

#if defined(LONGSPAN_TARGETS_AMX)
TEST_CASE("landmark_attention: bfloat16 calls use the tiles of the hardware", "[amx]") {
  if (!has_tiles()) return;
  Random random(5);
  Bf16Call<float> call(Shape{1, 4, 2, 100, 200, 32, 32}, Values::normal, random), direct = call;
  call.run(landmark_attention{landmarks::every(32)});
  attend<detail::HardwareTiles>(direct, options_of(landmarks::every(32)), causal{});
  CHECK(call.same_outputs(direct));

  landmark_attention in_float{landmarks::every(32)};
  in_float.bf16_products = false;
  Bf16Call<float> exact = call.unrun();
  exact.run(in_float);
  CHECK_FALSE(call.same_outputs(exact));
}
#endif

#else

TEST_CASE("landmark by tiles: not for a target without AVX-512", "[amx]") {
  SUCCEED("matrix tiles and their emulation are used with AVX-512 only");
}

#endif
