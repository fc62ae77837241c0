#include "longspan/partial.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <unsupported/Eigen/CXX11/Tensor>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/tensor.hpp"
#include "support/thread_pool.hpp"
#include "support/ulp.hpp"

using longspan::Arithmetic;
using longspan::compact_view;
using longspan::Index;
using longspan::merge;
using longspan::Partial;
using longspan::with_lse;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// A partial that owns its memory.
template <class T>
struct Part {
  using Real = Arithmetic<T>;

  test::Tensor<T> out;
  test::Rows<Real> lse;

  Part(Index batch, Index heads, Index rows, Index cols)
      : out(batch, heads, rows, cols, static_cast<T>(NAN)), lse(batch, heads, rows, static_cast<Real>(NAN)) {}
  /// One row of one head.
  Part(const std::vector<double>& row, double of_row) : Part(1, 1, 1, static_cast<Index>(row.size())) {
    for (std::size_t c = 0; c < row.size(); ++c) out.values[c] = static_cast<T>(static_cast<Real>(row[c]));
    lse.values[0] = static_cast<Real>(of_row);
  }

  Partial<const T> read() const { return {out.view(), lse.view()}; }
  Partial<T> write() { return {out.view(), lse.view()}; }
  bool operator==(const Part& other) const { return out == other.out && lse == other.lse; }
};

template <class T>
void fill(Part<T>& part, test::Random& random, double spread) {
  test::fill_normal(part.out, random);
  for (auto& lse : part.lse.values) lse = static_cast<Arithmetic<T>>(spread * random.normal());
}

template <class T>
std::vector<Partial<const T>> views_of(const std::vector<Part<T>>& parts) {
  std::vector<Partial<const T>> views;
  for (const Part<T>& part : parts) views.push_back(part.read());
  return views;
}

template <class T, class E = longspan::serial>
Part<T> merged(const std::vector<Part<T>>& parts, Index batch, Index heads, Index rows, Index cols,
               E&& execution = E{}) {
  Part<T> into(batch, heads, rows, cols);
  const auto views = views_of(parts);
  merge<T>(std::span<const Partial<const T>>(views), into.write(), execution);
  return into;
}
template <class T>
Part<T> merged(const std::vector<Part<T>>& parts) {
  const auto& like = parts.front().out;
  return merged(parts, like.batch, like.heads, like.rows, like.cols);
}

template <class T>
std::vector<double> row_of(const Part<T>& part) {
  std::vector<double> row;
  for (const T x : part.out.values) row.push_back(static_cast<double>(static_cast<Arithmetic<T>>(x)));
  return row;
}
template <class T>
double lse_of(const Part<T>& part) {
  return static_cast<double>(part.lse.values[0]);
}

/// The worst error of a merge, as a share of the allowed error. For out, part n may have an error of
/// (parts + 4 + highest lse - lse_n) u, because the difference of two lse is rounded before it becomes a
/// weight; for lse 2 u (1 + |lse|).
template <class T>
double worst_share(const std::vector<Part<T>>& parts, const Part<T>& got) {
  const double u = test::roundoff<T>();
  double worst = 0;
  for (std::size_t row = 0; row < got.lse.values.size(); ++row) {
    long double top = -infinity, sum = 0;
    for (const auto& part : parts) top = std::max(top, static_cast<long double>(part.lse.values[row]));
    for (const auto& part : parts) sum += std::exp(static_cast<long double>(part.lse.values[row]) - top);
    const long double lse = top + std::log(sum);
    const auto off = static_cast<double>(std::abs(static_cast<long double>(got.lse.values[row]) - lse));
    worst = std::max(worst, off / (2 * u * (1 + std::abs(static_cast<double>(lse)))));
    const auto cols = static_cast<std::size_t>(got.out.cols);
    for (std::size_t c = row * cols; c < (row + 1) * cols; ++c) {
      long double exact = 0, gauge = 0;
      for (const auto& part : parts) {
        const auto behind = top - static_cast<long double>(part.lse.values[row]);
        const auto term = std::exp(-behind) / sum *
                          static_cast<long double>(static_cast<Arithmetic<T>>(part.out.values[c]));
        exact += term;
        gauge += (static_cast<long double>(parts.size()) + 4 + behind) * std::abs(term);
      }
      const double x = static_cast<double>(static_cast<Arithmetic<T>>(got.out.values[c]));
      const double allowed =
          u * static_cast<double>(gauge) + 1.01 * test::storing_error<T>(static_cast<double>(exact));
      worst = std::max(worst, std::abs(x - static_cast<double>(exact)) / allowed);
    }
  }
  return worst;
}

}  // namespace

TEMPLATE_TEST_CASE("merge: (2, ln 3) and (5, 0) give (2.75, ln 4)", "[partial]", float, double,
                   Eigen::bfloat16, Eigen::half) {
  const double u = test::roundoff<TestType>();
  const auto both = merged<TestType>({{{2.0}, std::log(3.0)}, {{5.0}, 0.0}});
  CHECK(std::abs(row_of(both)[0] - 2.75) <= 6 * u * 2.75);
  CHECK(std::abs(lse_of(both) - std::log(4.0)) <= 2 * u * (1 + std::log(4.0)));
}

TEMPLATE_TEST_CASE("merge: equal parts are averaged exactly", "[partial][exact]", float, double,
                   Eigen::bfloat16, Eigen::half) {
  for (const std::size_t count : {1u, 2u, 4u, 64u}) {
    std::vector<Part<TestType>> parts;
    double sum = 0;
    for (std::size_t n = 0; n < count; ++n) {
      parts.push_back({std::vector<double>(19, static_cast<double>(n) - 3), 7.0});
      sum += static_cast<double>(n) - 3;
    }
    CHECK(row_of(merged(parts)) == std::vector<double>(19, sum / static_cast<double>(count)));
  }
}

TEMPLATE_TEST_CASE("merge: a part that saw no key is the identity, whatever its output contains", "[partial]",
                   float, double, Eigen::bfloat16, Eigen::half) {
  for (const double absent : {0.0, 3.0, not_a_number, infinity, -infinity}) {
    const Part<TestType> some({1.5, -2.25, 0.75}, -4.5), none(std::vector<double>(3, absent), -infinity);
    CHECK(merged<TestType>({some, none}) == some);
    CHECK(merged<TestType>({none, some}) == some);
    CHECK(merged<TestType>({none, some, none, none}) == some);
    for (const auto& nothing : {merged<TestType>({none}), merged<TestType>({none, none})}) {
      CHECK(row_of(nothing) == std::vector<double>(3, 0.0));
      CHECK(lse_of(nothing) == -infinity);
    }
  }
}

TEMPLATE_TEST_CASE("merge: no parts give attention over no keys", "[partial]", float, double) {
  const auto nothing = merged<TestType>(std::vector<Part<TestType>>{}, 1, 1, 1, 3);
  CHECK(row_of(nothing) == std::vector<double>(3, 0.0));
  CHECK(lse_of(nothing) == -infinity);
}

TEMPLATE_TEST_CASE("merge: one part is the result", "[partial]", float, double, Eigen::bfloat16,
                   Eigen::half) {
  const Part<TestType> part({0.3, -7.0, 1e4, 1e-3}, 12.3);
  CHECK(merged<TestType>({part}) == part);
}

TEMPLATE_TEST_CASE("merge: two parts in either order give the same bits", "[partial]", float, double,
                   Eigen::bfloat16, Eigen::half) {
  test::for_each_case(50, [](test::Random& random) {
    Part<TestType> a(2, 2, 5, random.pick<Index>({1, 7, 16, 33})), b = a;
    fill(a, random, 2);
    fill(b, random, 2);
    b.lse.values[0] = a.lse.values[0];
    CHECK(merged<TestType>({a, b}) == merged<TestType>({b, a}));
  });
}

TEMPLATE_TEST_CASE("merge: within its error bound", "[partial]", float, double, Eigen::bfloat16,
                   Eigen::half) {
  test::for_each_case(60, [](test::Random& random) {
    const Index count = random.pick<Index>({1, 2, 3, 8, 64}),
                cols = random.pick<Index>({1, 7, 8, 16, 17, 33, 64});
    const double spread = random.pick({0.0, 0.5, 5.0, 30.0, 300.0});
    std::vector<Part<TestType>> parts;
    for (Index n = 0; n < count; ++n) {
      parts.emplace_back(2, 2, 3, cols);
      fill(parts.back(), random, spread);
    }
    INFO(count << " parts, " << cols << " columns, spread " << spread);
    CHECK(worst_share(parts, merged(parts)) <= 1);
  });
}

TEMPLATE_TEST_CASE("merge: associative within the bound", "[partial]", float, double) {
  test::for_each_case(100, [](test::Random& random) {
    std::vector<Part<TestType>> parts;
    for (int n = 0; n < 3; ++n) {
      parts.emplace_back(1, 2, 3, 20);
      fill(parts.back(), random, 3);
    }
    const auto left = merged<TestType>({merged<TestType>({parts[0], parts[1]}), parts[2]});
    const auto right = merged<TestType>({parts[0], merged<TestType>({parts[1], parts[2]})});
    // Two merges, each with the error of one.
    CHECK(worst_share(parts, left) <= 2);
    CHECK(worst_share(parts, right) <= 2);
    CHECK(worst_share(parts, merged(parts)) <= 1);
  });
}

TEMPLATE_TEST_CASE("merge: any partition of the keys gives attention over all keys", "[partial]", float,
                   double) {
  test::for_each_case(100, [](test::Random& random) {
    const Index keys = random.between(1, 60), cols = 9, blocks = random.between(1, 10);
    std::vector<double> scores;
    std::vector<Index> block;
    test::Tensor<double> values(1, 1, keys, cols);
    for (Index j = 0; j < keys; ++j) {
      scores.push_back(4 * random.normal());
      block.push_back(random.between(0, blocks - 1));
    }
    test::fill_normal(values, random);
    double gauge = 0;
    for (const double v : values.values) gauge = std::max(gauge, std::abs(v));

    // Softmax attention over the keys of block n, or over all keys if n is -1.
    const auto attend = [&](Index n) {
      std::vector<double> out(static_cast<std::size_t>(cols), 0.0);
      double sum = 0;
      for (Index j = 0; j < keys; ++j) {
        if (n >= 0 && block[static_cast<std::size_t>(j)] != n) continue;
        const double p = std::exp(scores[static_cast<std::size_t>(j)]);
        sum += p;
        for (Index c = 0; c < cols; ++c) out[static_cast<std::size_t>(c)] += p * values.row(0, 0, j)[c];
      }
      for (double& x : out) x = sum == 0 ? 0 : x / sum;
      return Part<TestType>(out, std::log(sum));
    };
    std::vector<Part<TestType>> parts;
    for (Index n = 0; n < blocks; ++n) parts.push_back(attend(n));
    const auto got = merged(parts), whole = attend(-1);
    double worst = 0;
    for (std::size_t c = 0; c < static_cast<std::size_t>(cols); ++c) {
      worst = std::max(worst, std::abs(row_of(got)[c] - row_of(whole)[c]));
    }
    // In addition to the error of the merge, every lse of about 10 was rounded to TestType.
    CHECK(worst <= 40 * test::roundoff<TestType>() * gauge);
    CHECK(std::abs(lse_of(got) - lse_of(whole)) <= 20 * test::roundoff<TestType>());
  });
}

TEMPLATE_TEST_CASE("merge: large log-sum-exps do not overflow", "[partial]", float, double) {
  for (const double shift : {-1e4, 1e4, 1e30, -1e30}) {
    const auto both = merged<TestType>({{{2.0}, shift}, {{4.0}, shift}});
    CHECK(row_of(both)[0] == 3.0);
    CHECK(std::abs(lse_of(both) - (shift + std::log(2.0))) <=
          4 * test::roundoff<TestType>() * std::abs(shift));
  }
  const auto apart = merged<TestType>({{{2.0}, 1e4}, {{4.0}, -1e4}});
  CHECK(row_of(apart)[0] == 2.0);
  CHECK(lse_of(apart) == static_cast<double>(TestType(1e4)));
}

TEMPLATE_TEST_CASE("merge: NaN in a log-sum-exp or in a visible output stays in its row", "[partial]", float,
                   double, Eigen::bfloat16, Eigen::half) {
  for (const std::size_t of_part : {0u, 1u, 2u}) {
    std::vector<Part<TestType>> parts;
    for (int n = 0; n < 3; ++n) {
      parts.emplace_back(1, 1, 3, 5);
      std::fill(parts.back().out.values.begin(), parts.back().out.values.end(), TestType(2));
      std::fill(parts.back().lse.values.begin(), parts.back().lse.values.end(), Arithmetic<TestType>(n));
    }
    parts[of_part].lse.values[1] = static_cast<Arithmetic<TestType>>(not_a_number);
    parts[of_part].out.row(0, 0, 2)[3] = static_cast<TestType>(static_cast<float>(not_a_number));
    const auto got = merged(parts);
    const std::vector<double> out = row_of(got);
    for (std::size_t c = 0; c < 5; ++c) {
      CHECK(std::abs(out[c] - 2) < 0.02);
      CHECK(std::isnan(out[5 + c]));
      CHECK(std::isnan(out[10 + c]) == (c == 3));
    }
    CHECK(std::isfinite(got.lse.values[0]));
    CHECK(std::isnan(got.lse.values[1]));
    CHECK(std::isfinite(got.lse.values[2]));
  }
}

TEST_CASE("merge: mutable partials together with constant ones", "[partial]") {
  test::Random random(4);
  std::vector<Part<float>> parts;
  for (int n = 0; n < 3; ++n) {
    parts.emplace_back(1, 2, 3, 5);
    fill(parts.back(), random, 1);
  }
  const auto wanted = merged(parts);
  const auto mutable_part = [&](std::size_t n) {
    return longspan::partial(parts[n].out.view(), parts[n].lse.view());
  };
  STATIC_REQUIRE(std::is_same_v<decltype(mutable_part(0)), Partial<float>>);
  Part<float> into(1, 2, 3, 5);
  const auto check = [&](const auto& call) {
    into = Part<float>(1, 2, 3, 5);
    call();
    CHECK(into == wanted);
  };
  check([&] { merge({mutable_part(0), mutable_part(1), mutable_part(2)}, into.write()); });
  check([&] {
    merge({mutable_part(0), parts[1].read(), mutable_part(2)}, into.write(), longspan::serial{});
  });
  const std::vector<Partial<float>> in_vector{mutable_part(0), mutable_part(1), mutable_part(2)};
  check([&] { merge(in_vector, into.write()); });
  const auto constant = views_of(parts);
  check([&] { merge(constant, into.write(), longspan::openmp{2}); });
  // A constant lse makes a constant partial, and with_lse accepts a mutable partial.
  const auto& lse = std::as_const(parts[1]).lse;
  const auto of_constant_lse = longspan::partial(parts[1].out.view(), lse.view());
  STATIC_REQUIRE(std::is_same_v<decltype(of_constant_lse), const Partial<const float>>);
  check([&] { merge({mutable_part(0), of_constant_lse, mutable_part(2)}, into.write()); });
  check([&] {
    merge({mutable_part(0), with_lse(mutable_part(1), lse.view()), mutable_part(2)}, into.write());
  });
}

TEMPLATE_TEST_CASE("merge: a part whose log-sum-exp is NaN is not treated as absent", "[partial]", float,
                   double) {
  const double lowest = std::numeric_limits<TestType>::lowest();
  for (const double other : {-infinity, lowest, 0.0, 1e30, infinity}) {
    const Part<TestType> spoiled({2.0}, not_a_number), some({3.0}, other);
    for (const auto& both : {merged<TestType>({spoiled, some}), merged<TestType>({some, spoiled}),
                             merged<TestType>({some, spoiled, some})}) {
      CHECK(std::isnan(lse_of(both)));
      CHECK(std::isnan(row_of(both)[0]));
    }
  }
}

TEMPLATE_TEST_CASE("merge: into one of its parts", "[partial]", float, Eigen::bfloat16) {
  test::Random random(1);
  std::vector<Part<TestType>> parts;
  for (int n = 0; n < 3; ++n) {
    parts.emplace_back(2, 3, 4, 37);
    fill(parts.back(), random, 1);
  }
  const auto wanted = merged(parts);
  for (std::size_t n = 0; n < 3; ++n) {
    auto copies = parts;
    const auto views = views_of(copies);
    merge<TestType>(std::span<const Partial<const TestType>>(views), copies[n].write());
    CHECK(copies[n] == wanted);
    CHECK(copies[(n + 1) % 3] == parts[(n + 1) % 3]);
  }
}

TEST_CASE("merge: bits do not depend on the executor", "[partial]") {
  test::Random random(2);
  std::vector<Part<float>> parts;
  for (int n = 0; n < 4; ++n) {
    parts.emplace_back(2, 3, 600, 20);
    fill(parts.back(), random, 3);
  }
  const auto wanted = merged(parts, 2, 3, 600, 20, longspan::serial{});
  for (const Index threads : {0, 1, 2, 3, 7, 16}) {
    CHECK(merged(parts, 2, 3, 600, 20, longspan::openmp{threads}) == wanted);
  }
  CHECK(merged(parts, 2, 3, 600, 20, test::ThreadPool(3)) == wanted);
  longspan::Execution<longspan::openmp> execution(longspan::openmp{3});
  CHECK(merged(parts, 2, 3, 600, 20, execution) == wanted);
}

TEST_CASE("merge: Eigen tensors and strided views, and gaps between rows stay unchanged", "[partial]") {
  test::Random random(3);
  constexpr Index batch = 2, heads = 3, rows = 4, cols = 5, apart = 8;
  Part<float> a(batch, heads, rows, cols), b(batch, heads, rows, cols);
  fill(a, random, 1);
  fill(b, random, 1);
  const auto wanted = merged<float>({a, b});

  Eigen::Tensor<float, 4, Eigen::RowMajor> out(batch, heads, rows, cols);
  Eigen::Tensor<float, 3, Eigen::RowMajor> lse(batch, heads, rows);
  merge({a.read(), b.read()}, longspan::partial(out, lse));
  CHECK(std::equal(out.data(), out.data() + out.size(), wanted.out.values.begin()));
  CHECK(std::equal(lse.data(), lse.data() + lse.size(), wanted.lse.values.begin()));

  // [batch, rows, heads, cols with a gap] and [batch, rows, heads].
  std::vector<float> memory(batch * rows * heads * apart, -7.0f), numbers(batch * rows * heads);
  const longspan::TensorView<float> strided{memory.data(),        batch, heads,        rows, cols,
                                            rows * heads * apart, apart, heads * apart};
  const longspan::RowsView<float> of_rows{numbers.data(), batch, heads, rows, rows * heads, 1, heads};
  merge({a.read(), b.read()}, Partial<float>{strided, of_rows});
  bool right = true, kept = true;
  for (Index n = 0; n < batch; ++n) {
    for (Index h = 0; h < heads; ++h) {
      for (Index i = 0; i < rows; ++i) {
        right &= std::equal(strided.row(n, h, i), strided.row(n, h, i) + cols, wanted.out.row(n, h, i));
        right &= of_rows(n, h, i) == wanted.lse(n, h, i);
        for (Index c = cols; c < apart; ++c) kept &= strided.row(n, h, i)[c] == -7.0f;
      }
    }
  }
  CHECK(right);
  CHECK(kept);
}

TEST_CASE("merge: shapes that disagree are refused, and nothing is written", "[partial][errors]") {
  const Part<float> good(2, 3, 4, 5);
  Part<float> into(2, 3, 4, 5);
  const auto text = [&](const Partial<const float>& odd) {
    return test::refusal([&] { merge({good.read(), odd}, into.write()); });
  };
  CHECK(text(Part<float>(1, 3, 4, 5).read()) ==
        "longspan: merge: the output of part 1 is [1, 3, 4, 5], wanted [2, 3, 4, 5]");
  CHECK(text(Part<float>(2, 2, 4, 5).read()) ==
        "longspan: merge: the output of part 1 is [2, 2, 4, 5], wanted [2, 3, 4, 5]");
  CHECK(text(Part<float>(2, 3, 9, 5).read()) ==
        "longspan: merge: the output of part 1 is [2, 3, 9, 5], wanted [2, 3, 4, 5]");
  CHECK(text(Part<float>(2, 3, 4, 6).read()) ==
        "longspan: merge: the output of part 1 is [2, 3, 4, 6], wanted [2, 3, 4, 5]");
  for (const auto& lse :
       {test::Rows<float>(1, 3, 4), test::Rows<float>(2, 4, 4), test::Rows<float>(2, 3, 3)}) {
    CHECK(text(with_lse(good.read(), lse.view())) ==
          "longspan: merge: the lse of part 1 is [" + std::to_string(lse.batch) + ", " +
              std::to_string(lse.heads) + ", " + std::to_string(lse.rows) + "], wanted [2, 3, 4]");
    test::Rows<float> of_result = lse;
    CHECK(test::refusal([&] {
            merge({good.read()}, Partial<float>{into.out.view(), of_result.view()});
          }) == "longspan: merge: the lse of the result is [" + std::to_string(lse.batch) + ", " +
                    std::to_string(lse.heads) + ", " + std::to_string(lse.rows) + "], wanted [2, 3, 4]");
  }
  CHECK(into == Part<float>(2, 3, 4, 5));
}

TEST_CASE("merge: more than 64 parts are refused", "[partial][errors]") {
  const Part<float> part({1.0}, 0.0);
  Part<float> into({9.0}, 9.0);
  const Part<float> before = into;
  std::vector<Partial<const float>> parts(65, part.read());
  CHECK(test::refusal([&] { merge(std::span<const Partial<const float>>(parts), into.write()); }) ==
        "longspan: merge: the number of parts is 65, wanted at most 64");
  CHECK(into == before);
  parts.pop_back();
  merge(std::span<const Partial<const float>>(parts), into.write());
  CHECK(row_of(into)[0] == 1);
}

TEST_CASE("merge: accepts tensors without rows or columns", "[partial]") {
  CHECK(merged<float>({Part<float>(1, 2, 0, 5)}) == Part<float>(1, 2, 0, 5));
  Part<float> no_columns(1, 1, 2, 0);
  no_columns.lse.values = {1.0f, -std::numeric_limits<float>::infinity()};
  const auto got = merged<float>({no_columns, no_columns});
  CHECK(std::abs(got.lse.values[0] - (1 + std::log(2.0f))) < 1e-6f);
  CHECK(got.lse.values[1] == -std::numeric_limits<float>::infinity());
}

TEST_CASE("with_lse: the same output with another weight", "[partial]") {
  const Part<double> block({4.0, 8.0}, 100.0), local({1.0, 2.0}, std::log(3.0));
  const test::Rows<double> logit(1, 1, 1, 0.0);
  const Partial<const double> as_block = with_lse(block.read(), logit.view());
  CHECK(as_block.out.data == block.out.values.data());
  CHECK(as_block.lse(0, 0, 0) == 0.0);
  // As in landmark attention, the block's own log-sum-exp does not count.
  Part<double> out(1, 1, 1, 2);
  merge({local.read(), as_block}, out.write());
  CHECK(std::abs(row_of(out)[0] - 1.75) < 1e-15);
  CHECK(std::abs(row_of(out)[1] - 3.5) < 1e-15);
  CHECK(std::abs(lse_of(out) - std::log(4.0)) < 1e-15);
}

TEST_CASE("with_lse: a block whose weight is -infinity is left out", "[partial]") {
  const Part<float> block(std::vector<double>{not_a_number, not_a_number}, 3.0), local({1.0, 2.0}, 0.5);
  const test::Rows<float> logit(1, 1, 1, -std::numeric_limits<float>::infinity());
  Part<float> out(1, 1, 1, 2);
  merge({with_lse(block.read(), logit.view()), local.read()}, out.write());
  CHECK(out == local);
}

TEST_CASE("partial: from tensors, views, and one head", "[partial]") {
  Eigen::Tensor<float, 4, Eigen::RowMajor> out(2, 3, 4, 5);
  Eigen::Tensor<float, 3, Eigen::RowMajor> lse(2, 3, 4);
  const auto of_tensors = longspan::partial(out, lse);
  STATIC_REQUIRE(std::is_same_v<decltype(of_tensors), const Partial<float>>);
  CHECK(of_tensors.out.row(1, 2, 3) == &out(1, 2, 3, 0));
  CHECK(&of_tensors.lse(1, 2, 3) == &lse(1, 2, 3));
  STATIC_REQUIRE(std::is_same_v<decltype(longspan::partial(std::as_const(out), std::as_const(lse))),
                                Partial<const float>>);
  const Partial<const float> read_only = of_tensors;
  CHECK(read_only.out.data == out.data());

  Eigen::Matrix<double, 4, 5, Eigen::RowMajor> head;
  Eigen::Vector4d numbers;
  const auto of_matrix = longspan::partial(head, numbers);
  STATIC_REQUIRE(std::is_same_v<decltype(of_matrix), const Partial<double>>);
  CHECK(of_matrix.out.rows == 4);
  CHECK(&of_matrix.lse(0, 0, 3) == &numbers(3));

  Eigen::Tensor<Eigen::bfloat16, 2, Eigen::RowMajor> stored(4, 5);
  Eigen::Tensor<float, 1, Eigen::RowMajor> of_stored(4);
  STATIC_REQUIRE(std::is_same_v<decltype(longspan::partial(stored, of_stored)), Partial<Eigen::bfloat16>>);
}
