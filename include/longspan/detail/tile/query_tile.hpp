// One tile of queries: packs its queries, absorbs blocks of keys, writes its outputs.
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
#include "longspan/detail/tile/write_lanes.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <class Policy, Mask M, Score S>
class QueryTile {
 public:
  using Real = typename Policy::Real;
  using Query = typename Policy::Query;
  using Weight = typename Policy::Weight;
  using Block = KeyBlock<Policy>;
  using Scratch = TileScratch<Policy>;
  static constexpr bool changes_score = !std::is_same_v<S, unchanged>;
  static constexpr Index most_lanes = tile_lanes<Real>;
  static constexpr Index w = lanes<Real>;
  static_assert(Policy::keys_in_block <= Runs::capacity * keys_in_strip<Real> &&
                Policy::keys_in_block <= most_keys_in_block);

  static QueryTile take(Arena& arena, Index head_dim, Index padded_value_dim, Index kv_len) {
    QueryTile tile;
    tile.head_dim_ = head_dim;
    tile.q_ = arena.take<Query>(Policy::query_rows(head_dim) * most_lanes);
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
    factor_ = Policy::score_factor(to_units);
    if constexpr (!std::is_same_v<P, no_position>) encode(q, position, scratch.rows);
    for (int c = 0; c < packets_; ++c) {
      const auto row_of = [&](Index i) {
        const Index lane = (std::min)(c * w + i, lanes_.count - 1);
        if constexpr (std::is_same_v<P, no_position>) {
          return q.row(lanes_.batch, lanes_.head(lane), lanes_.row(lane));
        } else {
          return static_cast<const Real*>(scratch.rows + lane * head_dim_);
        }
      };
      Policy::pack(row_of, head_dim_, Policy::query_factor(to_units), q_ + c * w, stride_);
    }
  }

  KeyRanges ranges() const { return mask_.ranges(); }

  /// Absorbs a block that lies within one block of the key grid.
  void absorb(const Block& block, const Scratch& scratch) {
    const Runs runs = cut_into_runs(mask_, packets_, block.first_key, block.keys);
    if (runs.empty()) return;
    const Accumulator<Real>& state = state_.at_key(block.first_key);

    alignas(64) Real row_max[std::size_t(most_lanes)], rescale[std::size_t(most_lanes)],
        sum[std::size_t(most_lanes)];
    std::fill_n(row_max, stride_, Policy::masked_score);
    for (const Run& run : runs) score_run(block, run, scratch.scores, row_max);
    raise_max(state, row_max, rescale, sum);
    for (const Run& run : runs) {
      const Index lane = run.first_packet * w;
      with_packets(run.packets, [&]<int packets>() {
        Policy::template exp_rows<packets>(scratch.scores + run.begin * stride_ + lane, run.end - run.begin,
                                           factor_, row_max + lane, sum + lane, weights_of(run, scratch),
                                           stride_);
      });
    }
    add_sums(state, rescale, sum);
    add_values(
        block, {runs.begin(), runs.end()}, scratch, state, rescale,
        [&](const Run& run) { return must_check_values(run) && !values_finite(block, run); },
        [&](const Run& run, const Weight* weights, Real* o) {
          value_run_past_hidden(block, run, weights, o);
        });
  }

  /// Writes outputs and log-sum-exps.
  template <class To>
  void finish(TensorView<To> out, RowsView<Real> lse) {
    write_lanes(state_.whole(), lanes_, out, lse);
  }

  /// The state, for a tile whose keys are split among tasks.
  LeveledAccumulator<Real>& state() { return state_; }

 protected:  // a landmark tile makes its own order of these steps
  template <class Tq, Position P>
  void encode(TensorView<const Tq> q, const P& position, Real* rows) const;

  void score_run(const Block& block, const Run& run, Real* scores, Real* row_max) const;
  Packet<Real> change_score(Packet<Real> s, int c, Index key) const;
  void raise_max(const Accumulator<Real>& state, Real* row_max, Real* rescale, Real* sum) const;
  void add_sums(const Accumulator<Real>& state, const Real* rescale, const Real* sum) const;

  Weight* weights_of(const Run& run, const Scratch& scratch) const {
    return scratch.weights + run.begin / Policy::keys_in_row * stride_ + run.first_packet * w;
  }
  /// Calls work(ahead), where `ahead` prefetches the memory from `first` on, or work().
  template <class T, class Work>
  static void with_ahead(bool prefetches, const T* first, const Work& work) {
    if constexpr (std::is_same_v<T, float> && std::is_same_v<Policy, FloatArithmetic<float>>) {
      if (prefetches) return work(LinesAhead(first));
    }
    work();
  }
  bool must_check_values(const Run& run) const { return run.partial != 0 || changes_score; }
  void value_runs(const Block& block, std::span<const Run> runs, const Scratch& scratch, Real* o,
                  Accumulate into, const Real* scale) const;
  bool values_finite(const Block& block, const Run& run) const {
    constexpr Index in_row = Policy::keys_in_row;
    const auto find = [&](Index begin, Index end) {
      return Policy::values_finite(block.v + begin / in_row * block.v_stride, block.v_stride,
                                   divide_up(end - begin, in_row), state_.columns());
    };
    // The result for a whole block is kept for the other tiles of the task.
    if (run.end - run.begin < block.keys) return find(run.begin, run.end);
    if (block.values_finite < 0) block.values_finite = find(0, block.keys) ? 1 : 0;
    return block.values_finite != 0;
  }
  void value_run_past_hidden(const Block& block, const Run& run, const Weight* weights, Real* o) const;
  template <class MustHide, class PastHidden>
  void add_values(const Block& block, std::span<const Run> runs, const Scratch& scratch,
                  const Accumulator<Real>& state, const Real* rescale, const MustHide& must_hide,
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

template <class Policy, Mask M, Score S>
template <class Tq, Position P>
void QueryTile<Policy, M, S>::encode(TensorView<const Tq> q, const P& position, Real* rows) const {
  for (Index lane = 0; lane < lanes_.count; ++lane) {
    const Tq* row = q.row(lanes_.batch, lanes_.head(lane), lanes_.row(lane));
    convert_rows(row, head_dim_, 1, head_dim_, rows + lane * head_dim_, head_dim_);
  }
  encode_at(position, MatrixView<Real>{rows, lanes_.count, head_dim_, head_dim_},
            RowPositions{lanes_.position(0), lanes_.heads, lanes_.first_row % lanes_.heads}, Role::query);
}

// ----------------------------------------------------------------------------------------------------------
// Scores

template <class Policy, Mask M, Score S>
void QueryTile<Policy, M, S>::score_run(const Block& block, const Run& run, Real* scores,
                                        Real* row_max) const {
  const Index first_lane = run.first_packet * w;
  alignas(64) Real highest[std::size_t(most_lanes)];
  std::copy_n(row_max, stride_, highest);
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
    with_ahead(block.is_read_once, block.v + run.begin * block.v_stride, [&](auto... ahead) {
      Policy::template score_rows<packets>(
          block.k + run.begin * block.k_stride, block.k_stride, run.end - run.begin, q_ + first_lane,
          head_dim_, scores + run.begin * stride_ + first_lane, highest + first_lane, stride_, ahead...);
    });
  });
  for (int c = run.first_packet; c < run.first_packet + run.packets; ++c) {
    const bool hides = TileMask<Real, M>::may_hide && (run.partial >> c & 1u) != 0;
    if (!hides && !changes_score) {
      std::copy_n(highest + c * w, w, row_max + c * w);
      continue;
    }
    if constexpr (StripScore<S, Real>) change_strip(*score_, strip_of(c));
    Packet<Real> of_packet = load<Real>(row_max + c * w);
    for (Index j = run.begin; j < run.end; ++j) {
      Packet<Real> s = load<Real>(scores + j * stride_ + c * w);
      if constexpr (changes_score) s = change_score(s, c, block.first_key + j);
      if constexpr (TileMask<Real, M>::may_hide) {
        if (hides) s = select(mask_.visible(c, block.first_key + j), s, broadcast(Policy::masked_score));
      }
      of_packet = lane_max(of_packet, s);
      store(scores + j * stride_ + c * w, s);
    }
    store(row_max + c * w, of_packet);
  }
}

template <class Policy, Mask M, Score S>
auto QueryTile<Policy, M, S>::change_score(Packet<Real> s, int c, Index key) const -> Packet<Real> {
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
  return lane_max(s * broadcast(score_unit<Real>), broadcast(Policy::masked_score));
}

/// Turns the highest scores of a block into the new maxima, in score units.
template <class Policy, Mask M, Score S>
void QueryTile<Policy, M, S>::raise_max(const Accumulator<Real>& state, Real* row_max, Real* rescale,
                                        Real* sum) const {
  for (Index lane = 0; lane < packets_ * w; lane += w) {
    const Packet<Real> before = load<Real>(state.row_max + lane);
    const Packet<Real> raised = lane_max(before, load<Real>(row_max + lane) * broadcast(factor_));
    store(rescale + lane, exp_score(before - raised));
    store(state.row_max + lane, raised);
    store(row_max + lane, raised);
    store(sum + lane, broadcast(Real(0)));
  }
}

template <class Policy, Mask M, Score S>
void QueryTile<Policy, M, S>::add_sums(const Accumulator<Real>& state, const Real* rescale,
                                       const Real* sum) const {
  for (Index lane = 0; lane < packets_ * w; lane += w) {
    store(state.sum + lane,
          fma(load<Real>(state.sum + lane), load<Real>(rescale + lane), load<Real>(sum + lane)));
  }
}

// ----------------------------------------------------------------------------------------------------------
// Values

/// The values of neighbouring runs.
template <class Policy, Mask M, Score S>
void QueryTile<Policy, M, S>::value_runs(const Block& block, std::span<const Run> runs,
                                         const Scratch& scratch, Real* o, Accumulate into,
                                         const Real* scale) const {
  std::array<RowRun, Runs::capacity> rows;
  std::transform(runs.begin(), runs.end(), rows.begin(), [](const Run& run) {
    return RowRun{divide_up(run.end - run.begin, Policy::keys_in_row), run.first_packet, run.packets};
  });
  const Index first_row = runs.front().begin / Policy::keys_in_row;
  with_packets(packets_, [&]<int packets>() {
    with_ahead(block.is_read_once, block.k + block.keys * block.k_stride, [&](auto... ahead) {
      Policy::template value_rows<packets>(block.v + first_row * block.v_stride, block.v_stride,
                                           state_.columns(), scratch.weights + first_row * stride_,
                                           {rows.data(), runs.size()}, o, into, scale, stride_, ahead...);
    });
  });
}

/// A weight of 0 does not hide a value that is NaN or infinite. Where such a value stands among keys that a
/// lane must not see, its product is left out lane by lane.
template <class Policy, Mask M, Score S>
void QueryTile<Policy, M, S>::value_run_past_hidden(const Block& block, const Run& run, const Weight* weights,
                                                    Real* o) const {
  for (Index j = run.begin; j < run.end; ++j) {
    for (int c = run.first_packet; c < run.first_packet + run.packets; ++c) {
      const Packet<Real> zero = broadcast(Real(0));
      const Packet<Real> p = Policy::weight_of(weights + (c - run.first_packet) * w, j - run.begin, stride_);
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
        const Packet<Real> v = broadcast(Policy::value_of(block.v, block.v_stride, j, column));
        store(to, select(hidden, before, fma(v, p, before)));
      }
    }
  }
}

/// o = rescale * o + the sum over the runs of a block. That sum is made first, run behind run in key order, so
/// every lane's is taken in the same order, and its bits do not depend on the queries beside it. Where
/// must_hide(run), past_hidden(run, weights, o) adds the values of a run.
template <class Policy, Mask M, Score S>
template <class MustHide, class PastHidden>
void QueryTile<Policy, M, S>::add_values(const Block& block, std::span<const Run> runs,
                                         const Scratch& scratch, const Accumulator<Real>& state,
                                         const Real* rescale, const MustHide& must_hide,
                                         const PastHidden& past_hidden) const {
  Real* o = scratch.block_output;
  bool in_one_loop = true;
  std::size_t first = 0, next = 0;  // the runs of [first, next) can go through one loop
  const auto add_neighbours = [&] {
    if (in_one_loop) std::fill_n(o, state.columns * stride_, Real(0));
    in_one_loop = false;
    if (first < next)
      value_runs(block, runs.subspan(first, next - first), scratch, o, Accumulate::add, rescale);
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
  if (in_one_loop && !runs.empty())
    return value_runs(block, runs, scratch, state.o, Accumulate::rescale, rescale);
  add_neighbours();
  for (Index at = 0; at < state.columns * stride_; at += stride_) {
    for (Index lane = 0; lane < stride_; lane += w) {
      Real* to = state.o + at + lane;
      store(to, fma(load<Real>(rescale + lane), load<Real>(to), load<Real>(o + at + lane)));
    }
  }
}

/// The tile of an arithmetic policy.
template <class Policy, Mask M, Score S>
struct TileOf {
  using type = QueryTile<Policy, M, S>;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
