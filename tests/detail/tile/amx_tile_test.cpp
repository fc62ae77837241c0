// Compares attention with matrix tiles, emulated and in hardware if the machine has it, with the definition in double.
#include "longspan/detail/tile/amx_tile.hpp"

#include "longspan/detail/attend.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"
#include "support/tile_calls.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace {

using namespace test;
using namespace longspan;
using Eigen::bfloat16;

/// Keys and values in pages of `page` rows.
struct PagedKeys {
  detail::TensorKeys<bfloat16, bfloat16> tensors;
  Index page;

  detail::KeyRun<bfloat16, bfloat16> run(Index batch, Index kv_head, KeyRange keys) const {
    keys.end = std::min(keys.end, (keys.begin / page + 1) * page);
    return tensors.run(batch, kv_head, keys);
  }
};

template <class Unit, class To, Mask M, Score S, class E, class Keys>
void attend_over(Bf16Call<To>& call, const Keys& keys, const M& mask, const S& score, double scale,
                 const E& executor) {
  run_on_tiles<Unit>(call, scale, executor, [&](const auto& problem, Index workers) {
    return detail::Forward<detail::AmxArithmetic<Unit>, bfloat16, bfloat16, bfloat16, To, Keys, M, S,
                           no_position>(problem, keys, mask, score, no_position{}, workers);
  });
}

template <class Unit, class To, Mask M = everything, Score S = unchanged, class E = serial>
void attend(Bf16Call<To>& call, const M& mask = {}, const S& score = {}, const E& executor = {}) {
  const detail::TensorKeys<bfloat16, bfloat16> keys{std::as_const(call.k).view(),
                                                    std::as_const(call.v).view()};
  attend_over<Unit>(call, keys, mask, score, scale_of(call), executor);
}

/// A user-defined mask: every query sees its own pattern of keys.
struct Pattern {
  bool sees(Index, Index head, Index i, Index j) const {
    return j <= i && ((i + 3 * j + head) % 7 != 0 || j < 5);
  }
};

constexpr Allowance rounded_weights{0x1p-8 + 1.5e-4, 1e-4};

template <class To>
void check_exact(const Definition& what, const Bf16Call<To>& call) {
  check_against(exact_attention(what, call), call, rounded_weights);
}

}  // namespace

TEST_CASE("amx: errors are within the bound for all sizes and kinds of values", "[amx]") {
  for_each_unit([]<class Unit>() {
    for_each_case(15, [](Random& random) {
      const Shape shape = draw_shape(random);
      const Values values = random.pick(all_values);
      INFO(shape.text() << " values=" << text_of(values));
      Bf16Call<bfloat16> call(shape, values, random);
      attend<Unit>(call);
      check_exact({}, call);
      Bf16Call<float> wide(shape, values, random);
      attend<Unit>(wide, causal{});
      check_exact({.sees = [](Index, Index, Index i, Index j) { return j <= i; }}, wide);
    });
  });
}

TEST_CASE("amx: masks and score functions", "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(2);
    for (const Index q_len : {17, 50, 130}) {
      const Shape shape{2, 4, 2, q_len, 300, 40, 24};
      INFO(shape.text());
      Bf16Call<float> call(shape, Values::normal, random);
      attend<Unit>(call, Pattern{});
      check_exact({.sees = [](Index b, Index h, Index i, Index j) { return Pattern{}.sees(b, h, i, j); }},
                  call);
      Bf16Call<float> narrow = call.unrun();
      attend<Unit>(narrow, window{.left = 40});
      check_exact({.sees = [](Index, Index, Index i, Index j) { return i - 40 <= j; }}, narrow);
      Bf16Call<float> capped = call.unrun();
      attend<Unit>(capped, causal{}, softcap{2});
      check_exact({.sees = [](Index, Index, Index i, Index j) { return j <= i; },
                   .score = [](double s, Index, Index, Index, Index) { return 2 * std::tanh(s / 2); }},
                  capped);
      Bf16Call<float> tilted = call.unrun();
      attend<Unit>(tilted, everything{}, [](float s, Index, Index h, Index i, Index j) {
        return (i + j + h) % 5 == 0 ? -std::numeric_limits<float>::infinity()
                                    : s + 0.01f * static_cast<float>(j);
      });
      check_exact({.score =
                       [](double s, Index, Index h, Index i, Index j) {
                         return (i + j + h) % 5 == 0 ? -std::numeric_limits<double>::infinity()
                                                     : s + 0.01 * double(j);
                       }},
                  tilted);
    }
  });
}

TEST_CASE("amx: a hidden NaN or infinity has no effect, a visible one affects only rows that see it",
          "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(3);
    Bf16Call<float> clean(Shape{1, 2, 1, 70, 300, 32, 20}, Values::normal, random);
    Bf16Call<float> spoilt = clean;
    for (const Index j : {250, 263, 299}) {
      for (Index c = 0; c < 32; ++c) spoilt.k.row(0, 0, j)[c] = static_cast<bfloat16>(NAN);
      spoilt.v.row(0, 0, j)[3] = static_cast<bfloat16>(INFINITY);
    }
    attend<Unit>(clean, causal{});
    attend<Unit>(spoilt, causal{});
    Index wrong = 0, spoilt_rows = 0;
    for (Index h = 0; h < 2; ++h) {
      for (Index i = 0; i < 70; ++i) {
        const bool sees = 230 + i >= 250;
        spoilt_rows += sees;
        for (Index c = 0; c < 20; ++c) {
          const float x = spoilt.out.row(0, h, i)[c];
          wrong += sees ? !std::isnan(x) : x != clean.out.row(0, h, i)[c];
        }
        wrong += sees ? !std::isnan(spoilt.lse(0, h, i)) : spoilt.lse(0, h, i) != clean.lse(0, h, i);
      }
    }
    CHECK(spoilt_rows == 100);
    CHECK(wrong == 0);
  });
}

TEST_CASE("amx: queries that see no key have out = 0 and lse = -infinity", "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(4);
    Bf16Call<float> call(Shape{1, 1, 1, 40, 20, 16, 16}, Values::normal,
                         random);  // the first 20 queries are before key 0
    attend<Unit>(call, causal{});
    Index wrong = 0;
    for (Index i = 0; i < 20; ++i) {
      wrong += call.lse(0, 0, i) != -std::numeric_limits<float>::infinity();
      for (Index c = 0; c < 16; ++c) wrong += call.out.row(0, 0, i)[c] != 0;
    }
    CHECK(wrong == 0);
    check_exact({.sees = [](Index, Index, Index i, Index j) { return j <= i; }}, call);
  });
}

TEST_CASE("amx: scores that rise faster than the row max", "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(5);
    // Jumps of 30 in log2 within a step of 32 keys, from step to step, and from block to block.
    for (const Index period : {7, 40, 300}) {
      Bf16Call<float> call(Shape{1, 2, 1, 33, 900, 32, 32}, Values::normal, random);
      for (Index i = 0; i < 66; ++i)
        call.q.row(0, 0, i)[0] = static_cast<bfloat16>(i % 3 == 0 ? 8.0f : 0.25f);
      for (Index j = 0; j < 900; ++j)
        call.k.row(0, 0, j)[0] = static_cast<bfloat16>(14.0f * static_cast<float>(j / period));
      attend<Unit>(call);
      check_exact({}, call);
    }
  });
}

TEST_CASE("amx: scores of 1e9 and more", "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(6);
    for (const float size : {1e5f, 1e9f, 1e15f}) {
      Bf16Call<float> call(Shape{1, 1, 1, 20, 100, 32, 16}, Values::normal, random);
      for (bfloat16& x : call.q.values) x = static_cast<bfloat16>(static_cast<float>(x) * size);
      attend<Unit>(call);
      // One key has the whole weight: the output is its value.
      const Exact exact = exact_attention({}, call);
      INFO(size);
      CHECK(errors_of<float, float>(exact, std::as_const(call.out).view(), std::as_const(call.lse).view(),
                                    rounded_weights)
                .out <= most_error);
    }
  });
}

TEST_CASE("amx: the output of a query that sees one key is exactly its value", "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(7);
    Bf16Call<bfloat16> call(Shape{1, 3, 1, 41, 41, 32, 17}, Values::peaked, random);
    attend<Unit>(call, window{.left = 0, .right = 0});
    Index wrong = 0;
    for (Index h = 0; h < 3; ++h) {
      for (Index i = 0; i < 41; ++i) {
        for (Index c = 0; c < 17; ++c)
          wrong += static_cast<float>(call.out.row(0, h, i)[c]) != static_cast<float>(call.v.row(0, 0, i)[c]);
      }
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("amx: bits do not depend on threads, the split of the keys or other queries", "[amx][bits]") {
  for_each_unit([]<class Unit>() {
    Random random(8);
    for (const Shape& shape : {Shape{1, 1, 1, 33, 4200, 32, 32}, Shape{2, 4, 2, 100, 700, 72, 40}}) {
      INFO(shape.text());
      Bf16Call<bfloat16> whole(shape, Values::rising, random);
      Bf16Call<bfloat16> threads = whole, one = whole;
      attend<Unit>(whole, causal{});
      attend<Unit>(threads, causal{}, unchanged{}, openmp{5});
      CHECK(whole.same_outputs(threads));

      // The last 17 queries in a call of their own: each of them is then in another lane.
      Bf16Call<bfloat16> few(
          Shape{shape.batch, shape.heads, shape.kv_heads, 17, shape.kv_len, shape.head_dim, shape.value_dim});
      few.k = whole.k;
      few.v = whole.v;
      Index wrong = 0;
      for (Index b = 0; b < shape.batch; ++b) {
        for (Index h = 0; h < shape.heads; ++h) {
          for (Index i = 0; i < 17; ++i)
            std::copy_n(whole.q.row(b, h, shape.q_len - 17 + i), shape.head_dim, few.q.row(b, h, i));
        }
      }
      attend<Unit>(few, causal{});
      for (Index b = 0; b < shape.batch; ++b) {
        for (Index h = 0; h < shape.heads; ++h) {
          for (Index i = 0; i < 17; ++i) {
            wrong += few.lse(b, h, i) != whole.lse(b, h, shape.q_len - 17 + i);
            for (Index c = 0; c < shape.value_dim; ++c) {
              wrong += static_cast<float>(few.out.row(b, h, i)[c]) !=
                       static_cast<float>(whole.out.row(b, h, shape.q_len - 17 + i)[c]);
            }
          }
        }
      }
      CHECK(wrong == 0);
    }
  });
}

TEST_CASE("amx: keys in pages", "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(9);
    for (const Index page : {1, 16, 48, 300}) {
      Bf16Call<float> call(Shape{1, 2, 1, 50, page == 1 ? 40 : 610, 64, 48}, Values::peaked, random);
      const PagedKeys keys{{std::as_const(call.k).view(), std::as_const(call.v).view()}, page};
      attend_over<Unit>(call, keys, causal{}, unchanged{}, 0.125, serial{});
      INFO("page of " << page);
      check_exact({.sees = [](Index, Index, Index i, Index j) { return j <= i; }, .scale = 0.125}, call);
    }
  });
}

TEST_CASE("amx: rows at any stride and any address", "[amx]") {
  for_each_unit([]<class Unit>() {
    Random random(10);
    const Index keys = 45, queries = 20, d = 34;
    std::vector<bfloat16> q(20 * 100), k(45 * 100), v(45 * 100);
    for (auto* x : {&q, &k, &v}) {
      for (bfloat16& value : *x) value = static_cast<bfloat16>(static_cast<float>(random.normal()));
    }
    Bf16Call<float> compact(Shape{1, 1, 1, queries, keys, d, d});
    const auto strided = [](std::vector<bfloat16>& x, Index rows) {
      return TensorView<const bfloat16>{x.data() + 3, 1, 1, rows, d, 0, 0, 97};
    };
    const auto copy = [&](TensorView<const bfloat16> from, Tensor<bfloat16>& to) {
      for (Index i = 0; i < to.rows; ++i) std::copy_n(from.row(0, 0, i), d, to.row(0, 0, i));
    };
    copy(strided(q, queries), compact.q);
    copy(strided(k, keys), compact.k);
    copy(strided(v, keys), compact.v);
    Bf16Call<float> other = compact.unrun();
    attend<Unit>(compact);
    using Problem = detail::Problem<bfloat16, bfloat16, bfloat16, float>;
    const Problem problem{strided(q, queries), strided(k, keys), strided(v, keys),   other.out.view(),
                          other.lse.view(),    keys - queries,   1 / std::sqrt(34.0)};
    Workspace workspace;
    const detail::TensorKeys<bfloat16, bfloat16> rows{problem.k, problem.v};
    const detail::WithTiles<Unit, serial> on(serial{});
    using Pass = detail::Forward<detail::AmxArithmetic<Unit>, bfloat16, bfloat16, bfloat16, float,
                                 detail::TensorKeys<bfloat16, bfloat16>, everything, unchanged, no_position>;
    Pass(problem, rows, everything{}, unchanged{}, no_position{}, 1).run(on, workspace);
    CHECK(compact.same_outputs(other));
  });
}

#if defined(LONGSPAN_TARGETS_AMX)
TEST_CASE("amx: hardware and emulation have the same bits", "[amx][bits]") {
  if (!test::has_tiles()) return;
  for_each_case(10, [](Random& random) {
    Bf16Call<bfloat16> hardware(draw_shape(random), random.pick(all_values), random), emulated = hardware;
    attend<detail::HardwareTiles>(hardware, causal{});
    attend<detail::EmulatedTiles>(emulated, causal{});
    CHECK(hardware.same_outputs(emulated));
  });
}
#endif

#else

TEST_CASE("amx: not for a target without AVX-512", "[amx]") {
  SUCCEED("matrix tiles and their emulation are used with AVX-512 only");
}

#endif
