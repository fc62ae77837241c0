// Rows as a stream of int8 stores them.
#pragma once

#include <algorithm>
#include <cmath>

#include "support/catch.hpp"
#include "support/tensor.hpp"

namespace test {

/// The rows of x rounded to multiples of their scales: the error of each element is at most half a step, 1 / 254 of the
/// largest element of its row.
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
