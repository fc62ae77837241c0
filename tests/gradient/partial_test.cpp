#include "longspan/gradient/partial.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "longspan/reference/gradient/partial.hpp"
#include "longspan/reference/partial.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/tensor.hpp"
#include "support/thread_pool.hpp"
#include "support/ulp.hpp"

using longspan::Arithmetic;
using longspan::Index;
using longspan::MatrixView;
using longspan::Partial;

namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

/// A partial that owns its memory.
template <class T>
struct Owned {
  test::Tensor<T> out;
  test::Rows<Arithmetic<T>> lse;

  Owned(Index batch, Index heads, Index rows, Index cols)
      : out(batch, heads, rows, cols), lse(batch, heads, rows) {}

  Partial<T> view() { return {out.view(), lse.view()}; }
  Partial<const T> view() const { return {out.view(), lse.view()}; }
  bool operator==(const Owned& other) const { return out == other.out && lse == other.lse; }

  void fill(test::Random& random, double of_lse = 2) {
    test::fill_normal(out, random);
    for (auto& x : lse.values) x = static_cast<Arithmetic<T>>(of_lse * random.normal());
  }
  Owned<double> in_double() const {
    Owned<double> same(out.batch, out.heads, out.rows, out.cols);
    std::transform(out.values.begin(), out.values.end(), same.out.values.begin(),
                   [](T x) { return static_cast<double>(static_cast<Arithmetic<T>>(x)); });
    std::copy(lse.values.begin(), lse.values.end(), same.lse.values.begin());
    return same;
  }
};

template <class T>
std::vector<Partial<const T>> constants(const std::vector<Owned<T>>& parts) {
  std::vector<Partial<const T>> views;
  for (const auto& part : parts) views.push_back(part.view());
  return views;
}
template <class T>
std::vector<Partial<T>> views_of(std::vector<Owned<T>>& parts) {
  std::vector<Partial<T>> views;
  for (auto& part : parts) views.push_back(part.view());
  return views;
}

/// The gradients of the parts, by the reference.
std::vector<Owned<double>> reference_of(const std::vector<Owned<double>>& parts,
                                        const Owned<double>& dmerged) {
  std::vector<Owned<double>> gradients = parts;
  longspan::reference::merge_gradient(constants(parts), dmerged.view(), views_of(gradients));
  return gradients;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t n = 0; n < a.size(); ++n) sum += a[n] * b[n];
  return sum;
}
double loss_of_merge(const std::vector<Owned<double>>& parts, const Owned<double>& dmerged) {
  Owned<double> merged = parts.front();
  longspan::reference::merge(constants(parts), merged.view());
  return dot(merged.out.values, dmerged.out.values) + dot(merged.lse.values, dmerged.lse.values);
}

/// The central difference of loss() with respect to x.
template <class Loss>
double difference(double& x, const Loss& loss) {
  const double step = 1e-5, at = x;
  x = at + step;
  const double above = loss();
  x = at - step;
  const double below = loss();
  x = at;
  return (above - below) / (2 * step);
}

}  // namespace

TEST_CASE("reference::merge_gradient: agrees with central differences", "[gradient][partial]") {
  test::Random random(1);
  std::vector<Owned<double>> parts(3, Owned<double>(1, 2, 3, 4));
  for (auto& part : parts) part.fill(random);
  Owned<double> dmerged = parts.front();
  dmerged.fill(random);
  const auto gradients = reference_of(parts, dmerged);
  const auto loss = [&] { return loss_of_merge(parts, dmerged); };
  double worst = 0;
  for (std::size_t n = 0; n < parts.size(); ++n) {
    for (std::size_t at = 0; at < parts[n].out.values.size(); ++at)
      worst =
          std::max(worst, std::abs(difference(parts[n].out.values[at], loss) - gradients[n].out.values[at]));
    for (std::size_t at = 0; at < parts[n].lse.values.size(); ++at)
      worst =
          std::max(worst, std::abs(difference(parts[n].lse.values[at], loss) - gradients[n].lse.values[at]));
  }
  INFO("worst difference " << worst);
  CHECK(worst <= 1e-8);
}

TEST_CASE("reference::gate_gradient: agrees with central differences", "[gradient][partial]") {
  test::Random random(2);
  const Index heads = 2, cols = 3;
  for (const auto& [rows, columns] : {std::pair<Index, Index>{1, 1}, {heads, 1}, {heads, cols}, {1, cols}}) {
    std::vector<double> beta(static_cast<std::size_t>(rows * columns)), dbeta = beta;
    for (double& x : beta) x = random.normal();
    test::Tensor<double> a(2, heads, 4, cols), b = a, dout = a, da = a, db = a, out = a;
    for (auto* x : {&a, &b, &dout}) test::fill_normal(*x, random);
    const auto of_beta = MatrixView<const double>{beta.data(), rows, columns, columns};
    longspan::reference::gate_gradient(of_beta, std::as_const(a).view(), std::as_const(b).view(),
                                       std::as_const(dout).view(), {dbeta.data(), rows, columns, columns},
                                       da.view(), db.view());
    const auto loss = [&] {
      longspan::reference::gate(of_beta, std::as_const(a).view(), std::as_const(b).view(), out.view());
      return dot(out.values, dout.values);
    };
    double worst = 0;
    const auto compare = [&](std::vector<double>& x, const std::vector<double>& gradient) {
      for (std::size_t n = 0; n < x.size(); ++n)
        worst = std::max(worst, std::abs(difference(x[n], loss) - gradient[n]));
    };
    compare(a.values, da.values);
    compare(b.values, db.values);
    compare(beta, dbeta);
    INFO("beta [" << rows << ", " << columns << "], worst difference " << worst);
    CHECK(worst <= 1e-8);
  }
}

TEST_CASE("merge_gradient: the gradients of two parts by hand", "[gradient][partial][exact]") {
  // out 2 and 6 with weights 1/4 and 3/4, so that out = 5; dout = 1, dlse = 2.
  Owned<double> a(1, 1, 1, 1), b = a, merged = a, dmerged = a, da = a, db = a;
  a.out.values = {2};
  b.out.values = {6};
  b.lse.values = {std::log(3.0)};
  dmerged.out.values = {1};
  dmerged.lse.values = {2};
  longspan::merge<double>({a.view(), b.view()}, merged.view());
  longspan::merge_gradient<double>({a.view(), b.view()}, merged.view(), dmerged.view(),
                                   {da.view(), db.view()});
  CHECK(std::abs(da.out.values[0] - 0.25) <= 1e-15);
  CHECK(std::abs(db.out.values[0] - 0.75) <= 1e-15);
  CHECK(std::abs(da.lse.values[0] - 0.25 * (2 - 5 + 2)) <= 1e-15);
  CHECK(std::abs(db.lse.values[0] - 0.75 * (6 - 5 + 2)) <= 4e-15);
}

TEMPLATE_TEST_CASE("merge_gradient: within its bound", "[gradient][partial]", float, double, Eigen::bfloat16,
                   Eigen::half) {
  using Real = Arithmetic<TestType>;
  test::for_each_case(40, [](test::Random& random) {
    const Index rows = random.pick<Index>({1, 7, 300}), cols = random.pick<Index>({1, 5, 16, 33});
    const auto count = static_cast<std::size_t>(random.between(1, 4));
    std::vector<Owned<TestType>> parts(count, Owned<TestType>(2, 3, rows, cols)), got = parts;
    for (auto& part : parts) part.fill(random, random.pick({1, 5}));
    Owned<TestType> merged = parts[0], dmerged = parts[0];
    dmerged.fill(random);
    longspan::merge<TestType>(constants(parts), merged.view());
    longspan::merge_gradient<TestType>(constants(parts), merged.view(), dmerged.view(), views_of(got));
    std::vector<Owned<double>> in_double;
    for (const auto& part : parts) in_double.push_back(part.in_double());
    const auto wanted = reference_of(in_double, dmerged.in_double());
    // 16-bit outputs: dout.out has the rounding of the merged output.
    const double u = test::roundoff<TestType>(), stored = sizeof(TestType) == 2 ? 0x1p-8 : 0;
    double worst_out = 0, worst_lse = 0;
    for (std::size_t n = 0; n < count; ++n) {
      for (Index row = 0; row < 2 * 3 * rows; ++row) {
        const auto at = static_cast<std::size_t>(row);
        const double lse = static_cast<double>(merged.lse.values[at]),
                     of_part = static_cast<double>(parts[n].lse.values[at]);
        const double r = u * (8 + 2 * std::abs(of_part) + 2 * std::abs(lse)),
                     weight = std::exp(of_part - lse);
        double size = std::abs(static_cast<double>(dmerged.lse.values[at])), of_merged = 0;
        for (Index c = 0; c < cols; ++c) {
          const auto element = static_cast<std::size_t>(row * cols + c);
          const auto number = [&](const Owned<TestType>& x) {
            return std::abs(static_cast<double>(static_cast<Real>(x.out.values[element])));
          };
          size += number(dmerged) * (number(parts[n]) + number(merged));
          of_merged += number(dmerged) * number(merged);
          const double allowed = r * weight * number(dmerged) +
                                 1.01 * test::storing_error<TestType>(wanted[n].out.values[element]);
          worst_out = std::max(worst_out,
                               std::abs(static_cast<double>(static_cast<Real>(got[n].out.values[element])) -
                                        wanted[n].out.values[element]) /
                                   (allowed + 1e-300));
        }
        const double allowed =
            (r + static_cast<double>(cols) * u) * weight * size + stored * weight * of_merged;
        worst_lse = std::max(worst_lse,
                             std::abs(static_cast<double>(got[n].lse.values[at]) - wanted[n].lse.values[at]) /
                                 (allowed + 1e-300));
      }
    }
    INFO(count << " parts, " << rows << " rows, " << cols << " columns");
    CHECK(worst_out <= 1);
    CHECK(worst_lse <= 1);
  });
}

TEMPLATE_TEST_CASE("merge_gradient: a part without keys gets nothing, even if its output is NaN",
                   "[gradient][partial][masked]", float, Eigen::half) {
  using Real = Arithmetic<TestType>;
  const auto nan = static_cast<TestType>(static_cast<float>(not_a_number));
  test::Random random(3);
  Owned<TestType> good(1, 2, 3, 19), bad = good, merged = good, dmerged = good, of_good = good, of_bad = good;
  good.fill(random);
  dmerged.fill(random);
  std::fill(bad.out.values.begin(), bad.out.values.end(), nan);
  std::fill(bad.lse.values.begin(), bad.lse.values.end(), -std::numeric_limits<Real>::infinity());
  // In the last row no part has keys.
  good.lse.values.back() = -std::numeric_limits<Real>::infinity();
  std::fill_n(good.out.row(0, 1, 2), 19, nan);
  longspan::merge<TestType>({good.view(), bad.view()}, merged.view());
  longspan::merge_gradient<TestType>({good.view(), bad.view()}, merged.view(), dmerged.view(),
                                     {of_good.view(), of_bad.view()});
  CHECK(of_bad == Owned<TestType>(1, 2, 3, 19));
  CHECK(of_good.lse.values.back() == Real(0));
  CHECK(std::all_of(of_good.out.row(0, 1, 2), of_good.out.row(0, 1, 2) + 19,
                    [](TestType x) { return x == TestType(0); }));
  for (std::size_t n = 0; n < 5 * 19; ++n) CHECK(of_good.out.values[n] == dmerged.out.values[n]);
}

TEST_CASE("merge_gradient: an lse that is not wanted or not used", "[gradient][partial]") {
  test::Random random(4);
  Owned<float> a(1, 1, 5, 6), b = a, merged = a, dmerged = a, all = a, rest = a, without = a;
  a.fill(random);
  b.fill(random);
  dmerged.fill(random);
  std::fill(dmerged.lse.values.begin(), dmerged.lse.values.end(), 0.0f);
  longspan::merge<float>({a.view(), b.view()}, merged.view());
  longspan::merge_gradient<float>({a.view(), b.view()}, merged.view(), dmerged.view(),
                                  {all.view(), rest.view()});
  longspan::merge_gradient<float>({a.view()}, merged.view(),
                                  Partial<const float>{std::as_const(dmerged).out.view(), {}},
                                  {Partial<float>{without.out.view(), {}}});
  CHECK(without.out == all.out);
  longspan::merge_gradient<float>({a.view()}, merged.view(),
                                  Partial<const float>{std::as_const(dmerged).out.view(), {}},
                                  {without.view()});
  CHECK(without == all);
}

TEST_CASE("merge_gradient and gate_gradient: bits do not depend on the executor",
          "[gradient][partial][bits]") {
  test::Random random(5);
  Owned<float> a(2, 3, 600, 9), b = a, merged = a, dmerged = a, of_a = a, of_b = a;
  for (auto* x : {&a, &b, &dmerged}) x->fill(random);
  const std::vector<float> beta{-1.0f, 0.3f, 2.0f};
  std::vector<float> dbeta(3);
  longspan::merge<float>({a.view(), b.view()}, merged.view());
  const auto run = [&](const auto& executor) {
    longspan::merge_gradient<float>({a.view(), b.view()}, merged.view(), dmerged.view(),
                                    {of_a.view(), of_b.view()}, executor);
    std::vector<float> all = of_a.out.values;
    for (const auto* x : {&of_a.lse.values, &of_b.out.values, &of_b.lse.values})
      all.insert(all.end(), x->begin(), x->end());
    longspan::gate_gradient(longspan::per_head_gate(beta), a.out.view(), b.out.view(), dmerged.out.view(),
                            {dbeta.data(), 3, 1, 1}, of_a.out.view(), of_b.out.view(), executor);
    for (const auto* x : {&of_a.out.values, &of_b.out.values, &dbeta})
      all.insert(all.end(), x->begin(), x->end());
    return all;
  };
  const std::vector<float> wanted = run(longspan::serial{});
  for (const Index threads : {1, 2, 3, 7, 16})
    CHECK(test::Tensor<float>::same_bits(run(longspan::openmp{threads}), wanted));
  CHECK(test::Tensor<float>::same_bits(run(test::ThreadPool(3)), wanted));
}

TEMPLATE_TEST_CASE("gate_gradient: within its bound for every shape of beta", "[gradient][partial]", float,
                   double, Eigen::bfloat16, Eigen::half) {
  using Real = Arithmetic<TestType>;
  test::for_each_case(40, [](test::Random& random) {
    const Index heads = 3, cols = random.pick<Index>({1, 5, 33}), rows = random.pick<Index>({1, 4, 700});
    const auto [beta_rows, beta_cols] =
        random.pick({std::pair<Index, Index>{1, 1}, {heads, 1}, {heads, cols}, {1, cols}});
    std::vector<Real> beta(static_cast<std::size_t>(beta_rows * beta_cols)), dbeta = beta;
    for (auto& x : beta) x = static_cast<Real>(3 * random.normal());
    test::Tensor<TestType> a(2, heads, rows, cols), b = a, dout = a, da = a, db = a;
    for (auto* x : {&a, &b, &dout}) test::fill_normal(*x, random);
    longspan::gate_gradient(MatrixView<const Real>{beta.data(), beta_rows, beta_cols, beta_cols}, a.view(),
                            b.view(), dout.view(), {dbeta.data(), beta_rows, beta_cols, beta_cols}, da.view(),
                            db.view());
    const auto in_double = [](const auto& x) {
      std::vector<double> same;
      for (const auto value : x) same.push_back(static_cast<double>(static_cast<Real>(value)));
      return same;
    };
    const auto of = [&](std::vector<double>& x) {
      return longspan::TensorView<const double>(longspan::compact_view(x.data(), 2, heads, rows, cols));
    };
    std::vector<double> logits = in_double(beta), x = in_double(a.values), y = in_double(b.values),
                        z = in_double(dout.values), wanted_a = x, wanted_b = x, wanted(beta.size());
    longspan::reference::gate_gradient({logits.data(), beta_rows, beta_cols, beta_cols}, of(x), of(y), of(z),
                                       {wanted.data(), beta_rows, beta_cols, beta_cols},
                                       longspan::compact_view(wanted_a.data(), 2, heads, rows, cols),
                                       longspan::compact_view(wanted_b.data(), 2, heads, rows, cols));
    std::vector<double> sizes(beta.size(), 0.0);
    const double u = test::roundoff<TestType>();
    double worst = 0, worst_beta = 0;
    const std::vector<double> got_a = in_double(da.values), got_b = in_double(db.values);
    for (std::size_t n = 0; n < x.size(); ++n) {
      const auto allowed = [&](double w) {
        return 5 * u * std::abs(w) + 1.01 * test::storing_error<TestType>(w);
      };
      worst = std::max({worst, std::abs(got_a[n] - wanted_a[n]) / (allowed(wanted_a[n]) + 1e-300),
                        std::abs(got_b[n] - wanted_b[n]) / (allowed(wanted_b[n]) + 1e-300)});
      const Index c = static_cast<Index>(n) % cols, h = static_cast<Index>(n) / cols / rows % heads;
      const auto at =
          static_cast<std::size_t>((beta_rows == 1 ? 0 : h) * beta_cols + (beta_cols == 1 ? 0 : c));
      const double g = 1 / (1 + std::exp(-logits[at]));
      sizes[at] += g * (1 - g) * std::abs(z[n]) * (std::abs(x[n]) + std::abs(y[n]));
    }
    for (std::size_t n = 0; n < beta.size(); ++n)
      worst_beta =
          std::max(worst_beta, std::abs(static_cast<double>(dbeta[n]) - wanted[n]) / (270 * u * sizes[n]));
    INFO("beta [" << beta_rows << ", " << beta_cols << "], " << rows << " rows, " << cols << " columns");
    CHECK(worst <= 1);
    CHECK(worst_beta <= 1);
  });
}

TEST_CASE("gate_gradient: a closed gate sends nothing, even if its side is NaN",
          "[gradient][partial][masked]") {
  test::Random random(6);
  test::Tensor<float> good(1, 2, 3, 19), dout = good;
  test::fill_normal(good, random);
  test::fill_normal(dout, random);
  const test::Tensor<float> bad(1, 2, 3, 19, static_cast<float>(not_a_number)), nothing(1, 2, 3, 19);
  for (const float open : {static_cast<float>(infinity), 1000.0f}) {
    const float closed = -open;
    float dbeta = 7;
    test::Tensor<float> da(1, 2, 3, 19), db = da;
    longspan::gate_gradient(longspan::scalar_gate(closed), bad.view(), good.view(), dout.view(),
                            {&dbeta, 1, 1, 1}, da.view(), db.view());
    CHECK(da == nothing);
    CHECK(db == dout);
    CHECK(dbeta == 0.0f);
    longspan::gate_gradient(longspan::scalar_gate(open), good.view(), bad.view(), dout.view(),
                            {&dbeta, 1, 1, 1}, da.view(), db.view());
    CHECK(da == dout);
    CHECK(db == nothing);
    CHECK(dbeta == 0.0f);
  }
}

TEST_CASE("gate_gradient: dbeta may be left out and db may be dout", "[gradient][partial]") {
  test::Random random(7);
  test::Tensor<float> a(1, 2, 3, 5), b = a, dout = a, da = a, db = a;
  for (auto* x : {&a, &b, &dout}) test::fill_normal(*x, random);
  const float beta = 0.4f;
  float dbeta = 0;
  longspan::gate_gradient(longspan::scalar_gate(beta), a.view(), b.view(), dout.view(), {&dbeta, 1, 1, 1},
                          da.view(), db.view());
  test::Tensor<float> again = a;
  longspan::gate_gradient(longspan::scalar_gate(beta), a.view(), b.view(), dout.view(), {}, again.view(),
                          dout.view());
  CHECK(again == da);
  CHECK(dout == db);
}

TEST_CASE("merge_gradient and gate_gradient: shapes that disagree are refused",
          "[gradient][partial][errors]") {
  Owned<float> good(2, 3, 4, 5), odd(2, 3, 4, 6), to = good;
  const Owned<float> before = to;
  const auto text = [&](const auto& merged, const auto& dmerged, const auto& part, auto& dpart) {
    return test::refusal([&] {
      longspan::merge_gradient<float>({part.view()}, merged.view(), dmerged.view(), {dpart.view()});
    });
  };
  const std::string is = " is [2, 3, 4, 6], wanted [2, 3, 4, 5]";
  CHECK(text(good, odd, good, to) == "longspan: merge_gradient: the output of its gradient" + is);
  CHECK(text(good, good, odd, to) == "longspan: merge_gradient: the output of part 0" + is);
  CHECK(text(good, good, good, odd) == "longspan: merge_gradient: the output of the gradient of part 0" + is);
  CHECK(test::refusal([&] {
          longspan::merge_gradient<float>({good.view(), good.view()}, good.view(), good.view(), {to.view()});
        }) == "longspan: merge_gradient: the number of gradients is 1, wanted 2, one for each part");
  CHECK(to == before);

  const float beta = 0;
  float dbeta[2] = {};
  const auto gate_text = [&](const auto& a, const auto& dout, MatrixView<float> of_beta) {
    return test::refusal([&] {
      longspan::gate_gradient(longspan::scalar_gate(beta), a.out.view(), good.out.view(), dout.out.view(),
                              of_beta, to.out.view(), to.out.view());
    });
  };
  CHECK(gate_text(odd, good, {}) == "longspan: gate_gradient: a" + is);
  CHECK(gate_text(good, odd, {}) == "longspan: gate_gradient: a is [2, 3, 4, 5], wanted [2, 3, 4, 6]");
  CHECK(gate_text(good, good, {dbeta, 2, 1, 1}) ==
        "longspan: gate_gradient: dbeta is [2, 1], wanted [1, 1] as beta");
  CHECK(to == before);
}
