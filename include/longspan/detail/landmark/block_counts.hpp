// How many blocks of a landmark stream are sealed, dropped and final: functions of its size alone.
#pragma once

#include <algorithm>

#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Blocks are numbered from the start of the stream. What can be retrieved, [dropped, sealed), depends on the
/// size and not on `rollback`; that says how long blocks stay kept that a truncation brings back.
struct BlockCounts {
  // From the options.
  Index block = 2;          ///< tokens of a block
  Index window_blocks = 0;  ///< full blocks that are not sealed yet
  Index capacity = 0;       ///< blocks that can be retrieved
  Index drop_at_once = 0;   ///< blocks beyond the capacity that are dropped together; 0: none is dropped
  Index rollback = 0;       ///< tokens that can be taken back

  // The state.
  Index tokens = 0;   ///< size of the stream
  Index sealed = 0;   ///< blocks that have been sealed
  Index dropped = 0;  ///< of those, the oldest ones that cannot be retrieved any more
  Index settled = 0;  ///< blocks that no truncation can unseal
  Index opened = 0;   ///< blocks that a file held when the stream began
  Index let_go = 0;   ///< blocks that a caller has dropped, for good

  Index blocks() const noexcept { return sealed - dropped; }
  Index open() const noexcept { return tokens - sealed * block; }

  /// Blocks that are sealed in a stream of `size` tokens.
  Index sealed_at(Index size) const noexcept { return (std::max)(opened, size / block - window_blocks); }
  /// Blocks that are dropped where `count` are sealed.
  Index dropped_at(Index count) const noexcept {
    const bool is_full = drop_at_once > 0 && count - drop_at_once >= capacity;
    return (std::max)(let_go, is_full ? (count - capacity) / drop_at_once * drop_at_once : 0);
  }
  /// Blocks that are final, since a truncation reaches back at most to `size` - rollback tokens.
  Index settled_at(Index size) const noexcept {
    return (std::max)({settled, let_go, sealed_at(std::max<Index>(0, size - rollback))});
  }
  /// Blocks that are not needed any more, for any size that the stream can be truncated to.
  Index gone() const noexcept { return dropped_at(settled); }

  /// The least size that the stream can be truncated to: fewer tokens would unseal a settled block.
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
