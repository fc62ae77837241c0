// Score functions, which change scores between q.k and the softmax (the `score_mod` of FlexAttention).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/call_sizes.hpp"
#include "longspan/detail/call/check_view.hpp"
#include "longspan/detail/call/finite.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/simd/score_strip.hpp"
#include "longspan/error.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A score function: receives s = scale * q.k of head h in batch row b, for the query at position i and key j, and
/// returns the score that the softmax uses instead. It may be a lambda:
///
///   [](float s, Index b, Index h, Index i, Index j) { return s + table[h][i - j]; }
///
/// Minus infinity hides the key. The softmax weight of a score s is proportional to e^s. Inside the function denormal
/// numbers count as 0 (see Executor).
///
/// A score may have a member `void check(const CallSizes& sizes) const` (call_sizes.hpp), which throws Error if its
/// options or arrays do not fit a call. Like the same member of a mask it is called before anything is written.
///
/// Gradients (gradient/gradient.hpp) also need the derivative of the new score with respect to s:
///
///   float derivative(float s, Index b, Index h, Index i, Index j) const
template <class S>
concept Score = std::is_object_v<S> && !Mask<S> && requires(const S& score, float s, Index x) {
  { score(s, x, x, x, x) } -> std::convertible_to<float>;
};

/// Score functions with the derivative that gradients need.
template <class S>
concept DifferentiableScore = Score<S> && requires(const S& score, float s, Index x) {
  { score.derivative(s, x, x, x, x) } -> std::convertible_to<float>;
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

/// The type of a score function's first argument: the type that it declares, or Real if it is a template.
template <class S, class Real>
using ScoreValue = typename ScoreValueOf<S, Real>::type;

/// Score functions that can also change a packet of queries at once; `distance` contains i - j for each lane.
template <class S, class Packet>
concept PacketScore = requires(const S& score, Packet s, Index x) {
  { score.on_packet(s, x, s) } -> std::convertible_to<Packet>;
};

/// Changes the scores of a strip in place, in the fastest way that the score function offers.
template <class Real, class S>
void change_strip(const S& score, const ScoreStrip<Real>& strip) {
  constexpr Index w = lanes<Real>;
  if constexpr (PacketScore<S, Packet<Real>>) {
    alignas(64) Real distance[std::size_t(w)];
    for (Index j = 0; j < strip.keys; ++j) {
      for (Index i = 0; i < w; ++i)
        distance[i] = static_cast<Real>(strip.position(i) - (strip.first_key + j));
      Real* s = strip.scores + j * strip.stride;
      store(s, score.on_packet(load<Real>(s), strip.head, load<Real>(distance)));
    }
  } else if constexpr (StripScore<S, Real>) {
    score.on_strip(strip);
  } else {
    for (Index j = 0; j < strip.keys; ++j) {
      for (Index i = 0; i < w; ++i) {
        Real& s = strip.scores[j * strip.stride + i];
        s = static_cast<Real>(score(static_cast<ScoreValue<S, Real>>(s), strip.batch, strip.head,
                                    strip.position(i), strip.first_key + j));
      }
    }
  }
}
/// Score functions that can also change packets whose lanes belong to different heads: for_heads(the head of each
/// lane) returns a function of (scores, distances). A packet score without this member is called once for each of
/// these heads.
template <class S, class Real>
concept PacketScoreOfHeads = requires(const S& score, Packet<Real> s, const Index* heads) {
  { score.template for_heads<Real>(heads)(s, s) } -> std::convertible_to<Packet<Real>>;
};

/// Score functions that add a number to s which does not depend on s: their derivative is 1.
template <class S>
inline constexpr bool only_adds = false;

/// Score functions with the derivatives of a packet of pairs.
template <class S, class Packet>
concept PacketDerivative = requires(const S& score, Packet s, Index x) {
  { score.derivative_on_packet(s, x, s) } -> std::convertible_to<Packet>;
};

}  // namespace detail

/// Leaves scores unchanged.
struct unchanged {
  template <class Real>
  constexpr Real operator()(Real s, Index, Index, Index, Index) const noexcept {
    return s;
  }
  template <class Real>
  constexpr Real derivative(Real, Index, Index, Index, Index) const noexcept {
    return Real(1);
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
  Real derivative(Real s, Index, Index, Index, Index) const {
    const Real t = std::tanh(s / Real(cap));
    return (1 - t) * (1 + t);
  }
  template <class Real>
  detail::Packet<Real> on_packet(detail::Packet<Real> s, Index, detail::Packet<Real>) const {
    const auto by = detail::broadcast(Real(cap));
    return detail::tanh(s / by) * by;
  }
  template <class Real>
  detail::Packet<Real> derivative_on_packet(detail::Packet<Real> s, Index, detail::Packet<Real>) const {
    const auto t = detail::tanh(s / detail::broadcast(Real(cap))), one = detail::broadcast(Real(1));
    return (one - t) * (one + t);
  }
  void check(const CallSizes& sizes) const {
    if (detail::is_finite(cap) && cap > 0) return;
    detail::refuse(sizes.function, "softcap.cap", detail::number_text(cap),
                   "a positive finite number; a model without a cap omits softcap");
  }
  template <class Real>
  auto for_heads(const Index*) const {
    return [*this](detail::Packet<Real> s, detail::Packet<Real> distance) {
      return on_packet(s, Index{0}, distance);
    };
  }
};

/// s - slopes[h] * |i - j|. Press et al. 2021 (arXiv 2108.12409), section 3. One finite slope for each query
/// head; not owned.
struct alibi {
  std::span<const float> slopes;

  template <class Real>
  Real operator()(Real s, Index, Index h, Index i, Index j) const {
    return s - Real(slopes[static_cast<std::size_t>(h)]) * static_cast<Real>(i < j ? j - i : i - j);
  }
  template <class Real>
  constexpr Real derivative(Real, Index, Index, Index, Index) const noexcept {
    return Real(1);
  }
  template <class Real>
  detail::Packet<Real> on_packet(detail::Packet<Real> s, Index h, detail::Packet<Real> distance) const {
    return s - detail::broadcast(Real(slopes[static_cast<std::size_t>(h)])) * detail::abs(distance);
  }
  void check(const CallSizes& sizes) const {
    if (static_cast<Index>(slopes.size()) != sizes.heads) {
      detail::refuse(sizes.function, "the number of alibi.slopes", std::to_string(slopes.size()),
                     std::to_string(sizes.heads) + ", one for each query head");
    }
    for (const float slope : slopes) {
      if (!detail::is_finite(slope))
        detail::refuse(sizes.function, "one of alibi.slopes", detail::number_text(slope), "a finite number");
    }
  }
  template <class Real>
  auto for_heads(const Index* heads) const {
    alignas(64) Real of_lane[std::size_t(detail::lanes<Real>)];
    for (int i = 0; i < detail::lanes<Real>; ++i)
      of_lane[i] = Real(slopes[static_cast<std::size_t>(heads[i])]);
    return [slope = detail::load(static_cast<const Real*>(of_lane))](detail::Packet<Real> s,
                                                                     detail::Packet<Real> distance) {
      return s - slope * detail::abs(distance);
    };
  }
};

/// The slopes of the paper: 2^(-8 n / heads) for head n = 1 .. heads if heads is a power of two; otherwise the slopes
/// of the next lower power of two, followed by every second slope of the next higher power of two.
inline std::vector<float> alibi_slopes(Index heads) {
  std::vector<float> slopes;
  Index power = 1;
  while (power <= heads / 2) power *= 2;
  for (Index n = 1; n <= (std::min)(power, heads); ++n) {
    slopes.push_back(
        static_cast<float>(std::exp2(-8.0 * static_cast<double>(n) / static_cast<double>(power))));
  }
  for (Index n = 1; n <= heads - power; ++n) {
    slopes.push_back(
        static_cast<float>(std::exp2(-4.0 * static_cast<double>(2 * n - 1) / static_cast<double>(power))));
  }
  return slopes;
}

/// s + bias[b, h, i, j], with bias from a tensor [batch or 1, heads or 1, queries or 1, keys]; a dimension of 1 is
/// repeated, except for keys. Row 0 belongs to the query at position `first_query`; the default keys - queries aligns
/// the last row with the last key. The tensor may have more queries and keys than a call. Minus infinity hides the
/// key, but unlike with a mask the pair is still computed.
template <class T>
struct additive_bias {
  TensorView<const T> bias;
  Index first_query;

  explicit additive_bias(TensorView<const T> tensor)
      : additive_bias(tensor, detail::saturating_difference(tensor.cols, tensor.rows)) {}
  additive_bias(TensorView<const T> tensor, Index first) : bias(tensor), first_query(first) {
    if (bias.batch == 1) bias.batch_stride = 0;
    if (bias.heads == 1) bias.head_stride = 0;
    if (bias.rows == 1) bias.row_stride = 0;
  }

  template <class Real>
  Real operator()(Real s, Index b, Index h, Index i, Index j) const {
    return s + static_cast<Real>(bias.row(b, h, i - first_query)[j]);
  }
  template <class Real>
  constexpr Real derivative(Real, Index, Index, Index, Index) const noexcept {
    return Real(1);
  }
  /// Changes the scores of the query at position i with the keys [first_key, first_key + count).
  template <class Real>
  void on_keys(Real* s, Index b, Index h, Index i, Index first_key, Index count) const {
    const T* row = bias.row(b, h, i - first_query) + first_key;
    for (Index n = 0; n < count; ++n) s[n] += static_cast<Real>(row[n]);
  }
  void check(const CallSizes& sizes) const {
    detail::check_view(sizes.function, "additive_bias.bias", bias);
    const auto fits = [](Index size, Index wanted) { return size == 1 || size == wanted; };
    if (!fits(bias.batch, sizes.batch) || !fits(bias.heads, sizes.heads) || bias.cols < sizes.kv_len) {
      detail::refuse(sizes.function, "additive_bias.bias", detail::shape_text(bias),
                     std::string("[1 or ") + std::to_string(sizes.batch) + ", 1 or " +
                         std::to_string(sizes.heads) + ", 1 or q_len, at least " +
                         std::to_string(sizes.kv_len) + "]");
    }
    const Index row = detail::saturating_difference(sizes.first_query, first_query);
    if (sizes.q_len > 0 && bias.rows != 1 && (row < 0 || row > bias.rows - sizes.q_len)) {
      detail::refuse(sizes.function, "additive_bias.bias",
                     detail::shape_text(bias) + " with first_query " + std::to_string(first_query),
                     std::string("a row for each of the ") + std::to_string(sizes.q_len) +
                         " queries from position " + std::to_string(sizes.first_query) + " on");
    }
  }
  template <class Real>
  void on_strip(const detail::ScoreStrip<Real>& strip) const {
    if (bias.row_stride == 0) return detail::add_row(strip, row_of(strip, 0));
    detail::add_rows(strip, [&](Index lane) { return row_of(strip, lane); });
  }
  template <class Real>
  void prefetch_strip(const detail::ScoreStrip<Real>& strip) const {
    const Index rows = bias.row_stride == 0 ? 1 : std::min<Index>(strip.queries, detail::lanes<Real>);
    for (Index lane = 0; lane < rows; ++lane)
      detail::prefetch(row_of(strip, lane), strip.keys * static_cast<Index>(sizeof(T)));
  }

 private:
  template <class Real>
  const T* row_of(const detail::ScoreStrip<Real>& strip, Index lane) const {
    return bias.row(strip.batch, strip.head, strip.position(lane) - first_query) + strip.first_key;
  }
};
template <class T>
additive_bias(TensorView<T>) -> additive_bias<std::remove_const_t<T>>;
template <class T>
additive_bias(TensorView<T>, Index) -> additive_bias<std::remove_const_t<T>>;

/// Applies two score functions one after the other. `a | b`.
template <Score A, Score B>
struct piped {
  A first;
  B second;

  template <class Real>
  Real operator()(Real s, Index b, Index h, Index i, Index j) const {
    using Taken = detail::ScoreValue<A, Real>;
    using Passed = detail::ScoreValue<B, Real>;
    return static_cast<Real>(
        second(static_cast<Passed>(first(static_cast<Taken>(s), b, h, i, j)), b, h, i, j));
  }
  /// The chain rule.
  template <class Real>
  Real derivative(Real s, Index b, Index h, Index i, Index j) const
  requires(DifferentiableScore<A> && DifferentiableScore<B>)
  {
    using Taken = detail::ScoreValue<A, Real>;
    using Passed = detail::ScoreValue<B, Real>;
    const auto passed = first(static_cast<Taken>(s), b, h, i, j);
    return static_cast<Real>(first.derivative(static_cast<Taken>(s), b, h, i, j)) *
           static_cast<Real>(second.derivative(static_cast<Passed>(passed), b, h, i, j));
  }
  template <class Real>
  detail::Packet<Real> derivative_on_packet(detail::Packet<Real> s, Index h,
                                            detail::Packet<Real> distance) const
  requires(detail::PacketScore<A, detail::Packet<Real>> &&
           detail::PacketDerivative<A, detail::Packet<Real>> &&
           detail::PacketDerivative<B, detail::Packet<Real>>)
  {
    return first.derivative_on_packet(s, h, distance) *
           second.derivative_on_packet(first.on_packet(s, h, distance), h, distance);
  }
  template <class Real>
  detail::Packet<Real> on_packet(detail::Packet<Real> s, Index h, detail::Packet<Real> distance) const
  requires(detail::PacketScore<A, detail::Packet<Real>> && detail::PacketScore<B, detail::Packet<Real>>)
  {
    return second.on_packet(first.on_packet(s, h, distance), h, distance);
  }
  void check(const CallSizes& sizes) const {
    detail::check_part(first, sizes);
    detail::check_part(second, sizes);
  }
  template <class Real>
  void on_strip(const detail::ScoreStrip<Real>& strip) const
  requires(detail::StripScore<A, Real> || detail::StripScore<B, Real>)
  {
    detail::change_strip(first, strip);
    detail::change_strip(second, strip);
  }
  template <class Real>
  void prefetch_strip(const detail::ScoreStrip<Real>& strip) const {
    detail::prefetch_strip(first, strip);
    detail::prefetch_strip(second, strip);
  }
  template <class Real>
  auto for_heads(const Index* heads) const
  requires(detail::PacketScoreOfHeads<A, Real> && detail::PacketScoreOfHeads<B, Real>)
  {
    return [of_first = first.template for_heads<Real>(heads),
            of_second = second.template for_heads<Real>(heads)](detail::Packet<Real> s,
                                                                detail::Packet<Real> distance) {
      return of_second(of_first(s, distance), distance);
    };
  }
};

namespace detail {

template <>
inline constexpr bool only_adds<unchanged> = true;
template <>
inline constexpr bool only_adds<alibi> = true;
template <class T>
inline constexpr bool only_adds<additive_bias<T>> = true;
template <class A, class B>
inline constexpr bool only_adds<piped<A, B>> = only_adds<A> && only_adds<B>;

}  // namespace detail

template <Score A, Score B>
constexpr piped<A, B> operator|(A a, B b) {
  return {std::move(a), std::move(b)};
}

LONGSPAN_NAMESPACE_END
