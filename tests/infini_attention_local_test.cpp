#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/landmark_attention.hpp"
#include "longspan/reference/dilated_attention.hpp"
#include "longspan/reference/landmark_attention.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/infini_oracle.hpp"
#include "support/refusal.hpp"
#include "support/saved.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::causal;
using longspan::dilated_attention;
using longspan::EmptyMemory;
using longspan::infini_attention;
using longspan::InfiniRule;
using longspan::landmark_attention;
using longspan::landmarks;
using longspan::openmp;

constexpr float infinity = std::numeric_limits<float>::infinity(),
                not_a_number = std::numeric_limits<float>::quiet_NaN();

dilated_attention<causal> dilated() { return dilated_attention({{8, 1}, {32, 3}}, causal{}); }
auto exact(const dilated_attention<causal>& local) {
  return longspan::reference::exact{longspan::dilated_attention(local.branches, causal{})};
}

landmark_attention<> grouped() { return landmark_attention{landmarks::every(8)}; }
auto exact(const landmark_attention<>& local) { return longspan::reference::exact{local}; }

/// Runs a functor or a stream with the rows [first, first + count) of a call.
template <class Run, class C>
void run_rows(const Run& run, C& call, Index first, Index count) {
  run(std::as_const(call.q).view().slice_rows(first, count),
      std::as_const(call.k).view().slice_rows(first, count),
      std::as_const(call.v).view().slice_rows(first, count), call.out.view().slice_rows(first, count));
}

template <class Attend, class C>
void run(const Attend& attend, C& call) {
  run_rows([&](const auto&... x) { attend(x..., openmp{2}); }, call, 0, call.q.rows);
}

template <class Stream, class C>
void extend(Stream& stream, C& call, Index first, Index count) {
  run_rows([&](const auto&... x) { stream.extend(x..., openmp{2}); }, call, first, count);
}

/// Calls run_rows for each segment.
template <class Run, class C>
void run_segments(const Run& run, C& call, Index segment) {
  for (Index first = 0; first < call.q.rows; first += segment)
    run_rows(run, call, first, std::min(segment, call.q.rows - first));
}

/// infini_attention by its definition, with local attention by its definition in each segment.
template <class Local, class C>
Tensor<double> oracle(const infini_attention<Local>& attend, const C& call) {
  struct {
    const decltype(call.q)& q;
    const decltype(call.k)& k;
    const decltype(call.v)& v;
    Tensor<double> out;
  } local{call.q, call.k, call.v, {call.q.batch, call.q.heads, call.q.rows, call.v.cols, 0.0}};
  run_segments(exact(attend.local), local, attend.segment);
  return infini_oracle(attend, call, local.out);
}

/// The allowed error in u. The delta rule computes differences, whose errors do not average out.
double most_u(InfiniRule rule) { return rule == InfiniRule::linear ? 200 : 8000; }

template <class Local>
infini_attention<Local> options(Local local, Index segment, InfiniRule rule = InfiniRule::linear) {
  infini_attention attend{local};
  attend.segment = segment;
  attend.rule = rule;
  return attend;
}

/// Calls body(local) for each kind of local functor.
template <class Body>
void for_each_local(const Body& body) {
  body(dilated());
  body(grouped());
}

longspan::StreamShape stream_shape(const Shape& s) {
  return {s.batch, s.heads, s.kv_heads, s.head_dim, s.value_dim};
}

}  // namespace

TEST_CASE("infini_attention: local dilated and landmark attention, in one call and in a stream",
          "[gauge][infini]") {
  Random random(1);
  for (int n = 0; n < 40; ++n) {
    const Shape shape = draw_infini_shape(random);
    Call<float> call(shape, Values::normal, random);
    std::vector<float> beta(static_cast<std::size_t>(shape.heads));
    for (float& x : beta) x = static_cast<float>(2 * random.normal());
    for_each_local([&](const auto& local) {
      auto attend = options(local, random.pick(std::vector<Index>{1, 5, 16, 48, 50, 64, 1000}),
                            random.chance(0.5) ? InfiniRule::linear : InfiniRule::delta);
      attend.empty_memory = random.chance(0.7) ? EmptyMemory::gate : EmptyMemory::bypass;
      attend.beta = longspan::per_head_gate(beta);
      INFO(shape.text() << " segment=" << attend.segment << " rule=" << int(attend.rule));
      const Tensor<double> wanted = oracle(attend, call);
      run(attend, call);
      CHECK(worst_in_u<float>(call.out, wanted, call.v) <= most_u(attend.rule));

      auto chunks = attend.stream(stream_shape(shape)), tokens = chunks;
      Call<float> streamed = call.unrun();
      for (Index first = 0, count = 0; first < shape.q_len; first += count) {
        count = std::min(random.between(1, 70), shape.q_len - first);
        extend(chunks, streamed, first, count);
      }
      CHECK(worst_in_u<float>(streamed.out, wanted, call.v) <= most_u(attend.rule));
      streamed = call.unrun();
      for (Index first = 0; first < shape.q_len; ++first) extend(tokens, streamed, first, 1);
      CHECK(worst_in_u<float>(streamed.out, wanted, call.v) <= most_u(attend.rule));
      CHECK(saved(chunks) == saved(tokens));
    });
  }
}

TEST_CASE("infini_attention: local attention with bfloat16, in one call and in a stream", "[gauge][infini]") {
  Random random(2);
  const Shape shape{1, 4, 2, 100, 100, 32, 24};
  Call<bfloat16, bfloat16, bfloat16, float> call(shape, Values::normal, random);
  const auto attend = options(grouped(), 30);
  run(attend, call);
  CHECK(worst_in_u<float>(call.out, oracle(attend, call), call.v) <= 200);
  auto stream = attend.stream<bfloat16>(stream_shape(shape));
  auto streamed = call.unrun();
  for (Index first = 0; first < 100; first += 20) extend(stream, streamed, first, 20);
  CHECK(worst_in_u<float>(streamed.out, oracle(attend, call), call.v) <= 200);
}

TEST_CASE("infini_attention: with a closed gate the result is the local functor in each segment",
          "[laws][infini]") {
  Random random(3);
  for_each_local([&](const auto& local) {
    Call<float> call({2, 6, 2, 130, 130, 24, 16}, Values::normal, random), alone = call;
    auto attend = options(local, 48);
    const float beta = -infinity;
    attend.beta = longspan::scalar_gate(beta);
    run(attend, call);
    run_segments([&](const auto&... x) { local(x...); }, alone, 48);
    CHECK(call.out == alone.out);

    // One segment with an empty memory.
    attend = options(local, 130);
    attend.empty_memory = EmptyMemory::bypass;
    run(attend, call);
    run(local, alone);
    CHECK(call.out == alone.out);
    auto stream = attend.stream({2, 6, 2, 24, 16});
    extend(stream, call, 0, 130);
    CHECK(call.out == alone.out);
  });
}

TEST_CASE("infini_memory: the memory does not depend on local attention", "[laws][infini]") {
  Random random(4);
  Call<float> call({1, 2, 1, 100, 100, 16, 8}, Values::normal, random);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    auto exact = options(longspan::softmax_attention{causal{}}, 24, rule).stream({1, 2, 1, 16, 8});
    exact.append(0, call.k.view(), call.v.view());
    for_each_local([&](const auto& local) {
      auto stream = options(local, 24, rule).stream({1, 2, 1, 16, 8});
      extend(stream, call, 0, 100);
      CHECK(stream.open_rows() == exact.open_rows());
      for (Index c = 0; c < 16; ++c) {
        CHECK(stream.norm(0, 0, c) == exact.norm(0, 0, c));
        for (Index column = 0; column < 8; ++column)
          CHECK(stream.memory(0, 0, c, column) == exact.memory(0, 0, c, column));
      }
    });
  }
}

TEST_CASE("infini_attention: local attention ends at the length of a batch row", "[masked][infini]") {
  Random random(5);
  const std::vector<Index> lengths{70, 33, 0};
  for_each_local([&](const auto& local) {
    Call<float> padded({3, 4, 2, 100, 100, 16, 12}, Values::normal, random);
    for (Index b = 0; b < 3; ++b) {
      for (Index h = 0; h < 2; ++h) {
        for (Index i = lengths[static_cast<std::size_t>(b)]; i < 100; ++i) {
          std::fill_n(padded.k.row(b, h, i), 16, not_a_number);
          std::fill_n(padded.v.row(b, h, i), 12, not_a_number);
        }
      }
    }
    auto attend = options(local, 32);
    attend.lengths = lengths;
    run(attend, padded);
    attend.lengths = {};
    for (Index b = 0; b < 2; ++b) {
      const Index length = lengths[static_cast<std::size_t>(b)];
      Tensor<float> out(1, 4, length, 12, not_a_number);
      const auto row = [&](const auto& x) {
        return longspan::detail::batch_row(x.view(), b).slice_rows(0, length);
      };
      attend(row(std::as_const(padded.q)), row(std::as_const(padded.k)), row(std::as_const(padded.v)),
             out.view(), openmp{2});
      double worst = 0;
      for (Index h = 0; h < 4; ++h) {
        for (Index n = 0; n < length * 12; ++n) {
          const double off = std::abs(double(padded.out.row(b, h, 0)[n]) - double(out.row(0, h, 0)[n]));
          if (!(off <= worst)) worst = off;
        }
      }
      CHECK(worst <= 2e-6);
    }
  });
}

TEST_CASE("infini_attention: errors of the local functor are thrown before anything is written",
          "[errors][infini]") {
  Random random(6);
  const Shape shape{2, 4, 2, 40, 40, 16, 16};
  Call<float> call(shape, Values::normal, random);
  const auto said = [&](const auto& local) {
    const std::string text = refusal([&] { run(options(local, 16), call); });
    for (const float x : call.out.values) REQUIRE(std::isnan(x));
    return text;
  };
  const auto said_by_stream = [&](const auto& local) {
    return refusal([&] { options(local, 16).stream(stream_shape(shape)); });
  };
  dilated_attention undilated = dilated();
  undilated.branches[1].dilation = 0;
  CHECK(said(undilated) ==
        "longspan: dilated_attention: branch 1 is [segment 32, dilation 0], wanted both at least 1");
  CHECK(said_by_stream(undilated) == said(undilated));
  const landmark_attention nowhere{landmarks::every(0)};
  CHECK(said(nowhere) == "longspan: landmark_attention: the length of a block is 0, wanted at least 1");
  CHECK(said_by_stream(nowhere) == said(nowhere));
  // These landmarks fit the first two segments, but not the last one, which has 8 tokens.
  const std::vector<Index> keys{7, 15};
  CHECK(said(landmark_attention{landmarks::at(keys)}) ==
        "longspan: landmark_attention: a landmark of batch row 0 is 15, wanted rising keys from 0 to 7");

  CHECK(refusal([&] { options(landmark_attention{landmarks::at(keys)}, 16).stream(stream_shape(shape)); }) ==
        "longspan: infini_memory: landmarks of the local attention is a list of landmarks, wanted "
        "landmarks::every(n), because a list does not fit an open segment");

  const std::vector<float> factors(1);
  landmark_attention dropped = grouped();
  dropped.gate_keep = longspan::compact_view(factors.data(), 1, 1, 1, 1);
  CHECK(refusal([&] { run(options(dropped, 16), call); }) ==
        "longspan: infini_attention: gate_keep or control of the local attention is given, wanted none, "
        "because they index rows of one call and each segment is a separate call");
}

TEST_CASE("infini_attention: a list of landmarks that fits all segments", "[options][infini]") {
  Random random(7);
  Call<float> call({1, 2, 1, 64, 64, 16, 16}, Values::normal, random), by_length = call;
  const std::vector<Index> keys{7, 15};
  run(options(landmark_attention{landmarks::at(keys)}, 16), call);
  run(options(grouped(), 16), by_length);
  CHECK(call.out == by_length.out);
}

TEST_CASE("infini_attention: a second call allocates nothing, and local positions start at the segment",
          "[options][infini]") {
  Random random(8);
  for_each_local([&](auto local) {
    Call<float> call({1, 2, 1, 90, 90, 16, 16}, Values::normal, random), told = call;
    const auto attend = options(local, 32);
    longspan::Execution team(openmp{2});
    const auto run_in_team = [&] { run_rows([&](const auto&... x) { attend(x..., team); }, call, 0, 90); };
    run_in_team();
    CHECK(allocations_of(run_in_team) == 0);
    local.first_query = 1000;
    run(options(local, 32), told);
    CHECK(told.out == call.out);

    auto stream = attend.stream({1, 2, 1, 16, 16});
    const auto extend_in_team = [&](Index first) {
      run_rows([&](const auto&... x) { stream.extend(x..., team); }, told, first, 1);
    };
    for (Index first = 0; first < 40; ++first) extend_in_team(first);
    CHECK(allocations_of([&] { extend_in_team(40); }) == 0);
  });
}
