// The memory that the tiles of one worker share.
#pragma once

#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// What the tiles of one worker share: all of it is free again when a block is absorbed.
template <class Policy>
struct TileScratch {
  using Real = typename Policy::Real;

  Real* scores = nullptr;                      ///< [keys_in_block + tile_rows][lanes of a tile]
  typename Policy::Weight* weights = nullptr;  ///< [keys_in_block / keys_in_row][tile_lanes]
  Real* block_output = nullptr;                ///< [padded value_dim][tile_lanes]
  Real* rows = nullptr;                        ///< [tile_lanes][head_dim], for position encoding

  static TileScratch take(Arena& arena, Index head_dim, Index padded_value_dim, bool encodes) {
    constexpr Index width = tile_lanes<Real>, keys = Policy::keys_in_block;
    TileScratch scratch;
    scratch.scores = arena.take<Real>((keys + tile_rows) * width);
    if constexpr (std::is_same_v<Real, typename Policy::Weight>) {
      scratch.weights = scratch.scores;  // a weight stands where its score stood
    } else {
      scratch.weights = arena.take<typename Policy::Weight>(keys / Policy::keys_in_row * width);
    }
    scratch.block_output = arena.take<Real>(padded_value_dim * width);
    if (encodes) scratch.rows = arena.take<Real>(width * head_dim);
    return scratch;
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
