// Attention of rows of one head in tiles, and the merge of a tile's results into rows that have absorbed other keys.
#pragma once

#include <algorithm>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/decode/decode.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/amx_tile.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/detail/tile/query_tile.hpp"
#include "longspan/detail/tile/tile_plan.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Merges lane i of a tile into row first + i * step, for `count` lanes: Accumulator::merge from lanes to rows.
template <class Real>
void merge_lanes(const Accumulator<Real>& tile, Index count, Index value_dim,
                 const RowAccumulator<Real>& rows, Index first, Index step) {
  constexpr Index w = lanes<Real>;
  for (Index lane = 0; lane < count; lane += w) {
    const Index used = (std::min)(w, count - lane);
    const auto row_of = [&](Index i) { return first + (lane + i) * step; };
    alignas(64) Real before[std::size_t(w)]{}, share[std::size_t(w)];
    for (Index i = 0; i < used; ++i) before[i] = rows.row_max[row_of(i)];
    const Packet<Real> mine = load<Real>(before), others = load<Real>(tile.row_max + lane),
                       both = lane_max(mine, others);
    const Packet<Real> other_share = exp_score(others - both);
    store<Real>(share, exp_score(mine - both));
    store<Real>(before, both);
    for (Index i = 0; i < used; ++i) rows.row_max[row_of(i)] = before[i];
    store<Real>(before, load<Real>(tile.sum + lane) * other_share);
    for (Index i = 0; i < used; ++i) rows.sum[row_of(i)] = rows.sum[row_of(i)] * share[i] + before[i];

    Index column = 0;
    for (; column + w <= value_dim; column += w) {
      Packet<Real> square[std::size_t(w)];
      LONGSPAN_UNROLL
      for (int i = 0; i < w; ++i)
        square[i] = load<Real>(tile.o + (column + i) * tile.stride + lane) * other_share;
      transpose(square);
      for (Index i = 0; i < used; ++i) {
        Real* to = rows.o + row_of(i) * rows.stride + column;
        store(to, fma(load<Real>(to), broadcast(share[i]), square[i]));
      }
    }
    for (; column < value_dim; ++column) {
      store<Real>(before, load<Real>(tile.o + column * tile.stride + lane) * other_share);
      for (Index i = 0; i < used; ++i) {
        Real& to = rows.o[row_of(i) * rows.stride + column];
        to = to * share[i] + before[i];
      }
    }
  }
}

/// Writes rows [first, first + count) as the outputs of a head, and their log-sum-exps.
template <class Real, class To>
void write_rows(const RowAccumulator<Real>& rows, Index count, Index batch, Index head, Index first,
                TensorView<To> out, RowsView<Real> lse) {
  constexpr Index w = lanes<Real>;
  for (Index i = 0; i < count; ++i) {
    // A row that has seen no key has sum 0; its output is 0.
    const Real by = rows.sum[i] == Real(0) ? Real(0) : Real(1) / rows.sum[i];
    const Real* from = rows.o + i * rows.stride;
    To* to = out.row(batch, head, first + i);
    Index column = 0;
    for (; column + w <= out.cols; column += w)
      store_as(to + column, load<Real>(from + column) * broadcast(by));
    for (; column < out.cols; ++column) to[column] = static_cast<To>(from[column] * by);
    if (lse.data != nullptr) lse(batch, head, first + i) = lse_of(rows.row_max[i], rows.sum[i]);
  }
}

/// Consecutive queries of one head and the keys of a run, both numbered as in the mask.
template <class Tq, class Tk, class Tv>
struct RowsToAttend {
  TensorView<const Tq> q;  ///< row 0 is the first of the queries
  Index batch = 0;
  Index head = 0;
  Index first_query = 0;
  Index count = 0;
  KeyRun<Tk, Tv> keys;
  /// Runs of one kind (of one branch) with the same number are the same keys.
  Index kind = 0;
  Index run = 0;
};

/// The tiles of one worker.
template <class Policy, class Tk, class Tv, Mask M, Score S, Position P>
class RowTiles {
 public:
  using Real = typename Policy::Real;
  using Queries = typename TileOf<Policy, M, S>::type;

  /// For key runs of at most `most_keys` keys. Keeps the values of the last run of each of the first `kinds` kinds.
  static RowTiles take(Arena& arena, Index head_dim, Index value_dim, Index most_keys, Index kinds) {
    const Index padded_value_dim = round_up(value_dim, Policy::columns_in_tile);
    RowTiles tiles;
    tiles.scratch_ =
        TileScratch<Policy>::take(arena, head_dim, padded_value_dim, !std::is_same_v<P, no_position>);
    tiles.blocks_ = Blocks::take(arena, head_dim, value_dim);
    if constexpr (keeps_values) {
      tiles.kinds_ = kinds;
      tiles.keeping_ = arena.take<Blocks>(kinds);
      for (Index kind = 0; kind < kinds; ++kind) {
        const auto blocks =
            Blocks::take(arena, head_dim, value_dim, divide_up(most_keys, Policy::keys_in_block));
        if (tiles.keeping_ != nullptr) tiles.keeping_[kind] = blocks;
      }
    }
    for (Queries& tile : tiles.tiles_) tile = Queries::take(arena, head_dim, padded_value_dim, most_keys);
    return tiles;
  }

  /// To be called before the first task of a call.
  void clear() const {
    if constexpr (keeps_values) std::for_each_n(keeping_, kinds_, [](const Blocks& each) { each.clear(); });
  }

  /// Calls done(first, count, state) with the queries [first, first + count) of each tile; rows.q.row 0 is query 0.
  template <class Tq, class Done>
  void attend(const RowsToAttend<Tq, Tk, Tv>& rows, const M& mask, const S& score, const P& position,
              double scale, const Done& done) {
    constexpr Index width = tile_lanes<Real>;
    const Blocks& blocks = rows.kind < kinds_ ? keeping_[rows.kind] : blocks_;
    if constexpr (keeps_values) blocks.enter(rows.run);
    for (Index first = 0; first < rows.count; first += tiles_in_task * width) {
      const Index tiles = (std::min)(tiles_in_task, divide_up(rows.count - first, width));
      const auto lanes_of = [&](Index t) {
        const Index row = first + t * width;
        return QueryLanes{rows.batch,      rows.head, 1, row, (std::min)(width, rows.count - row),
                          rows.first_query};
      };
      KeyRanges ranges;
      for (Index t = 0; t < tiles; ++t) {
        tiles_[t].start(lanes_of(t), mask, score, rows.q, scale, position, scratch_);
        ranges = united(ranges, tiles_[t].ranges());
      }
      for_each_block(ranges, {0, rows.keys.k.rows}, Policy::keys_in_block, [&](KeyRange keys) {
        const auto run = slice_rows(rows.keys, keys.begin, keys.end - keys.begin);
        const KeyBlock<Policy> block = blocks.block(run, position, keys.begin);
        for (Index t = 0; t < tiles; ++t) tiles_[t].absorb(block, scratch_);
      });
      for (Index t = 0; t < tiles; ++t)
        done(lanes_of(t).first_row, lanes_of(t).count, tiles_[t].state().whole());
    }
  }

 private:
  using Blocks = KeyBlocks<Policy, Tk, Tv, P>;

  /// Do the blocks keep values from call to call of attend?
  static constexpr bool keeps_values = requires(const Blocks& blocks) { blocks.clear(); };

  TileScratch<Policy> scratch_;
  Blocks blocks_;
  Blocks* keeping_ = nullptr;  ///< one for each kind of runs
  Index kinds_ = 0;
  Queries tiles_[tiles_in_task];
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
