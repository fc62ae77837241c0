// The gradient of softmax_attention with masks, scores and position encodings, compared with the definition in double.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "support/drawn_masks.hpp"
#include "support/encodings.hpp"
#include "support/gauge.hpp"
#include "support/gradient.hpp"

namespace {

using namespace test;
using longspan::Pairing;
using longspan::softmax_attention;
using Function = decltype(Definition::score);

Shape draw_small_shape(Random& random) {
  Shape shape = draw_shape(random);
  shape.heads = shape.kv_heads * std::min<Index>(shape.heads / shape.kv_heads, 3);
  shape.head_dim = std::min<Index>(shape.head_dim, 65);
  shape.value_dim = std::min<Index>(shape.value_dim, 65);
  return shape;
}

}  // namespace

TEST_CASE("gradient of softmax_attention: within the bound with every mask", "[gauge][mask]") {
  for_each_case(12, [](Random& random) {
    const Shape shape = draw_small_shape(random);
    Definition what;
    if (random.chance(0.5)) what.first_query = random.between(-5, shape.kv_len + 5);
    DrawnMasks(shape, random).for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      INFO(name);
      what.sees = sees;
      check_gradient_call<GradientCall<float>>(shape, random.pick(all_values), random,
                                               softmax_attention{AnyMask(mask)}, what);
    });
  });
}

TEST_CASE("gradient of softmax_attention: within the bound with random combinations of masks",
          "[gauge][mask]") {
  for_each_case(100, [](Random& random) {
    const Shape shape = draw_small_shape(random);
    const MaskCase mask = random_mask(random, 3);
    INFO(mask.text);
    Definition what{.sees = mask.meaning};
    if (random.chance(0.5)) what.first_query = random.between(-5, shape.kv_len + 5);
    check_gradient_call<GradientCall<float>>(shape, random.pick(all_values), random,
                                             softmax_attention{mask.mask}, what);
  });
}

namespace {

/// A score function as a user writes it, with scalar members only.
struct waves {
  float operator()(float s, Index b, Index h, Index i, Index j) const {
    return s + 0.5f * std::sin(s + phase(b, h, i, j));
  }
  float derivative(float s, Index b, Index h, Index i, Index j) const {
    return 1 + 0.5f * std::cos(s + phase(b, h, i, j));
  }
  static float phase(Index b, Index h, Index i, Index j) {
    return static_cast<float>((b + h + i + 2 * j) % 5);
  }
};

/// A score function that hides some keys by -infinity and has no useful derivative there.
struct every_fourth_hidden {
  double operator()(double s, Index, Index, Index i, Index j) const {
    return hides(i, j) ? -std::numeric_limits<double>::infinity() : 2 * s;
  }
  double derivative(double, Index, Index, Index i, Index j) const {
    return hides(i, j) ? std::numeric_limits<double>::quiet_NaN() : 2;
  }
  static bool hides(Index i, Index j) { return ((i + j) % 4 + 4) % 4 == 1; }
};

/// The score functions of a shape, and what they mean.
class Scores {
 public:
  Scores(const Shape& shape, Random& random)
      : slopes_(longspan::alibi_slopes(shape.heads)),
        repeats_(random.chance(0.5)),
        first_(shape.kv_len - shape.q_len),
        bias_(repeats_ ? 1 : shape.batch, repeats_ ? 1 : shape.heads, shape.q_len, shape.kv_len) {
    fill_normal(bias_, random, 2);
  }

  /// Calls visit(name, score, what): what.score and what.derivative are the meaning of `score`.
  template <class Visit>
  void for_each(const Visit& visit) const {
    using namespace longspan;
    const auto capped = [](double s, double cap) { return cap * std::tanh(s / cap); };
    const auto of_cap = [](double s, double cap) { return 1 / std::pow(std::cosh(s / cap), 2); };
    const Function one = [](double, Index, Index, Index, Index) { return 1.0; };
    const Function sloped = [this](double s, Index, Index h, Index i, Index j) {
      return s - double(slopes_[std::size_t(h)]) * std::abs(double(i - j));
    };
    const Function biased = [this](double s, Index b, Index h, Index i, Index j) {
      return s + double(bias_.row(repeats_ ? 0 : b, repeats_ ? 0 : h, i - first_)[j]);
    };
    visit("softcap", softcap{5},
          Definition{.score = [=](double s, Index, Index, Index, Index) { return capped(s, 5); },
                     .derivative = [=](double s, Index, Index, Index, Index) { return of_cap(s, 5); }});
    visit("alibi", alibi{slopes_}, Definition{.score = sloped, .derivative = one});
    visit("softcap | alibi", softcap{20} | alibi{slopes_},
          Definition{.score = [=](double s, Index b, Index h, Index i,
                                  Index j) { return sloped(capped(s, 20), b, h, i, j); },
                     .derivative = [=](double s, Index, Index, Index, Index) { return of_cap(s, 20); }});
    visit("bias", additive_bias{bias_.view()}, Definition{.score = biased, .derivative = one});
    visit("bias | softcap", additive_bias{bias_.view()} | softcap{9},
          Definition{.score = [=](double s, Index b, Index h, Index i,
                                  Index j) { return capped(biased(s, b, h, i, j), 9); },
                     .derivative = [=](double s, Index b, Index h, Index i,
                                       Index j) { return of_cap(biased(s, b, h, i, j), 9); }});
    const auto shifted = [](double s, Index b, Index h, Index i, Index j) {
      return s + double(waves::phase(b, h, i, j));
    };
    visit("a user's score", waves{},
          Definition{.score = [=](double s, Index b, Index h, Index i,
                                  Index j) { return s + 0.5 * std::sin(shifted(s, b, h, i, j)); },
                     .derivative = [=](double s, Index b, Index h, Index i,
                                       Index j) { return 1 + 0.5 * std::cos(shifted(s, b, h, i, j)); }});
    visit("a user's score that hides keys", every_fourth_hidden{},
          Definition{.score =
                         [](double s, Index, Index, Index i, Index j) {
                           return every_fourth_hidden::hides(i, j) ? -std::numeric_limits<double>::infinity()
                                                                   : 2 * s;
                         },
                     .derivative = [](double, Index, Index, Index, Index) { return 2.0; }});
  }

 private:
  std::vector<float> slopes_;
  bool repeats_;
  Index first_;
  Tensor<float> bias_;
};

}  // namespace

TEST_CASE("gradient of softmax_attention: within the bound with every score function", "[gauge][score]") {
  for_each_case(12, [](Random& random) {
    Shape shape = draw_small_shape(random);
    shape.kv_len = std::max(shape.kv_len, shape.q_len);  // a bias has no rows for negative positions
    Scores(shape, random).for_each([&](const char* name, const auto& score, Definition what) {
      INFO(name);
      if (random.chance(0.5)) what.scale = 0.2;
      check_gradient_call<GradientCall<float>>(shape, random.pick(all_values), random,
                                               softmax_attention{score}, what);
    });
  });
}

TEST_CASE("gradient of softmax_attention: within the bound with a score in double and bfloat16",
          "[gauge][score]") {
  const longspan::softcap score{3};
  const Definition what{
      .score = [](double s, Index, Index, Index, Index) { return 3 * std::tanh(s / 3); },
      .derivative = [](double s, Index, Index, Index, Index) { return 1 / std::pow(std::cosh(s / 3), 2); }};
  for_each_case(10, [&](Random& random) {
    const Shape shape = draw_small_shape(random);
    check_gradient_call<GradientCall<double>>(shape, Values::normal, random, softmax_attention{score}, what);
    check_gradient_call<GradientCall<Eigen::bfloat16>>(shape, Values::normal, random,
                                                       softmax_attention{score}, what);
  });
}

TEMPLATE_TEST_CASE("gradient of softmax_attention: within the bound with position encodings",
                   "[gauge][position]", float, double) {
  for_each_case(12, [](Random& random) {
    Shape shape = draw_small_shape(random);
    shape.q_len = std::min<Index>(shape.q_len, 130);  // the oracle multiplies every row by a matrix
    shape.kv_len = std::min<Index>(shape.kv_len, 130);
    shape.head_dim = random.pick<Index>({2, 6, 8, 16, 34});
    const Values values = random.pick({Values::normal, Values::flat, Values::log_normal});
    const Pairing pairing = random.pick({Pairing::interleaved, Pairing::half_split});
    const Index dims = random.chance(0.5) ? 0 : 2 * random.between(1, shape.head_dim / 2);
    Definition rotary = with_rotary(pairing, dims), xpos = with_xpos(pairing, 512, 100);
    // Angles are computed in double, with an error of 300 * 2^-53 at position 300.
    if (std::is_same_v<TestType, double>) rotary.encode_error = xpos.encode_error = 64;
    if (random.chance(0.5)) rotary.first_query = xpos.first_query = random.between(-3, shape.kv_len + 3);
    check_gradient_call<GradientCall<TestType>>(
        shape, values, random, softmax_attention{longspan::rotary(pairing, 10000, dims)}, rotary);
    check_gradient_call<GradientCall<TestType>>(shape, values, random,
                                                softmax_attention{longspan::xpos(pairing, 512, 100)}, xpos);
  });
}

TEST_CASE("gradient of softmax_attention: within the bound with mask, score and position encoding together",
          "[gauge]") {
  for_each_case(15, [](Random& random) {
    Shape shape = draw_small_shape(random);
    shape.q_len = std::min<Index>(shape.q_len, 130);
    shape.kv_len = std::min<Index>(shape.kv_len, 130);
    shape.head_dim = random.pick<Index>({2, 16, 34});
    Definition what = with_rotary(Pairing::half_split, 0);
    what.sees = [](Index, Index, Index i, Index j) { return j <= i && j >= i - 50; };
    what.score = [](double s, Index, Index, Index, Index) { return 7 * std::tanh(s / 7); };
    what.derivative = [](double s, Index, Index, Index, Index) { return 1 / std::pow(std::cosh(s / 7), 2); };
    what.scale = 0.4;
    what.first_query = random.between(-3, shape.kv_len);  // the first queries may see no key
    check_gradient_call<GradientCall<float>>(
        shape, Values::normal, random,
        softmax_attention{longspan::rotary(Pairing::half_split), longspan::softcap{7},
                          longspan::causal{} & longspan::window{.left = 50}},
        what);
  });
}
