// Which products serve a backward call: those of matrix tiles, or of float or double.
#pragma once

#include <type_traits>

#include "longspan/detail/attend.hpp"
#include "longspan/detail/gradient/amx_key_tiles.hpp"
#include "longspan/detail/gradient/key_tiles.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <class Real>
struct RealProducts {
  static constexpr bool measures = true;  ///< Tiles has `measure`
  template <Mask M, Score S>
  using Tiles = KeyTiles<Real, M, S>;
};

#if defined(LONGSPAN_USES_AMX)
struct TileProducts {
  static constexpr bool measures = false;
  template <Mask M, Score S>
  using Tiles = AmxKeyTiles<TileUnit, M, S>;
};
#endif

/// Calls work.operator()<Products>(executor). Matrix tiles take q, k, v and dout of bfloat16 without a position
/// encoding.
template <Position P, class Call, class E, class Work>
void with_products([[maybe_unused]] const Call& call, [[maybe_unused]] bool bf16_products, const E& executor,
                   const Work& work) {
#if defined(LONGSPAN_USES_AMX)
  using Tq = std::remove_const_t<typename decltype(Call::Forward::q)::Element>;
  using Td = std::remove_const_t<typename decltype(Call::dout)::Element>;
  if constexpr (is_all<Eigen::bfloat16, Tq, typename Call::Forward::Key, typename Call::Forward::Value, Td> &&
                std::is_same_v<P, no_position>) {
    if (bf16_products && uses_tiles())
      return work.template operator()<TileProducts>(WithTiles<TileUnit, E>(executor));
  }
#endif
  work.template operator()<RealProducts<typename Call::Real>>(executor);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
