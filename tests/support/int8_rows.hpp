// What rows become that a stream keeps as int8.
#pragma once

#include <algorithm>
#include <cmath>

#include "support/catch.hpp"
#include "support/tensor.hpp"

namespace test {

/// The rows of x as multiples of their scales: each element is off by half a step at most, 1 / 254 of the
/// largest of its row.
inline Tensor<double> kept_as_int8(const Tensor<float>& x) {
  Tensor<double> rows(x.batch, x.heads, x.rows, x.cols);
  for (Index n = 0; n < x.batch * x.heads * x.rows; ++n) {
    float top = 0;
    for (Index c = 0; c < x.cols; ++c) top = std::max(top, std::abs(x.row(0, 0, n)[c]));
    const float scale = top / 127;
    for (Index c = 0; c < x.cols; ++c) {
      const double value = x.row(0, 0, n)[c];
      rows.row(0, 0, n)[c] = scale == 0 ? 0 : double(scale) * std::nearbyint(x.row(0, 0, n)[c] / scale);
      REQUIRE(std::abs(rows.row(0, 0, n)[c] - value) <= 0.50001 * double(scale));
    }
  }
  return rows;
}

}  // namespace test
