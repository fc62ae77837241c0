// One tile of queries: takes its queries in, absorbs blocks of keys, gives its outputs out.
#pragma once

#include <algorithm>
#include <type_traits>

#include "longspan/detail/accumulator.hpp"
#include "longspan/detail/key_block.hpp"
#include "longspan/detail/microkernel.hpp"
#include "longspan/detail/query_lanes.hpp"
#include "longspan/detail/scratch.hpp"
#include "longspan/detail/simd.hpp"
#include "longspan/detail/tile_mask.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN
namespace detail {

/// What the tiles of one worker share: all of it is free again when a block is absorbed.
template <class Real>
struct TileScratch {
  Real* scores = nullptr;       ///< [keys_in_block + tile_rows][tile_lanes]
  Real* block_output = nullptr;  ///< [padded value_dim][tile_lanes]
  Real* rows = nullptr;         ///< [tile_lanes][head_dim], for position encoding

  static TileScratch take(Arena& arena, Index head_dim, Index padded_value_dim, bool encodes) {
    constexpr Index width = tile_lanes<Real>;
    return {arena.take<Real>((keys_in_block + tile_rows) * width), arena.take<Real>(padded_value_dim * width),
            encodes ? arena.take<Real>(width * head_dim) : nullptr};
  }
};

template <class Real, Mask M, Score S>
class QueryTile {
 public:
  static constexpr bool changes_score = !std::is_same_v<S, unchanged>;
  static constexpr Index width = tile_lanes<Real>;
  static constexpr Index w = lanes<Real>;

  static QueryTile take(Arena& arena, Index head_dim, Index padded_value_dim, Index kv_len) {
    QueryTile tile;
    tile.head_dim_ = head_dim;
    tile.q_ = arena.take<Real>(head_dim * width);
    tile.state_ = LeveledAccumulator<Real>::take(arena, padded_value_dim, width, kv_len);
    return tile;
  }

  /// Starts the tile: its queries, scaled and position-encoded, go to the lanes.
  template <class Tq, Position P>
  void start(const QueryLanes& queries, const M& mask, const S& score, TensorView<const Tq> q, double scale,
             const P& position, const TileScratch<Real>& scratch) {
    lanes_ = queries;
    score_ = &score;
    packets_ = static_cast<int>(divide_up(queries.count, w));
    mask_.prepare(mask, queries);
    state_.clear();
    const Real factor = static_cast<Real>(scale * (changes_score ? 1.0 : double(score_unit<Real>)));
    if constexpr (std::is_same_v<P, no_position>) {
      pack([&](Index lane) { return q.row(lanes_.batch, lanes_.head(lane), lanes_.row(lane)); }, factor);
    } else {
      encode(q, position, scratch.rows);
      pack([&](Index lane) { return static_cast<const Real*>(scratch.rows + lane * head_dim_); }, factor);
    }
  }

  KeyRanges ranges() const { return mask_.ranges(); }

  /// Absorbs a block that lies within one block of the key grid.
  void absorb(const KeyBlock<Real>& block, const TileScratch<Real>& scratch) {
    const Runs runs = cut_into_runs(mask_, packets_, block.first_key, block.keys);
    if (runs.empty()) return;
    const Accumulator<Real>& state = state_.at_key(block.first_key);

    alignas(64) Real top[std::size_t(width)], shrink[std::size_t(width)], sum[std::size_t(width)];
    std::copy_n(state.top, width, top);
    if constexpr (TileMask<Real, M>::may_hide) mask_.enter_block(block.first_key);
    for (const Run& run : runs) score_run(block, run, scratch.scores, top);
    raise_tops(state, top, shrink, sum);
    for (const Run& run : runs) {
      with_packets(run.packets, [&]<int packets>() {
        const Index lane = run.first_packet * w;
        weigh_rows<packets>(scratch.scores + run.begin * width + lane, width, run.end - run.begin, top + lane,
                            sum + lane);
      });
    }
    add_sums(state, shrink, sum);
    if (runs.count == 1 && !must_check_values(runs.run[0])) {
      value_run(block, runs.run[0], scratch.scores, state.o, Into::rescaled, shrink);
    } else {
      add_runs(block, runs, scratch, state, shrink);
    }
  }

  /// Writes outputs and log-sum-exps.
  template <class To>
  void finish(TensorView<To> out, RowsView<Real> lse) {
    write(state_.whole(), lanes_, out, lse);
  }

  /// The state, for a tile whose keys are split among tasks.
  LeveledAccumulator<Real>& state() { return state_; }

  template <class To>
  static void write(const Accumulator<Real>& state, const QueryLanes& queries, TensorView<To> out,
                    RowsView<Real> lse);

 private:
  template <class RowOfLane>
  void pack(const RowOfLane& row_of_lane, Real factor);
  template <class Tq, Position P>
  void encode(TensorView<const Tq> q, const P& position, Real* rows) const;

  void score_run(const KeyBlock<Real>& block, const Run& run, Real* scores, Real* top) const;
  Packet<Real> change_score(Packet<Real> s, int c, Index key) const;
  void raise_tops(const Accumulator<Real>& state, const Real* top, Real* shrink, Real* sum) const;
  void add_sums(const Accumulator<Real>& state, const Real* shrink, const Real* sum) const;

  bool must_check_values(const Run& run) const { return run.partial != 0 || changes_score; }
  void value_run(const KeyBlock<Real>& block, const Run& run, const Real* weights, Real* o, Into into,
                 const Real* scale) const;
  void value_run_past_hidden(const KeyBlock<Real>& block, const Run& run, const Real* weights, Real* o) const;
  void add_runs(const KeyBlock<Real>& block, const Runs& runs, const TileScratch<Real>& scratch,
                const Accumulator<Real>& state, const Real* shrink) const;

  QueryLanes lanes_;
  TileMask<Real, M> mask_;
  const S* score_ = nullptr;
  LeveledAccumulator<Real> state_;
  Real* q_ = nullptr;  ///< [head_dim][width]
  Index head_dim_ = 0;
  int packets_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------
// Queries in

template <class Real, Mask M, Score S>
template <class Tq, Position P>
void QueryTile<Real, M, S>::encode(TensorView<const Tq> q, const P& position, Real* rows) const {
  for (Index lane = 0; lane < lanes_.count; ++lane) {
    const Tq* row = q.row(lanes_.batch, lanes_.head(lane), lanes_.row(lane));
    convert_rows(row, head_dim_, 1, head_dim_, rows + lane * head_dim_, head_dim_);
  }
  // The lanes of one head are rows at consecutive positions.
  for (Index lane = 0; lane < std::min(lanes_.heads, lanes_.count); ++lane) {
    const Index count = divide_up(lanes_.count - lane, lanes_.heads);
    position.encode(MatrixView<Real>{rows + lane * head_dim_, count, head_dim_, lanes_.heads * head_dim_},
                    lanes_.position(lane), Role::query);
  }
}

template <class Real, Mask M, Score S>
template <class RowOfLane>
void QueryTile<Real, M, S>::pack(const RowOfLane& row_of_lane, Real factor) {
  const Packet<Real> by = broadcast(factor);
  for (int c = 0; c < packets_; ++c) {
    decltype(row_of_lane(0)) row[std::size_t(w)];
    for (Index i = 0; i < w; ++i) row[i] = row_of_lane(std::min(c * w + i, lanes_.count - 1));
    Real* to = q_ + c * w;
    Index column = 0;
    for (; column + w <= head_dim_; column += w) {
      Packet<Real> square[std::size_t(w)];
      LONGSPAN_UNROLL
      for (int i = 0; i < w; ++i) square[i] = load_as<Real>(row[i] + column) * by;
      transpose<Real>(square);
      LONGSPAN_UNROLL
      for (int i = 0; i < w; ++i) store(to + (column + i) * width, square[i]);
    }
    for (; column < head_dim_; ++column) {
      for (Index i = 0; i < w; ++i) to[column * width + i] = static_cast<Real>(row[i][column]) * factor;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Scores

template <class Real, Mask M, Score S>
void QueryTile<Real, M, S>::score_run(const KeyBlock<Real>& block, const Run& run, Real* scores, Real* top) const {
  const Index first_lane = run.first_packet * w;
  alignas(64) Real highest[std::size_t(width)];
  std::copy_n(top, width, highest);
  with_packets(run.packets, [&]<int packets>() {
    for (Index j = run.begin; j < run.end; j += tile_rows) {
      score_rows<packets>(block.k + j * block.k_stride, block.k_stride, run.end - j, q_ + first_lane, width,
                          head_dim_, scores + j * width + first_lane, width, highest + first_lane);
    }
  });
  for (int c = run.first_packet; c < run.first_packet + run.packets; ++c) {
    const bool hides = TileMask<Real, M>::may_hide && (run.partial >> c & 1u) != 0;
    if (!hides && !changes_score) {
      std::copy_n(highest + c * w, w, top + c * w);
      continue;
    }
    Packet<Real> of_packet = load<Real>(top + c * w);
    for (Index j = run.begin; j < run.end; ++j) {
      Packet<Real> s = load<Real>(scores + j * width + c * w);
      if constexpr (changes_score) s = change_score(s, c, block.first_key + j);
      if constexpr (TileMask<Real, M>::may_hide) {
        if (hides) s = select(mask_.visible(c, block.first_key + j), s, broadcast(hidden_score<Real>));
      }
      of_packet = max(of_packet, s);
      store(scores + j * width + c * w, s);
    }
    store(top + c * w, of_packet);
  }
}

template <class Real, Mask M, Score S>
Packet<Real> QueryTile<Real, M, S>::change_score(Packet<Real> s, int c, Index key) const {
  alignas(64) Real values[std::size_t(w)];
  if constexpr (PacketScore<S, Packet<Real>>) {
    for (Index i = 0; i < w; ++i) values[i] = static_cast<Real>(lanes_.position(c * w + i) - key);
    s = score_->on_packet(s, lanes_.head(0), load<Real>(values));
  } else {
    store<Real>(values, s);
    for (Index i = 0; i < w; ++i) {
      const Index lane = c * w + i;
      values[i] = static_cast<Real>((*score_)(static_cast<ScoreValue<S, Real>>(values[i]), lanes_.batch,
                                              lanes_.head(lane), lanes_.position(lane), key));
    }
    s = load<Real>(values);
  }
  // A score of -infinity hides its key, in a finite way.
  return max(s * broadcast(score_unit<Real>), broadcast(hidden_score<Real>));
}

template <class Real, Mask M, Score S>
void QueryTile<Real, M, S>::raise_tops(const Accumulator<Real>& state, const Real* top, Real* shrink, Real* sum) const {
  for (Index lane = 0; lane < packets_ * w; lane += w) {
    const Packet<Real> raised = load<Real>(top + lane);
    store(shrink + lane, weight(load<Real>(state.top + lane) - raised));
    store(state.top + lane, raised);
    store(sum + lane, broadcast(Real(0)));
  }
}

template <class Real, Mask M, Score S>
void QueryTile<Real, M, S>::add_sums(const Accumulator<Real>& state, const Real* shrink, const Real* sum) const {
  for (Index lane = 0; lane < packets_ * w; lane += w) {
    store(state.sum + lane, fma(load<Real>(state.sum + lane), load<Real>(shrink + lane), load<Real>(sum + lane)));
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Values

template <class Real, Mask M, Score S>
void QueryTile<Real, M, S>::value_run(const KeyBlock<Real>& block, const Run& run, const Real* weights, Real* o,
                                      Into into, const Real* scale) const {
  const Index lane = run.first_packet * w, columns = state_.columns();
  with_packets(run.packets, [&]<int packets>() {
    for (Index column = 0; column < columns; column += tile_rows) {
      value_rows<packets>(block.v + run.begin * block.v_stride + column, block.v_stride,
                          weights + run.begin * width + lane, width, run.end - run.begin, o + column * width + lane,
                          width, into, scale + lane);
    }
  });
}

/// Is every value of the rows finite?
template <class Real>
bool all_finite(const Real* rows, Index stride, Index count, Index cols) {
  Packet<Real> worst = broadcast(Real(0));
  Real rest = 0;
  for (Index i = 0; i < count; ++i, rows += stride) {
    Index c = 0;
    // x * 0 is 0 for finite x and NaN for the others, and NaN stays in a sum.
    for (; c + lanes<Real> <= cols; c += lanes<Real>) worst = fma(load(rows + c), broadcast(Real(0)), worst);
    for (; c < cols; ++c) rest += rows[c] * Real(0);
  }
  alignas(64) Real of_lane[std::size_t(lanes<Real>)];
  store(static_cast<Real*>(of_lane), worst);
  for (const Real x : of_lane) rest += x;
  return rest == Real(0);
}

/// A weight of 0 does not hide a value that is NaN or infinite. Where such a value stands among keys that a lane
/// must not see, its products are selected away lane by lane.
template <class Real, Mask M, Score S>
void QueryTile<Real, M, S>::value_run_past_hidden(const KeyBlock<Real>& block, const Run& run, const Real* weights,
                                                  Real* o) const {
  for (Index j = run.begin; j < run.end; ++j) {
    for (int c = run.first_packet; c < run.first_packet + run.packets; ++c) {
      const Packet<Real> p = load(weights + j * width + c * w), zero = broadcast(Real(0));
      Packet<Real> hidden = less(zero, zero);
      if constexpr (changes_score) hidden = equal(p, zero);
      if constexpr (TileMask<Real, M>::may_hide) {
        if ((run.partial >> c & 1u) != 0) {
          hidden = select(mask_.visible(c, block.first_key + j), hidden, equal(zero, zero));
        }
      }
      for (Index column = 0; column < state_.columns(); ++column) {
        Real* to = o + column * width + c * w;
        const Packet<Real> before = load<Real>(to);
        const Packet<Real> after = fma(broadcast(block.v + j * block.v_stride + column), p, before);
        store(to, select(hidden, before, after));
      }
    }
  }
}

/// More than one run, or values that must be looked at: the block's own output is made first, run behind run in
/// key order, and then added. So every lane's sum is taken in the same order as from one run over the block, and
/// its bits do not depend on the queries beside it.
template <class Real, Mask M, Score S>
void QueryTile<Real, M, S>::add_runs(const KeyBlock<Real>& block, const Runs& runs, const TileScratch<Real>& scratch,
                                     const Accumulator<Real>& state, const Real* shrink) const {
  std::fill_n(scratch.block_output, state.columns * width, Real(0));
  for (const Run& run : runs) {
    const bool plain = !must_check_values(run) || all_finite(block.v + run.begin * block.v_stride, block.v_stride,
                                                             run.end - run.begin, state.columns);
    if (plain) {
      value_run(block, run, scratch.scores, scratch.block_output, Into::continued, shrink);
    } else {
      value_run_past_hidden(block, run, scratch.scores, scratch.block_output);
    }
  }
  for (Index column = 0; column < state.columns; ++column) {
    Real* to = state.o + column * width;
    const Real* from = scratch.block_output + column * width;
    for (Index lane = 0; lane < packets_ * w; lane += w) {
      store(to + lane, fma(load<Real>(shrink + lane), load<Real>(to + lane), load<Real>(from + lane)));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Outputs

template <class Real, Mask M, Score S>
template <class To>
void QueryTile<Real, M, S>::write(const Accumulator<Real>& state, const QueryLanes& queries, TensorView<To> out,
                                  RowsView<Real> lse) {
  const Packet<Real> zero = broadcast(Real(0)), one = broadcast(Real(1));
  for (Index first_lane = 0; first_lane < queries.count; first_lane += w) {
    const Index used = std::min(w, queries.count - first_lane);
    To* row[std::size_t(w)];
    for (Index i = 0; i < used; ++i) {
      row[i] = out.row(queries.batch, queries.head(first_lane + i), queries.row(first_lane + i));
    }
    const Packet<Real> sum = load<Real>(state.sum + first_lane);
    // A lane that has seen no key has sum 0, and gives 0.
    const Packet<Real> by = select(equal(sum, zero), zero, one / sum);
    alignas(64) Real factor[std::size_t(w)];
    store<Real>(factor, by);
    Index column = 0;
    for (; column + w <= out.cols; column += w) {
      Packet<Real> square[std::size_t(w)];
      LONGSPAN_UNROLL
      for (int i = 0; i < w; ++i) square[i] = load<Real>(state.o + (column + i) * width + first_lane) * by;
      transpose<Real>(square);
      for (Index i = 0; i < used; ++i) store_as(row[i] + column, square[i]);
    }
    for (; column < out.cols; ++column) {
      for (Index i = 0; i < used; ++i) {
        row[i][column] = static_cast<To>(state.o[column * width + first_lane + i] * factor[i]);
      }
    }
  }
  if (lse.data == nullptr) return;
  for (Index lane = 0; lane < queries.count; ++lane) {
    lse(queries.batch, queries.head(lane), queries.row(lane)) = lse_of(state.top[lane], state.sum[lane]);
  }
}

}  // namespace detail
LONGSPAN_END
