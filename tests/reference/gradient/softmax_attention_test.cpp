#include "longspan/reference/gradient/softmax_attention.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "longspan/reference/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/differences.hpp"
#include "support/masks.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::Pairing;
using longspan::softmax_attention;
namespace reference = longspan::reference;

/// Shapes with groups of heads, more queries than keys, and more keys than queries.
const std::vector<Shape> shapes{{1, 4, 2, 4, 6, 4, 3}, {1, 3, 1, 7, 4, 2, 3}, {2, 2, 2, 1, 9, 4, 1}};

template <class Attend>
void check_both(const Attend& attend, const Shape& shape, Random& random) {
  INFO(shape.text());
  DifferenceCall problem(shape, random);
  check_differences(attend, problem);
  for (const bool has_dlse : {true, false}) {
    problem.has_dlse = has_dlse;
    check_adjoint(attend, problem, random);
  }
}

template <class Attend>
void check_both(const Attend& attend) {
  Random random(1);
  for (const Shape& shape : shapes) check_both(attend, shape, random);
}

/// A user's score function in double.
struct waves {
  double operator()(double s, Index b, Index h, Index i, Index j) const {
    return s + 0.5 * std::sin(s + static_cast<double>(b + h + i + 2 * j));
  }
  double derivative(double s, Index b, Index h, Index i, Index j) const {
    return 1 + 0.5 * std::cos(s + static_cast<double>(b + h + i + 2 * j));
  }
};

bool all_zero(const Tensor<double>& x) {
  return std::all_of(x.values.begin(), x.values.end(), [](double n) { return n == 0; });
}

}  // namespace

TEST_CASE("reference of the gradient of softmax_attention: central differences with every mask",
          "[reference][gradient]") {
  Random random(2);
  std::vector<MaskCase> masks = library_masks();
  for (const MaskCase& mask : user_masks()) masks.push_back(mask);
  for (std::size_t n = 0; n < masks.size(); ++n) {
    INFO(masks[n].text);
    check_both(softmax_attention{masks[n].mask}, shapes[n % shapes.size()], random);
  }
}

TEST_CASE("reference of the gradient of softmax_attention: central differences with scale and first_query",
          "[reference][gradient]") {
  for (const double scale : {0.7, -1.3}) {
    for (const Index first_query : {-2, 1, 20}) {
      softmax_attention attend{longspan::causal{}};
      attend.scale = scale;
      attend.first_query = first_query;
      check_both(attend);
    }
  }
}

TEST_CASE("reference of the gradient of softmax_attention: central differences with every score",
          "[reference][gradient]") {
  Random random(3);
  for (const Shape& shape : shapes) {
    const std::vector<float> slopes = longspan::alibi_slopes(shape.heads);
    Tensor<float> bias(shape.batch, 1, shape.q_len, shape.kv_len);
    fill_normal(bias, random, 2);
    const longspan::additive_bias biased(bias.view(), 0);
    const auto check = [&](const auto& score) {
      softmax_attention attend{score};
      attend.first_query = 0;
      check_both(attend, shape, random);
    };
    check(longspan::softcap{1.5f});
    check(longspan::alibi{slopes});
    check(biased);
    check(biased | longspan::softcap{2});
    check(longspan::softcap{2} | longspan::alibi{slopes});
    check(waves{});
    check(waves{} | longspan::softcap{2});
  }
}

TEST_CASE("reference of the gradient of softmax_attention: central differences through positions",
          "[reference][gradient]") {
  for (const Pairing pairing : {Pairing::interleaved, Pairing::half_split}) {
    check_both(softmax_attention{longspan::rotary(pairing)});
    check_both(softmax_attention{longspan::rotary(pairing, 100, 2)});
    check_both(softmax_attention{longspan::xpos(pairing, 8, 3)});
    softmax_attention attend{longspan::rotary(pairing), longspan::causal{}, longspan::softcap{2}};
    attend.first_query = 2;
    check_both(attend);
  }
}

TEST_CASE("reference of the gradient of softmax_attention: rows that see no key", "[reference][gradient]") {
  Random random(4);
  DifferenceCall problem(Shape{1, 2, 1, 4, 3, 2, 2}, random);
  softmax_attention attend{longspan::causal{}};
  attend.first_query = -2;  // queries 0 and 1 see nothing
  problem.dout.row(0, 0, 0)[0] = NAN;
  problem.q.row(0, 1, 1)[1] = std::numeric_limits<double>::infinity();
  problem.differentiate(attend);
  for (Index h = 0; h < 2; ++h) {
    for (Index i = 0; i < 4; ++i) {
      for (Index c = 0; c < 2; ++c) CHECK(std::isfinite(problem.dq.row(0, h, i)[c]));
    }
    CHECK(problem.dq.row(0, h, 1)[0] == 0);
  }
  for (const double x : problem.dk.values) CHECK(std::isfinite(x));
  for (const double x : problem.dv.values) CHECK(std::isfinite(x));

  DifferenceCall no_keys(Shape{1, 1, 1, 2, 0, 3, 2}, random), no_queries(Shape{1, 1, 1, 0, 4, 3, 2}, random);
  no_keys.differentiate(softmax_attention{});
  CHECK(all_zero(no_keys.dq));
  no_queries.differentiate(softmax_attention{});
  CHECK((all_zero(no_queries.dk) && all_zero(no_queries.dv)));
}

TEST_CASE("reference of the gradient of softmax_attention: two keys by hand",
          "[reference][gradient][exact]") {
  // p = (1/4, 3/4), out = 1/4 * 8 + 3/4 * 16 = 14; dp - D = 8 - 14 and 16 - 14, ds = (-3/2, 3/2).
  Random random(5);
  DifferenceCall problem(Shape{1, 1, 1, 1, 2, 1, 1}, random);
  problem.q.values = {1};
  problem.k.values = {0, std::log(3.0)};
  problem.v.values = {8, 16};
  problem.dout.values = {1};
  problem.has_dlse = false;
  problem.differentiate(softmax_attention{});
  const auto near = [](double got, double wanted) {
    return std::abs(got - wanted) <= 1e-15 * std::abs(wanted) * 8;
  };
  CHECK(near(problem.dv.values[0], 0.25));
  CHECK(near(problem.dv.values[1], 0.75));
  CHECK(near(problem.dk.values[0], -1.5));
  CHECK(near(problem.dk.values[1], 1.5));
  CHECK(near(problem.dq.values[0], 1.5 * std::log(3.0)));

  // dlse alone: the gradient of lse is p.
  problem.has_dlse = true;
  problem.dlse.values = {4};
  problem.dout.values = {0};
  problem.differentiate(softmax_attention{});
  CHECK(near(problem.dk.values[0], 1));
  CHECK(near(problem.dk.values[1], 3));
  CHECK(near(problem.dq.values[0], 3 * std::log(3.0)));
}
