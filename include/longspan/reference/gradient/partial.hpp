// Naive gradients of merge and gate in double.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

#include "longspan/partial.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// longspan::merge_gradient in double, for results that all have an lse. It computes the merged partial again.
inline void merge_gradient(std::span<const Partial<const double>> parts, const Partial<const double>& dmerged,
                           std::span<const Partial<double>> dparts) {
  constexpr double nothing = -std::numeric_limits<double>::infinity();
  const TensorView<const double>& dout = dmerged.out;
  for (Index b = 0; b < dout.batch; ++b) {
    for (Index h = 0; h < dout.heads; ++h) {
      for (Index i = 0; i < dout.rows; ++i) {
        double top = nothing, sum = 0, mean = 0;
        for (const auto& part : parts) top = std::fmax(top, part.lse(b, h, i));
        std::vector<double> weights, dots;
        for (const auto& part : parts) {
          const bool is_absent = part.lse(b, h, i) == nothing;
          double dot = 0;
          for (Index c = 0; c < dout.cols && !is_absent; ++c)
            dot += dout.row(b, h, i)[c] * part.out.row(b, h, i)[c];
          weights.push_back(is_absent ? 0 : std::exp(part.lse(b, h, i) - top));
          dots.push_back(dot);
          sum += weights.back();
        }
        for (std::size_t n = 0; n < parts.size(); ++n) {
          weights[n] = weights[n] == 0 ? 0 : weights[n] / sum;
          mean += weights[n] * dots[n];
        }
        const double dlse = dmerged.lse.data == nullptr || sum == 0 ? 0 : dmerged.lse(b, h, i);
        for (std::size_t n = 0; n < parts.size(); ++n) {
          for (Index c = 0; c < dout.cols; ++c)
            dparts[n].out.row(b, h, i)[c] = weights[n] == 0 ? 0 : weights[n] * dout.row(b, h, i)[c];
          dparts[n].lse(b, h, i) = weights[n] * (dots[n] - mean + dlse);
        }
      }
    }
  }
}

/// longspan::gate_gradient in double.
inline void gate_gradient(MatrixView<const double> beta, TensorView<const double> a,
                          TensorView<const double> b, TensorView<const double> dout, MatrixView<double> dbeta,
                          TensorView<double> da, TensorView<double> db) {
  for (Index r = 0; r < dbeta.rows; ++r) {
    for (Index c = 0; c < dbeta.cols; ++c) dbeta.row(r)[c] = 0;
  }
  for (Index batch = 0; batch < dout.batch; ++batch) {
    for (Index h = 0; h < dout.heads; ++h) {
      for (Index i = 0; i < dout.rows; ++i) {
        for (Index c = 0; c < dout.cols; ++c) {
          const Index row = beta.rows == 1 ? 0 : h, column = beta.cols == 1 ? 0 : c;
          const double logit = beta.row(row)[column];
          const double g = 1 / (1 + std::exp(-logit)), rest = 1 / (1 + std::exp(logit));
          const double change = dout.row(batch, h, i)[c];
          da.row(batch, h, i)[c] = g == 0 ? 0 : g * change;
          db.row(batch, h, i)[c] = rest == 0 ? 0 : rest * change;
          if (g * rest != 0)
            dbeta.row(row)[column] += g * rest * change * (a.row(batch, h, i)[c] - b.row(batch, h, i)[c]);
        }
      }
    }
  }
}

}  // namespace reference
LONGSPAN_NAMESPACE_END
