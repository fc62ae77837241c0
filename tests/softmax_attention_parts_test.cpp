// softmax_attention with scores, position encodings, and masks in other types, compared with the definition in
// double.
#include <cmath>
#include <functional>
#include <type_traits>

#include "support/encodings.hpp"
#include "support/gauge.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using Eigen::half;
using longspan::Pairing;

}  // namespace

TEST_CASE("softmax_attention: within the bound with a mask in bfloat16 and double", "[gauge][mask]") {
  const Definition what{
      .sees = [](Index, Index, Index i, Index j) { return j <= i && (j >= i - 40 || j < 3); }};
  const longspan::softmax_attention attend{longspan::causal{} &
                                           (longspan::window{.left = 40} | longspan::sinks{3})};
  for_each_case(15, [&](Random& random) {
    const Shape shape = draw_shape(random);
    check_call<bfloat16>(shape, random.pick(all_values), random, attend, what);
    check_call<double>(shape, random.pick(all_values), random, attend, what);
    check_call<float, half, bfloat16>(shape, random.pick(all_values), random, attend, what);
  });
}

namespace {

/// Calls visit(name, score, function) for each score; `function` is what the score means.
template <class Visit>
void for_each_score(const Shape& shape, Random& random, const Visit& visit) {
  using namespace longspan;
  using Function = decltype(Definition::score);
  const auto slopes = alibi_slopes(shape.heads);
  const auto capped = [](double s, double cap) { return cap * std::tanh(s / cap); };
  const auto slope = [&](Index h) { return double(slopes[std::size_t(h)]); };
  visit("softcap", softcap{5}, Function{[=](double s, Index, Index, Index, Index) { return capped(s, 5); }});
  visit("alibi", alibi{slopes}, Function{[=](double s, Index, Index h, Index i, Index j) {
          return s - slope(h) * std::abs(double(i - j));
        }});
  visit("softcap | alibi", softcap{20} | alibi{slopes},
        Function{[=](double s, Index, Index h, Index i, Index j) {
          return capped(s, 20) - slope(h) * std::abs(double(i - j));
        }});

  const bool repeats = random.chance(0.5);
  Tensor<float> bias(repeats ? 1 : shape.batch, repeats ? 1 : shape.heads, shape.q_len, shape.kv_len);
  fill_normal(bias, random, 2);
  const Index first = shape.kv_len - shape.q_len;
  const Function biased = [&](double s, Index b, Index h, Index i, Index j) {
    return s + double(bias.row(repeats ? 0 : b, repeats ? 0 : h, i - first)[j]);
  };
  visit("bias", additive_bias{bias.view()}, biased);
  visit("bias | softcap", additive_bias{bias.view()} | softcap{9},
        Function{
            [&](double s, Index b, Index h, Index i, Index j) { return capped(biased(s, b, h, i, j), 9); }});
  visit(
      "lambda",
      [](float s, Index b, Index h, Index i, Index j) { return s + float((b + h + i + 2 * j) % 5); },
      Function{
          [](double s, Index b, Index h, Index i, Index j) { return s + double((b + h + i + 2 * j) % 5); }});
}

Shape shape_for_scores(Random& random) {
  Shape shape = draw_shape(random);
  shape.head_dim = std::min<Index>(shape.head_dim, 65);
  shape.value_dim = std::min<Index>(shape.value_dim, 65);
  shape.kv_len = std::max(shape.kv_len, shape.q_len);  // a bias has no rows for negative positions
  return shape;
}

}  // namespace

TEST_CASE("softmax_attention: within the bound with every score function", "[gauge][score]") {
  for_each_case(8, [](Random& random) {
    const Shape shape = shape_for_scores(random);
    const Values values = random.pick(all_values);
    for_each_score(shape, random, [&](const char* name, const auto& score, const auto& function) {
      INFO(name);
      Definition what{.score = function};
      if (random.chance(0.5)) what.scale = 0.2;
      check_call<float>(shape, values, random, longspan::softmax_attention{score}, what);
    });
  });
}

TEMPLATE_TEST_CASE("softmax_attention: within the bound with score functions in other types",
                   "[gauge][score]", double, bfloat16) {
  for_each_case(8, [](Random& random) {
    const Shape shape = shape_for_scores(random);
    const auto slopes = longspan::alibi_slopes(shape.heads);
    const auto alibi_capped = [&](double s, Index, Index h, Index i, Index j) {
      return 3 * std::tanh((s - double(slopes[std::size_t(h)]) * std::abs(double(i - j))) / 3);
    };
    const auto striped = [](double s, Index b, Index h, Index i, Index j) {
      return s + double((b + h + i + 2 * j) % 5) / 8;
    };
    check_call<TestType>(shape, random.pick(all_values), random,
                         longspan::softmax_attention{longspan::alibi{slopes} | longspan::softcap{3}},
                         {.score = alibi_capped});
    check_call<TestType>(shape, random.pick(all_values), random, longspan::softmax_attention{striped},
                         {.score = striped});
  });
}

TEMPLATE_TEST_CASE("softmax_attention: within the bound with position encodings", "[gauge][position]", float,
                   double, bfloat16) {
  for_each_case(10, [](Random& random) {
    Shape shape = draw_shape(random);
    shape.head_dim = random.pick<Index>({2, 6, 8, 16, 34, 64, 80, 128});
    const Values values = random.pick({Values::normal, Values::flat, Values::log_normal});
    const Pairing pairing = random.pick({Pairing::interleaved, Pairing::half_split});
    const Index dims = random.chance(0.5) ? 0 : 2 * random.between(1, shape.head_dim / 2);
    Definition rotary = with_rotary(pairing, dims), xpos = with_xpos(pairing, 512, 100);
    // Angles are computed in double, with an error of 300 * 2^-53 at position 300.
    if (std::is_same_v<TestType, double>) rotary.encode_error = xpos.encode_error = 64;
    // Matrix tiles round encoded rows to bfloat16, which changes a score by up to 2^-7 |q| |k|: in 16 u of float.
    if (std::is_same_v<TestType, bfloat16> && longspan::detail::uses_tiles())
      rotary.encode_error = xpos.encode_error = 0x1p13;
    if (random.chance(0.5)) rotary.first_query = xpos.first_query = random.between(-3, shape.kv_len + 3);
    check_call<TestType>(shape, values, random,
                         longspan::softmax_attention{longspan::rotary(pairing, 10000, dims)}, rotary);
    check_call<TestType>(shape, values, random,
                         longspan::softmax_attention{longspan::xpos(pairing, 512, 100)}, xpos);
  });
}

TEST_CASE("softmax_attention: within the bound with mask, score and position encoding together", "[gauge]") {
  for_each_case(12, [](Random& random) {
    Shape shape = shape_for_scores(random);
    shape.head_dim = random.pick<Index>({2, 16, 34, 64});
    Definition what = with_rotary(Pairing::half_split, 0);
    what.sees = [](Index, Index, Index i, Index j) { return j <= i && j >= i - 50; };
    what.score = [](double s, Index, Index, Index, Index) { return 7 * std::tanh(s / 7); };
    what.scale = 0.4;
    what.first_query = random.between(0, shape.kv_len);
    const longspan::softmax_attention attend{longspan::rotary(Pairing::half_split), longspan::softcap{7},
                                             longspan::causal{} & longspan::window{.left = 50}};
    check_call<float>(shape, Values::normal, random, attend, what);
    check_call<float, half, half>(shape, Values::normal, random, attend, what);
    what.encode_error = 64;
    check_call<double>(shape, Values::normal, random, attend, what);
  });
}
