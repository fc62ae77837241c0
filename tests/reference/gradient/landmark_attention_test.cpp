// The reference of the gradient of landmark attention: a worked example, central differences, and laws.
#include "longspan/reference/gradient/landmark_attention.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "longspan/reference/gradient/softmax_attention.hpp"
#include "longspan/reference/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/differences.hpp"
#include "support/landmark_oracle.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::everything;
using longspan::landmark_attention;
using longspan::landmarks;
using longspan::LandmarkSoftmax;
namespace reference = longspan::reference;

/// A call that may have a CMT, and the gradient with respect to it.
struct Problem : DifferenceCall {
  Rows<float> cmt, dcmt;

  Problem(const Shape& s, Random& random)
      : DifferenceCall(s, random), cmt(s.batch, s.heads, s.q_len), dcmt(s.batch, s.heads, s.q_len, NAN) {
    // Multiples of 2^-6, so that central differences of float numbers are exact.
    for (float& x : cmt.values) x = static_cast<float>(std::round(64 * random.normal()) / 64);
  }

  template <class Attend>
  double loss(const Attend& attend) const {
    return DifferenceCall::loss(with_cmt(attend));
  }
  template <class Attend>
  void differentiate(const Attend& attend) {
    auto gradient = longspan::gradient(with_cmt(attend));
    if (attend.control.blocks.data != nullptr) gradient.dcmt = dcmt.view();
    differentiate_exactly(gradient);
  }
  /// The functor with this problem's CMT, if it has controlled blocks.
  template <class Attend>
  Attend with_cmt(Attend attend) const {
    if (attend.control.blocks.data != nullptr) attend.control.cmt = cmt.view();
    return attend;
  }
};

/// dq, dk, dv and dcmt against central differences of the loss.
template <class Attend>
void check_all_differences(const Attend& attend, Problem problem) {
  check_differences(attend, problem);
  if (attend.control.blocks.data == nullptr) return;
  problem.differentiate(attend);
  std::size_t wrong = 0;
  for (std::size_t n = 0; n < problem.cmt.values.size(); ++n) {
    const float at = problem.cmt.values[n], got = problem.dcmt.values[n];
    const double wanted = slope_of(
        [&](double step) {
          problem.cmt.values[n] = at + static_cast<float>(step);
          return problem.loss(attend);
        },
        0x1p-10);
    problem.cmt.values[n] = at;
    wrong += !(std::abs(double(got) - wanted) <= 1e-6 * std::abs(wanted) + 1e-9);
  }
  CHECK(wrong == 0);
}

/// Groups of heads, fewer queries than keys, and one query.
const std::vector<Shape> shapes{{2, 2, 1, 4, 8, 2, 2}, {1, 3, 1, 6, 6, 2, 1}, {1, 1, 1, 1, 12, 4, 2}};

template <class Attend>
void check_both(const Attend& attend, const Shape& shape, Random& random) {
  INFO(shape.text());
  Problem problem(shape, random);
  check_all_differences(attend, problem);
  for (const bool has_dlse : {true, false}) {
    problem.has_dlse = has_dlse;
    check_adjoint(attend, problem, random);
  }
}

/// With regular landmarks and with a random list for each batch row. `set` sets options for so many blocks.
template <class Set>
void check_with_landmarks(const Set& set) {
  Random random(1);
  for (const Shape& shape : shapes) {
    for (const Index length : {1, 3, 5}) {
      INFO("blocks of " << length);
      check_both(set(landmarks::every(length), shape, shape.kv_len / length), shape, random);
    }
    const Landmarks drawn = drawn_landmarks(3, shape.batch, shape.kv_len, random);
    const LandmarkLists lists(drawn);
    std::size_t blocks = 0;
    for (const auto& keys : drawn.of_row) blocks = std::max(blocks, keys.size());
    check_both(set(lists.at(), shape, Index(blocks)), shape, random);
  }
}

struct odd_pairs {
  bool sees(Index i, Index j) const { return (i * 7 + j * 3) % 5 != 0; }
};

/// A user's score function in double.
struct waves {
  double operator()(double s, Index b, Index h, Index i, Index j) const {
    return s + 0.5 * std::sin(s + static_cast<double>(b + h + i + 2 * j));
  }
  double derivative(double s, Index b, Index h, Index i, Index j) const {
    return 1 + 0.5 * std::cos(s + static_cast<double>(b + h + i + 2 * j));
  }
};

}  // namespace

TEST_CASE("reference of the gradient of landmark_attention: three blocks by hand",
          "[reference][gradient][golden]") {
  Random random(1);
  Problem problem(Shape{1, 1, 1, 1, 7, 1, 1}, random);
  problem.q.values = {1};
  const std::vector<double> counts{1, 3, 2, 1, 1, 4, 2};
  for (std::size_t n = 0; n < counts.size(); ++n) problem.k.values[n] = std::log(counts[n]);
  problem.v.values = {1, 2, NAN, 3, 4, NAN, 5};
  problem.dout.values = {1};
  problem.has_dlse = false;
  const std::vector<Index> keys{2, 5};
  landmark_attention attend{landmarks::at(keys)};
  attend.scale = 1;
  problem.differentiate(attend);
  const std::vector<double> dk{-3 / 64.0, 3 / 64.0, -27 / 64.0, -1 / 8.0, 1 / 8.0, 1 / 32.0, 25 / 64.0};
  const std::vector<double> dv{1 / 16.0, 3 / 16.0, 0, 1 / 4.0, 1 / 4.0, 0, 1 / 4.0};
  double dq = 0;
  for (std::size_t n = 0; n < counts.size(); ++n) {
    CHECK(std::abs(problem.dk.values[n] - dk[n]) < 1e-15);
    CHECK(std::abs(problem.dv.values[n] - dv[n]) < 1e-15);
    dq += dk[n] * std::log(counts[n]);
  }
  CHECK(std::abs(problem.dq.values[0] - dq) < 1e-15);

  // dlse alone: the gradient of lse is the softmax over own tokens and landmarks.
  problem.has_dlse = true;
  problem.dlse.values = {8};
  problem.dout.values = {0};
  problem.differentiate(attend);
  const std::vector<double> group{0, 0, 2, 0, 0, 4, 2};
  for (std::size_t n = 0; n < counts.size(); ++n) CHECK(std::abs(problem.dk.values[n] - group[n]) < 1e-14);
}

TEST_CASE("reference of the gradient of landmark_attention: ds sums to 0 over the group and over each block",
          "[reference][gradient]") {
  Random random(2);
  Problem problem(Shape{1, 1, 1, 1, 23, 1, 3}, random);
  problem.q.values = {1};
  problem.has_dlse = false;
  landmark_attention attend{landmarks::every(5)};
  attend.scale = 1;
  problem.differentiate(attend);  // with q = 1 and scale = 1 dk is ds
  double of_group = 0;
  for (Index m = 0; m < 4; ++m) {
    double of_block = 0;
    for (Index t = 0; t < 4; ++t) of_block += problem.dk.values[std::size_t(5 * m + t)];
    CHECK(std::abs(of_block) < 1e-15);
    of_group += problem.dk.values[std::size_t(5 * m + 4)];
  }
  for (std::size_t own = 20; own < 23; ++own) of_group += problem.dk.values[own];
  CHECK(std::abs(of_group) < 1e-15);
}

TEST_CASE("reference of the gradient of landmark_attention: central differences with masks",
          "[reference][gradient]") {
  check_with_landmarks([](landmarks at, const Shape&, Index) { return landmark_attention{at}; });
  check_with_landmarks([](landmarks at, const Shape&, Index) {
    return landmark_attention{at, everything{}};
  });
  check_with_landmarks([](landmarks at, const Shape&, Index) {
    return landmark_attention{at, causal{} & longspan::window{.left = 4}};
  });
  check_with_landmarks([](landmarks at, const Shape&, Index) {
    landmark_attention attend{at, odd_pairs{}};
    attend.scale = -0.7;
    attend.first_query = -2;
    return attend;
  });
}

TEST_CASE("reference of the gradient of landmark_attention: central differences with leak and gate_keep",
          "[reference][gradient]") {
  Random random(3);
  std::vector<float> keep(1000);
  for (float& x : keep) x = random.pick({0.0f, 1.5f, 1.0f});
  const auto set = [&](bool leak) {
    return [&, leak](landmarks at, const Shape& shape, Index blocks) {
      landmark_attention attend{at, odd_pairs{}};
      attend.leak = leak;
      attend.gate_keep =
          longspan::compact_view(std::as_const(keep).data(), shape.batch, shape.heads, shape.q_len, blocks);
      return attend;
    };
  };
  check_with_landmarks(set(false));
  check_with_landmarks(set(true));
}

TEST_CASE("reference of the gradient of landmark_attention: central differences through controlled blocks",
          "[reference][gradient][control]") {
  Random random(4);
  std::vector<unsigned char> kinds(100);
  for (auto& kind : kinds) kind = random.chance(0.5);
  for (const double cutoff : {0.0, 0.15}) {
    check_with_landmarks([&](landmarks at, const Shape& shape, Index blocks) {
      landmark_attention attend{at};
      attend.control.blocks = {kinds.data(), shape.batch, blocks, blocks};
      attend.control.cutoff = cutoff;
      return attend;
    });
  }
}

TEST_CASE("reference of the gradient of landmark_attention: central differences with scores and positions",
          "[reference][gradient][score]") {
  check_with_landmarks([](landmarks at, const Shape&, Index) {
    return landmark_attention{at, longspan::softcap{1.5f}};
  });
  check_with_landmarks([](landmarks at, const Shape&, Index) { return landmark_attention{at, waves{}}; });
  check_with_landmarks([](landmarks at, const Shape&, Index) {
    return landmark_attention{at, longspan::rotary(longspan::Pairing::half_split, 100, 2), waves{}};
  });
}

TEST_CASE(
    "reference of the gradient of landmark_attention: without landmarks it is that of softmax attention",
    "[reference][gradient][law]") {
  Random random(5);
  const Problem problem(Shape{1, 4, 2, 9, 9, 4, 3}, random);
  const auto check = [&](auto attend) {
    Problem own = problem, plain = problem;
    own.differentiate(attend);
    reference::exact{gradient(longspan::softmax_attention{causal{}})}(
        plain.q.view(), plain.k.view(), plain.v.view(), plain.dout.view(), plain.dlse.view(), plain.dq.view(),
        plain.dk.view(), plain.dv.view());
    for (std::size_t which = 0; which < 3; ++which) {
      for (std::size_t n = 0; n < own.gradients()[which]->values.size(); ++n)
        REQUIRE(std::abs(own.gradients()[which]->values[n] - plain.gradients()[which]->values[n]) < 1e-14);
    }
  };
  check(landmark_attention{landmarks::none()});
  check(landmark_attention{landmarks::every(10)});
  landmark_attention plain{landmarks::every(3)};
  plain.softmax = LandmarkSoftmax::plain;
  check(plain);
}

TEST_CASE("reference of the gradient of landmark_attention: ignored landmarks, and rows that see nothing",
          "[reference][gradient]") {
  check_with_landmarks([](landmarks at, const Shape&, Index) {
    landmark_attention attend{at};
    attend.softmax = LandmarkSoftmax::ignored;
    return attend;
  });
  Random random(6);
  Problem problem(Shape{1, 2, 1, 4, 3, 2, 2}, random);
  landmark_attention attend{landmarks::every(2)};
  attend.first_query = -2;
  problem.dout.row(0, 0, 0)[0] = NAN;
  problem.k.row(0, 0, 2)[1] = std::numeric_limits<double>::infinity();  // no query sees it
  problem.differentiate(attend);
  for (auto* x : problem.gradients()) {
    CHECK(std::all_of(x->values.begin(), x->values.end(), [](double n) { return std::isfinite(n); }));
  }
  CHECK(problem.dq.row(0, 1, 1)[0] == 0);
}
