// What the gradients of a gate share: its factors, and the sums for the gradient of its logits.
#pragma once

#include <cmath>
#include <string_view>

#include "longspan/detail/call/check_view.hpp"
#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// g = sigmoid(beta) and rest = 1 - g for each head and column, [heads][cols] each. Each is computed from its own
/// exponential, as `gate` does.
template <class Real, class Logit>
void fill_gates(const MatrixView<const Logit>& beta, Index heads, Index cols, Real* g, Real* rest) {
  for (Index h = 0; h < heads; ++h) {
    for (Index c = 0; c < cols; ++c) {
      const auto logit = static_cast<Real>(beta.row(beta.rows == 1 ? 0 : h)[beta.cols == 1 ? 0 : c]);
      g[h * cols + c] = 1 / (1 + std::exp(-logit));
      rest[h * cols + c] = 1 / (1 + std::exp(logit));
    }
  }
}

/// Adds sums [heads][cols] to the shape of beta.
template <class Sums, class Real>
void write_beta_gradient(const Sums& sum_of, Index heads, Index cols, const MatrixView<Real>& dbeta) {
  for (Index r = 0; r < dbeta.rows; ++r) {
    for (Index c = 0; c < dbeta.cols; ++c) {
      double sum = 0;
      for (Index h = dbeta.rows == 1 ? 0 : r; h < (dbeta.rows == 1 ? heads : r + 1); ++h) {
        for (Index of = dbeta.cols == 1 ? 0 : c; of < (dbeta.cols == 1 ? cols : c + 1); ++of)
          sum += sum_of(h, of);
      }
      dbeta.row(r)[c] = static_cast<Real>(sum);
    }
  }
}

template <class Real, class Logit>
void check_dbeta(std::string_view function, const MatrixView<Real>& dbeta,
                 const MatrixView<const Logit>& beta) {
  if (dbeta.data == nullptr) return;
  check_view(function, "dbeta", dbeta);
  if (dbeta.rows != beta.rows || dbeta.cols != beta.cols)
    refuse(function, "dbeta", shape_text(dbeta), shape_text(beta) + " as beta");
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
