// Keys that matrix tiles cannot read in place: position-encoded ones. Emulated, and in hardware if the machine has it.
#include "longspan/detail/tile/amx_key_block.hpp"

#include "longspan/detail/attend.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"
#include "support/tile_calls.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <algorithm>
#include <utility>
#include <vector>

namespace {

using namespace test;
using namespace longspan;
using Eigen::bfloat16;

template <class Unit, class To, Mask M, Position P, class E = serial>
void attend(Bf16Call<To>& call, const M& mask, const P& position, const E& executor = {}) {
  using Keys = detail::TensorKeys<bfloat16, bfloat16>;
  const Keys keys{std::as_const(call.k).view(), std::as_const(call.v).view()};
  const unchanged score;
  run_on_tiles<Unit>(call, scale_of(call), executor, [&](const auto& problem, Index workers) {
    return detail::Forward<detail::AmxArithmetic<Unit>, bfloat16, bfloat16, bfloat16, To, Keys, M, unchanged,
                           P>(problem, keys, mask, score, position, workers);
  });
}

/// Encodes rows in float, the first of them at position `first`, and rounds them to bfloat16.
template <class P>
void encode_and_round(Tensor<bfloat16>& x, const P& position, Index first, Role role) {
  Tensor<float> rows(x.batch, x.heads, x.rows, x.cols);
  std::copy(x.values.begin(), x.values.end(), rows.values.begin());
  encode_positions(rows.view(), position, first, role);
  std::transform(rows.values.begin(), rows.values.end(), x.values.begin(),
                 [](float number) { return static_cast<bfloat16>(number); });
}

template <class Unit, class P>
void check_encoding(const Shape& shape, const P& position, Random& random) {
  INFO(shape.text());
  Bf16Call<float> call(shape, random.pick({Values::normal, Values::peaked}), random), before = call;
  attend<Unit>(call, causal{}, position);
  encode_and_round(before.q, position, shape.kv_len - shape.q_len, Role::query);
  encode_and_round(before.k, position, 0, Role::key);
  attend<Unit>(before, causal{}, no_position{});
  CHECK(call.same_outputs(before));
}

/// An encoding without the optional members of Position.
struct Stretching {
  template <class Real>
  void encode(MatrixView<Real> rows, Index first, Role role) const {
    for (Index i = 0; i < rows.rows; ++i) {
      for (Index c = 0; c < rows.cols; ++c)
        rows.row(i)[c] *= role == Role::key ? static_cast<Real>(1 + (first + i) % 3) : Real(0.25);
    }
  }
  void check(Index) const {}
};

}  // namespace

TEST_CASE("amx: calls with a position have the bits of calls with encoded rows rounded to bfloat16",
          "[amx][bits][position]") {
  for_each_unit([]<class Unit>() {
    for_each_case(8, [](Random& random) {
      Shape shape = draw_shape(random);
      shape.head_dim = random.pick<Index>({2, 6, 16, 34, 64, 80, 128});
      const Pairing pairing = random.pick({Pairing::interleaved, Pairing::half_split});
      check_encoding<Unit>(shape, rotary(pairing, 10000, random.chance(0.5) ? 0 : 2), random);
      check_encoding<Unit>(shape, xpos(pairing, 512, 100), random);
      check_encoding<Unit>(shape, Stretching{}, random);
    });
  });
}

TEST_CASE("amx: encoded keys are kept from task to task and from head to head", "[amx][bits][position]") {
  for_each_unit([]<class Unit>() {
    Random random(2);
    // Several tasks to a head, more than one head, and more keys than are kept.
    check_encoding<Unit>(Shape{1, 4, 2, 1000, 1030, 32, 24}, rotary(Pairing::half_split), random);
    check_encoding<Unit>(Shape{2, 3, 1, 700, 700, 40, 16}, xpos(Pairing::interleaved), random);
    check_encoding<Unit>(Shape{1, 2, 2, 400, 9000, 256, 1}, rotary(Pairing::half_split), random);
  });
}

TEST_CASE("amx: with a position bits do not depend on threads and the split of the keys",
          "[amx][bits][position]") {
  for_each_unit([]<class Unit>() {
    Random random(3);
    for (const Shape& shape : {Shape{1, 1, 1, 33, 4200, 32, 32}, Shape{2, 4, 2, 500, 700, 72, 40}}) {
      INFO(shape.text());
      Bf16Call<bfloat16> one(shape, Values::rising, random), threads = one;
      attend<Unit>(one, causal{}, rotary(Pairing::half_split));
      attend<Unit>(threads, causal{}, rotary(Pairing::half_split), openmp{5});
      CHECK(one.same_outputs(threads));
    }
  });
}

TEST_CASE("amx: a hidden key that is NaN has no effect on other keys of its block", "[amx][bits][position]") {
  for_each_unit([]<class Unit>() {
    Random random(4);
    Bf16Call<float> clean(Shape{1, 2, 1, 70, 300, 32, 20}, Values::normal, random), spoilt = clean;
    std::fill_n(spoilt.k.row(0, 0, 299), 32, std::numeric_limits<bfloat16>::quiet_NaN());
    const auto before = causal{} & window{.left = 400, .right = -1};
    attend<Unit>(clean, before, rotary(Pairing::half_split));
    attend<Unit>(spoilt, before, rotary(Pairing::half_split));
    CHECK(clean.same_outputs(spoilt));
  });
}

#else

TEST_CASE("amx: key blocks need a target with AVX-512", "[amx]") {
  SUCCEED("matrix tiles and their emulation are used with AVX-512 only");
}

#endif
