// The task loop of landmark attention: each task takes a few tiles of queries through the chunks of landmark blocks.
#pragma once

#include <algorithm>
#include <type_traits>

#include "longspan/detail/attend.hpp"
#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/landmark/amx_tile.hpp"
#include "longspan/detail/landmark/plan.hpp"
#include "longspan/detail/landmark/tile.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/detail/tile/tile_plan.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The tile of an arithmetic policy.
template <class Policy, Mask M, Score S>
struct LandmarkTileOf {
  using type = LandmarkTile<Policy, M, S>;
  static constexpr bool takes_wide_blocks = true;
};
#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)
template <class Unit, Mask M, Score S>
struct LandmarkTileOf<AmxArithmetic<Unit>, M, S> {
  using type = AmxLandmarkTile<Unit, M, S>;
  static constexpr bool takes_wide_blocks = false;
};
#endif

template <class Policy, class Tq, class Tk, class Tv, class To, Mask M, Score S, Position P>
class LandmarkForward {
 public:
  using Call = Problem<Tq, Tk, Tv, To>;
  using Real = typename Call::Real;
  using Of = LandmarkTileOf<Policy, M, S>;
  using Queries = typename Of::type;
  using Blocks = KeyBlocks<Policy, Tk, Tv, P>;

  LandmarkForward(const Call& call, const LandmarkOptions& options, const M& mask, const S& score,
                  const P& position, Index widest, Index workers)
      : call_(call),
        options_(options),
        mask_(mask),
        score_(score),
        position_(position),
        tiles_(call, Queries::changes_score ? 1 : call.group(), workers),
        widest_(widest) {}

  template <class E>
  void run(const E& executor, Workspace& workspace) {
    const WorkerScratch scratch(
        workspace, executor.workers(), [&](Arena& arena) { cut_worker(arena); },
        [&](Arena& arena) { take_plan(arena); });
    Arena plan_arena = scratch.shared();
    plan_ = take_plan(plan_arena);
    if constexpr (keeps_values) {
      for (Index worker = 0; worker < executor.workers(); ++worker) {
        Arena arena = scratch.of_worker(worker);
        cut_worker(arena).blocks.clear();
      }
    }
    executor.for_each(tiles_.tasks(), [&](Index task, Index worker) {
      Arena arena = scratch.of_worker(worker);
      Worker own = cut_worker(arena);
      run_task(task, own);
    });
  }

 private:
  /// Do the blocks keep values from task to task?
  static constexpr bool keeps_values = requires(const Blocks& blocks) { blocks.clear(); };

  struct Worker {
    TileScratch<Policy> scratch;
    Blocks blocks;
    Queries tiles[tiles_in_task];
  };

  LandmarkPlan take_plan(Arena& arena) const {
    const bool same_in_all_rows = options_.landmarks.same_in_all_rows() && !options_.has_controlled();
    return LandmarkPlan::take(arena, options_.landmarks, call_.k.batch, call_.kv_len(), Policy::keys_in_block,
                              same_in_all_rows,
                              [&](Index b, Index m) { return options_.is_controlled(b, m); });
  }

  Worker cut_worker(Arena& arena) const {
    const Index padded_value_dim = round_up(call_.value_dim(), Policy::columns_in_tile);
    Worker worker;
    worker.scratch =
        TileScratch<Policy>::take(arena, call_.head_dim(), padded_value_dim, !std::is_same_v<P, no_position>);
    if constexpr (keeps_values) {
      const Index chunks = LandmarkPlan::most_chunks(call_.kv_len(), Policy::keys_in_block);
      worker.blocks =
          Blocks::take(arena, call_.head_dim(), call_.value_dim(), tiles_.tasks_of_head() > 1 ? chunks : 0);
    } else {
      worker.blocks = Blocks::take(arena, call_.head_dim(), call_.value_dim());
    }
    for (Index t = 0; t < tiles_.tiles_per_task(); ++t) {
      worker.tiles[t] = Queries::take(arena, call_.head_dim(), padded_value_dim, call_.kv_len(), widest_,
                                      options_.has_controlled());
    }
    return worker;
  }

  void run_task(Index task, Worker& worker) const {
    Index tiles = 0;
    for (; tiles < tiles_.tiles_per_task() && tiles_.lanes_of(task, tiles).count > 0; ++tiles) {
      worker.tiles[tiles].start(tiles_.lanes_of(task, tiles), mask_, score_, options_, call_.kv_len(),
                                call_.q, call_.scale, position_, worker.scratch);
    }
    KeyRanges ranges;
    for (Index t = 0; t < tiles; ++t) ranges = united(ranges, worker.tiles[t].ranges());
    ranges = intersection(ranges, KeyRanges({0, call_.kv_len()}));
    const QueryLanes lanes = tiles_.lanes_of(task, 0);
    if constexpr (keeps_values)
      worker.blocks.enter(lanes.batch * call_.k.heads + lanes.first_head / call_.group());
    Index done = 0;  // a chunk that overlaps two ranges is absorbed once
    for (const KeyRange& range : ranges) {
      for (const LandmarkChunk& chunk : plan_.chunks(lanes.batch, range)) {
        if (chunk.keys.begin < done) continue;
        absorb(chunk, lanes, tiles, worker);
        done = chunk.keys.end;
      }
    }
    for (Index t = 0; t < tiles; ++t) worker.tiles[t].finish(call_.out, call_.lse);
  }

  void absorb(const LandmarkChunk& chunk, const QueryLanes& lanes, Index tiles, Worker& worker) const {
    const TensorKeys<Tk, Tv> all{call_.k, call_.v};
    const auto keys_of = [&](Index first, Index count) {
      const Index kv_head = lanes.first_head / call_.group();
      const KeyRun<Tk, Tv> run = all.run(lanes.batch, kv_head, {first, first + count});
      if constexpr (keeps_values) {
        return worker.blocks.block(run, position_, first, plan_.index_of(lanes.batch, chunk));
      } else {
        return worker.blocks.block(run, position_, first);
      }
    };
    if (chunk.length() <= Policy::keys_in_block) {
      const auto keys = keys_of(chunk.keys.begin, chunk.length());
      for (Index t = 0; t < tiles; ++t) worker.tiles[t].absorb_chunk(chunk, keys, worker.scratch);
      return;
    }
    if constexpr (Of::takes_wide_blocks) {
      const LandmarkBlock block =
          landmark_block(options_.landmarks, lanes.batch, chunk.first_block, chunk.keys.end);
      for (Index t = 0; t < tiles; ++t) worker.tiles[t].start_wide();
      for (Index first = block.tokens.begin; first < block.tokens.end; first += Policy::keys_in_block) {
        const Index count = (std::min)(Policy::keys_in_block, block.tokens.end - first);
        const auto keys = keys_of(first, count);
        for (Index t = 0; t < tiles; ++t) worker.tiles[t].absorb_piece(keys, worker.scratch);
      }
      KeyBlock<Policy> landmark;
      if (block.closed) landmark = keys_of(block.landmark(), 1);
      for (Index t = 0; t < tiles; ++t) worker.tiles[t].finish_wide(chunk, landmark, worker.scratch);
    }
  }

  const Call& call_;
  const LandmarkOptions& options_;
  const M& mask_;
  const S& score_;
  const P& position_;
  TilePlan<Real> tiles_;
  LandmarkPlan plan_;
  Index widest_;  ///< keys of the widest landmark block
};

template <class Tq, class Tk, class Tv, class To, Mask M, Score S, Position P, class E>
void landmark_forward(const Problem<Tq, Tk, Tv, To>& call, const LandmarkOptions& options, const M& mask,
                      const S& score, const P& position, const E& executor, Workspace& workspace,
                      bool bf16_products) {
  if (call.out.batch == 0 || call.out.heads == 0 || call.out.rows == 0) return;
  const Index widest = widest_block(options.landmarks, call.k.batch, call.kv_len());
  // Matrix tiles support neither controlled blocks nor blocks that are wider than a key block.
  const bool fits_tiles = !options.has_controlled() && widest <= tuning::keys_in_tile_block;
  run_where_it_pays(call.flop(), least_parallel_tile_flop, executor, [&](const auto& where) {
    const auto run = [&]<class Policy>(const auto& on) {
      LandmarkForward<Policy, Tq, Tk, Tv, To, M, S, P>(call, options, mask, score, position, widest,
                                                       on.workers())
          .run(on, workspace);
    };
    with_tile_or_float_arithmetic(call, bf16_products && fits_tiles, where, run);
  });
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
