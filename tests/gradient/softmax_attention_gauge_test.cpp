// The gradient of softmax_attention compared with the definition in double, in units of the error that the data allow.
#include <algorithm>
#include <vector>

#include "support/gauge.hpp"
#include "support/gradient.hpp"
#include "support/has_tiles.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using Eigen::half;
using longspan::softmax_attention;

/// A shape whose oracle takes a few milliseconds.
Shape draw_gradient_shape(Random& random) {
  Shape shape = draw_shape(random);
  shape.heads = shape.kv_heads * std::min<Index>(shape.heads / shape.kv_heads, 4);
  return shape;
}

template <class C>
void check_types(std::int64_t cases) {
  for_each_case(cases, [](Random& random) {
    Definition what;
    if (random.chance(0.3)) what.scale = random.pick({-0.3, 0.05, 1.0});
    check_gradient_call<C>(draw_gradient_shape(random), random.pick(all_values), random, softmax_attention{},
                           what);
  });
}

/// Checks each size of a list, with small random other sizes.
template <class T>
void check_each(const std::vector<Index>& sizes, Index Shape::*size, std::int64_t cases) {
  for_each_case(cases, [&](Random& random) {
    for (const Index n : sizes) {
      Shape shape;
      shape.q_len = random.pick<Index>({1, 3, 9, 17, 50});
      shape.kv_len = random.pick<Index>({5, 17, 129, 140});
      shape.head_dim = random.pick<Index>({3, 8, 32});
      shape.value_dim = random.pick<Index>({4, 8, 19});
      shape.*size = n;
      check_gradient_call<GradientCall<T>>(shape, random.pick(all_values), random, softmax_attention{}, {});
    }
  });
}

const Definition causally{.sees = [](Index, Index, Index i, Index j) { return j <= i; }};

}  // namespace

TEST_CASE("gradient of softmax_attention: within the bound for float", "[gauge]") {
  GradientErrors worst;
  for_each_case(60, [&](Random& random) {
    const Values values = random.pick(all_values);
    const GradientErrors errors = check_gradient_call<GradientCall<float>>(
        draw_gradient_shape(random), values, random, softmax_attention{}, {});
    worst.dq = std::max(worst.dq, errors.dq);
    worst.dk = std::max(worst.dk, errors.dk);
    worst.dv = std::max(worst.dv, errors.dv);
  });
  INFO("worst ratios " << worst.dq << ' ' << worst.dk << ' ' << worst.dv);
  CHECK(worst.dq > 0);
  CHECK(worst.dk > 0);
  CHECK(worst.dv > 0);
}

TEST_CASE("gradient of softmax_attention: within the bound under a causal mask", "[gauge][mask]") {
  for_each_case(40, [](Random& random) {
    Definition what = causally;
    if (random.chance(0.5)) what.first_query = random.between(-5, 300);
    check_gradient_call<GradientCall<float>>(draw_gradient_shape(random), random.pick(all_values), random,
                                             softmax_attention{longspan::causal{}}, what);
  });
}

TEST_CASE("gradient of softmax_attention: within the bound for every element type", "[gauge][types]") {
  SECTION("double") { check_types<GradientCall<double>>(15); }
  SECTION("bfloat16") { check_types<GradientCall<bfloat16>>(15); }
  SECTION("half") { check_types<GradientCall<half>>(10); }
  SECTION("16-bit tensors with gradients in float") {
    check_types<GradientCall<bfloat16, bfloat16, bfloat16, bfloat16, float, float, float>>(10);
  }
  SECTION("mixed") {
    check_types<GradientCall<float, bfloat16, half, float, half, float, bfloat16>>(8);
    check_types<GradientCall<double, float, bfloat16, float, float, double, half>>(8);
  }
}

TEST_CASE("gradient of softmax_attention: within the bound by matrix tiles", "[gauge][amx]") {
  if (!has_tiles()) return;
  // Weights are rounded to bfloat16 after an exponential with an error of 7.5e-5, forward and backward.
  const GradientAllowance allowed{{0x1p-8 + 1.5e-4, 1e-4}, 0x1p-8 + 7.5e-5};
  for_each_case(30, [&](Random& random) {
    const Shape shape = draw_gradient_shape(random);
    const Values values = random.pick(all_values);
    GradientCall<bfloat16, bfloat16, bfloat16, bfloat16, float, float, float> call(shape, values, random);
    call.has_dlse = random.chance(0.5);
    INFO(shape.text() << " values=" << text_of(values));
    call.run(softmax_attention{}, longspan::openmp{2});
    check_gradient({}, call, allowed);
    call.run(softmax_attention{longspan::causal{}}, longspan::openmp{2});
    check_gradient(causally, call, allowed);
  });
}

TEST_CASE("gradient of softmax_attention: within the bound for every size", "[gauge][sizes]") {
  SECTION("head_dim") { check_each<float>(head_dims, &Shape::head_dim, 2); }
  SECTION("value_dim") { check_each<float>(head_dims, &Shape::value_dim, 2); }
  SECTION("head_dim, double") { check_each<double>(head_dims, &Shape::head_dim, 1); }
  SECTION("value_dim, bfloat16") { check_each<bfloat16>(head_dims, &Shape::value_dim, 1); }
  SECTION("q_len") { check_each<float>(lengths, &Shape::q_len, 2); }
  SECTION("kv_len") { check_each<float>(lengths, &Shape::kv_len, 2); }
  SECTION("q_len around query blocks") {
    check_each<float>({95, 96, 97, 191, 192, 193, 289}, &Shape::q_len, 2);
  }
  SECTION("kv_len around groups of key tiles") {
    check_each<float>({63, 64, 65, 191, 192, 193, 255, 256, 257, 511, 513}, &Shape::kv_len, 2);
  }
  SECTION("query heads of one KV head") { check_each<float>(groups, &Shape::heads, 2); }
}

TEST_CASE("gradient of softmax_attention: within the bound for many queries and many keys", "[gauge][slow]") {
  for_each_case(1, [](Random& random) {
    for (const Values values : {Values::normal, Values::log_normal, Values::flat}) {
      // Chunks of 2016 queries; GQA, so that a chunk ends with its head.
      for (const Index q_len : {2015, 2017, 5000}) {
        check_gradient_call<GradientCall<float>>(Shape{1, 2, 1, q_len, 40, 8, 12}, values, random,
                                                 softmax_attention{}, {});
      }
      // More than 8 spans of 2^13 keys: the sums of the first spans are carried.
      for (const Index kv_len : {8191, 65536, 65537, 140001}) {
        check_gradient_call<GradientCall<float>>(Shape{1, 2, 1, 3, kv_len, 4, 3}, values, random,
                                                 softmax_attention{}, {});
      }
    }
    Definition what = causally;
    what.first_query = 70000;  // the last spans are hidden from all queries
    check_gradient_call<GradientCall<float>>(Shape{1, 1, 1, 100, 100000, 8, 8}, Values::normal, random,
                                             softmax_attention{longspan::causal{}}, what);
  });
}
