// Which lane of a tile holds which query.
#pragma once

#include <algorithm>

#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <class Real>
inline constexpr int tile_lanes = tile_packets * lanes<Real>;

/// The queries of one tile. The query heads that share a KV head are interleaved in the lanes as (position, head)
/// pairs, with the head changing fastest. K and V are then read once for all of them, and a tile spans fewer
/// positions, so that less of it is on the causal diagonal.
struct QueryLanes {
  Index batch = 0;
  Index first_head = 0;      ///< of the heads that share the tile
  Index heads = 1;           ///< how many share it
  Index first_row = 0;       ///< of all their rows, counted (row, head) with the head fastest
  Index count = 0;           ///< lanes in use; the lanes after them repeat the last one
  Index first_position = 0;  ///< position of row 0

  Index flat(Index lane) const noexcept { return first_row + (std::min)(lane, count - 1); }
  Index head(Index lane) const noexcept { return heads == 1 ? first_head : first_head + flat(lane) % heads; }
  Index row(Index lane) const noexcept { return heads == 1 ? flat(lane) : flat(lane) / heads; }
  Index position(Index lane) const noexcept { return first_position + row(lane); }

  /// The Tile of the lanes [first, first + lanes_used) and the keys.
  Tile tile(Index first, Index lanes_used, KeyRange keys) const noexcept {
    const Index from = position(first);
    return {batch,      first_head,           heads, from, position(first + lanes_used - 1) - from + 1,
            keys.begin, keys.end - keys.begin};
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
