// The reference of the gradient of dilated attention: worked examples, central differences, and the same sums in
// another way.
#include "longspan/reference/gradient/dilated_attention.hpp"

#include <cmath>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "longspan/reference/dilated_attention.hpp"
#include "longspan/reference/gradient/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace longspan;
using test::Random;
using test::Rows;
using test::Tensor;

/// The tensors of a call in double, and its gradients.
struct Problem {
  Tensor<double> q, k, v, dout, out, dq, dk, dv;
  Rows<double> lse, dlse;

  Problem(const test::Shape& s, Random& random)
      : q(s.batch, s.heads, s.q_len, s.head_dim),
        k(s.batch, s.kv_heads, s.kv_len, s.head_dim),
        v(s.batch, s.kv_heads, s.kv_len, s.value_dim),
        dout(s.batch, s.heads, s.q_len, s.value_dim),
        out(dout),
        dq(q),
        dk(k),
        dv(v),
        lse(s.batch, s.heads, s.q_len),
        dlse(lse) {
    for (Tensor<double>* x : {&q, &k, &v, &dout}) {
      for (double& number : x->values) number = random.normal();
    }
    for (double& number : dlse.values) number = random.normal();
  }
  template <class Gradient>
  void differentiate(const Gradient& gradient) {
    reference::exact{gradient}(q.view(), k.view(), v.view(), dout.view(), dq.view(), dk.view(), dv.view());
  }

  /// The loss dout.out + dlse.lse of the forward reference.
  template <class Attend>
  double loss(const Attend& attend, bool with_lse) {
    reference::exact{attend}(q.view(), k.view(), v.view(), out.view(), lse.view());
    double sum = 0;
    for (std::size_t n = 0; n < out.values.size(); ++n) sum += out.values[n] * dout.values[n];
    for (std::size_t n = 0; with_lse && n < lse.values.size(); ++n) {
      if (std::isfinite(lse.values[n])) sum += lse.values[n] * dlse.values[n];
    }
    return sum;
  }
};

/// CHECKs the gradients of a tensor against central differences of the loss.
template <class Loss>
void check_differences(const char* name, Tensor<double>& x, const Tensor<double>& gradient,
                       const Loss& loss) {
  double size = 0;
  for (const double g : gradient.values) size = std::fmax(size, std::abs(g));
  CHECK(size > 0.01);
  double worst = 0;
  for (std::size_t n = 0; n < x.values.size(); n += 7) {
    const double before = x.values[n], h = 1e-5;
    x.values[n] = before + h;
    const double above = loss();
    x.values[n] = before - h;
    const double below = loss();
    x.values[n] = before;
    worst = std::fmax(worst, std::abs((above - below) / (2 * h) - gradient.values[n]));
  }
  INFO(name);
  CHECK(worst <= 1e-6 * size);
}

/// The loss if the weights of the branches are the constants that they are at the start.
template <class Attend>
struct DetachedLoss {
  const Attend& attend;
  Problem& problem;
  std::vector<Rows<double>> weights;  ///< of each branch

  DetachedLoss(const Attend& of, Problem& at) : attend(of), problem(at) {
    Rows<double> whole = at.lse, part = at.lse;
    reference::exact{attend}(at.q.view(), at.k.view(), at.v.view(), at.out.view(), whole.view());
    for (std::size_t n = 0; n < attend.branches.size(); ++n) {
      reference::exact{branch(n)}(at.q.view(), at.k.view(), at.v.view(), at.out.view(), part.view());
      weights.push_back(part);
      for (std::size_t i = 0; i < part.values.size(); ++i)
        weights[n].values[i] = std::isfinite(part.values[i]) ? std::exp(part.values[i] - whole.values[i]) : 0;
    }
  }
  Attend branch(std::size_t n) const {
    Attend one = attend;
    one.branches = {attend.branches[n]};
    return one;
  }
  double operator()() const {
    double sum = 0;
    for (std::size_t n = 0; n < attend.branches.size(); ++n) {
      reference::exact{branch(n)}(problem.q.view(), problem.k.view(), problem.v.view(), problem.out.view());
      for (std::size_t i = 0; i < weights[n].values.size(); ++i) {
        for (Index c = 0; c < problem.out.cols; ++c) {
          const auto at = i * static_cast<std::size_t>(problem.out.cols) + static_cast<std::size_t>(c);
          sum += weights[n].values[i] * problem.out.values[at] * problem.dout.values[at];
        }
      }
    }
    return sum;
  }
};

template <class Attend>
void check_all(const Attend& attend, const test::Shape& shape) {
  Random random(3);
  Problem problem(shape, random);
  {
    INFO("exact");
    reference::exact{gradient(attend)}(problem.q.view(), problem.k.view(), problem.v.view(),
                                       problem.dout.view(), problem.dlse.view(), problem.dq.view(),
                                       problem.dk.view(), problem.dv.view());
    const auto loss = [&] { return problem.loss(attend, true); };
    check_differences("dq", problem.q, problem.dq, loss);
    check_differences("dk", problem.k, problem.dk, loss);
    check_differences("dv", problem.v, problem.dv, loss);
  }
  INFO("detached");
  problem.differentiate(gradient(attend, Mixing::detached));
  const DetachedLoss loss(attend, problem);
  check_differences("dq", problem.q, problem.dq, loss);
  check_differences("dk", problem.k, problem.dk, loss);
  check_differences("dv", problem.v, problem.dv, loss);
}

}  // namespace

TEST_CASE("reference gradient of dilated attention: the worked example of 4 tokens and 2 branches",
          "[golden]") {
  // exp(score) and value of key j are j + 1; the loss is the output of query 0.
  Random random(1);
  Problem problem(test::Shape{1, 1, 1, 4, 4, 1, 1}, random);
  for (Index j = 0; j < 4; ++j) {
    problem.q.values[std::size_t(j)] = 1;
    problem.k.values[std::size_t(j)] = std::log(static_cast<double>(j + 1));
    problem.v.values[std::size_t(j)] = static_cast<double>(j + 1);
    problem.dout.values[std::size_t(j)] = j == 0;
  }
  const dilated_attention attend{{{2, 1}, {4, 2}}};
  const auto check = [](const Tensor<double>& x, const std::vector<double>& wanted) {
    for (std::size_t n = 0; n < wanted.size(); ++n) CHECK(std::abs(x.values[n] - wanted[n]) < 1e-14);
  };
  problem.differentiate(gradient(attend));
  check(problem.dk, {-16.0 / 49, -2.0 / 49, 18.0 / 49, 0});
  check(problem.dv, {2.0 / 7, 2.0 / 7, 3.0 / 7, 0});
  problem.differentiate(gradient(attend, Mixing::detached));
  check(problem.dk, {-13.0 / 42, 2.0 / 21, 3.0 / 14, 0});
  check(problem.dv, {2.0 / 7, 2.0 / 7, 3.0 / 7, 0});
}

TEST_CASE("reference gradient of dilated attention: central differences", "[laws]") {
  const test::Shape shape{2, 4, 2, 30, 30, 4, 3};
  SECTION("causal") { check_all(dilated_attention{{{4, 1}, {12, 3}}, causal{}}, shape); }
  SECTION("tokens that no branch keeps") { check_all(dilated_attention{{{8, 2}, {20, 5}}}, shape); }
  SECTION("each key once") {
    dilated_attention attend{{{4, 1}, {16, 2}}, causal{}};
    attend.overlap = Overlap::set;
    Random random(3);
    Problem problem(shape, random);
    problem.differentiate(gradient(attend));
    check_differences("dk", problem.k, problem.dk, [&] { return problem.loss(attend, false); });
  }
  SECTION("padded with zeros, blocked offsets") {
    dilated_attention attend{{{7, 2}, {16, 3}}};
    attend.zero_pad_compat = true;
    attend.phase = Phase::blocked;
    check_all(attend, test::Shape{1, 6, 6, 26, 26, 4, 3});
  }
  SECTION("rotary, a cap, fewer queries than keys") {
    check_all(dilated_attention{{{8, 1}, {32, 4}}, causal{}, rotary{Pairing::interleaved}, softcap{2}},
              test::Shape{1, 2, 1, 11, 40, 4, 3});
  }
}

TEST_CASE("reference gradient of dilated attention: one branch (N, 1) is softmax attention", "[laws]") {
  Random random(4);
  Problem problem(test::Shape{1, 2, 1, 20, 20, 5, 6}, random);
  problem.differentiate(gradient(dilated_attention{{{20, 1}}, causal{}}));
  const Tensor<double> dq = problem.dq, dk = problem.dk, dv = problem.dv;
  problem.differentiate(gradient(softmax_attention{causal{}}));
  CHECK(dq == problem.dq);
  CHECK(dk == problem.dk);
  CHECK(dv == problem.dv);
}
