// The attention within segments of infini_attention: what it can be told, and what can be asked of it.
#pragma once

#include <type_traits>

#include "longspan/infini_options.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN

template <class Local, FeatureMap F>
struct infini_attention;

namespace detail {

/// Positions from `offset` on.
template <Position P>
struct ShiftedPosition {
  P position;
  Index offset = 0;

  template <class Real>
  void encode(MatrixView<Real> rows, Index first, Role role) const {
    position.encode(rows, offset + first, role);
  }
  void check(Index cols) const { position.check(cols); }
};

/// The position encoding of a local functor; none where it has none.
template <class Local>
auto position_of(const Local& local) {
  if constexpr (requires { local.position; }) {
    return local.position;
  } else {
    return no_position{};
  }
}

/// The local functor for a segment that stands at `offset`. Only softmax_attention can be told so; the others
/// count from the beginning of the segment.
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

/// Does it answer the last queries of its keys without those before?
template <class Local>
inline constexpr bool answers_last_queries = true;
template <class Local, FeatureMap F>
inline constexpr bool answers_last_queries<infini_attention<Local, F>> = false;

/// Does it have a mask, and that hides nothing?
template <class Local>
inline constexpr bool shows_later_keys =
    requires { requires std::is_same_v<decltype(Local::mask), everything>; };

}  // namespace detail
LONGSPAN_END
