#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "longspan/partial.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/tensor.hpp"
#include "support/thread_pool.hpp"
#include "support/ulp.hpp"

using longspan::Arithmetic;
using longspan::Index;

namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

template <class T>
using Beta = longspan::MatrixView<const Arithmetic<T>>;

/// The worst error of g a + (1 - g) b, as a share of the 5 u of each side that five roundings allow:
/// exp, 1 +, 1 /, the product and the sum.
template <class T>
double worst_gate(const std::vector<Arithmetic<T>>& beta, Index beta_rows, Index beta_cols,
                  const test::Tensor<T>& a, const test::Tensor<T>& b, const test::Tensor<T>& got) {
  double worst = 0;
  for (Index n = 0; n < a.batch; ++n) {
    for (Index h = 0; h < a.heads; ++h) {
      for (Index i = 0; i < a.rows; ++i) {
        for (Index c = 0; c < a.cols; ++c) {
          const auto at = (beta_rows == 1 ? 0 : h) * beta_cols + (beta_cols == 1 ? 0 : c);
          const auto logit = static_cast<long double>(beta[static_cast<std::size_t>(at)]);
          const auto number = [&](const test::Tensor<T>& x) {
            return static_cast<long double>(static_cast<Arithmetic<T>>(x.row(n, h, i)[c]));
          };
          const long double of_a = number(a) / (1 + std::exp(-logit)),
                            of_b = number(b) / (1 + std::exp(logit));
          const auto allowed =
              5 * test::roundoff<T>() * static_cast<double>(std::abs(of_a) + std::abs(of_b)) +
              1.01 * test::storing_error<T>(static_cast<double>(of_a + of_b));
          worst = std::max(worst, static_cast<double>(std::abs(number(got) - (of_a + of_b))) / allowed);
        }
      }
    }
  }
  return worst;
}

}  // namespace

TEST_CASE("gate: beta = ln 3 takes three quarters of a", "[partial]") {
  const std::vector<double> beta{std::log(3.0)};
  const test::Tensor<double> a(1, 1, 1, 1, 26.0 / 7), b(1, 1, 1, 1, 1.0);
  test::Tensor<double> out(1, 1, 1, 1);
  longspan::gate(Beta<double>{beta.data(), 1, 1, 1}, a.view(), b.view(), out.view());
  CHECK(std::abs(out.values[0] - 3.0357142857142857) < 2e-15);
}

TEMPLATE_TEST_CASE("gate: beta 0 takes half of each", "[partial][exact]", float, double, Eigen::bfloat16,
                   Eigen::half) {
  const std::vector<Arithmetic<TestType>> beta{0};
  const test::Tensor<TestType> a(1, 2, 3, 17, TestType(6)), b(1, 2, 3, 17, TestType(-2));
  test::Tensor<TestType> out(1, 2, 3, 17);
  longspan::gate(Beta<TestType>{beta.data(), 1, 1, 1}, a.view(), b.view(), out.view());
  CHECK(out == test::Tensor<TestType>(1, 2, 3, 17, TestType(2)));
}

TEMPLATE_TEST_CASE("gate: within its bound for every shape of beta", "[partial]", float, double,
                   Eigen::bfloat16, Eigen::half) {
  test::for_each_case(60, [](test::Random& random) {
    const Index heads = 3, cols = random.pick<Index>({1, 5, 16, 33});
    const auto [beta_rows, beta_cols] =
        random.pick({std::pair<Index, Index>{1, 1}, {heads, 1}, {heads, cols}, {1, cols}});
    std::vector<Arithmetic<TestType>> beta(static_cast<std::size_t>(beta_rows * beta_cols));
    for (auto& x : beta) x = static_cast<Arithmetic<TestType>>(4 * random.normal());
    test::Tensor<TestType> a(2, heads, 4, cols), b = a, out = a;
    test::fill_normal(a, random);
    test::fill_normal(b, random);
    longspan::gate(Beta<TestType>{beta.data(), beta_rows, beta_cols, beta_cols}, a.view(), b.view(),
                   out.view());
    INFO("beta [" << beta_rows << ", " << beta_cols << "], " << cols << " columns");
    CHECK(worst_gate(beta, beta_rows, beta_cols, a, b, out) <= 1);
  });
}

TEST_CASE("gate: beta may have gaps between rows", "[partial]") {
  const std::vector<double> beta{-1.0, 0.0, 9.0, 9.0, 1.0, 2.0};
  test::Tensor<double> a(1, 2, 1, 2, 1.0), b(1, 2, 1, 2, 0.0), out = a;
  longspan::gate(Beta<double>{beta.data(), 2, 2, 4}, a.view(), b.view(), out.view());
  CHECK(std::abs(out.values[0] - 1 / (1 + std::exp(1.0))) < 1e-15);
  CHECK(out.values[1] == 0.5);
  CHECK(std::abs(out.values[2] - 1 / (1 + std::exp(-1.0))) < 1e-15);
  CHECK(std::abs(out.values[3] - 1 / (1 + std::exp(-2.0))) < 1e-15);
}

TEMPLATE_TEST_CASE("gate: fully open or closed it copies one side, even if the other is NaN", "[partial]",
                   float, double, Eigen::bfloat16, Eigen::half) {
  using Real = Arithmetic<TestType>;
  test::Random random(4);
  test::Tensor<TestType> good(1, 2, 3, 19);
  test::fill_normal(good, random);
  const test::Tensor<TestType> bad(1, 2, 3, 19, static_cast<TestType>(static_cast<float>(not_a_number)));
  for (const Real open : {std::numeric_limits<Real>::infinity(), Real(1000)}) {
    const std::vector<Real> beta{open, -open};
    test::Tensor<TestType> from_a(1, 2, 3, 19), from_b = from_a;
    longspan::gate(Beta<TestType>{beta.data(), 1, 1, 1}, good.view(), bad.view(), from_a.view());
    longspan::gate(Beta<TestType>{beta.data() + 1, 1, 1, 1}, bad.view(), good.view(), from_b.view());
    CHECK(from_a == good);
    CHECK(from_b == good);
  }
}

TEST_CASE("gate: NaN in an open side or in beta reaches the output", "[partial]") {
  const test::Tensor<double> bad(1, 1, 1, 1, not_a_number), good(1, 1, 1, 1, 1.0);
  test::Tensor<double> out(1, 1, 1, 1);
  const std::vector<double> beta{2.0, not_a_number};
  longspan::gate(Beta<double>{beta.data(), 1, 1, 1}, bad.view(), good.view(), out.view());
  CHECK(std::isnan(out.values[0]));
  longspan::gate(Beta<double>{beta.data(), 1, 1, 1}, good.view(), bad.view(), out.view());
  CHECK(std::isnan(out.values[0]));
  longspan::gate(Beta<double>{beta.data() + 1, 1, 1, 1}, good.view(), good.view(), out.view());
  CHECK(std::isnan(out.values[0]));
}

TEST_CASE("gate: a small share keeps its digits", "[partial]") {
  const std::vector<float> beta{30.0f};
  const test::Tensor<float> a(1, 1, 1, 1, 0.0f), b(1, 1, 1, 1, 1.0f);
  test::Tensor<float> out(1, 1, 1, 1);
  longspan::gate(Beta<float>{beta.data(), 1, 1, 1}, a.view(), b.view(), out.view());
  CHECK(test::ulps(out.values[0], 1 / (1 + std::exp(30.0))) <= 3);
}

TEST_CASE("gate: out may be an input, and bits do not depend on the executor", "[partial]") {
  test::Random random(5);
  test::Tensor<float> a(2, 3, 600, 9), b = a, wanted = a;
  test::fill_normal(a, random);
  test::fill_normal(b, random);
  const std::vector<float> beta{-1.0f, 0.3f, 2.0f};
  const Beta<float> of_head{beta.data(), 3, 1, 1};
  longspan::gate(of_head, a.view(), b.view(), wanted.view(), longspan::serial{});
  test::Tensor<float> into_a = a, into_b = b;
  longspan::gate(of_head, into_a.view(), b.view(), into_a.view());
  longspan::gate(of_head, a.view(), into_b.view(), into_b.view());
  CHECK(into_a == wanted);
  CHECK(into_b == wanted);
  for (const Index threads : {1, 2, 3, 7, 16}) {
    test::Tensor<float> out(2, 3, 600, 9);
    longspan::gate(of_head, a.view(), b.view(), out.view(), longspan::openmp{threads});
    CHECK(out == wanted);
  }
  test::Tensor<float> out(2, 3, 600, 9);
  longspan::gate(of_head, a.view(), b.view(), out.view(), test::ThreadPool(3));
  CHECK(out == wanted);
}

TEST_CASE("gate: shapes that disagree are refused, and nothing is written", "[partial][errors]") {
  const std::vector<float> beta(100, 1.0f);
  const test::Tensor<float> good(2, 3, 4, 5);
  test::Tensor<float> out(2, 3, 4, 5, 7.0f);
  const Beta<float> one{beta.data(), 1, 1, 1};
  for (const auto& odd : {test::Tensor<float>(1, 3, 4, 5), test::Tensor<float>(2, 1, 4, 5),
                          test::Tensor<float>(2, 3, 5, 5), test::Tensor<float>(2, 3, 4, 4)}) {
    const std::string is =
        std::string(" is ").append(longspan::detail::shape_text(odd.view())) + ", wanted [2, 3, 4, 5]";
    CHECK(test::refusal([&] { longspan::gate(one, odd.view(), good.view(), out.view()); }) ==
          "longspan: gate: a" + is);
    CHECK(test::refusal([&] { longspan::gate(one, good.view(), odd.view(), out.view()); }) ==
          "longspan: gate: b" + is);
  }
  for (const auto& [rows, cols] :
       {std::pair<Index, Index>{2, 1}, {4, 1}, {3, 4}, {3, 2}, {0, 1}, {1, 0}, {1, 3}, {5, 3}}) {
    const Beta<float> odd{beta.data(), rows, cols, cols};
    CHECK(test::refusal([&] { longspan::gate(odd, good.view(), good.view(), out.view()); }) ==
          "longspan: gate: beta is [" + std::to_string(rows) + ", " + std::to_string(cols) +
              "], wanted [1 or 3, 1 or 5]");
  }
  CHECK(out == test::Tensor<float>(2, 3, 4, 5, 7.0f));
}
