// How many blocks of a landmark stream are sealed, dropped and final: functions of the stream's size alone.
#pragma once

#include <algorithm>

#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Blocks are numbered from the start of the stream. The blocks that can be retrieved, [dropped, sealed), depend on the
/// size and not on `rollback`; `rollback` determines how long blocks are kept that a truncation may bring back.
struct BlockCounts {
  // From the options.
  Index block = 2;          ///< tokens of a block
  Index window_blocks = 0;  ///< full blocks that are not sealed yet
  Index capacity = 0;       ///< maximum number of blocks that can be retrieved
  Index drop_at_once = 0;   ///< blocks beyond the capacity are dropped so many at a time; 0: none is dropped
  Index rollback = 0;       ///< maximum number of tokens that a truncation can remove

  // The state.
  Index tokens = 0;   ///< size of the stream
  Index sealed = 0;   ///< blocks that have been sealed
  Index dropped = 0;  ///< of the sealed blocks, the oldest ones that cannot be retrieved any more
  Index settled = 0;  ///< blocks that no truncation can unseal
  Index opened = 0;   ///< blocks that the file contained when the stream began
  Index let_go = 0;   ///< blocks that the caller has dropped permanently

  Index blocks() const noexcept { return sealed - dropped; }
  Index open() const noexcept { return tokens - sealed * block; }

  /// The number of sealed blocks in a stream of `size` tokens.
  Index sealed_at(Index size) const noexcept { return (std::max)(opened, size / block - window_blocks); }
  /// The number of dropped blocks if `count` are sealed.
  Index dropped_at(Index count) const noexcept {
    const bool is_full = drop_at_once > 0 && count - drop_at_once >= capacity;
    return (std::max)(let_go, is_full ? (count - capacity) / drop_at_once * drop_at_once : 0);
  }
  /// The number of final blocks: a truncation leaves at least `size` - rollback tokens.
  Index settled_at(Index size) const noexcept {
    return (std::max)({settled, let_go, sealed_at(std::max<Index>(0, size - rollback))});
  }
  /// The number of blocks that are not needed at any size to which the stream can be truncated.
  Index gone() const noexcept { return dropped_at(settled); }

  /// The smallest size to which the stream can be truncated: fewer tokens would unseal a settled block.
  Index least() const noexcept {
    return settled <= opened ? opened * block : (settled + window_blocks) * block;
  }
  void truncate(Index size) noexcept {
    tokens = size;
    sealed = sealed_at(size);
    dropped = dropped_at(sealed);
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
