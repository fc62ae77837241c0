#include "longspan/infini_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "longspan/landmark_attention.hpp"
#include "longspan/reference/dilated_attention.hpp"
#include "longspan/reference/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/infini_oracle.hpp"
#include "support/refusal.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::causal;
using longspan::EmptyMemory;
using longspan::infini_attention;
using longspan::InfiniRule;
using longspan::Pairing;
using longspan::rotary;
using longspan::softmax_attention;

constexpr float infinity = std::numeric_limits<float>::infinity();

/// The allowed error in u: averages of values have errors of a few u, scores of about a dozen add more.
constexpr double most_u = 200;

template <class Attend, class Call>
void run(const Attend& attend, Call& call, Index threads = 2) {
  attend(std::as_const(call.q).view(), std::as_const(call.k).view(), std::as_const(call.v).view(),
         call.out.view(), longspan::openmp{threads});
}

/// A random beta of one of the allowed shapes.
template <class Attend>
std::vector<float> draw_beta(Random& random, const Shape& shape, Attend& attend) {
  const Index rows = random.chance(0.5) ? 1 : shape.heads, cols = random.chance(0.5) ? 1 : shape.value_dim;
  std::vector<float> beta(static_cast<std::size_t>(rows * cols));
  for (float& x : beta) x = static_cast<float>(2 * random.normal());
  if (random.chance(0.8)) attend.beta = {beta.data(), rows, cols, cols};
  return beta;
}

}  // namespace

TEMPLATE_TEST_CASE("infini_attention: matches its definition for all sizes", "[gauge][infini]", float,
                   double) {
  Random random(1);
  for (int n = 0; n < 150; ++n) {
    const Shape shape = draw_infini_shape(random);
    infini_attention attend;
    const std::vector<float> beta = draw_beta(random, shape, attend);
    attend.segment = random.pick(std::vector<Index>{1, 2, 5, 16, 48, 64, 100, 1000});
    attend.rule = random.chance(0.5) ? InfiniRule::linear : InfiniRule::delta;
    attend.empty_memory = random.chance(0.7) ? EmptyMemory::gate : EmptyMemory::bypass;
    Call<TestType> call(shape, Values::normal, random);
    run(attend, call);
    INFO(shape.text() << " segment=" << attend.segment << " rule=" << int(attend.rule)
                      << " empty_memory=" << int(attend.empty_memory));
    // The delta rule computes differences, whose errors do not average out.
    const double allowed = attend.rule == InfiniRule::linear ? most_u : 40 * most_u;
    CHECK(worst_in_u<TestType>(call.out, infini_oracle(attend, call), call.v) <= allowed);
  }
}

TEST_CASE("infini_attention: bfloat16 tensors add one rounding", "[gauge][infini]") {
  Random random(2);
  Call<bfloat16, bfloat16, bfloat16, float> call(Shape{1, 4, 2, 100, 100, 32, 24}, Values::normal, random);
  infini_attention attend;
  attend.segment = 30;
  run(attend, call);
  CHECK(worst_in_u<float>(call.out, infini_oracle(attend, call), call.v) <= most_u);
}

TEST_CASE("infini_attention: a closed gate gives local attention, an open one the memory", "[laws][infini]") {
  Random random(3);
  const Shape shape{1, 2, 1, 96, 96, 16, 16};
  Call<float> call(shape, Values::normal, random), local = call;
  infini_attention attend;
  attend.segment = 32;
  float beta = -infinity;
  attend.beta = longspan::scalar_gate(beta);
  run(attend, call);
  softmax_attention{causal{} & longspan::segments{32}}(std::as_const(local.q).view(),
                                                       std::as_const(local.k).view(),
                                                       std::as_const(local.v).view(), local.out.view());
  CHECK(worst_in_u<float>(call.out, infini_oracle(attend, call), call.v) <= most_u);
  for (std::size_t n = 0; n < call.out.values.size(); ++n)
    CHECK(std::abs(call.out.values[n] - local.out.values[n]) <= 1e-6f);

  // An open gate: the values of the query's own segment, including NaN, have no effect.
  beta = infinity;
  Call<float> changed = call;
  for (Index i = 64; i < 96; ++i) changed.v.row(0, 0, i)[0] = std::numeric_limits<float>::quiet_NaN();
  run(attend, call);
  run(attend, changed);
  CHECK(call.out == changed.out);
}

TEST_CASE("infini_attention: one segment with bypass gives local attention", "[laws][infini]") {
  Random random(4);
  Call<float> call(Shape{2, 2, 2, 50, 50, 24, 24}, Values::normal, random), local = call;
  infini_attention attend;
  attend.segment = 50;
  attend.empty_memory = EmptyMemory::bypass;
  run(attend, call);
  run(softmax_attention{causal{}}, local);
  CHECK(call.out == local.out);
}

TEST_CASE("infini_attention: the order of past tokens does not matter to a linear memory", "[laws][infini]") {
  Random random(5);
  const Shape shape{1, 1, 1, 64, 64, 16, 8};
  Call<double> call(shape, Values::normal, random), swapped = call;
  for (Index i = 0; i < 16; ++i) {
    std::swap_ranges(swapped.k.row(0, 0, i), swapped.k.row(0, 0, i) + 16, swapped.k.row(0, 0, 31 - i));
    std::swap_ranges(swapped.v.row(0, 0, i), swapped.v.row(0, 0, i) + 8, swapped.v.row(0, 0, 31 - i));
  }
  infini_attention attend;
  attend.segment = 32;
  const float beta = infinity;
  attend.beta = longspan::scalar_gate(beta);
  run(attend, call);
  run(attend, swapped);
  for (Index i = 32; i < 64; ++i) {
    for (Index c = 0; c < 8; ++c)
      CHECK(std::abs(call.out.row(0, 0, i)[c] - swapped.out.row(0, 0, i)[c]) <= 1e-13);
  }
}

TEST_CASE("infini_attention: a linear memory of one constant value returns this value", "[laws][infini]") {
  Random random(6);
  Call<float> call(Shape{1, 2, 1, 200, 200, 32, 3}, Values::normal, random);
  std::fill(call.v.values.begin(), call.v.values.end(), 3.0f);
  infini_attention attend;
  attend.segment = 20;
  attend.empty_memory = EmptyMemory::bypass;
  run(attend, call);
  for (const float x : call.out.values) CHECK(std::abs(x - 3) <= 3e-5f);
}

TEST_CASE("infini_attention: rows after the length of a batch row may contain NaN", "[masked][infini]") {
  Random random(7);
  const std::vector<Index> lengths{70, 33};
  Call<float> padded(Shape{2, 2, 1, 100, 100, 16, 16}, Values::normal, random);
  for (Index b = 0; b < 2; ++b) {
    for (Index i = lengths[static_cast<std::size_t>(b)]; i < 100; ++i) {
      std::fill_n(padded.k.row(b, 0, i), 16, std::numeric_limits<float>::quiet_NaN());
      std::fill_n(padded.v.row(b, 0, i), 16, std::numeric_limits<float>::quiet_NaN());
    }
  }
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    infini_attention attend;
    attend.segment = 32;
    attend.rule = rule;
    attend.lengths = lengths;
    run(attend, padded);
    infini_attention alone = attend;
    alone.lengths = {};
    for (Index b = 0; b < 2; ++b) {
      const Index length = lengths[static_cast<std::size_t>(b)];
      Call<float> row(Shape{1, 2, 1, length, length, 16, 16});
      for (Index i = 0; i < length; ++i) {
        std::copy_n(padded.k.row(b, 0, i), 16, row.k.row(0, 0, i));
        std::copy_n(padded.v.row(b, 0, i), 16, row.v.row(0, 0, i));
        for (Index h = 0; h < 2; ++h) std::copy_n(padded.q.row(b, h, i), 16, row.q.row(0, h, i));
      }
      run(alone, row);
      double worst = 0;
      for (Index h = 0; h < 2; ++h) {
        for (Index i = 0; i < length; ++i) {
          for (Index c = 0; c < 16; ++c)
            worst = std::max(worst, double(std::abs(padded.out.row(b, h, i)[c] - row.out.row(0, h, i)[c])));
        }
      }
      CHECK(worst <= 2e-6);
    }
  }
}

TEST_CASE("infini_attention: positions within segments or absolute, optionally also in the memory",
          "[position][infini]") {
  Random random(8);
  const rotary turn(Pairing::half_split);
  Call<float> call(Shape{1, 2, 1, 90, 90, 32, 16}, Values::normal, random), encoded = call;
  for (Tensor<float>* x : {&encoded.q, &encoded.k}) {
    for (Index h = 0; h < x->heads; ++h) turn.encode(x->view().matrix(0, h), 0, longspan::Role::query);
  }
  infini_attention attend{softmax_attention{causal{}, turn}};
  attend.segment = 32;
  infini_attention plain;
  plain.segment = 32;
  Tensor<double> local(1, 2, 90, 16, 0.0);
  longspan::reference::exact{longspan::softmax_attention{causal{} & longspan::segments{32}}}(
      encoded.q.view(), encoded.k.view(), encoded.v.view(), local.view());
  for (const bool absolute : {false, true}) {
    attend.absolute_positions = absolute;
    attend.memory_uses_positions = false;
    run(attend, call);
    CHECK(worst_in_u<float>(call.out, infini_oracle(plain, call, local), call.v) <= 4 * most_u);
  }
  attend.memory_uses_positions = true;
  run(attend, call);
  CHECK(worst_in_u<float>(call.out, infini_oracle(plain, encoded, local), call.v) <= 40 * most_u);
}

TEST_CASE("infini_attention: every option, against the reference", "[gauge][infini]") {
  test::for_each_case(30, [](Random& random) {
    const Shape shape = draw_infini_shape(random);
    Call<float> call(shape, Values::normal, random);
    const auto check = [&](auto attend) {
      attend.segment = random.pick({7, 16, 50, 1000});
      attend.rule = random.pick({InfiniRule::linear, InfiniRule::delta});
      attend.empty_memory = random.pick({EmptyMemory::gate, EmptyMemory::bypass});
      attend.absolute_positions = random.chance(0.5);
      attend.memory_uses_positions = random.chance(0.3);
      const std::vector<float> beta = draw_beta(random, shape, attend);
      std::vector<Index> lengths;
      for (Index b = 0; b < shape.batch; ++b) lengths.push_back(random.between(0, shape.q_len));
      if (random.chance(0.5)) attend.lengths = lengths;
      Tensor<double> wanted(shape.batch, shape.heads, shape.q_len, shape.value_dim);
      longspan::reference::exact{attend}(call.q.view(), call.k.view(), call.v.view(), wanted.view());
      run(attend, call);
      for (Index b = 0; b < shape.batch; ++b) {  // other rows are not compared
        const Index length = attend.lengths.empty() ? shape.q_len : lengths[static_cast<std::size_t>(b)];
        for (Index h = 0; h < shape.heads; ++h) {
          for (Index i = length; i < shape.q_len; ++i) {
            std::fill_n(call.out.row(b, h, i), shape.value_dim, 0.0f);
            std::fill_n(wanted.row(b, h, i), shape.value_dim, 0.0);
          }
        }
      }
      INFO(shape.text() << " segment=" << attend.segment << " rule=" << int(attend.rule));
      CHECK(worst_in_u<float>(call.out, wanted, call.v) <= 40 * most_u);
    };
    check(infini_attention{});
    if (shape.head_dim % 2 == 0) {
      check(infini_attention{softmax_attention{causal{}, rotary(Pairing::half_split)}});
      check(infini_attention{
          longspan::landmark_attention{longspan::landmarks::every(5), rotary(Pairing::half_split)}});
      check(infini_attention{longspan::dilated_attention{{{4, 1}, {16, 3}}, causal{}}});
    }
  });
}

TEST_CASE("infini_attention: a user-defined feature map without on_packet", "[options][infini]") {
  struct squared {
    double operator()(double x) const { return x * x; }
  };
  Random random(9);
  Call<float> call(Shape{1, 2, 2, 80, 80, 16, 16}, Values::normal, random);
  infini_attention attend{softmax_attention{causal{}}, squared{}};
  attend.segment = 16;
  run(attend, call);
  CHECK(worst_in_u<float>(call.out, infini_oracle(attend, call), call.v) <= most_u);
}

TEST_CASE("infini_attention: the feature of a very negative number is not rounded to 0", "[golden][infini]") {
  const longspan::elu_plus_one phi;
  alignas(64) float of_lane[64];
  longspan::detail::store<float>(of_lane, phi.on_packet(longspan::detail::broadcast(-18.0f)));
  CHECK(std::abs(double(of_lane[0]) / 1.5229979744712628e-8 - 1) < 1e-6);
  CHECK(std::abs(phi(-18) / 1.5229979744712628e-8 - 1) < 1e-12);
}

TEST_CASE("infini_attention: invalid arguments are refused, and nothing is written", "[errors][infini]") {
  Random random(12);
  Call<float> call(Shape{1, 4, 2, 8, 8, 16, 16}, Values::normal, random);
  const auto said = [&](const auto& attend) { return refusal([&] { run(attend, call); }); };
  infini_attention attend;
  attend.segment = 0;
  CHECK(said(attend) == "longspan: infini_attention: the segment is 0, wanted at least 1");
  attend.segment = 4;
  const std::vector<float> beta(3);
  attend.beta = longspan::per_head_gate(beta);
  CHECK(said(attend) == "longspan: infini_attention: beta is [3, 1], wanted [1 or 4, 1 or 16]");
  attend.beta = {};
  const std::vector<Index> lengths{1, 2};
  attend.lengths = lengths;
  CHECK(said(attend) ==
        "longspan: infini_attention: the number of lengths is 2, wanted 1, one for each batch row");
  attend.lengths = {};
  CHECK(refusal([&] {
          attend(std::as_const(call.q).view().slice_rows(0, 4), std::as_const(call.k).view(),
                 std::as_const(call.v).view(), call.out.view().slice_rows(0, 4));
        }) == "longspan: infini_attention: the number of rows of q is 4, wanted the 8 of k");
  for (const float x : call.out.values) CHECK(std::isnan(x));
}
