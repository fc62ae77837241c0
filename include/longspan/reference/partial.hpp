// Naive merge and gate in double.
#pragma once

#include <cmath>
#include <limits>
#include <span>

#include "longspan/partial.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// longspan::merge in double. `into` must not be one of the parts.
inline void merge(std::span<const Partial<const double>> parts, const Partial<double>& into) {
  for (Index b = 0; b < into.out.batch; ++b) {
    for (Index h = 0; h < into.out.heads; ++h) {
      for (Index i = 0; i < into.out.rows; ++i) {
        double top = -std::numeric_limits<double>::infinity(), sum = 0;
        for (const auto& part : parts) top = std::fmax(top, part.lse(b, h, i));
        for (const auto& part : parts) {
          if (part.lse(b, h, i) != -std::numeric_limits<double>::infinity())
            sum += std::exp(part.lse(b, h, i) - top);
        }
        const double lse = sum == 0 ? top : top + std::log(sum);
        into.lse(b, h, i) = lse;
        for (Index c = 0; c < into.out.cols; ++c) {
          double& o = into.out.row(b, h, i)[c];
          o = 0;
          for (const auto& part : parts) {
            if (part.lse(b, h, i) == -std::numeric_limits<double>::infinity()) continue;
            o += std::exp(part.lse(b, h, i) - lse) * part.out.row(b, h, i)[c];
          }
        }
      }
    }
  }
}

/// longspan::gate in double.
inline void gate(MatrixView<const double> beta, TensorView<const double> a, TensorView<const double> b,
                 TensorView<double> out) {
  for (Index batch = 0; batch < out.batch; ++batch) {
    for (Index h = 0; h < out.heads; ++h) {
      for (Index i = 0; i < out.rows; ++i) {
        for (Index c = 0; c < out.cols; ++c) {
          const double logit = beta.row(beta.rows == 1 ? 0 : h)[beta.cols == 1 ? 0 : c];
          const double g = 1 / (1 + std::exp(-logit)), rest = 1 / (1 + std::exp(logit));
          double& o = out.row(batch, h, i)[c];
          o = g == 0 ? 0 : g * a.row(batch, h, i)[c];
          if (rest != 0) o += rest * b.row(batch, h, i)[c];
        }
      }
    }
  }
}

}  // namespace reference
LONGSPAN_NAMESPACE_END
