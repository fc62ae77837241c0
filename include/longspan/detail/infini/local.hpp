// The local functor of infini_attention, which attends within a segment: its position offset, and whether its mask
// hides later keys.
#pragma once

#include <tuple>
#include <type_traits>

#include "longspan/infini_options.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

template <class Local, FeatureMap F>
struct infini_attention;

namespace detail {

/// A position encoding whose positions begin at `offset`.
template <Position P>
struct ShiftedPosition {
  P position;
  Index offset = 0;

  template <class Real>
  void encode(MatrixView<Real> rows, Index first, Role role) const {
    position.encode(rows, offset + first, role);
  }
  template <class Real>
  void encode_at(MatrixView<Real> rows, const RowPositions& at, Role role) const {
    detail::encode_at(position, rows, RowPositions{offset + at.first, at.alike, at.skipped}, role);
  }
  template <class Real>
  void encode_transposed(MatrixView<Real> rows, Index first, Role role) const
  requires TransposablePosition<P>
  {
    position.encode_transposed(rows, offset + first, role);
  }
  void check(Index cols) const { position.check(cols); }
};

/// The position encoding of a local functor; no_position if it has none.
template <class Local>
auto position_of(const Local& local) {
  if constexpr (requires { local.position; }) {
    return local.position;
  } else {
    return no_position{};
  }
}

/// The local functor for a segment that begins at position `offset`. Only softmax_attention supports an offset; other
/// functors count positions from the beginning of the segment.
template <class Local>
const Local& local_at(const Local& local, Index) {
  return local;
}
template <Mask M, Score S, Position P>
requires(!std::is_same_v<P, no_position>)
auto local_at(const softmax_attention<M, S, P>& local, Index offset) {
  softmax_attention<M, S, ShiftedPosition<P>> shifted(local.mask, local.score,
                                                      ShiftedPosition<P>{local.position, offset});
  shifted.scale = local.scale;
  shifted.first_query = local.first_query;
  shifted.bf16_products = local.bf16_products;
  return shifted;
}

/// True if the functor can be called with only the last queries of its keys.
template <class Local>
inline constexpr bool answers_last_queries = true;
template <class Local, FeatureMap F>
inline constexpr bool answers_last_queries<infini_attention<Local, F>> = false;

/// Whether a mask hides every key after the query. `known`: the type allows an answer; `holds`: the answer for its
/// values.
template <class M>
struct HidesLaterKeys {
  static constexpr bool known = false;
  static constexpr bool holds(const M&) { return false; }
};
template <>
struct HidesLaterKeys<causal> {
  static constexpr bool known = true;
  static constexpr bool holds(const causal&) { return true; }
};
template <>
struct HidesLaterKeys<window> {
  static constexpr bool known = true;
  static constexpr bool holds(const window& mask) { return mask.right <= 0; }
};
template <class A, class B>
struct HidesLaterKeys<both<A, B>> {
  static constexpr bool known = HidesLaterKeys<A>::known || HidesLaterKeys<B>::known;
  static constexpr bool holds(const both<A, B>& mask) {
    return HidesLaterKeys<A>::holds(mask.a) || HidesLaterKeys<B>::holds(mask.b);
  }
};
template <class A, class B>
struct HidesLaterKeys<either<A, B>> {
  static constexpr bool known = HidesLaterKeys<A>::known && HidesLaterKeys<B>::known;
  static constexpr bool holds(const either<A, B>& mask) {
    return HidesLaterKeys<A>::holds(mask.a) && HidesLaterKeys<B>::holds(mask.b);
  }
};

/// The same for a local functor: for its mask, or for all functors that it consists of. A functor that has neither is
/// user-defined, and is assumed to hide later keys.
template <class Local>
struct LocalHidesLaterKeys {
  static constexpr bool known = true;
  static constexpr bool holds(const Local&) { return true; }
};
template <class Local>
requires requires(const Local& local) { local.mask; }
struct LocalHidesLaterKeys<Local> {
  using OfMask = HidesLaterKeys<decltype(Local::mask)>;
  static constexpr bool known = OfMask::known;
  static constexpr bool holds(const Local& local) { return OfMask::holds(local.mask); }
};
template <class... F>
struct LocalHidesLaterKeys<std::tuple<F...>> {
  static constexpr bool known = (LocalHidesLaterKeys<F>::known && ...);
  static constexpr bool holds(const std::tuple<F...>& parts) {
    return std::apply([](const F&... part) { return (LocalHidesLaterKeys<F>::holds(part) && ...); }, parts);
  }
};
template <class Local>
requires requires(const Local& local) { local.parts; }
struct LocalHidesLaterKeys<Local> : LocalHidesLaterKeys<decltype(Local::parts)> {
  static constexpr bool holds(const Local& local) {
    return LocalHidesLaterKeys<decltype(Local::parts)>::holds(local.parts);
  }
};
template <class Local>
requires requires(const Local& local) { local.ranges; }
struct LocalHidesLaterKeys<Local> : LocalHidesLaterKeys<decltype(Local::ranges)> {
  static constexpr bool holds(const Local& local) {
    return LocalHidesLaterKeys<decltype(Local::ranges)>::holds(local.ranges);
  }
};
template <class Local>
requires requires(const Local& local) { local.a, local.b; }
struct LocalHidesLaterKeys<Local> {
  using OfA = LocalHidesLaterKeys<decltype(Local::a)>;
  using OfB = LocalHidesLaterKeys<decltype(Local::b)>;
  static constexpr bool known = OfA::known && OfB::known;
  static constexpr bool holds(const Local& local) { return OfA::holds(local.a) && OfB::holds(local.b); }
};
template <class Local>
requires requires(const Local& local) { local.begin, local.end, local.attend; }
struct LocalHidesLaterKeys<Local> : LocalHidesLaterKeys<decltype(Local::attend)> {
  static constexpr bool holds(const Local& local) {
    return LocalHidesLaterKeys<decltype(Local::attend)>::holds(local.attend);
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
