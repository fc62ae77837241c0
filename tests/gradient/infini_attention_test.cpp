#include "longspan/gradient/infini_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/stream/infini_memory.hpp"
#include "support/catch.hpp"
#include "support/infini_gradient.hpp"
#include "support/infini_oracle.hpp"
#include "support/refusal.hpp"

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

template <class T>
constexpr double u = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;

/// The allowed error in u, as a share of the largest number of a gradient; the worst that was seen is 131.
constexpr double most_u = 400;

/// A call of doubles with the same numbers.
template <class T>
InfiniGradientCall<double> in_double(const InfiniGradientCall<T>& call, Random& random) {
  InfiniGradientCall<double> same(call.shape, random);
  const auto copy = [](const auto& from, auto& to) {
    std::transform(from.values.begin(), from.values.end(), to.values.begin(),
                   [](T x) { return static_cast<double>(x); });
  };
  copy(call.q, same.q);
  copy(call.k, same.k);
  copy(call.v, same.v);
  copy(call.dout, same.dout);
  return same;
}

}  // namespace

TEMPLATE_TEST_CASE("gradient of infini_attention: matches its reference for all sizes and options",
                   "[gauge][gradient][infini]", float, double) {
  for_each_case(40, [](Random& random) {
    Shape shape = draw_infini_shape(random);
    shape.head_dim += shape.head_dim % 2;
    InfiniGradientCall<TestType> call(shape, random);
    infini_attention attend{softmax_attention{causal{}, rotary(Pairing::half_split)}};
    attend.segment = random.pick({1, 5, 16, 48, 100, 1000});
    attend.rule = random.pick({InfiniRule::linear, InfiniRule::delta});
    attend.empty_memory = random.pick({EmptyMemory::gate, EmptyMemory::bypass});
    attend.memory_uses_positions = random.chance(0.3);
    attend.absolute_positions = random.chance(0.3);
    attend.beta = call.draw_beta(random);
    std::vector<Index> lengths;
    for (Index b = 0; b < shape.batch; ++b) lengths.push_back(random.between(0, shape.q_len));
    if (random.chance(0.3)) attend.lengths = lengths;
    OwnedState initial(shape), dfinal(shape);
    initial.fill(random);
    dfinal.fill(random);
    auto backward = gradient(attend);
    if (random.chance(0.5)) backward.initial = initial.constant();
    if (random.chance(0.5)) backward.dfinal = dfinal.constant();
    backward.bptt_segments = random.pick<Index>({1, 2, 3, longspan::all_segments});
    backward.checkpoint_segments = random.pick<Index>({1, 2, 5, 1000});
    InfiniGradientCall<double> wanted = in_double(call, random);
    wanted.run_reference(backward);
    call.run(backward, longspan::openmp{2});
    INFO(shape.text() << " segment=" << attend.segment << " rule=" << int(attend.rule)
                      << " bptt=" << backward.bptt_segments << " checkpoints=" << backward.checkpoint_segments
                      << " initial=" << (backward.initial.m.data != nullptr)
                      << " dfinal=" << (backward.dfinal.m.data != nullptr));
    CHECK(worst_of_tensors(call, wanted) <= most_u * u<TestType>);
    CHECK(worst_of_options(call, wanted) <= most_u * u<float>);
  });
}

TEST_CASE("gradient of infini_attention: 16-bit tensors add one rounding", "[gauge][gradient][infini]") {
  Random random(2);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    InfiniGradientCall<bfloat16> call(Shape{1, 4, 2, 100, 100, 32, 24}, random);
    infini_attention attend;
    attend.segment = 30;
    attend.rule = rule;
    auto backward = gradient(attend);
    InfiniGradientCall<double> wanted = in_double(call, random);
    wanted.run_reference(backward);
    call.run(backward, longspan::openmp{2});
    CHECK(worst_of_tensors(call, wanted) <= 0x1p-8 + most_u * u<float>);
    CHECK(worst_of_options(call, wanted) <= most_u * u<float>);
  }
}

TEST_CASE("gradient of infini_attention: two segments of one token by hand", "[gradient][infini][exact]") {
  // The memory of one token returns its value, whatever q and k are.
  Random random(3);
  InfiniGradientCall<double> call(Shape{1, 1, 1, 2, 2, 1, 1}, random);
  call.v.values = {3, 5};
  call.dout.values = {1, 2};
  infini_attention attend;
  attend.segment = 1;
  auto backward = gradient(attend);
  call.run(backward, longspan::serial{});
  CHECK(std::abs(call.dv.values[0] - (0.5 * 1 + 0.5 * 2)) <= 1e-15);
  CHECK(std::abs(call.dv.values[1] - 0.5 * 2) <= 1e-15);
  CHECK(std::abs(call.dbeta[0] - 0.25f * (1 * (0 - 3) + 2 * (3 - 5))) <= 1e-6f);
  for (const double x : call.dq.values) CHECK(std::abs(x) <= 1e-14);
  for (const double x : call.dk.values) CHECK(std::abs(x) <= 1e-14);
}

TEST_CASE(
    "gradient of infini_attention: truncated at every segment no key or value gets anything from the memory",
    "[laws][gradient][infini]") {
  Random random(4);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    InfiniGradientCall<float> call(Shape{2, 4, 2, 90, 90, 16, 24}, random), local = call, full = call;
    infini_attention attend;
    attend.segment = 20;
    attend.rule = rule;
    auto backward = gradient(attend);
    full.run(backward, longspan::openmp{2});
    backward.bptt_segments = 1;
    call.run(backward, longspan::openmp{2});
    const float closed = -std::numeric_limits<float>::infinity();
    backward.attend.beta = longspan::scalar_gate(closed);
    for (float& x : local.dout.values) x *= 0.5f;
    local.run(backward, longspan::openmp{2});
    CHECK(call.dk == local.dk);
    CHECK(call.dv == local.dv);
    CHECK(call.dq == full.dq);  // reads do not depend on the truncation
    CHECK(call.dbeta == full.dbeta);
    CHECK_FALSE(call.dk == full.dk);
    CHECK_FALSE(call.dv == full.dv);
  }
}

TEST_CASE("gradient of infini_attention: a document in chunks", "[laws][gradient][infini]") {
  // With dinitial as dfinal of the chunk before, chunks give the gradient of the whole; without it, that of a
  // truncation at the borders of the chunks.
  Random random(5);
  const Shape shape{2, 4, 2, 72, 72, 8, 12};
  const Index in_chunk = 20;
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    infini_attention attend;
    attend.segment = 10;
    attend.rule = rule;
    InfiniGradientCall<double> whole(shape, random);
    attend.beta = whole.draw_beta(random);
    auto backward = gradient(attend);
    InfiniGradientCall<double> truncated = whole;
    whole.run(backward, longspan::openmp{2});
    backward.bptt_segments = 2;
    truncated.run(backward, longspan::openmp{2});
    backward.bptt_segments = longspan::all_segments;
    for (const bool chained : {true, false}) {
      InfiniGradientCall<double> chunked = whole;
      std::vector<double> dbeta(whole.dbeta.size());
      OwnedState change(shape), next(shape);
      for (Index begin = 60; begin >= 0; begin -= in_chunk) {
        const Index rows = std::min(in_chunk, shape.q_len - begin);
        auto stream = attend.template stream<double>(
            {.batch = 2, .heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 12});
        stream.append(std::as_const(whole.k).view().slice_rows(0, begin),
                      std::as_const(whole.v).view().slice_rows(0, begin));
        OwnedState initial(shape);
        for (Index b = 0; b < 2; ++b) {
          for (Index h = 0; h < 2; ++h) {
            for (Index c = 0; c < 8; ++c) {
              for (Index column = 0; column < 12; ++column)
                initial.m.row(b, h, c)[column] = static_cast<float>(stream.memory(b, h, c, column));
              initial.z.view()(b, h, c) = static_cast<float>(stream.norm(b, h, c));
            }
          }
        }
        const auto part = [&](auto x) { return x.slice_rows(begin, rows); };
        std::vector<float> of_chunk(whole.dbeta.size());
        backward.dbeta = {of_chunk.data(), attend.beta.rows, attend.beta.cols, attend.beta.cols};
        backward.initial = begin > 0 ? initial.constant() : longspan::InfiniState<const float>{};
        if (chained) backward.dfinal = change.constant();
        backward.dinitial = next.view();
        backward(part(std::as_const(chunked.q).view()), part(std::as_const(chunked.k).view()),
                 part(std::as_const(chunked.v).view()), part(std::as_const(chunked.dout).view()),
                 part(chunked.dq.view()), part(chunked.dk.view()), part(chunked.dv.view()));
        std::swap(change, next);
        for (std::size_t n = 0; n < dbeta.size(); ++n) dbeta[n] += static_cast<double>(of_chunk[n]);
      }
      backward.dfinal = {};
      backward.initial = {};
      INFO("rule " << int(rule) << ", chained " << chained);
      CHECK(worst_of_tensors(chunked, chained ? whole : truncated) <= 3e-6);
      CHECK(worst_share(dbeta, whole.dbeta) <= 3e-6);
    }
  }
}

TEST_CASE(
    "gradient of infini_attention: rows after the length of a batch row get 0, even if they contain NaN",
    "[masked][gradient][infini]") {
  Random random(6);
  const std::vector<Index> lengths{70, 33};
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    InfiniGradientCall<float> padded(Shape{2, 2, 1, 100, 100, 16, 16}, random), plain = padded;
    for (Tensor<float>* x : {&padded.q, &padded.k, &padded.v, &padded.dout}) {
      for (Index b = 0; b < 2; ++b) {
        for (Index h = 0; h < x->heads; ++h) {
          for (Index i = lengths[static_cast<std::size_t>(b)]; i < 100; ++i)
            std::fill_n(x->row(b, h, i), 16, std::numeric_limits<float>::quiet_NaN());
        }
      }
    }
    infini_attention attend;
    attend.segment = 32;
    attend.rule = rule;
    attend.lengths = lengths;
    auto backward = gradient(attend);
    padded.run(backward, longspan::openmp{2});
    plain.run(backward, longspan::openmp{2});
    CHECK(padded.dq == plain.dq);
    CHECK(padded.dk == plain.dk);
    CHECK(padded.dv == plain.dv);
    CHECK(padded.dbeta == plain.dbeta);
    for (const Tensor<float>* x : {&padded.dq, &padded.dk, &padded.dv}) {
      for (Index i = 33; i < 100; ++i)
        CHECK(std::all_of(x->row(1, 0, i), x->row(1, 0, i) + 16, [](float y) { return y == 0; }));
    }
    // The rows before the length have the gradient of a shorter call.
    const auto part = [&](auto x) { return longspan::detail::batch_rows(x, 1, 1).slice_rows(0, 33); };
    Tensor<float> dq(1, 2, 33, 16), dk(1, 1, 33, 16), dv = dk;
    auto alone = gradient(attend);
    alone.attend.lengths = {};
    alone(part(std::as_const(plain.q).view()), part(std::as_const(plain.k).view()),
          part(std::as_const(plain.v).view()), part(std::as_const(plain.dout).view()), dq.view(), dk.view(),
          dv.view());
    double worst = 0;
    for (Index i = 0; i < 33; ++i) {
      for (Index c = 0; c < 16; ++c) {
        worst = std::max({worst, std::abs(double(dk.row(0, 0, i)[c]) - double(padded.dk.row(1, 0, i)[c])),
                          std::abs(double(dv.row(0, 0, i)[c]) - double(padded.dv.row(1, 0, i)[c])),
                          std::abs(double(dq.row(0, 1, i)[c]) - double(padded.dq.row(1, 1, i)[c]))});
      }
    }
    CHECK(worst <= most_u * u<float>);
  }
}

TEST_CASE("gradient of infini_attention: a side whose gate is 0 gets nothing", "[masked][gradient][infini]") {
  Random random(7);
  InfiniGradientCall<float> call(Shape{1, 2, 1, 48, 48, 16, 8}, random);
  infini_attention attend;
  attend.segment = 16;
  const float open = std::numeric_limits<float>::infinity();
  attend.beta = longspan::scalar_gate(open);
  auto backward = gradient(attend);
  call.run(backward, longspan::openmp{2});
  // The last segment is not read, and the first one has no memory.
  for (Index i = 32; i < 48; ++i) {
    CHECK(std::all_of(call.dv.row(0, 0, i), call.dv.row(0, 0, i) + 8, [](float x) { return x == 0; }));
    CHECK(std::all_of(call.dk.row(0, 0, i), call.dk.row(0, 0, i) + 16, [](float x) { return x == 0; }));
  }
  for (Index i = 0; i < 16; ++i)
    CHECK(std::all_of(call.dq.row(0, 0, i), call.dq.row(0, 0, i) + 16, [](float x) { return x == 0; }));
  CHECK(call.dbeta[0] == 0.0f);
}

namespace {

/// A feature map as a user writes it, with scalar members only.
struct squared {
  double operator()(double x) const { return x * x + 0.125; }
  double derivative(double x) const { return 2 * x; }
};

}  // namespace

TEST_CASE("gradient of infini_attention: a feature map of the user", "[gauge][gradient][infini]") {
  Random random(8);
  InfiniGradientCall<float> call(Shape{1, 2, 1, 50, 50, 16, 8}, random);
  infini_attention attend{softmax_attention{causal{}}, squared{}};
  attend.segment = 16;
  attend.rule = InfiniRule::delta;
  auto backward = gradient(attend);
  InfiniGradientCall<double> wanted = in_double(call, random);
  wanted.run_reference(backward);
  call.run(backward, longspan::openmp{2});
  CHECK(worst_of_tensors(call, wanted) <= most_u * u<float>);
}

TEST_CASE("gradient of infini_attention: what does not fit is refused, and nothing is written",
          "[errors][gradient][infini]") {
  Random random(9);
  InfiniGradientCall<float> call(Shape{1, 4, 2, 20, 20, 8, 6}, random);
  const auto text = [&](const auto& change) {
    infini_attention attend;
    attend.segment = 8;
    auto backward = gradient(attend);
    change(backward);
    return refusal([&] {
      backward(std::as_const(call.q).view(), std::as_const(call.k).view(), std::as_const(call.v).view(),
               std::as_const(call.dout).view(), call.dq.view(), call.dk.view(), call.dv.view());
    });
  };
  const std::string name = "longspan: gradient(infini_attention): ";
  std::vector<float> numbers(100);
  OwnedState state(Shape{1, 4, 2, 20, 20, 8, 6}), odd(Shape{1, 4, 2, 20, 20, 6, 6});
  const auto before = call.dq;
  CHECK(text([&](auto& x) {
          x.dbeta = {numbers.data(), 4, 1, 1};
        }) == name + "dbeta is [4, 1], wanted [1, 1] as beta");
  CHECK(text([&](auto& x) { x.initial = odd.constant(); }) ==
        name + "initial.m is [1, 2, 6, 6], wanted [1, 2, 8, 6]");
  CHECK(text([&](auto& x) {
          x.dinitial = {state.m.view(), odd.z.view()};
        }) == name + "dinitial.z is [1, 2, 6], wanted [1, 2, 8]");
  CHECK(text([&](auto& x) { x.bptt_segments = 0; }) == name + "bptt_segments is 0, wanted at least 1");
  CHECK(text([&](auto& x) { x.checkpoint_segments = -1; }) ==
        name + "checkpoint_segments is -1, wanted at least 1");
  CHECK(text([&](auto& x) { x.attend.segment = 0; }) ==
        "longspan: infini_attention: the segment is 0, wanted at least 1");
  CHECK(refusal([&] {
          gradient(infini_attention{})(std::as_const(call.q).view(), std::as_const(call.k).view(),
                                       std::as_const(call.v).view(), std::as_const(call.v).view(),
                                       call.dq.view(), call.dk.view(), call.dv.view());
        }) == name + "dout is [1, 2, 20, 6], wanted [1, 4, 20, 6]");
  CHECK(call.dq == before);
}
