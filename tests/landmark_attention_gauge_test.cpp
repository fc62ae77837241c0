// Random calls of landmark_attention, each compared with its definition.
#include <utility>
#include <vector>

#include "longspan/landmark_attention.hpp"
#include "longspan/reference/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"
#include "support/landmark_oracle.hpp"

namespace {

using namespace test;
using longspan::landmark_attention;

const std::vector<Index> block_means{1, 2, 3, 8, 16, 17, 40, 64, 100};

Shape draw_call(Random& random) {
  Shape shape = draw_shape(random);
  if (random.chance(0.3))
    shape.kv_len = random.between(129, 700);  // landmark blocks that are longer than a key block
  shape.q_len = std::min<Index>(shape.q_len, 130);
  while (shape.work() > 4'000'000 && shape.q_len > 3) shape.q_len /= 2;
  while (shape.work() > 4'000'000 && shape.head_dim + shape.value_dim > 8) {
    shape.head_dim = shape.head_dim / 2 + 1;
    shape.value_dim = shape.value_dim / 2 + 1;
  }
  return shape;
}

template <class Tq, class Tk = Tq, class Tv = Tk, class To = Tq, class Part>
void check_landmark_call(Random& random, const Part& mask, const Definition& what, Trust* trust = nullptr) {
  const Shape shape = draw_call(random);
  const Values values = random.pick(all_values);
  const bool regular = random.chance(0.4);
  const Index mean = random.pick(block_means);
  const Landmarks at = regular ? every(mean, shape.batch, shape.kv_len)
                               : drawn_landmarks(mean, shape.batch, shape.kv_len, random);
  const LandmarkLists lists(at);
  INFO("types=" << type_text<Tq> << ',' << type_text<Tk> << ',' << type_text<Tv> << ','
                << type_text<To> << ' ' << shape.text() << " values=" << text_of(values)
                << (regular ? " every " : " mean ") << mean << " first_query=" << what.first_query);
  landmark_attention attend{regular ? landmarks::every(mean) : lists.at(), mask};
  attend.bf16_products = false;  // which rounds weights: detail/landmark/amx_tile_test.cpp
  Call<Tq, Tk, Tv, To> call(shape, values, random);
  call.run(with_options(attend, what), longspan::openmp{random.between(1, 3)});
  const Exact exact = exact_landmark_attention(what, at, call);
  if (trust != nullptr) trust->add(exact);
  check_against(exact, call);
}

const Definition causal_definition{.sees = [](Index, Index, Index i, Index j) { return j <= i; }};

}  // namespace

TEST_CASE("landmark_attention: within the bound of its docstring, causal", "[gauge]") {
  Trust trust;
  for_each_case(150, [&](Random& random) {
    check_landmark_call<float>(random, longspan::causal{}, causal_definition, &trust);
  });
  CHECK(trust.outputs_are_mostly_nonzero());
  CHECK(trust.half_of_the_softmaxes_are_healthy());
}

TEST_CASE("landmark_attention: within the bound of its docstring, all blocks visible", "[gauge]") {
  Trust trust;
  for_each_case(
      100, [&](Random& random) { check_landmark_call<float>(random, longspan::everything{}, {}, &trust); });
  CHECK(trust.half_of_the_softmaxes_are_healthy());
}

TEST_CASE("landmark_attention: a window hides tokens and landmarks individually", "[gauge][mask]") {
  for_each_case(60, [](Random& random) {
    const Index left = random.between(0, 200);
    check_landmark_call<float>(
        random, longspan::causal{} & longspan::window{.left = left},
        {.sees = [left](Index, Index, Index i, Index j) { return j <= i && i - j <= left; }});
  });
}

TEST_CASE("landmark_attention: user-defined masks and other options", "[gauge][mask]") {
  struct odd_pairs {
    bool sees(Index i, Index j) const { return (i * 7 + j * 3) % 5 != 0; }
  };
  for_each_case(40, [](Random& random) {
    Definition what{.sees = [](Index, Index, Index i, Index j) { return odd_pairs{}.sees(i, j); }};
    what.scale = 0.3;
    what.first_query = random.between(-5, 40);
    check_landmark_call<float>(random, odd_pairs{}, what);
  });
}

TEST_CASE("landmark_attention: double, and 16-bit storage", "[gauge][types]") {
  using Eigen::bfloat16;
  using Eigen::half;
  for_each_case(25, [](Random& random) {
    check_landmark_call<double>(random, longspan::causal{}, causal_definition);
    check_landmark_call<bfloat16>(random, longspan::causal{}, causal_definition);
    check_landmark_call<float, half, bfloat16, float>(random, longspan::causal{}, causal_definition);
  });
}

TEST_CASE("landmark_attention: within the bound with scores and position encodings", "[gauge][score]") {
  for_each_case(30, [](Random& random) {
    Definition what = causal_definition;
    what.score = [](double s, Index, Index, Index, Index) { return 5 * std::tanh(s / 5); };
    Shape shape{1, 6, 2, 70, 150, 16, 8};
    const Landmarks at = drawn_landmarks(random.pick(block_means), 1, shape.kv_len, random);
    const LandmarkLists lists(at);
    Call<float> call(shape, Values::normal, random), own = call.unrun();
    call.run(landmark_attention{lists.at(), longspan::softcap{5}});
    check_against(exact_landmark_attention(what, at, call), call);
  });
}
