// Bits, memory and allocations of the gradient of landmark_attention.
#include <algorithm>
#include <utility>
#include <vector>

#include "longspan/gradient/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/gradient.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::landmark_attention;
using longspan::landmarks;
using longspan::openmp;
using longspan::serial;

template <class C, class Attend>
void check_threads(C call, const Attend& attend) {
  call.has_dlse = true;
  call.run(attend, serial{});
  for (const Index threads : {1, 2, 3, 7, 16}) {
    INFO(threads << " threads");
    C own = call;
    std::fill(own.dq.values.begin(), own.dq.values.end(), typename decltype(own.dq.values)::value_type(NAN));
    std::fill(own.dk.values.begin(), own.dk.values.end(), typename decltype(own.dk.values)::value_type(NAN));
    own.differentiate(attend, openmp{threads});
    CHECK(own.same_gradients(call));
  }
}

/// A functor of which every second block is controlled.
struct Controlled {
  Rows<float> cmt;
  std::vector<unsigned char> kinds;

  Controlled(const Shape& shape, Index blocks, Random& random)
      : cmt(shape.batch, shape.heads, shape.q_len), kinds(static_cast<std::size_t>(blocks)) {
    for (float& x : cmt.values) x = static_cast<float>(random.normal());
    for (std::size_t m = 0; m < kinds.size(); m += 2) kinds[m] = 1;
  }
  template <class Attend>
  Attend with_control(Attend attend) const {
    const auto blocks = static_cast<Index>(kinds.size());
    attend.control = {cmt.view(), {kinds.data(), 1, blocks, blocks}, 0};
    return attend;
  }
};

}  // namespace

TEST_CASE("gradient of landmark_attention: bits do not depend on the number of threads", "[bits][slow]") {
  Random random(1);
  const Shape shape{2, 6, 2, 330, 700, 24, 16};
  for (const Index length : {3, 50, 64, 300}) {
    INFO("blocks of " << length);
    check_threads(GradientCall<float>(shape, Values::normal, random),
                  landmark_attention{landmarks::every(length)});
  }
  check_threads(GradientCall<bfloat16>(shape, Values::normal, random),
                landmark_attention{landmarks::every(64)});
  check_threads(GradientCall<double>(shape, Values::normal, random),
                landmark_attention{landmarks::every(64)});
  const Controlled controlled(shape, 14, random);
  check_threads(GradientCall<float>(shape, Values::normal, random),
                controlled.with_control(landmark_attention{landmarks::every(50)}));
}

TEST_CASE("gradient of landmark_attention: bits do not depend on other batch rows and KV heads", "[bits]") {
  Random random(2);
  for (const Index length : {50, 300}) {
    GradientCall<float> call(Shape{2, 4, 2, 150, 500, 17, 9}, Values::normal, random);
    const landmark_attention attend{landmarks::every(length)};
    call.run(attend, openmp{2});
    for (Index b = 0; b < 2; ++b) {
      for (Index kv = 0; kv < 2; ++kv) {
        GradientCall<float> own(Shape{1, 2, 1, 150, 500, 17, 9}, Values::normal, random);
        const auto copy = [](const auto& from, Index row, Index head, auto& to) {
          std::copy_n(from.row(row, head, 0), to.values.size(), to.values.data());
        };
        copy(call.forward.q, b, 2 * kv, own.forward.q);
        copy(call.forward.k, b, kv, own.forward.k);
        copy(call.forward.v, b, kv, own.forward.v);
        copy(call.dout, b, 2 * kv, own.dout);
        own.run(attend, serial{});
        const auto same = [&](const auto& mine, const auto& all, Index head) {
          return std::equal(mine.values.begin(), mine.values.end(), all.row(b, head, 0));
        };
        CHECK(same(own.dq, call.dq, 2 * kv));
        CHECK(same(own.dk, call.dk, kv));
        CHECK(same(own.dv, call.dv, kv));
      }
    }
  }
}

TEST_CASE("gradient of landmark_attention: a list of the keys of landmarks::every gives its bits", "[bits]") {
  Random random(3);
  for (const Index length : {1, 7, 64, 129, 200}) {
    GradientCall<float> call(Shape{2, 2, 1, 100, 500, 16, 8}, Values::normal, random), own = call;
    std::vector<Index> keys;
    for (Index j = length - 1; j < 500; j += length) keys.push_back(j);
    const std::vector<std::span<const Index>> lists{keys, keys};
    call.run(landmark_attention{landmarks::every(length)});
    own.run(landmark_attention{landmarks::at(keys)});
    CHECK(own.same_gradients(call));
    own.run(landmark_attention{landmarks::at(lists)});
    CHECK(own.same_gradients(call));
  }
}

TEST_CASE("gradient of landmark_attention: nothing is allocated after the first call of a shape", "[bits]") {
  Random random(4);
  const Shape shape{1, 4, 2, 200, 700, 17, 8};
  const Controlled controlled(shape, 3, random);
  GradientCall<float> call(shape, Values::normal, random);
  longspan::Execution<serial> serially(serial{});
  longspan::Execution<openmp> team(openmp{3});
  const auto check = [&](const auto& attend, auto& execution) {
    call.forward.run(attend);
    call.differentiate(attend, execution);
    CHECK(allocations_of([&] { call.differentiate(attend, execution); }) == 0);
  };
  for (const Index length : {20, 250}) {
    check(landmark_attention{landmarks::every(length)}, serially);
    check(landmark_attention{landmarks::every(length)}, team);
  }
  check(controlled.with_control(landmark_attention{landmarks::every(230)}), team);
}

TEST_CASE("gradient of landmark_attention: every size may be 0", "[bits]") {
  constexpr Index Shape::*sizes[] = {&Shape::batch,  &Shape::heads,    &Shape::q_len,
                                     &Shape::kv_len, &Shape::head_dim, &Shape::value_dim};
  for (const auto size : sizes) {
    Shape shape{2, 2, 2, 20, 20, 8, 8};
    shape.*size = 0;
    shape.kv_heads = shape.heads;
    INFO(shape.text());
    Random random(5);
    GradientCall<float> call(shape, Values::normal, random);
    call.run(landmark_attention{landmarks::every(6)}, openmp{2});
    for (const auto* x : {&call.dq, &call.dk, &call.dv}) {
      CHECK(std::all_of(x->values.begin(), x->values.end(), [](float n) { return std::isfinite(n); }));
    }
  }
}
