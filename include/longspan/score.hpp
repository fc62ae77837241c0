// How a score is changed between q.k and the softmax.
#pragma once

#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/simd/packet.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN

/// A score function: takes s = scale * q.k of head h in batch row b, for the query at position i and key j,
/// and returns what the softmax is to see instead. A lambda will do:
///
///   [](float s, Index b, Index h, Index i, Index j) { return s + table[h][i - j]; }
///
/// Minus infinity hides the key. Units are those of the natural exponential. Denormal numbers count as 0 in it (see
/// Executor).
template <class S>
concept Score = std::is_object_v<S> && !Mask<S> && requires(const S& score, float s, Index x) {
  { score(s, x, x, x, x) } -> std::convertible_to<float>;
};

namespace detail {

template <class Call>
struct FirstArgument;
template <class S, class R, class First, class... Rest>
struct FirstArgument<R (S::*)(First, Rest...) const> {
  using type = std::remove_cvref_t<First>;
};
template <class S, class R, class First, class... Rest>
struct FirstArgument<R (S::*)(First, Rest...) const noexcept> {
  using type = std::remove_cvref_t<First>;
};

template <class S, class Real>
struct ScoreValueOf {
  using type = Real;
};
template <class S, class Real>
requires requires { typename FirstArgument<decltype(&S::operator())>::type; }
struct ScoreValueOf<S, Real> {
  using type = typename FirstArgument<decltype(&S::operator())>::type;
};

/// The type in which a score function takes its score: its own if it names one, Real if it is a template.
template <class S, class Real>
using ScoreValue = typename ScoreValueOf<S, Real>::type;

/// Scores that also work on a packet of queries at once; `distance` holds i - j of each lane.
template <class S, class Packet>
concept PacketScore = requires(const S& score, Packet s, Index x) {
  { score.on_packet(s, x, s) } -> std::convertible_to<Packet>;
};

}  // namespace detail

/// Scores as they are.
struct unchanged {
  template <class Real>
  constexpr Real operator()(Real s, Index, Index, Index, Index) const noexcept {
    return s;
  }
};

/// cap * tanh(s / cap): keeps scores within (-cap, cap). Gemma 2 (arXiv 2408.00118), section 2.
struct softcap {
  float cap = 50;

  template <class Real>
  Real operator()(Real s, Index, Index, Index, Index) const {
    return Real(cap) * std::tanh(s / Real(cap));
  }
  template <class Real>
  detail::Packet<Real> on_packet(detail::Packet<Real> s, Index, detail::Packet<Real>) const {
    const auto by = detail::broadcast(Real(cap));
    return detail::tanh(s / by) * by;
  }
};

/// s - slopes[h] * |i - j|. Press et al. 2021 (arXiv 2108.12409), section 3. One slope for each head; not
/// owned.
struct alibi {
  std::span<const float> slopes;

  template <class Real>
  Real operator()(Real s, Index, Index h, Index i, Index j) const {
    return s - Real(slopes[static_cast<std::size_t>(h)]) * static_cast<Real>(i < j ? j - i : i - j);
  }
  template <class Real>
  detail::Packet<Real> on_packet(detail::Packet<Real> s, Index h, detail::Packet<Real> distance) const {
    return s - detail::broadcast(Real(slopes[static_cast<std::size_t>(h)])) * detail::abs(distance);
  }
};

/// The slopes of the paper: 2^(-8 n / heads) for head n = 1 .. heads when heads is a power of two; else those
/// of the next lower power of two, followed by every second one of the next higher.
inline std::vector<float> alibi_slopes(Index heads) {
  std::vector<float> slopes;
  Index power = 1;
  while (power * 2 <= heads) power *= 2;
  for (Index n = 1; n <= std::min(power, heads); ++n) {
    slopes.push_back(
        static_cast<float>(std::exp2(-8.0 * static_cast<double>(n) / static_cast<double>(power))));
  }
  for (Index n = 1; n <= heads - power; ++n) {
    slopes.push_back(
        static_cast<float>(std::exp2(-4.0 * static_cast<double>(2 * n - 1) / static_cast<double>(power))));
  }
  return slopes;
}

/// s + bias[b, h, i, j], from a tensor [batch or 1, heads or 1, queries or 1, keys]; a dimension of 1 is
/// repeated. Its row 0 belongs to the query at position `first_query`, which by default is where the queries
/// of a [queries, keys] bias stand. Its values are read through scalar code: prefer a mask or alibi where one
/// will do.
template <class T>
struct additive_bias {
  TensorView<const T> bias;
  Index first_query;

  explicit additive_bias(TensorView<const T> tensor) : additive_bias(tensor, tensor.cols - tensor.rows) {}
  additive_bias(TensorView<const T> tensor, Index first) : bias(tensor), first_query(first) {
    if (bias.batch == 1) bias.batch_stride = 0;
    if (bias.heads == 1) bias.head_stride = 0;
    if (bias.rows == 1) bias.row_stride = 0;
  }

  template <class Real>
  Real operator()(Real s, Index b, Index h, Index i, Index j) const {
    return s + static_cast<Real>(bias.row(b, h, i - first_query)[j]);
  }
};
template <class T>
additive_bias(TensorView<T>) -> additive_bias<std::remove_const_t<T>>;
template <class T>
additive_bias(TensorView<T>, Index) -> additive_bias<std::remove_const_t<T>>;

/// First one, then the other. `a | b`.
template <Score A, Score B>
struct piped {
  A first;
  B second;

  template <class Real>
  Real operator()(Real s, Index b, Index h, Index i, Index j) const {
    return second(static_cast<Real>(first(s, b, h, i, j)), b, h, i, j);
  }
  template <class Real>
  detail::Packet<Real> on_packet(detail::Packet<Real> s, Index h, detail::Packet<Real> distance) const
  requires(detail::PacketScore<A, detail::Packet<Real>> && detail::PacketScore<B, detail::Packet<Real>>)
  {
    return second.on_packet(first.on_packet(s, h, distance), h, distance);
  }
};

template <Score A, Score B>
constexpr piped<A, B> operator|(A a, B b) {
  return {std::move(a), std::move(b)};
}

LONGSPAN_END
