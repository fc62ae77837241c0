// softmax_attention compared with the definition in double, in units of the error that the data allow.
#include <vector>

#include "support/gauge.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using Eigen::half;

template <class... T>
struct Types {};

template <class Tq, class Tk, class Tv, class To>
void check_types(Types<Tq, Tk, Tv, To>, std::int64_t cases) {
  for_each_case(cases, [](Random& random) {
    Definition what;
    if (random.chance(0.3)) what.scale = random.pick({-0.3, 0.05, 1.0});
    longspan::softmax_attention attend;
    attend.bf16_products = random.chance(0.5);
    check_call<Tq, Tk, Tv, To>(draw_shape(random), random.pick(all_values), random, attend, what);
  });
}

template <class... List>
struct ListOfTypes {
  static void check(std::int64_t cases) { (check_types(List{}, cases), ...); }
};

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
      shape.heads = std::max(shape.heads, shape.kv_heads);
      check_call<T>(shape, random.pick(all_values), random, longspan::softmax_attention{}, {});
    }
  });
}

}  // namespace

TEST_CASE("softmax_attention: within the bound for float, with data that are not trivial", "[gauge][slow]") {
  Trust typical, all;
  double worst = 0;
  for_each_case(60, [&](Random& random) {
    const Values values = random.pick(all_values);
    const Shape shape = draw_shape(random);
    const Errors errors = check_call<float>(shape, values, random, longspan::softmax_attention{}, {},
                                            values == Values::normal && shape.kv_len > 15 ? &typical : &all);
    worst = std::max(worst, errors.out);
  });
  INFO("worst ratio " << worst);
  CHECK(typical.half_of_the_softmaxes_are_healthy());
  CHECK(all.outputs_are_mostly_nonzero());
  CHECK(worst > 0);
}

TEST_CASE("softmax_attention: within the bound for every element type", "[gauge][types]") {
  SECTION("all four alike") {
    ListOfTypes<Types<double, double, double, double>, Types<bfloat16, bfloat16, bfloat16, bfloat16>,
                Types<half, half, half, half>>::check(20);
  }
  SECTION("mixed") {
    ListOfTypes<Types<float, bfloat16, bfloat16, float>, Types<float, half, half, float>,
                Types<bfloat16, bfloat16, bfloat16, float>, Types<half, float, double, half>,
                Types<double, float, bfloat16, float>, Types<float, double, half, bfloat16>>::check(8);
  }
}

TEST_CASE("softmax_attention: within the bound for every size", "[gauge][sizes]") {
  SECTION("head_dim") { check_each<float>(head_dims, &Shape::head_dim, 3); }
  SECTION("value_dim") { check_each<float>(head_dims, &Shape::value_dim, 3); }
  SECTION("head_dim, double") { check_each<double>(head_dims, &Shape::head_dim, 1); }
  SECTION("value_dim, double") { check_each<double>(head_dims, &Shape::value_dim, 1); }
  SECTION("head_dim, bfloat16") { check_each<bfloat16>(head_dims, &Shape::head_dim, 1); }
  SECTION("value_dim, bfloat16") { check_each<bfloat16>(head_dims, &Shape::value_dim, 1); }
  SECTION("q_len") { check_each<float>(lengths, &Shape::q_len, 3); }
  SECTION("kv_len") { check_each<float>(lengths, &Shape::kv_len, 3); }
  SECTION("kv_len, bfloat16") { check_each<bfloat16>(lengths, &Shape::kv_len, 2); }
  SECTION("query heads of one KV head") { check_each<float>(groups, &Shape::heads, 3); }
}

TEST_CASE("softmax_attention: every group of query heads, with few queries and with many", "[gauge][sizes]") {
  for_each_case(1, [](Random& random) {
    for (const Index group : groups) {
      for (const Index q_len : {1, 2, 3, 4, 8, 13}) {
        const Shape shape{2, 2 * group, 2, q_len, random.between(1, 150), 24, 20};
        const Definition causally{.sees = [](Index, Index, Index i, Index j) { return j <= i; }};
        check_call<float>(shape, Values::normal, random, longspan::softmax_attention{}, {});
        check_call<float>(shape, Values::normal, random, longspan::softmax_attention{longspan::causal{}},
                          causally);
      }
    }
  });
}

TEST_CASE("softmax_attention: within the bound for more keys than a key chunk has", "[gauge]") {
  for_each_case(2, [](Random& random) {
    for (const Index q_len : {2, 20}) {
      for (const Index kv_len : {2047, 2048, 2049, 4500}) {
        const Shape shape{1, 2, 1, q_len, kv_len, 8, 12};
        const Values values = random.pick(all_values);
        const Definition recently{
            .sees = [](Index, Index, Index i, Index j) { return j <= i && j > i - 2100; }};
        check_call<float>(shape, values, random, longspan::softmax_attention{}, {});
        check_call<bfloat16>(shape, values, random, longspan::softmax_attention{}, {});
        check_call<float>(shape, values, random,
                          longspan::softmax_attention{longspan::causal{} & longspan::window{.left = 2099}},
                          recently);
      }
    }
  });
}
