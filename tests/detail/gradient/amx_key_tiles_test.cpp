// The backward pass by matrix tiles, emulated and on the hardware.
#include "longspan/detail/gradient/amx_key_tiles.hpp"

#include "support/catch.hpp"
#include "support/tile_calls.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "longspan/detail/gradient/backward.hpp"
#include "longspan/detail/gradient/dilated.hpp"
#include "longspan/softmax_attention.hpp"
#include "support/gauge.hpp"
#include "support/gradient.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::causal;
using longspan::everything;
using longspan::unchanged;

/// Gradients of float, so that they are not rounded again.
using Bf16Gradient = GradientCall<bfloat16, bfloat16, bfloat16, bfloat16, float, float, float>;

/// The forward call in float arithmetic, and the backward call on the tiles of `Unit`.
template <class Unit, class M, class S, class E>
void differentiate(Bf16Gradient& call, const M& mask, const S& score, const E& executor) {
  longspan::softmax_attention<M, S> attend;
  attend.mask = mask;
  attend.score = score;
  attend.bf16_products = false;
  call.forward.run(attend, longspan::serial{});
  const auto& in = std::as_const(call.forward);
  const auto& of_out = std::as_const(call.dout);
  const auto problem = longspan::detail::checked_gradient("test", in.q.view(), in.k.view(), in.v.view(),
                                                          in.out.view(), in.lse.view(), of_out.view(),
                                                          longspan::detail::no_rows<const float>(),
                                                          call.dq.view(), call.dk.view(), call.dv.view())
                           .at("test", longspan::queries_end_at_keys, std::nullopt);
  longspan::Workspace workspace;
  longspan::detail::run_without_denormals(executor, [&](const auto& where) {
    using On = std::remove_cvref_t<decltype(where)>;
    const longspan::detail::WithTiles<Unit, On> on(where);
    using Tiles = longspan::detail::AmxKeyTiles<Unit, M, S>;
    longspan::detail::Backward<Tiles, std::remove_cvref_t<decltype(problem)>, M, S, longspan::no_position>(
        problem, mask, score, longspan::no_position{}, on.workers())
        .run(on, workspace);
  });
}

/// The error that the tiles add to weights and to their gradients, relative to them.
constexpr double rounding = 0x1p-8;

template <class Unit, class M = everything, class S = unchanged>
void check(const Shape& shape, const Definition& what, const M& mask = {}, const S& score = {}) {
  INFO(shape.text());
  Random random(21);
  Bf16Gradient call(shape, Values::normal, random);
  differentiate<Unit>(call, mask, score, longspan::openmp{2});
  check_gradient(what, call, {{}, rounding});
}

}  // namespace

TEST_CASE("backward pass by matrix tiles: within the error bound", "[amx][gauge]") {
  for_each_unit([]<class Unit>() {
    Definition of_causal;
    of_causal.sees = [](Index, Index, Index i, Index j) { return j <= i; };
    check<Unit>(Shape{1, 1, 1, 32, 48, 32, 32}, {});
    check<Unit>(Shape{1, 2, 1, 1, 1, 1, 1}, {});
    check<Unit>(Shape{2, 4, 2, 33, 200, 40, 17}, {});
    check<Unit>(Shape{1, 2, 1, 205, 205, 64, 64}, of_causal, causal{});
    check<Unit>(Shape{1, 1, 1, 250, 97, 16, 80}, {});
    Definition of_window;
    of_window.sees = [](Index, Index, Index i, Index j) { return j <= i && i - j <= 20; };
    check<Unit>(Shape{1, 1, 1, 130, 300, 33, 31}, of_window, causal{} & longspan::window{.left = 20});
    Definition of_cap = of_causal;
    of_cap.score = [](double s, Index, Index, Index, Index) { return 2 * std::tanh(s / 2); };
    of_cap.derivative = [](double s, Index, Index, Index, Index) {
      const double t = std::tanh(s / 2);
      return 1 - t * t;
    };
    check<Unit>(Shape{1, 2, 2, 70, 110, 24, 24}, of_cap, causal{}, longspan::softcap{2});
  });
}

TEST_CASE("backward pass by matrix tiles: 2^11 queries and more are summed in chunks", "[amx][gauge]") {
#if defined(LONGSPAN_TARGETS_AMX)
  if (!has_tiles()) return;
  check<longspan::detail::HardwareTiles>(Shape{1, 2, 1, 2300, 70, 8, 8}, {});
#else
  SUCCEED("no hardware tiles in this build");
#endif
}

TEST_CASE("backward pass by matrix tiles: bits do not depend on the threads", "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(22);
    Bf16Gradient call(Shape{1, 4, 2, 230, 430, 40, 24}, Values::normal, random);
    differentiate<Unit>(call, causal{}, unchanged{}, longspan::serial{});
    for (const Index threads : {2, 3, 7}) {
      Bf16Gradient again = call;
      differentiate<Unit>(again, causal{}, unchanged{}, longspan::openmp{threads});
      CHECK(again.same_gradients(call));
    }
  });
}

TEST_CASE("backward pass by matrix tiles: hardware and emulation have the same bits", "[amx]") {
#if defined(LONGSPAN_TARGETS_AMX)
  if (!has_tiles()) return;
  Random random(23);
  Bf16Gradient call(Shape{1, 2, 1, 230, 230, 40, 24}, Values::normal, random);
  differentiate<longspan::detail::HardwareTiles>(call, causal{}, unchanged{}, longspan::serial{});
  Bf16Gradient emulated = call;
  differentiate<longspan::detail::EmulatedTiles>(emulated, causal{}, unchanged{}, longspan::serial{});
  CHECK(emulated.same_gradients(call));
#else
  SUCCEED("no hardware tiles in this build");
#endif
}

TEST_CASE("backward pass by matrix tiles: hidden keys and queries may be NaN", "[amx][masked]") {
  for_each_unit([]<class Unit>() {
    const std::vector<Index> kept{60};
    const auto mask = causal{} & longspan::padding{kept};
    Random random(24);
    const Shape shape{1, 1, 1, 100, 100, 20, 20};
    Bf16Gradient zeros(shape, Values::normal, random);
    const auto fill = [](Tensor<bfloat16>& x, Index from, float value) {
      for (Index i = from; i < x.rows; ++i) std::fill_n(x.row(0, 0, i), x.cols, static_cast<bfloat16>(value));
    };
    fill(zeros.forward.k, 60, 0);
    fill(zeros.forward.v, 60, 0);
    Bf16Gradient poisoned = zeros;
    fill(poisoned.forward.k, 60, NAN);
    fill(poisoned.forward.v, 60, std::numeric_limits<float>::infinity());
    differentiate<Unit>(zeros, mask, unchanged{}, longspan::serial{});
    differentiate<Unit>(poisoned, mask, unchanged{}, longspan::serial{});
    CHECK(poisoned.same_gradients(zeros));
    for (Index j = 60; j < 100; ++j) CHECK(zeros.dk.row(0, 0, j)[3] == 0.0f);

    // A query that is NaN reaches the keys that it sees, and no others.
    Bf16Gradient query(shape, Values::normal, random);
    Bf16Gradient clean = query;
    std::fill_n(query.dout.row(0, 0, 40), 20, static_cast<bfloat16>(NAN));
    std::fill_n(clean.dout.row(0, 0, 40), 20, bfloat16(0));
    differentiate<Unit>(query, causal{}, unchanged{}, longspan::serial{});
    differentiate<Unit>(clean, causal{}, unchanged{}, longspan::serial{});
    for (Index j = 0; j < 100; ++j) {
      CHECK(std::isnan(query.dv.row(0, 0, j)[5]) == (j <= 40));
      if (j > 40) CHECK(query.dv.row(0, 0, j)[5] == clean.dv.row(0, 0, j)[5]);
    }
  });
}

#else

TEST_CASE("backward pass by matrix tiles: needs AVX-512", "[amx]") {
  SUCCEED("there are no tiles, emulated or not, without AVX-512");
}

#endif
