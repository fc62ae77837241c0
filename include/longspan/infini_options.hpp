// Options of Infini-attention: the update rule, the first segment, the feature map.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include "longspan/detail/simd/packet.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// How a segment is written to the memory.
enum class InfiniRule : std::uint8_t {
  linear,  ///< M += phi(K)^T V
  delta,   ///< M += phi(K)^T (V - what the memory already returns for K)
};

/// The output of a query while nothing has been written to the memory.
enum class EmptyMemory : std::uint8_t {
  gate,    ///< the memory counts as 0: (1 - sigmoid(beta)) * local
  bypass,  ///< the local attention alone, as in the code of lucidrains
};

/// A compressive memory, or the gradient with respect to one: M [batch, kv_heads, head_dim, value_dim] and z [batch,
/// kv_heads, head_dim]. Owns nothing.
template <class T>
struct InfiniState {
  TensorView<T> m{};
  RowsView<T> z{};
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN

/// The smallest norm: a sum phi(q).z below it is replaced by it, so that no quotient is infinite.
inline constexpr double infini_least_norm = 1e-10;

/// phi(x) = elu(x) + 1: x + 1 above 0, exp(x) below. Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 7.
/// Computed as exp(x) below 0, because elu(x) + 1 in float would be 0 for x below -17.
struct elu_plus_one {
  double operator()(double x) const { return x > 0 ? x + 1 : std::exp(x); }

  template <class Real>
  detail::Packet<Real> on_packet(detail::Packet<Real> x) const {
    const auto zero = detail::broadcast(Real(0)), one = detail::broadcast(Real(1));
    return detail::select(detail::less(zero, x), x + one, detail::exp(x));
  }

  double derivative(double x) const { return x > 0 ? 1 : std::exp(x); }

  template <class Real>
  detail::Packet<Real> derivative_on_packet(detail::Packet<Real> x) const {
    const auto zero = detail::broadcast(Real(0)), one = detail::broadcast(Real(1));
    return detail::select(detail::less(zero, x), one, detail::exp(x));
  }
};

/// A feature map: a function of one number whose result is at least 0. Without `on_packet` it is called for each
/// number, which is slower but gives the same results.
template <class F>
concept FeatureMap = std::is_object_v<F> && requires(const F& feature, double x) {
  { feature(x) } -> std::convertible_to<double>;
};

/// A feature map that has a gradient. Without `derivative_on_packet`, `derivative` is called for each number.
template <class F>
concept DifferentiableFeatureMap = FeatureMap<F> && requires(const F& feature, double x) {
  { feature.derivative(x) } -> std::convertible_to<double>;
};

LONGSPAN_NAMESPACE_END
