// One tile of queries: takes its queries in, absorbs blocks of keys, gives its outputs out.
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/detail/tile/tile_mask.hpp"
#include "longspan/detail/tile/tile_scratch.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN
namespace detail {

template <class Products, Mask M, Score S>
class QueryTile {
 public:
  using Real = typename Products::Real;
  using Query = typename Products::Query;
  using Weight = typename Products::Weight;
  using Block = KeyBlock<Products>;
  using Scratch = TileScratch<Products>;
  static constexpr bool changes_score = !std::is_same_v<S, unchanged>;
  static constexpr Index most_lanes = tile_lanes<Real>;
  static constexpr Index w = lanes<Real>;
  static_assert(Products::keys_in_block <= Runs::capacity * keys_in_strip<Real> &&
                Products::keys_in_block <= most_keys_in_block);

  static QueryTile take(Arena& arena, Index head_dim, Index padded_value_dim, Index kv_len) {
    QueryTile tile;
    tile.head_dim_ = head_dim;
    tile.q_ = arena.take<Query>(Products::query_rows(head_dim) * most_lanes);
    tile.state_ = LeveledAccumulator<Real>::take(arena, padded_value_dim, most_lanes, kv_len);
    return tile;
  }

  /// Starts the tile: its queries, scaled and position-encoded, go to the lanes.
  template <class Tq, Position P>
  void start(const QueryLanes& queries, const M& mask, const S& score, TensorView<const Tq> q, double scale,
             const P& position, const Scratch& scratch) {
    lanes_ = queries;
    score_ = &score;
    packets_ = static_cast<int>(divide_up(queries.count, w));
    stride_ = packets_ * w;
    mask_.prepare(mask, queries);
    state_.clear(stride_);
    const double to_units = scale * (changes_score ? 1.0 : double(score_unit<Real>));
    factor_ = Products::score_factor(to_units);
    if constexpr (!std::is_same_v<P, no_position>) encode(q, position, scratch.rows);
    for (int c = 0; c < packets_; ++c) {
      const auto row_of = [&](Index i) {
        const Index lane = std::min(c * w + i, lanes_.count - 1);
        if constexpr (std::is_same_v<P, no_position>) {
          return q.row(lanes_.batch, lanes_.head(lane), lanes_.row(lane));
        } else {
          return static_cast<const Real*>(scratch.rows + lane * head_dim_);
        }
      };
      Products::pack(row_of, head_dim_, Products::query_factor(to_units), q_ + c * w, stride_);
    }
  }

  KeyRanges ranges() const { return mask_.ranges(); }

  /// Absorbs a block that lies within one block of the key grid.
  void absorb(const Block& block, const Scratch& scratch) {
    const Runs runs = cut_into_runs(mask_, packets_, block.first_key, block.keys);
    if (runs.empty()) return;
    const Accumulator<Real>& state = state_.at_key(block.first_key);

    alignas(64) Real top[std::size_t(most_lanes)], shrink[std::size_t(most_lanes)],
        sum[std::size_t(most_lanes)];
    std::fill_n(top, stride_, Products::hidden);
    for (const Run& run : runs) score_run(block, run, scratch.scores, top);
    raise_tops(state, top, shrink, sum);
    for (const Run& run : runs) {
      const Index lane = run.first_packet * w;
      with_packets(run.packets, [&]<int packets>() {
        Products::template weigh_rows<packets>(scratch.scores + run.begin * stride_ + lane,
                                               run.end - run.begin, factor_, top + lane, sum + lane,
                                               weights_of(run, scratch), stride_);
      });
    }
    add_sums(state, shrink, sum);
    add_values(
        block, {runs.begin(), runs.end()}, scratch, state, shrink,
        [&](const Run& run) { return must_check_values(run) && !values_finite(block, run); },
        [&](const Run& run, const Weight* weights, Real* o) {
          value_run_past_hidden(block, run, weights, o);
        });
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

 protected:  // a landmark tile makes its own order of these steps
  template <class Tq, Position P>
  void encode(TensorView<const Tq> q, const P& position, Real* rows) const;

  void score_run(const Block& block, const Run& run, Real* scores, Real* top) const;
  Packet<Real> change_score(Packet<Real> s, int c, Index key) const;
  void raise_tops(const Accumulator<Real>& state, Real* top, Real* shrink, Real* sum) const;
  void add_sums(const Accumulator<Real>& state, const Real* shrink, const Real* sum) const;

  Weight* weights_of(const Run& run, const Scratch& scratch) const {
    return scratch.weights + run.begin / Products::keys_in_row * stride_ + run.first_packet * w;
  }
  bool must_check_values(const Run& run) const { return run.partial != 0 || changes_score; }
  void value_runs(const Block& block, std::span<const Run> runs, const Scratch& scratch, Real* o, Into into,
                  const Real* scale) const;
  bool values_finite(const Block& block, const Run& run) const {
    constexpr Index in_row = Products::keys_in_row;
    const auto find = [&](Index begin, Index end) {
      return Products::values_finite(block.v + begin / in_row * block.v_stride, block.v_stride,
                                     divide_up(end - begin, in_row), state_.columns());
    };
    // Of a whole block all tiles of a task want to know it; the strips of a mask's edge are their own.
    if (run.end - run.begin < block.keys) return find(run.begin, run.end);
    if (block.values_finite < 0) block.values_finite = find(0, block.keys) ? 1 : 0;
    return block.values_finite != 0;
  }
  void value_run_past_hidden(const Block& block, const Run& run, const Weight* weights, Real* o) const;
  template <class MustHide, class PastHidden>
  void add_values(const Block& block, std::span<const Run> runs, const Scratch& scratch,
                  const Accumulator<Real>& state, const Real* shrink, const MustHide& must_hide,
                  const PastHidden& past_hidden) const;

  QueryLanes lanes_;
  TileMask<Real, M> mask_;
  const S* score_ = nullptr;
  LeveledAccumulator<Real> state_;
  Query* q_ = nullptr;  ///< [query_rows][stride]
  Real factor_ = 1;     ///< scores come out of the products in units of this
  Index head_dim_ = 0;
  int packets_ = 0;
  Index stride_ = 0;  ///< lanes in those packets: a narrow tile is compact
};

// ----------------------------------------------------------------------------------------------------------
// Queries in

template <class Products, Mask M, Score S>
template <class Tq, Position P>
void QueryTile<Products, M, S>::encode(TensorView<const Tq> q, const P& position, Real* rows) const {
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

// ----------------------------------------------------------------------------------------------------------
// Scores

template <class Products, Mask M, Score S>
void QueryTile<Products, M, S>::score_run(const Block& block, const Run& run, Real* scores, Real* top) const {
  const Index first_lane = run.first_packet * w;
  alignas(64) Real highest[std::size_t(most_lanes)];
  std::copy_n(top, stride_, highest);
  const auto strip_of = [&](int c) {
    return ScoreStrip<Real>{scores + run.begin * stride_ + c * w,
                            stride_,
                            lanes_.batch,
                            lanes_.head(0),
                            lanes_.position(c * w),
                            lanes_.count - c * w,
                            block.first_key + run.begin,
                            run.end - run.begin};
  };
  if constexpr (StripScore<S, Real>) {
    for (int c = run.first_packet; c < run.first_packet + run.packets; ++c)
      prefetch_strip(*score_, strip_of(c));
  }
  with_packets(run.packets, [&]<int packets>() {
    Products::template score_rows<packets>(
        block.k + run.begin * block.k_stride, block.k_stride, run.end - run.begin, q_ + first_lane, head_dim_,
        scores + run.begin * stride_ + first_lane, highest + first_lane, stride_);
  });
  for (int c = run.first_packet; c < run.first_packet + run.packets; ++c) {
    const bool hides = TileMask<Real, M>::may_hide && (run.partial >> c & 1u) != 0;
    if (!hides && !changes_score) {
      std::copy_n(highest + c * w, w, top + c * w);
      continue;
    }
    if constexpr (StripScore<S, Real>) change_strip(*score_, strip_of(c));
    Packet<Real> of_packet = load<Real>(top + c * w);
    for (Index j = run.begin; j < run.end; ++j) {
      Packet<Real> s = load<Real>(scores + j * stride_ + c * w);
      if constexpr (changes_score) s = change_score(s, c, block.first_key + j);
      if constexpr (TileMask<Real, M>::may_hide) {
        if (hides) s = select(mask_.visible(c, block.first_key + j), s, broadcast(Products::hidden));
      }
      of_packet = max(of_packet, s);
      store(scores + j * stride_ + c * w, s);
    }
    store(top + c * w, of_packet);
  }
}

template <class Products, Mask M, Score S>
auto QueryTile<Products, M, S>::change_score(Packet<Real> s, int c, Index key) const -> Packet<Real> {
  alignas(64) Real values[std::size_t(w)];
  if constexpr (PacketScore<S, Packet<Real>>) {
    for (Index i = 0; i < w; ++i) values[i] = static_cast<Real>(lanes_.position(c * w + i) - key);
    s = score_->on_packet(s, lanes_.head(0), load<Real>(values));
  } else if constexpr (!StripScore<S, Real>) {  // whose strips have been changed
    store<Real>(values, s);
    for (Index i = 0; i < w; ++i) {
      const Index lane = c * w + i;
      values[i] = static_cast<Real>((*score_)(static_cast<ScoreValue<S, Real>>(values[i]), lanes_.batch,
                                              lanes_.head(lane), lanes_.position(lane), key));
    }
    s = load<Real>(values);
  }
  // A score of -infinity hides its key, in a finite way.
  return max(s * broadcast(score_unit<Real>), broadcast(Products::hidden));
}

/// Turns the highest scores of a block into the new tops, in score units.
template <class Products, Mask M, Score S>
void QueryTile<Products, M, S>::raise_tops(const Accumulator<Real>& state, Real* top, Real* shrink,
                                           Real* sum) const {
  for (Index lane = 0; lane < packets_ * w; lane += w) {
    const Packet<Real> before = load<Real>(state.top + lane);
    const Packet<Real> raised = max(before, load<Real>(top + lane) * broadcast(factor_));
    store(shrink + lane, weight(before - raised));
    store(state.top + lane, raised);
    store(top + lane, raised);
    store(sum + lane, broadcast(Real(0)));
  }
}

template <class Products, Mask M, Score S>
void QueryTile<Products, M, S>::add_sums(const Accumulator<Real>& state, const Real* shrink,
                                         const Real* sum) const {
  for (Index lane = 0; lane < packets_ * w; lane += w) {
    store(state.sum + lane,
          fma(load<Real>(state.sum + lane), load<Real>(shrink + lane), load<Real>(sum + lane)));
  }
}

// ----------------------------------------------------------------------------------------------------------
// Values

/// The values of neighbouring runs.
template <class Products, Mask M, Score S>
void QueryTile<Products, M, S>::value_runs(const Block& block, std::span<const Run> runs,
                                           const Scratch& scratch, Real* o, Into into,
                                           const Real* scale) const {
  std::array<RowRun, Runs::capacity> rows;
  std::transform(runs.begin(), runs.end(), rows.begin(), [](const Run& run) {
    return RowRun{divide_up(run.end - run.begin, Products::keys_in_row), run.first_packet, run.packets};
  });
  const Index first_row = runs.front().begin / Products::keys_in_row;
  with_packets(packets_, [&]<int packets>() {
    Products::template value_rows<packets>(block.v + first_row * block.v_stride, block.v_stride,
                                           state_.columns(), scratch.weights + first_row * stride_,
                                           {rows.data(), runs.size()}, o, into, scale, stride_);
  });
}

/// A weight of 0 does not hide a value that is NaN or infinite. Where such a value stands among keys that a
/// lane must not see, its products are selected away lane by lane.
template <class Products, Mask M, Score S>
void QueryTile<Products, M, S>::value_run_past_hidden(const Block& block, const Run& run,
                                                      const Weight* weights, Real* o) const {
  for (Index j = run.begin; j < run.end; ++j) {
    for (int c = run.first_packet; c < run.first_packet + run.packets; ++c) {
      const Packet<Real> zero = broadcast(Real(0));
      const Packet<Real> p =
          Products::weight_of(weights + (c - run.first_packet) * w, j - run.begin, stride_);
      Packet<Real> hidden = less(zero, zero);
      if constexpr (changes_score) hidden = equal(p, zero);
      if constexpr (TileMask<Real, M>::may_hide) {
        if ((run.partial >> c & 1u) != 0) {
          hidden = select(mask_.visible(c, block.first_key + j), hidden, equal(zero, zero));
        }
      }
      for (Index column = 0; column < state_.columns(); ++column) {
        Real* to = o + column * stride_ + c * w;
        const Packet<Real> before = load<Real>(to);
        const Packet<Real> v = broadcast(Products::value_of(block.v, block.v_stride, j, column));
        store(to, select(hidden, before, fma(v, p, before)));
      }
    }
  }
}

/// o = shrink * o + the sum over the runs of a block. That sum is made first, run behind run in key order, so
/// every lane's is taken in the same order, and its bits do not depend on the queries beside it. Where
/// must_hide(run), past_hidden(run, weights, o) adds the values of a run.
template <class Products, Mask M, Score S>
template <class MustHide, class PastHidden>
void QueryTile<Products, M, S>::add_values(const Block& block, std::span<const Run> runs,
                                           const Scratch& scratch, const Accumulator<Real>& state,
                                           const Real* shrink, const MustHide& must_hide,
                                           const PastHidden& past_hidden) const {
  Real* o = scratch.block_output;
  bool in_one_loop = true;
  std::size_t first = 0, next = 0;  // the runs of [first, next) can go through one loop
  const auto add_neighbours = [&] {
    if (in_one_loop) std::fill_n(o, state.columns * stride_, Real(0));
    in_one_loop = false;
    if (first < next)
      value_runs(block, runs.subspan(first, next - first), scratch, o, Into::continued, shrink);
    first = next;
  };
  for (; next < runs.size(); ++next) {
    if (must_hide(runs[next])) {
      add_neighbours();
      past_hidden(runs[next], weights_of(runs[next], scratch), o);
      ++first;
    } else if (first < next && runs[next - 1].end != runs[next].begin) {
      add_neighbours();
    }
  }
  if (in_one_loop && !runs.empty()) return value_runs(block, runs, scratch, state.o, Into::rescaled, shrink);
  add_neighbours();
  for (Index at = 0; at < state.columns * stride_; at += stride_) {
    for (Index lane = 0; lane < stride_; lane += w) {
      Real* to = state.o + at + lane;
      store(to, fma(load<Real>(shrink + lane), load<Real>(to), load<Real>(o + at + lane)));
    }
  }
}

// ----------------------------------------------------------------------------------------------------------
// Outputs

template <class Products, Mask M, Score S>
template <class To>
void QueryTile<Products, M, S>::write(const Accumulator<Real>& state, const QueryLanes& queries,
                                      TensorView<To> out, RowsView<Real> lse) {
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
      for (int i = 0; i < w; ++i)
        square[i] = load<Real>(state.o + (column + i) * state.stride + first_lane) * by;
      transpose<Real>(square);
      for (Index i = 0; i < used; ++i) store_as(row[i] + column, square[i]);
    }
    for (; column < out.cols; ++column) {
      for (Index i = 0; i < used; ++i) {
        row[i][column] = static_cast<To>(state.o[column * state.stride + first_lane + i] * factor[i]);
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
