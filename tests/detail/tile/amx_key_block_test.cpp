// Keys that matrix tiles cannot read in place: position-encoded ones and int8. Emulated, and in hardware if the machine
// has it.
#include "longspan/detail/tile/amx_key_block.hpp"

#include "longspan/detail/attend.hpp"
#include "longspan/dilated_attention.hpp"
#include "longspan/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"
#include "support/tile_calls.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
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

/// Rows of int8 and their scales, in pages of `page` rows.
struct Int8Keys {
  Tensor<std::int8_t> k, v;
  std::vector<float> k_scale, v_scale;
  Index page;

  Int8Keys(const Shape& s, Index in_page, Random& random)
      : k(s.batch, s.kv_heads, s.kv_len, s.head_dim),
        v(s.batch, s.kv_heads, s.kv_len, s.value_dim),
        page(in_page) {
    for (auto* rows : {&k, &v}) {
      for (std::int8_t& x : rows->values) x = static_cast<std::int8_t>(random.between(-127, 127));
    }
    for (Index n = 0; n < s.batch * s.kv_heads * s.kv_len; ++n) {
      k_scale.push_back(static_cast<float>(random.between(1, 1000)) * 1e-5f);
      v_scale.push_back(
          std::ldexp(static_cast<float>(random.between(100, 200)), int(random.between(-40, 10))));
    }
  }
  detail::KeyRun<std::int8_t, std::int8_t> run(Index b, Index h, KeyRange keys) const {
    const Index end = std::min(keys.end, (keys.begin / page + 1) * page), count = end - keys.begin;
    const Index at = (b * k.heads + h) * k.rows + keys.begin;
    return {{k.row(b, h, keys.begin), count, k.cols, k.cols},
            {v.row(b, h, keys.begin), count, v.cols, v.cols},
            true,
            k_scale.data() + at,
            v_scale.data() + at};
  }
  /// The numbers that the rows stand for.
  static Tensor<double> numbers(const Tensor<std::int8_t>& x, const std::vector<float>& scale) {
    Tensor<double> rows(x.batch, x.heads, x.rows, x.cols);
    for (std::size_t n = 0; n < rows.values.size(); ++n)
      rows.values[n] = double(x.values[n]) * double(scale[n / static_cast<std::size_t>(x.cols)]);
    return rows;
  }
};

template <class Unit, class To, Mask M, Score S = unchanged, class E = serial>
void attend_int8(Bf16Call<To>& call, const Int8Keys& keys, const M& mask, const S& score = {},
                 const E& executor = {}) {
  using Scaled = detail::RowScales<Unit>;
  const no_position position;
  const detail::Problem<bfloat16, std::int8_t, std::int8_t, To> problem{
      std::as_const(call.q).view(), keys.k.view(), keys.v.view(), call.out.view(), call.lse.view(),
      call.k.rows - call.q.rows,    scale_of(call)};
  if (call.out.values.empty()) return;
  Workspace workspace;
  detail::run_without_denormals(executor, [&](const auto& where) {
    const detail::WithTiles<Unit, std::remove_cvref_t<decltype(where)>> on(where);
    detail::Forward<detail::AmxArithmetic<Scaled>, bfloat16, std::int8_t, std::int8_t, To, Int8Keys, M, S,
                    no_position>(problem, keys, mask, score, position, on.workers())
        .run(on, workspace);
  });
}

template <class To>
void check_int8(const Definition& what, const Bf16Call<To>& call, const Int8Keys& keys) {
  const Tensor<double> k = Int8Keys::numbers(keys.k, keys.k_scale),
                       v = Int8Keys::numbers(keys.v, keys.v_scale);
  const Exact exact = exact_attention<bfloat16, double, double>(what, call.q.view(), k.view(), v.view());
  check_against(exact, call, {0x1p-8 + 1.5e-4, 1e-4});
}

}  // namespace

TEST_CASE("amx: rows of int8 have the error of bfloat16 products", "[amx]") {
  for_each_unit([]<class Unit>() {
    for_each_case(12, [](Random& random) {
      const Shape shape = draw_shape(random);
      INFO(shape.text());
      const Int8Keys keys(shape, random.pick<Index>({16, 48, 256, 1000}), random);
      Bf16Call<float> all(shape, random.pick(all_values), random);
      attend_int8<Unit>(all, keys, everything{});
      check_int8({}, all, keys);
      Bf16Call<bfloat16> few(shape, random.pick(all_values), random);
      attend_int8<Unit>(few, keys, causal{} & window{.left = 40}, softcap{2});
      check_int8({.sees = [](Index, Index, Index i, Index j) { return j <= i && i - j <= 40; },
                  .score = [](double s, Index, Index, Index, Index) { return 2 * std::tanh(s / 2); }},
                 few, keys);
    });
  });
}

TEST_CASE("amx: rows of int8 that are kept from task to task, on any number of threads", "[amx][bits]") {
  for_each_unit([]<class Unit>() {
    Random random(5);
    for (const Shape& shape : {Shape{1, 4, 2, 1000, 1030, 32, 24}, Shape{1, 1, 1, 33, 4200, 40, 16}}) {
      INFO(shape.text());
      const Int8Keys keys(shape, 256, random);
      Bf16Call<float> one(shape, Values::normal, random), threads = one;
      attend_int8<Unit>(one, keys, causal{});
      attend_int8<Unit>(threads, keys, causal{}, unchanged{}, openmp{3});
      CHECK(one.same_outputs(threads));
      check_int8({.sees = [](Index, Index, Index i, Index j) { return j <= i; }}, one, keys);
    }
  });
}

TEST_CASE("amx: an int8 row whose scale is NaN affects only the rows that see it", "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(6);
    const Shape shape{1, 2, 1, 70, 300, 32, 20};
    Int8Keys keys(shape, 256, random);
    Bf16Call<float> clean(shape, Values::normal, random), spoilt = clean;
    attend_int8<Unit>(clean, keys, causal{});
    keys.v_scale[250] = keys.k_scale[263] = keys.v_scale[299] = std::numeric_limits<float>::quiet_NaN();
    attend_int8<Unit>(spoilt, keys, causal{});
    Index wrong = 0;
    for (Index h = 0; h < 2; ++h) {
      for (Index i = 0; i < 70; ++i) {
        for (Index c = 0; c < 20; ++c) {
          const float x = spoilt.out.row(0, h, i)[c];
          wrong += 230 + i >= 250 ? !std::isnan(x) : x != clean.out.row(0, h, i)[c];
        }
      }
    }
    CHECK(wrong == 0);
  });
}

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

TEST_CASE("amx: encoded keys are kept from task to task and from head to head",
          "[slow][amx][bits][position]") {
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

TEST_CASE("amx: landmark and dilated attention with a position have the bits of calls with encoded rows",
          "[amx][bits][position]") {
  if (!test::has_tiles()) return;
  Random random(7);
  const auto check = [&](const auto& with, const auto& without) {
    Bf16Call<bfloat16> call(Shape{1, 4, 2, 330, 350, 40, 24}, Values::normal, random), before = call;
    call.run(with);
    encode_and_round(before.q, with.position, 20, Role::query);
    encode_and_round(before.k, with.position, 0, Role::key);
    before.run(without);
    CHECK(call.same_outputs(before));
  };
  const rotary turned(Pairing::half_split);
  check(landmark_attention{landmarks::every(33), causal{}, turned},
        landmark_attention{landmarks::every(33), causal{}});
  check(dilated_attention{{{64, 1}, {256, 3}}, causal{}, turned},
        dilated_attention{{{64, 1}, {256, 3}}, causal{}});
}

#if defined(LONGSPAN_TARGETS_AMX)
TEST_CASE("amx: hardware and emulation have the same bits with int8 and with a position", "[amx][bits]") {
  if (!test::has_tiles()) return;
  for_each_case(5, [](Random& random) {
    const Shape shape = draw_shape(random);
    const Int8Keys keys(shape, 256, random);
    Bf16Call<bfloat16> hardware(shape, random.pick(all_values), random), emulated = hardware;
    attend_int8<detail::HardwareTiles>(hardware, keys, causal{});
    attend_int8<detail::EmulatedTiles>(emulated, keys, causal{});
    CHECK(hardware.same_outputs(emulated));
    attend<detail::HardwareTiles>(hardware, causal{}, xpos(Pairing::half_split));
    attend<detail::EmulatedTiles>(emulated, causal{}, xpos(Pairing::half_split));
    CHECK(hardware.same_outputs(emulated));
  });
}
#endif

#else

TEST_CASE("amx: key blocks need a target with AVX-512", "[amx]") {
  SUCCEED("matrix tiles and their emulation are used with AVX-512 only");
}

#endif
