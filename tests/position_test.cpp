#include "longspan/position.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <type_traits>
#include <unsupported/Eigen/CXX11/Tensor>
#include <utility>
#include <vector>

#include "longspan/reference/position.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/ulp.hpp"

using longspan::Index;
using longspan::MatrixView;
using longspan::no_position;
using longspan::Pairing;
using longspan::Role;
using longspan::rotary;
using longspan::xpos;

namespace {

constexpr Pairing pairings[] = {Pairing::interleaved, Pairing::half_split};
const std::vector<Index> positions{0,      1,       2,         63,        64,         65,
                                   -1,     -5,      -64,       -65,       100,        4095,
                                   131072, 1000000, 100000000, 999999999, 1000000000, Index{1} << 40};

template <class Real>
std::vector<Real> random_rows(test::Random& random, Index count) {
  std::vector<Real> x(static_cast<std::size_t>(count));
  for (Real& value : x) value = static_cast<Real>(random.normal());
  return x;
}

template <class Real>
MatrixView<Real> matrix(std::vector<Real>& x, Index cols) {
  return {x.data(), static_cast<Index>(x.size()) / cols, cols, cols};
}

template <class Real, class P>
std::vector<Real> encoded(std::vector<Real> x, Index cols, const P& encoding, Index first,
                          Role role = Role::query) {
  encoding.encode(matrix(x, cols), first, role);
  return x;
}

template <class Real>
bool same_bits(const std::vector<Real>& a, const std::vector<Real>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Real)) == 0);
}

/// The two columns of pair p of a row.
struct Pair {
  std::size_t first, second;
};
Pair pair_of(Pairing pairing, Index p, Index turned) {
  const Index first = pairing == Pairing::interleaved ? 2 * p : p;
  const Index second = pairing == Pairing::interleaved ? 2 * p + 1 : p + turned / 2;
  return {static_cast<std::size_t>(first), static_cast<std::size_t>(second)};
}

/// The worst error of a number in a row, in ulp of the length of its pair in `exact`.
template <class Real, class Exact>
Exact worst_coordinate(const std::vector<Real>& got, const std::vector<Exact>& exact, Pairing pairing,
                       Index turned) {
  Exact worst = 0;
  for (Index p = 0; p < turned / 2; ++p) {
    const Pair at = pair_of(pairing, p, turned);
    const Exact one = test::ulp<Real>(std::hypot(exact[at.first], exact[at.second]));
    worst = std::max({worst, std::abs(static_cast<Exact>(got[at.first]) - exact[at.first]) / one,
                      std::abs(static_cast<Exact>(got[at.second]) - exact[at.second]) / one});
  }
  return worst;
}

/// A row rotated in long double, by the definition.
template <class Real>
std::vector<long double> turned_exactly(const std::vector<Real>& x, const rotary& encoding, Index n) {
  std::vector<long double> y(x.begin(), x.end());
  const Index turned = encoding.dims == 0 ? static_cast<Index>(x.size()) : encoding.dims;
  for (Index p = 0; p < turned / 2; ++p) {
    const Pair at = pair_of(encoding.pairing, p, turned);
    const long double exponent = -2.0L * static_cast<long double>(p) / static_cast<long double>(turned);
    const long double angle =
        static_cast<long double>(n) * std::pow(static_cast<long double>(encoding.base), exponent);
    const long double a = y[at.first], b = y[at.second];
    y[at.first] = a * std::cos(angle) - b * std::sin(angle);
    y[at.second] = a * std::sin(angle) + b * std::cos(angle);
  }
  return y;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}

}  // namespace

TEMPLATE_TEST_CASE("rotary: position 1 of (1, 0, 0, 0), both pairings", "[position]", float, double) {
  const std::vector<TestType> x{1, 0, 0, 0};
  const auto c = static_cast<TestType>(std::cos(1.0)), s = static_cast<TestType>(std::sin(1.0));
  CHECK(encoded(x, 4, rotary(Pairing::interleaved), 1) == std::vector<TestType>{c, s, 0, 0});
  CHECK(encoded(x, 4, rotary(Pairing::half_split), 1) == std::vector<TestType>{c, 0, s, 0});
}

TEMPLATE_TEST_CASE("rotary: the second pair is rotated by base^(-2 / d)", "[position]", float, double) {
  const auto c = static_cast<TestType>(std::cos(0.01)), s = static_cast<TestType>(std::sin(0.01));
  CHECK(encoded(std::vector<TestType>{0, 0, 1, 0}, 4, rotary(Pairing::interleaved), 1) ==
        std::vector<TestType>{0, 0, c, s});
  CHECK(encoded(std::vector<TestType>{0, 1, 0, 0}, 4, rotary(Pairing::half_split), 1) ==
        std::vector<TestType>{0, c, 0, s});
  // A quarter turn rotates (0, 1) to (-1, 0).
  const double quarter = std::pow(2 / std::acos(-1.0), 2);  // base^(-1/2) = pi / 2
  const auto turned = encoded(std::vector<TestType>{0, 0, 0, 1}, 4, rotary(Pairing::interleaved, quarter), 1);
  CHECK(std::abs(turned[2] + 1) < TestType(1e-6));
  CHECK(std::abs(turned[3]) < TestType(1e-6));
}

TEMPLATE_TEST_CASE("rotary: position 0 changes nothing", "[position]", float, double) {
  test::Random random(1);
  for (const Pairing pairing : pairings) {
    const auto x = random_rows<TestType>(random, 66);
    CHECK(encoded(x, 66, rotary(pairing), 0) == x);
  }
}

// The angle n * frequency, at most |n|, is computed in double and rounded twice, in the frequency and in the
// product. Its error |n| 2^-52 is |n| 2^-28 ulp of a float pair's length and 2 |n| ulp of a double pair's.
TEST_CASE("rotary: float within 2 ulp of the pair's length plus the error of the angle", "[position]") {
  test::Random random(2);
  for (const Pairing pairing : pairings) {
    for (const Index cols : {2, 4, 32, 34, 64, 128, 256}) {
      for (const double base : {10000.0, 500000.0, 100.0}) {
        const rotary encoding(pairing, base);
        double worst = 0;
        long double worst_exactly = 0;
        for (const Index n : positions) {
          const double allowed = 2 + static_cast<double>(std::abs(n)) * 0x1p-28;
          for (int round = 0; round < 4; ++round) {
            auto x = random_rows<float>(random, cols);
            const auto got = encoded(x, cols, encoding, n);
            const auto reference = longspan::reference::encoded(matrix(x, cols), encoding, n, Role::key);
            worst = std::max(worst, worst_coordinate(got, reference, pairing, cols) / allowed);
            const auto exact = turned_exactly(x, encoding, n);
            worst_exactly = std::max(worst_exactly, worst_coordinate(got, exact, pairing, cols) / allowed);
          }
        }
        INFO(cols << " columns, base " << base);
        CHECK(worst <= 1);
        CHECK(worst_exactly <= 1);
      }
    }
  }
}

TEST_CASE("rotary: double within 2 ulp of the pair's length plus the error of the angle", "[position]") {
  test::Random random(3);
  for (const Pairing pairing : pairings) {
    for (const Index cols : {2, 34, 128}) {
      const rotary encoding(pairing);
      double worst = 0;
      long double worst_exactly = 0;
      for (const Index n : positions) {
        auto x = random_rows<double>(random, cols);
        const auto got = encoded(x, cols, encoding, n);
        const auto reference = longspan::reference::encoded(matrix(x, cols), encoding, n, Role::key);
        worst = std::max(worst, worst_coordinate(got, reference, pairing, cols));
        const auto allowed = 2 + 2 * static_cast<long double>(std::abs(n));
        const auto exact = turned_exactly(x, encoding, n);
        worst_exactly = std::max(worst_exactly, worst_coordinate(got, exact, pairing, cols) / allowed);
      }
      INFO(cols << " columns");
      CHECK(worst <= 2);
      CHECK(worst_exactly <= 1);
    }
  }
}

TEST_CASE("rotary: rotates only the first `dims` columns", "[position]") {
  test::Random random(4);
  for (const Pairing pairing : pairings) {
    const Index cols = 40, turned = 22;
    const rotary encoding(pairing, 1000, turned);
    auto x = random_rows<float>(random, cols);
    const auto got = encoded(x, cols, encoding, 77);
    CHECK(std::equal(got.begin() + turned, got.end(), x.begin() + turned));
    // The first columns are as in a row of only these columns.
    const std::vector<float> front(x.begin(), x.begin() + turned);
    CHECK(std::equal(got.begin(), got.begin() + turned,
                     encoded(front, turned, rotary(pairing, 1000), 77).begin()));
    CHECK(worst_coordinate(got, longspan::reference::encoded(matrix(x, cols), encoding, 77, Role::key),
                           pairing, turned) <= 2);
  }
}

TEMPLATE_TEST_CASE("position: the bits of a row do not depend on other rows", "[position]", float, double) {
  test::Random random(5);
  const auto check = [&](const auto& encoding) {
    const Index cols = 38, rows = 200;
    for (const Index first : {Index{0}, Index{1}, Index{37}, Index{64}, Index{-100}, Index{1000000}}) {
      const auto x = random_rows<TestType>(random, rows * cols);
      const auto together = encoded(x, cols, encoding, first, Role::key);
      bool alone = true;
      for (Index i = 0; i < rows; ++i) {
        const auto from = x.begin() + i * cols;
        const auto row =
            encoded(std::vector<TestType>(from, from + cols), cols, encoding, first + i, Role::key);
        alone &= same_bits(
            row, std::vector<TestType>(together.begin() + i * cols, together.begin() + (i + 1) * cols));
      }
      CHECK(alone);
      const auto behind = x.begin() + 50 * cols;
      const auto part =
          encoded(std::vector<TestType>(behind, x.end()), cols, encoding, first + 50, Role::key);
      CHECK(same_bits(part, std::vector<TestType>(together.begin() + 50 * cols, together.end())));
    }
  };
  for (const Pairing pairing : pairings) {
    check(rotary(pairing));
    check(rotary(pairing, 10000, 20));
    check(xpos(pairing, 512, 50));
  }
}

namespace {
/// Rotary positions without the optional members of an encoding.
struct PlainRotary {
  template <class Real>
  void encode(MatrixView<Real> rows, Index first, Role role) const {
    rotary(Pairing::half_split).encode(rows, first, role);
  }
  void check(Index) const {}
};

template <class P>
void check_rows_at(const P& encoding, const longspan::detail::RowPositions& at) {
  test::Random random(11);
  const Index rows = 70, cols = 48;
  std::vector<float> together = random_rows<float>(random, rows * cols), alone = together;
  longspan::detail::encode_at(encoding, matrix(together, cols), at, Role::key);
  for (Index i = 0; i < rows; ++i) {
    const MatrixView<float> row{alone.data() + i * cols, 1, cols, cols};
    encoding.encode(row, at.first + (at.skipped + i) / at.alike, Role::key);
  }
  INFO("first=" << at.first << " alike=" << at.alike << " skipped=" << at.skipped);
  CHECK(same_bits(together, alone));
}

}  // namespace

TEST_CASE("position: rows that share a position have the bits of rows encoded alone", "[position][bits]") {
  for (const Index first : {0, 61, 1000, -70}) {
    for (const auto& [alike, skipped] :
         {std::pair<Index, Index>{1, 0}, {3, 0}, {8, 5}, {100, 0}, {100, 50}}) {
      const longspan::detail::RowPositions at{first, alike, skipped};
      check_rows_at(rotary(Pairing::half_split), at);
      check_rows_at(xpos(Pairing::interleaved, 512, 100), at);
      check_rows_at(PlainRotary{}, at);
    }
  }
}

TEMPLATE_TEST_CASE("rotary: preserves the length of every pair", "[position]", float, double) {
  test::Random random(6);
  for (const Pairing pairing : pairings) {
    const Index cols = 64;
    double worst = 0;
    for (const Index n : positions) {
      const auto x = random_rows<TestType>(random, cols);
      const auto y = encoded(x, cols, rotary(pairing), n);
      for (Index p = 0; p < cols / 2; ++p) {
        const Pair at = pair_of(pairing, p, cols);
        const double before = std::hypot(double(x[at.first]), double(x[at.second]));
        const double after = std::hypot(double(y[at.first]), double(y[at.second]));
        worst = std::max(worst, std::abs(after - before) / test::ulp<TestType>(before));
      }
    }
    CHECK(worst <= 3);
  }
}

TEST_CASE("rotary: a score depends only on the difference of positions", "[position]") {
  test::Random random(7);
  for (const Pairing pairing : pairings) {
    const Index cols = 48;
    const auto q = random_rows<double>(random, cols), k = random_rows<double>(random, cols);
    const rotary encoding(pairing);
    for (const Index apart : {0, 1, 17, 1000}) {
      const double wanted = dot(encoded(q, cols, encoding, apart), encoded(k, cols, encoding, 0));
      for (const Index shift : {Index{1}, Index{63}, Index{-40}, Index{5000}, Index{1000000}}) {
        const double got = dot(encoded(q, cols, encoding, apart + shift), encoded(k, cols, encoding, shift));
        CHECK(std::abs(got - wanted) <
              1e-15 * static_cast<double>(cols) * (10 + static_cast<double>(std::abs(shift))));
      }
    }
  }
}

TEST_CASE("xpos: queries and keys match the reference", "[position]") {
  test::Random random(8);
  for (const Pairing pairing : pairings) {
    for (const Role role : {Role::query, Role::key}) {
      const xpos encoding(pairing, 512, 1000);
      double worst = 0;
      for (const Index n : {-3000, 0, 999, 1000, 1001, 1064, 5000, 20000}) {
        auto x = random_rows<float>(random, 68);
        const auto got = encoded(x, 68, encoding, n, role);
        worst = std::max(worst,
                         worst_coordinate(got, longspan::reference::encoded(matrix(x, 68), encoding, n, role),
                                          pairing, 68));
      }
      CHECK(worst <= 2);
    }
  }
}

TEST_CASE("xpos: a score depends only on the difference of positions and decreases with it", "[position]") {
  test::Random random(9);
  const Index cols = 32;
  const auto q = random_rows<double>(random, cols), k = random_rows<double>(random, cols);
  for (const Pairing pairing : pairings) {
    const auto score = [&](const xpos& encoding, Index n, Index m) {
      return dot(encoded(q, cols, encoding, n, Role::query), encoded(k, cols, encoding, m, Role::key));
    };
    const xpos encoding(pairing, 64);
    for (const Index apart : {0, 1, 40, 100}) {
      const double wanted = score(encoding, apart, 0);
      for (const Index shift : {-200, 63, 700}) {
        CHECK(std::abs(score(encoding, apart + shift, shift) - wanted) < 1e-11);
        // The centre changes the factors, but not their product.
        CHECK(std::abs(score(xpos(pairing, 64, 300), apart + shift, shift) - wanted) < 1e-11);
      }
    }
    // Only the pair with zeta = 0.4 / 1.4: the product of its two factors is zeta^(n - m).
    std::vector<double> first_pair(static_cast<std::size_t>(cols), 0.0);
    first_pair[0] = 1;
    const auto length = [&](Index n, Role role) {
      const auto y = encoded(first_pair, cols, encoding, n, role);
      return std::sqrt(dot(y, y));
    };
    const double zeta = 0.4 / 1.4;
    CHECK(std::abs(length(64, Role::query) - zeta) < 1e-12);
    CHECK(std::abs(length(64, Role::key) - 1 / zeta) < 1e-12);
    CHECK(std::abs(length(128, Role::query) * length(64, Role::key) - zeta) < 1e-12);
  }
}

TEST_CASE("xpos: at its centre it changes nothing", "[position]") {
  test::Random random(10);
  const auto x = random_rows<float>(random, 16);
  CHECK(encoded(x, 16, xpos(Pairing::half_split, 512, 123), 123, Role::query) == x);
  CHECK(encoded(x, 16, xpos(Pairing::half_split, 512, 123), 123, Role::key) == x);
  CHECK(encoded(x, 16, xpos(Pairing::half_split, 512, 123), 124, Role::key) != x);
}

TEST_CASE("position: an invalid base, scale_base or centre is refused", "[position][errors]") {
  using test::refusal;
  constexpr double nan = std::numeric_limits<double>::quiet_NaN(),
                   inf = std::numeric_limits<double>::infinity();
  CHECK(refusal([] { rotary(Pairing::half_split, nan).check(8); }) ==
        "longspan: rotary: base is nan, wanted a positive finite number");
  for (const double odd : {0.0, -1.0, inf, nan}) {
    CHECK(refusal([&] { rotary(Pairing::half_split, odd).check(8); }) != "");
    CHECK(refusal([&] { xpos(Pairing::half_split, odd).check(8); }).find("scale_base") != std::string::npos);
    CHECK(refusal([&] { xpos(Pairing::half_split, 512, 0, odd).check(8); }).find(": base") !=
          std::string::npos);
  }
  constexpr Index far = Index{1} << 61;
  CHECK(refusal([] { xpos(Pairing::half_split, 512, far).check(8); }) == "");
  CHECK(refusal([] { xpos(Pairing::half_split, 512, -far - 1).check(8); }).find("centre") !=
        std::string::npos);
}

TEST_CASE("position: rows that cannot be paired are refused", "[position][errors]") {
  using test::refusal;
  CHECK(
      refusal([] { rotary(Pairing::half_split).check(7); }) ==
      "longspan: rotary: the number of rotated dimensions is 7, wanted an even number of at most head_dim = "
      "7");
  CHECK(
      refusal([] { rotary(Pairing::interleaved, 10000, 3).check(8); }) ==
      "longspan: rotary: the number of rotated dimensions is 3, wanted an even number of at most head_dim = "
      "8");
  CHECK(refusal([] { rotary(Pairing::interleaved, 10000, 10).check(8); }) ==
        "longspan: rotary: the number of rotated dimensions is 10, wanted an even number of at most head_dim "
        "= 8");
  CHECK(refusal([] { rotary(Pairing::interleaved, 10000, -2).check(8); }) ==
        "longspan: rotary: the number of rotated dimensions is -2, wanted an even number of at most head_dim "
        "= 8");
  CHECK(
      refusal([] { xpos(Pairing::interleaved).check(5); }) ==
      "longspan: xpos: the number of rotated dimensions is 5, wanted an even number of at most head_dim = 5");
  CHECK(refusal([] { rotary(Pairing::half_split).check(0); }) == "");
  CHECK(refusal([] { rotary(Pairing::half_split, 10000, 6).check(7); }) == "");
  CHECK(refusal([] { no_position{}.check(7); }) == "");
}

TEST_CASE("encode_positions: encodes every head of a tensor in place", "[position]") {
  test::Random random(11);
  Eigen::Tensor<float, 4, Eigen::RowMajor> x(2, 3, 5, 8);
  for (Index n = 0; n < x.size(); ++n) x.data()[n] = static_cast<float>(random.normal());
  Eigen::Tensor<float, 4, Eigen::RowMajor> before = x;
  const rotary encoding(Pairing::half_split);
  longspan::encode_positions(x, encoding, 70, Role::query);
  double worst = 0;
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 3; ++h) {
      for (Index i = 0; i < 5; ++i) {
        const MatrixView<float> row{&before(b, h, i, 0), 1, 8, 8};
        const std::vector<float> got(&x(b, h, i, 0), &x(b, h, i, 0) + 8);
        const auto wanted = longspan::reference::encoded(row, encoding, 70 + i, Role::query);
        worst = std::max(worst, worst_coordinate(got, wanted, Pairing::half_split, 8));
      }
    }
  }
  CHECK(worst <= 2);
}

TEST_CASE("encode_positions: a [batch, rows, heads, cols] buffer, whose gaps stay unchanged", "[position]") {
  constexpr Index rows = 4, heads = 3, cols = 6, apart = 9;
  test::Random random(13);
  auto memory = random_rows<double>(random, rows * heads * apart);
  const auto before = memory;
  const longspan::TensorView<double> x{memory.data(), 1, heads, rows, cols, 0, apart, heads * apart};
  const rotary encoding(Pairing::interleaved);
  longspan::encode_positions(x, encoding, 3, Role::key);
  double worst = 0;
  bool kept = true;
  for (Index i = 0; i < rows; ++i) {
    for (Index h = 0; h < heads; ++h) {
      const auto at = (i * heads + h) * apart;
      std::vector<double> row(before.begin() + at, before.begin() + at + cols);
      const std::vector<double> got(memory.begin() + at, memory.begin() + at + cols);
      const auto wanted = longspan::reference::encoded(matrix(row, cols), encoding, 3 + i, Role::key);
      worst = std::max(worst, worst_coordinate(got, wanted, Pairing::interleaved, cols));
      kept &= std::equal(before.begin() + at + cols, before.begin() + at + apart, memory.begin() + at + cols);
    }
  }
  CHECK(worst <= 2);
  CHECK(kept);
}

TEST_CASE("encode_positions: a wrong shape throws and leaves the tensor unchanged", "[position][errors]") {
  Eigen::Tensor<float, 3, Eigen::RowMajor> x(2, 3, 7);
  x.setConstant(2);
  CHECK_THROWS_AS(longspan::encode_positions(x, rotary(Pairing::half_split), 1, Role::query),
                  longspan::Error);
  CHECK_THROWS_AS(longspan::encode_positions(x, xpos(Pairing::half_split), 1, Role::query), longspan::Error);
  bool untouched = true;
  for (Index n = 0; n < x.size(); ++n) untouched &= x.data()[n] == 2.0f;
  CHECK(untouched);
}

TEST_CASE("encode_positions: accepts tensors without rows or columns", "[position]") {
  Eigen::Tensor<float, 4, Eigen::RowMajor> no_rows(1, 2, 0, 8), no_cols(1, 2, 3, 0);
  longspan::encode_positions(no_rows, rotary(Pairing::half_split), 1, Role::query);
  longspan::encode_positions(no_cols, rotary(Pairing::half_split), 1, Role::query);
  longspan::encode_positions(no_rows, no_position{}, 1, Role::query);
  CHECK(no_rows.size() + no_cols.size() == 0);
}

TEST_CASE("no_position: changes nothing", "[position]") {
  test::Random random(12);
  const auto x = random_rows<float>(random, 21);
  CHECK(encoded(x, 7, no_position{}, 1000) == x);
}

TEST_CASE("Position: the types that satisfy it", "[position]") {
  STATIC_REQUIRE(longspan::Position<rotary>);
  STATIC_REQUIRE(longspan::Position<xpos>);
  STATIC_REQUIRE(longspan::Position<no_position>);
  STATIC_REQUIRE_FALSE(longspan::Position<int>);
  STATIC_REQUIRE_FALSE(longspan::Position<Pairing>);
  STATIC_REQUIRE_FALSE(std::is_default_constructible_v<rotary>);  // the pairing must be named
  STATIC_REQUIRE_FALSE(std::is_default_constructible_v<xpos>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<Pairing, rotary>);
}
