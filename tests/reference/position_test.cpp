#include "longspan/reference/position.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "support/catch.hpp"

using longspan::Index;
using longspan::MatrixView;
using longspan::Pairing;
using longspan::Role;
using longspan::rotary;
using longspan::xpos;

namespace {

template <class P>
std::vector<double> row(std::vector<double> x, const P& encoding, Index n, Role role = Role::query) {
  longspan::reference::encode_row(x.data(), static_cast<Index>(x.size()), encoding, n, role);
  return x;
}

bool near(const std::vector<double>& x, const std::vector<double>& y) {
  double worst = x.size() == y.size() ? 0 : 1;
  for (std::size_t c = 0; c < x.size() && worst < 1; ++c) worst = std::max(worst, std::abs(x[c] - y[c]));
  return worst < 1e-14;
}

const double c1 = std::cos(1.0), s1 = std::sin(1.0), c2 = std::cos(0.01), s2 = std::sin(0.01);

}  // namespace

TEST_CASE("reference rotary: position 1, both pairings", "[reference]") {
  CHECK(near(row({1, 0, 0, 0}, rotary(Pairing::interleaved), 1), {c1, s1, 0, 0}));
  CHECK(near(row({1, 0, 0, 0}, rotary(Pairing::half_split), 1), {c1, 0, s1, 0}));
  CHECK(near(row({0, 1, 0, 0}, rotary(Pairing::interleaved), 1), {-s1, c1, 0, 0}));
  CHECK(near(row({0, 0, 1, 0}, rotary(Pairing::half_split), 1), {-s1, 0, c1, 0}));
  CHECK(near(row({0, 0, 1, 0}, rotary(Pairing::interleaved), 1), {0, 0, c2, s2}));
  CHECK(near(row({0, 1, 0, 0}, rotary(Pairing::half_split), 1), {0, c2, 0, s2}));
}

TEST_CASE("reference rotary: position, base and the number of rotated dimensions", "[reference]") {
  CHECK(near(row({1, 0, 0, 0}, rotary(Pairing::interleaved), -3), {std::cos(3.0), -std::sin(3.0), 0, 0}));
  CHECK(near(row({0, 0, 1, 0}, rotary(Pairing::interleaved, 16), 2), {0, 0, std::cos(0.5), std::sin(0.5)}));
  CHECK(near(row({1, 7, 5, 6}, rotary(Pairing::interleaved, 10000, 2), 1), {c1 - 7 * s1, s1 + 7 * c1, 5, 6}));
  CHECK(near(row({1, 0, 7, 0, 5, 6}, rotary(Pairing::half_split, 10000, 4), 1),
             {c1 - 7 * s1, 0, s1 + 7 * c1, 0, 5, 6}));
}

TEST_CASE("reference xpos: scales queries up and keys down with the distance from its centre",
          "[reference]") {
  const double zeta = 0.4 / 1.4;
  const double c5 = std::cos(5.0), s5 = std::sin(5.0);
  const xpos encoding(Pairing::interleaved, 10, 100);
  CHECK(near(row({1, 0}, encoding, 100), {1, 0}));
  CHECK(near(row({1, 0}, encoding, 105), {std::sqrt(zeta) * c5, std::sqrt(zeta) * s5}));
  CHECK(near(row({1, 0}, encoding, 105, Role::key), {c5 / std::sqrt(zeta), s5 / std::sqrt(zeta)}));
  CHECK(near(row({1, 0}, encoding, 95), {c5 / std::sqrt(zeta), -s5 / std::sqrt(zeta)}));
  // The second of two pairs: zeta = (0.5 * 2 / 2 + 0.4) / 1.4.
  const double second = std::pow(0.9 / 1.4, 0.1);
  CHECK(near(row({0, 0, 1, 0}, encoding, 101), {0, 0, second * c2, second * s2}));
  CHECK(near(row({0, 1, 0, 0}, xpos(Pairing::half_split, 10, 100), 101), {0, second * c2, 0, second * s2}));
}

TEST_CASE("reference: no position changes nothing", "[reference]") {
  CHECK(row({1, 2, 3}, longspan::no_position{}, 1000) == std::vector<double>{1, 2, 3});
}

TEST_CASE("reference::encoded: encodes each row of a strided matrix at its position, in double",
          "[reference]") {
  const std::vector<float> memory{1, 0, 9, 0, 1, 9, 2, 0};
  const MatrixView<const float> x{memory.data(), 3, 2, 3};
  const auto rows = longspan::reference::encoded(x, rotary(Pairing::half_split), 4, Role::key);
  CHECK(near(rows, {std::cos(4.0), std::sin(4.0), -std::sin(5.0), std::cos(5.0), 2 * std::cos(6.0),
                    2 * std::sin(6.0)}));
  CHECK(memory == std::vector<float>{1, 0, 9, 0, 1, 9, 2, 0});
}
