// The task loop of the tile kernel: a call cut into tasks, each of which takes a few tiles of queries through their
// keys.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/tile/amx_tile.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/detail/tile/query_tile.hpp"
#include "longspan/detail/tile/tile_plan.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// For each task, in parallel:
///   pack its tiles of queries
///   for each key block that one of them may see: convert it once, then each tile scores it, updates its softmax
///     and adds its values
///   write the outputs of its tiles
/// With fewer tiles than workers the keys are split as well, and the parts are merged in a fixed order.
template <class Policy, class Tq, class Tk, class Tv, class To, class Keys, Mask M, Score S, Position P>
class Forward {
 public:
  using Call = Problem<Tq, Tk, Tv, To>;
  using Real = typename Policy::Real;
  using Queries = typename TileOf<Policy, M, S>::type;
  using Blocks = KeyBlocks<Policy, Tk, Tv, P>;

  /// Reads only the shapes of call.k and call.v: the rows are in `keys`.
  Forward(const Call& call, const Keys& keys, const M& mask, const S& score, const P& position, Index workers)
      : call_(call),
        keys_(keys),
        mask_(mask),
        score_(score),
        position_(position),
        // A score may depend on the head, and its packet form takes one head for all lanes.
        plan_(call, Queries::changes_score ? 1 : call.group(), workers) {
    // Splitting the keys changes no bit of the result (see keys_in_chunk).
    if (plan_.has_few_tiles() && workers > 1) {
      split_keys_ = call.kv_len() <= keys_in_span ? keys_in_chunk : keys_in_span;
      splits_ = std::max<Index>(1, divide_up(call.kv_len(), split_keys_));
    }
  }

  template <class E>
  void run(const E& executor, Workspace& workspace) {
    const Index workers = executor.workers(), tasks = plan_.tasks();
    const WorkerScratch scratch(
        workspace, workers, [&](Arena& arena) { cut_worker(arena); },
        [&](Arena& arena) { cut_parts(arena, tasks); });
    if (splits_ == 1) {
      if constexpr (keeps_values) {
        for (Index worker = 0; worker < workers; ++worker) {
          Arena arena = scratch.of_worker(worker);
          cut_worker(arena).blocks.clear();
        }
      }
      executor.for_each(tasks, [&](Index task, Index worker) {
        Arena arena = scratch.of_worker(worker);
        Worker own = cut_worker(arena);
        run_task(task, own);
      });
      return;
    }
    Arena arena = scratch.shared();
    Accumulator<Real>* parts = cut_parts(arena, tasks);
    executor.for_each(tasks * splits_, [&](Index part, Index worker) {
      Arena own_arena = scratch.of_worker(worker);
      Worker own = cut_worker(own_arena);
      run_split(part / splits_, part % splits_, own, parts[part]);
    });
    executor.for_each(tasks, [&](Index task, Index) { join_splits(task, parts + task * splits_); });
  }

 private:
  /// Do the blocks keep values from task to task?
  static constexpr bool keeps_values = requires(const Blocks& blocks) { blocks.clear(); };

  struct Worker {
    TileScratch<Policy> scratch;
    Blocks blocks;
    Queries tiles[tiles_in_task];
  };

  Index padded_value_dim() const { return round_up(call_.value_dim(), Policy::columns_in_tile); }

  Worker cut_worker(Arena& arena) const {
    Worker worker;
    worker.scratch = TileScratch<Policy>::take(arena, call_.head_dim(), padded_value_dim(),
                                               !std::is_same_v<P, no_position>);
    if constexpr (keeps_values) {
      // Worth it where several tasks meet the same keys.
      const bool keeps = splits_ == 1 && plan_.tasks_of_head() > 1;
      worker.blocks = Blocks::take(arena, call_.head_dim(), call_.value_dim(),
                                   keeps ? divide_up(call_.kv_len(), Policy::keys_in_block) : 0);
    } else {
      worker.blocks = Blocks::take(arena, call_.head_dim(), call_.value_dim());
    }
    if constexpr (requires { worker.blocks.read_once(); }) {
      if (plan_.tasks_of_head() == 1 && plan_.tiles_per_task() == 1) worker.blocks.read_once();
    }
    for (Index t = 0; t < plan_.tiles_per_task(); ++t) {
      worker.tiles[t] = Queries::take(arena, call_.head_dim(), padded_value_dim(), call_.kv_len());
    }
    return worker;
  }

  /// The states of all splits of all tasks.
  Accumulator<Real>* cut_parts(Arena& arena, Index tasks) const {
    if (splits_ == 1) return nullptr;
    auto* parts = arena.take<Accumulator<Real>>(tasks * splits_);
    for (Index i = 0; i < tasks * splits_; ++i) {
      const auto part = Accumulator<Real>::take(arena, padded_value_dim(), tile_lanes<Real>);
      if (parts != nullptr) parts[i] = part;
    }
    return parts;
  }

  void run_task(Index task, Worker& worker) const {
    Index tiles = 0;
    for (; tiles < plan_.tiles_per_task() && plan_.lanes_of(task, tiles).count > 0; ++tiles)
      start(worker, tiles, plan_.lanes_of(task, tiles));
    absorb_keys(worker, tiles, plan_.lanes_of(task, 0), {0, call_.kv_len()});
    for (Index t = 0; t < tiles; ++t) worker.tiles[t].finish(call_.out, call_.lse);
  }

  void run_split(Index task, Index split, Worker& worker, Accumulator<Real>& part) const {
    start(worker, 0, plan_.lanes_of(task, 0));
    const Index first = split * split_keys_;
    absorb_keys(worker, 1, plan_.lanes_of(task, 0), {first, (std::min)(call_.kv_len(), first + split_keys_)});
    const Accumulator<Real>& whole = worker.tiles[0].state().whole();
    part.stride = whole.stride;
    part.clear();
    part.merge(whole);
  }

  void join_splits(Index task, const Accumulator<Real>* parts) const {
    for (Index split = 1; split < splits_; ++split) parts[0].merge(parts[split]);
    write_lanes(parts[0], plan_.lanes_of(task, 0), call_.out, call_.lse);
  }

  void start(Worker& worker, Index t, const QueryLanes& lanes_of_tile) const {
    worker.tiles[t].start(lanes_of_tile, mask_, score_, call_.q, call_.scale, position_, worker.scratch);
  }

  /// Takes the tiles through every key block that one of them may see. Blocks are cut at multiples of their length.
  void absorb_keys(Worker& worker, Index tiles, const QueryLanes& lanes_of_tile, KeyRange keys) const {
    KeyRanges ranges;
    for (Index t = 0; t < tiles; ++t) ranges = united(ranges, worker.tiles[t].ranges());
    const Index kv_head = lanes_of_tile.first_head / call_.group();
    if constexpr (keeps_values) worker.blocks.enter(lanes_of_tile.batch * call_.k.heads + kv_head);
    for_each_block(ranges, keys, Policy::keys_in_block, [&](KeyRange of_block) {
      for_each_run(keys_, lanes_of_tile.batch, kv_head, of_block, [&](const auto& run, KeyRange of_run) {
        const KeyBlock<Policy> block = worker.blocks.block(run, position_, of_run.begin);
        for (Index t = 0; t < tiles; ++t) worker.tiles[t].absorb(block, worker.scratch);
      });
    });
  }

  const Call& call_;
  const Keys& keys_;
  const M& mask_;
  const S& score_;
  const P& position_;
  TilePlan<Real> plan_;
  Index splits_ = 1;
  Index split_keys_ = 0;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
