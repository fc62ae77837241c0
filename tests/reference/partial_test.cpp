#include "longspan/reference/partial.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/tensor.hpp"

using longspan::Index;
using longspan::MatrixView;
using longspan::Partial;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// One row of one column.
struct Number {
  double out, lse;

  Partial<const double> read() const {
    return {longspan::compact_view(&out, 1, 1, 1, 1), longspan::compact_rows_view(&lse, 1, 1, 1)};
  }
  Partial<double> write() {
    return {longspan::compact_view(&out, 1, 1, 1, 1), longspan::compact_rows_view(&lse, 1, 1, 1)};
  }
};

Number merged(const std::vector<Number>& numbers) {
  std::vector<Partial<const double>> parts;
  for (const Number& number : numbers) parts.push_back(number.read());
  Number into{not_a_number, not_a_number};
  longspan::reference::merge(parts, into.write());
  return into;
}

/// Compares with the accuracy that weights have if lse is a double.
bool is(const Number& got, double out, double lse) {
  const double allowed = 1e-15 * (4 + (std::isfinite(lse) ? std::abs(lse) : 0));
  return std::abs(got.out - out) <= allowed * std::abs(out) &&
         (got.lse == lse || std::abs(got.lse - lse) <= allowed * std::abs(lse));
}

double gated(double beta, double a, double b) {
  double out = not_a_number;
  longspan::reference::gate({&beta, 1, 1, 1}, longspan::compact_view<const double>(&a, 1, 1, 1, 1),
                            longspan::compact_view<const double>(&b, 1, 1, 1, 1),
                            longspan::compact_view(&out, 1, 1, 1, 1));
  return out;
}

}  // namespace

TEST_CASE("reference::merge: matches values computed by hand", "[reference]") {
  CHECK(is(merged({{2, std::log(3.0)}, {5, 0}}), 2.75, std::log(4.0)));
  CHECK(is(merged({{5, 0}, {2, std::log(3.0)}}), 2.75, std::log(4.0)));
  CHECK(is(merged({{1, std::log(1.0)}, {2, std::log(2.0)}, {3, std::log(3.0)}, {4, std::log(4.0)}}), 3,
           std::log(10.0)));
  CHECK(is(merged({{6, 1000}, {8, 1000}}), 7, 1000 + std::log(2.0)));
  CHECK(is(merged({{6, -1000}, {8, -1000}}), 7, -1000 + std::log(2.0)));
  CHECK(is(merged({{7, 0.5}}), 7, 0.5));
}

TEST_CASE("reference::merge: a part with lse -infinity is absent", "[reference]") {
  for (const double absent : {0.0, 9.0, not_a_number, infinity}) {
    CHECK(is(merged({{2, 1.5}, {absent, -infinity}}), 2, 1.5));
    CHECK(is(merged({{absent, -infinity}, {2, 1.5}}), 2, 1.5));
    CHECK(is(merged({{absent, -infinity}, {absent, -infinity}}), 0, -infinity));
  }
  CHECK(is(merged({}), 0, -infinity));
}

TEST_CASE("reference::merge: NaN reaches the result", "[reference]") {
  for (const auto& numbers : {std::vector<Number>{{2, not_a_number}, {3, 1}},
                              {{3, 1}, {2, not_a_number}},
                              {{2, not_a_number}},
                              {{2, not_a_number}, {3, -infinity}}}) {
    CHECK(std::isnan(merged(numbers).out));
    CHECK(std::isnan(merged(numbers).lse));
  }
  CHECK(std::isnan(merged({{not_a_number, 0}, {3, 1}}).out));
}

TEST_CASE("reference::merge: rows and columns are independent", "[reference]") {
  test::Tensor<double> a(2, 2, 2, 3), b = a, out = a;
  test::Rows<double> lse_a(2, 2, 2), lse_b = lse_a, lse = lse_a;
  for (std::size_t n = 0; n < 24; ++n) a.values[n] = static_cast<double>(n), b.values[n] = 100;
  for (std::size_t n = 0; n < 8; ++n)
    lse_a.values[n] = std::log(3.0), lse_b.values[n] = n == 5 ? -infinity : 0.0;
  const std::vector<Partial<const double>> parts{{std::as_const(a).view(), std::as_const(lse_a).view()},
                                                 {std::as_const(b).view(), std::as_const(lse_b).view()}};
  longspan::reference::merge(parts, {out.view(), lse.view()});
  double worst = 0;
  for (std::size_t n = 0; n < 24; ++n) {
    const double wanted = n / 3 == 5 ? a.values[n] : 0.75 * a.values[n] + 25;
    worst = std::max(worst, std::abs(out.values[n] - wanted));
  }
  CHECK(worst < 1e-13);
  CHECK(lse.values[5] == std::log(3.0));
  CHECK(std::abs(lse.values[4] - std::log(4.0)) < 1e-15);
}

TEST_CASE("reference::gate: matches values computed by hand", "[reference]") {
  CHECK(gated(0, 6, -2) == 2);
  CHECK(std::abs(gated(std::log(3.0), 26.0 / 7, 1) - 3.0357142857142857) < 1e-14);
  CHECK(std::abs(gated(-std::log(3.0), 1, 26.0 / 7) - 3.0357142857142857) < 1e-14);
  CHECK(gated(infinity, 3, 5) == 3);
  CHECK(gated(-infinity, 3, 5) == 5);
}

TEST_CASE("reference::gate: a small share keeps its digits", "[reference]") {
  for (const double beta : {20.0, 30.0, 40.0, 300.0}) {
    const double small = std::exp(-beta) / (1 + std::exp(-beta));
    CHECK(std::abs(gated(beta, 0, 1) - small) <= 1e-14 * small);
    CHECK(std::abs(gated(-beta, 1, 0) - small) <= 1e-14 * small);
  }
}

TEST_CASE("reference::gate: a closed side has no effect, even if it is NaN", "[reference]") {
  CHECK(gated(infinity, 3, not_a_number) == 3);
  CHECK(gated(-infinity, not_a_number, 5) == 5);
  CHECK(std::isnan(gated(0, not_a_number, 5)));
  CHECK(std::isnan(gated(not_a_number, 3, 5)));
}

TEST_CASE("reference::gate: every shape of beta", "[reference]") {
  const test::Tensor<double> a(1, 2, 3, 2, 1.0), b(1, 2, 3, 2, 0.0);
  const std::vector<double> beta{0.0, std::log(3.0), -std::log(3.0), infinity};
  const auto shares = [&](Index rows, Index cols) {
    test::Tensor<double> out(1, 2, 3, 2);
    longspan::reference::gate({beta.data(), rows, cols, cols}, a.view(), b.view(), out.view());
    return std::vector<double>{out.row(0, 0, 2)[0], out.row(0, 0, 2)[1], out.row(0, 1, 2)[0],
                               out.row(0, 1, 2)[1]};
  };
  const auto near = [](const std::vector<double>& x, const std::vector<double>& y) {
    double worst = 0;
    for (std::size_t n = 0; n < x.size(); ++n) worst = std::max(worst, std::abs(x[n] - y[n]));
    return worst < 1e-15;
  };
  CHECK(near(shares(1, 1), {0.5, 0.5, 0.5, 0.5}));
  CHECK(near(shares(2, 1), {0.5, 0.5, 0.75, 0.75}));
  CHECK(near(shares(2, 2), {0.5, 0.75, 0.25, 1}));
  CHECK(near(shares(1, 2), {0.5, 0.75, 0.5, 0.75}));
}
