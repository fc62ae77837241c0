// How the queries of a call are cut into tiles, and the tiles into tasks.
#pragma once

#include <algorithm>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The most tiles of one KV head that a task takes through each key block together. Four hide the conversion of
/// 16-bit blocks (6-10 % of a call with one tile, 1-2 % with four) and the cache misses of widely strided rows.
inline constexpr Index tiles_in_task = 4;

/// The tiles of all heads. Results do not depend on how many tiles a task has.
template <class Real>
class TilePlan {
 public:
  TilePlan() = default;
  /// `shared_heads` query heads of a group share the lanes of a tile: all of them, or 1.
  template <class Call>
  TilePlan(const Call& call, Index shared_heads, Index workers)
      : shared_heads_(shared_heads),
        rows_(call.q_len() * shared_heads),
        first_query_(call.first_query),
        heads_(call.q.batch * (call.q.heads / shared_heads)),
        head_groups_(call.q.heads / shared_heads) {
    const Index tiles_of_head = divide_up(rows_, tile_lanes<Real>);
    has_few_tiles_ = heads_ * tiles_of_head < tasks_per_worker * workers;
    per_task_ = heads_ * tiles_of_head >= tasks_per_worker * workers * tiles_in_task ? tiles_in_task : 1;
    tasks_of_head_ = divide_up(tiles_of_head, per_task_);
  }

  Index tasks() const noexcept { return heads_ * tasks_of_head_; }
  Index tasks_of_head() const noexcept { return tasks_of_head_; }
  Index tiles_per_task() const noexcept { return per_task_; }
  /// Are there too few tiles to keep all workers busy?
  bool has_few_tiles() const noexcept { return has_few_tiles_; }

  /// Tile t of task `task`; its count is not positive if the task has fewer tiles. Heads rise from task to task, so
  /// that the threads share the keys of one head in the cache. Within a head the tiles fall, since under a causal mask
  /// the last ones take longest.
  QueryLanes lanes_of(Index task, Index t) const {
    const Index head = task / tasks_of_head_, from_the_end = tasks_of_head_ - 1 - task % tasks_of_head_;
    const Index first_row = (from_the_end * per_task_ + t) * tile_lanes<Real>;
    return {head / head_groups_,
            head % head_groups_ * shared_heads_,
            shared_heads_,
            first_row,
            std::min<Index>(tile_lanes<Real>, rows_ - first_row),
            first_query_};
  }

 private:
  static constexpr Index tasks_per_worker = 4;

  Index shared_heads_ = 1;
  Index rows_ = 0;  ///< (row, head) pairs of the heads that share tiles
  Index first_query_ = 0;
  Index heads_ = 0;        ///< heads that have tiles of their own, in all batch rows
  Index head_groups_ = 0;  ///< the same in one batch row
  Index per_task_ = 1;
  Index tasks_of_head_ = 1;
  bool has_few_tiles_ = false;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
