// The two usual shapes of a gate's logits: one for each query head, and one for all.
#pragma once

#include <span>
#include <vector>

#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

// `beta` of gate, gated, infini_attention and hybrid_stream is a view of logits, [1 or heads][1 or value_dim],
// and a gate is sigmoid(beta). These functions make such views. A view does not own the logits: they must stay
// where they are while the functor is used, so temporary objects are refused when they are compiled.
//
//   std::vector<float> beta(heads);
//   attend.beta = per_head_gate(beta);
//   attend.beta = scalar_gate(beta[0]);
//
// A matrix [heads, value_dim], which has a gate for each column, is a MatrixView of its own.

/// One logit for each query head, in all columns.
LONGSPAN_INLINE constexpr MatrixView<const float> per_head_gate(std::span<const float> logits) noexcept {
  return {logits.data(), static_cast<Index>(logits.size()), 1, 1};
}
LONGSPAN_INLINE constexpr MatrixView<const double> per_head_gate(std::span<const double> logits) noexcept {
  return {logits.data(), static_cast<Index>(logits.size()), 1, 1};
}
void per_head_gate(std::vector<float>&&) = delete;
void per_head_gate(std::vector<double>&&) = delete;

/// One logit for all heads and columns.
LONGSPAN_INLINE constexpr MatrixView<const float> scalar_gate(const float& logit) noexcept {
  return {&logit, 1, 1, 1};
}
LONGSPAN_INLINE constexpr MatrixView<const double> scalar_gate(const double& logit) noexcept {
  return {&logit, 1, 1, 1};
}
void scalar_gate(const float&&) = delete;
void scalar_gate(const double&&) = delete;

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The logits of a gate; one logit of 0, which weighs both sides evenly, if beta is not set.
inline MatrixView<const float> logits_of(const MatrixView<const float>& beta) noexcept {
  static constexpr float even = 0;
  return beta.data == nullptr ? scalar_gate(even) : beta;
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
