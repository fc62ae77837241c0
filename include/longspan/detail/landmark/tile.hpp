// A tile of queries with the grouped softmax of landmark attention: the landmark of a block determines its weight.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "longspan/detail/landmark/plan.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/query_tile.hpp"
#include "longspan/mask.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// P[j][lane] *= factor[lane] for `keys` rows.
template <int packets, class Real>
void scale_rows(Real* p, Index stride, Index keys, const Real* factor) {
  constexpr int w = lanes<Real>;
  Packet<Real> by[std::size_t(packets)];
  LONGSPAN_UNROLL
  for (int c = 0; c < packets; ++c) by[c] = load(factor + c * w);
  LONGSPAN_UNROLL_BY_2
  for (Index j = 0; j < keys; ++j, p += stride) {
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) store(p + c * w, load(static_cast<const Real*>(p) + c * w) * by[c]);
  }
}

/// Which lanes absorb a block: lanes whose own block it is, the other lanes, or all.
struct LandmarkLanes {
  bool own = true;
  bool remote = true;
};

template <class PolicyType, Mask M, Score S, class BaseTile = QueryTile<PolicyType, M, S>>
class LandmarkTile : public BaseTile {
 public:
  using Policy = PolicyType;
  using Base = BaseTile;
  using Real = typename Policy::Real;
  using Block = KeyBlock<Policy>;
  using Scratch = TileScratch<Policy>;
  using Base::most_lanes;
  using Base::w;

  static LandmarkTile take(Arena& arena, Index head_dim, Index padded_value_dim, Index kv_len, Index widest,
                           bool has_controlled) {
    LandmarkTile tile;
    static_cast<Base&>(tile) = Base::take(arena, head_dim, padded_value_dim, kv_len);
    const auto state_for = [&](Index keys) {
      return LeveledAccumulator<Real>::take(arena, padded_value_dim, most_lanes, keys);
    };
    if (widest > Policy::keys_in_block) tile.wide_ = state_for(widest);
    if (has_controlled) tile.controlled_ = state_for(kv_len);
    return tile;
  }

  template <class Tq, Position P>
  void start(const QueryLanes& queries, const M& mask, const S& score, const LandmarkOptions& options,
             Index kv_len, TensorView<const Tq> q, double scale, const P& position, const Scratch& scratch) {
    Base::start(queries, mask, score, q, scale, position, scratch);
    of_mask_ = &mask;
    options_ = &options;
    if (options.has_controlled()) controlled_.clear(stride_);
    for (Index lane = 0; lane < stride_; ++lane)
      own_block_[lane] = options.landmarks.block_of(queries.batch, queries.position(lane), kv_len);
  }

  /// True if block m may be the own block of one of the queries.
  bool owns(Index m) const noexcept { return own_block_[0] <= m && m <= own_block_[stride_ - 1]; }

  /// Absorbs landmark blocks that fit into one key block. keys.first_key is the first key of the chunk.
  void absorb_chunk(const LandmarkChunk& chunk, const Block& keys, const Scratch& scratch) {
    const Runs runs = cut_into_runs(mask_, packets_, keys.first_key, keys.keys);
    if (runs.empty()) return;
    score_runs(keys, runs, scratch);
    for (Index m = chunk.first_block; m < chunk.first_block + chunk.blocks; ++m) {
      const LandmarkBlock block = landmark_block(options_->landmarks, lanes_.batch, m, chunk.keys.end);
      if (!chunk.controlled) {
        absorb_block(block, keys, runs, LandmarkLanes{}, scratch, state_);
        continue;
      }
      if (owns(m)) {
        absorb_block(block, keys, runs, {.own = true, .remote = false}, scratch, state_);
        score_runs(keys, runs, scratch);  // again: weights have overwritten the scores
      }
      absorb_block(block, keys, runs, {.own = false, .remote = true}, scratch, controlled_);
    }
  }

  // A landmark block that is wider than a key block: its tokens piece by piece, then its landmark.

  void start_wide() { wide_.clear(stride_); }
  void absorb_piece(const Block& tokens, const Scratch& scratch) {
    std::swap(state_, wide_);
    this->absorb(tokens, scratch);
    std::swap(state_, wide_);
  }
  /// `landmark` contains one key if the block is closed.
  void finish_wide(const LandmarkChunk& chunk, const Block& landmark, const Scratch& scratch) {
    const LandmarkBlock block =
        landmark_block(options_->landmarks, lanes_.batch, chunk.first_block, chunk.keys.end);
    const Accumulator<Real>& tokens = wide_.whole();
    if (block.closed) {
      Runs runs;
      runs.add({0, 1, 0, packets_, 0});
      score_runs(landmark, runs, scratch);
    }
    if (!chunk.controlled) return add_wide(block, tokens, {}, scratch, state_);
    if (owns(block.index)) add_wide(block, tokens, {.own = true, .remote = false}, scratch, state_);
    add_wide(block, tokens, {.own = false, .remote = true}, scratch, controlled_);
  }

  /// Also adds the controlled blocks with the weight of the CMT, if there are any.
  template <class To>
  void finish(TensorView<To> out, RowsView<Real> lse) {
    if (options_->has_controlled()) add_controlled(state_.whole(), controlled_.whole());
    Base::finish(out, lse);
  }

 protected:
  using Base::add_values;
  using Base::lanes_;
  using Base::mask_;
  using Base::packets_;
  using Base::score_run;
  using Base::state_;
  using Base::stride_;

  bool all_of_it(const Runs& runs, Index keys) const {
    const Run& run = runs.run[0];
    return runs.count == 1 && run.partial == 0 && run.packets == packets_ && run.begin == 0 &&
           run.end == keys;
  }

  void score_runs(const Block& keys, const Runs& runs, const Scratch& scratch) const {
    // Pairs outside all runs are masked.
    if (!all_of_it(runs, keys.keys)) std::fill_n(scratch.scores, keys.keys * stride_, Policy::masked_score);
    alignas(64) Real unused[std::size_t(most_lanes)];
    std::fill_n(unused, stride_, Policy::masked_score);
    for (const Run& run : runs) score_run(keys, run, scratch.scores, unused);
  }

  /// For each lane, as 0 or 1: `own`, the block is the query's own block; `open`, the query may reach the block through
  /// its landmark.
  struct Reach {
    alignas(64) Real own[std::size_t(most_lanes)];
    alignas(64) Real open[std::size_t(most_lanes)];
    bool none_shut = true;  ///< `own` or `open` is 1 in every lane
  };

  Reach reach_of(const LandmarkBlock& block, bool sees_all, LandmarkLanes taken) const {
    Reach reach;
    if (sees_all && options_->grouped && !owns(block.index)) {
      const bool open = taken.remote && block.closed;
      std::fill_n(reach.own, stride_, Real(0));
      std::fill_n(reach.open, stride_, open ? Real(1) : Real(0));
      reach.none_shut = open;
      return reach;
    }
    for (Index lane = 0; lane < stride_; ++lane) {
      const bool own = !options_->grouped || own_block_[lane] == block.index;
      bool open = !own && taken.remote && block.closed;
      if (open && !sees_all) {
        open = longspan::sees(*of_mask_, lanes_.batch, lanes_.head(lane), lanes_.position(lane),
                              block.landmark());
      }
      reach.own[lane] = own && taken.own ? Real(1) : Real(0);
      reach.open[lane] = open ? Real(1) : Real(0);
      reach.none_shut = reach.none_shut && ((own && taken.own) || open);
    }
    return reach;
  }

  void absorb_block(const LandmarkBlock& block, const Block& keys, const Runs& runs, LandmarkLanes taken,
                    const Scratch& scratch, LeveledAccumulator<Real>& into) const;
  template <class Raise>
  void add_part(const LandmarkBlock& block, const Reach& reach, const Real* landmark, const Real* row_max,
                const Real* sum, const Accumulator<Real>& state, Real* rescale, Real* factor,
                const Raise& raise) const;
  /// The row max of a row and of a block become that of both, and the rescale of the row.
  static std::pair<Packet<Real>, Packet<Real>> raise(Packet<Real> before, Packet<Real> log_weight) {
    const Packet<Real> now = lane_max(before, log_weight);
    return {now, exp_score(before - now)};
  }
  void add_values_past_hidden(const Block& keys, const Run& run, const Reach& reach, const Real* weights,
                              Real* o) const;
  void add_wide(const LandmarkBlock& block, const Accumulator<Real>& tokens, LandmarkLanes taken,
                const Scratch& scratch, LeveledAccumulator<Real>& into) const;
  void add_controlled(const Accumulator<Real>& state, const Accumulator<Real>& controlled) const;
  Real gate_keep(Index lane, Index m) const {
    return static_cast<Real>(options_->gate_keep.row(lanes_.batch, lanes_.head(lane), lanes_.row(lane))[m]);
  }

  const M* of_mask_ = nullptr;
  const LandmarkOptions* options_ = nullptr;
  LeveledAccumulator<Real> wide_;
  LeveledAccumulator<Real> controlled_;
  Index own_block_[std::size_t(most_lanes)] = {};
};

/// Computes the softmax within the block, then adds the block to the state as one partial result.
template <class Policy, Mask M, Score S, class BaseTile>
void LandmarkTile<Policy, M, S, BaseTile>::absorb_block(const LandmarkBlock& block, const Block& keys,
                                                        const Runs& runs, LandmarkLanes taken,
                                                        const Scratch& scratch,
                                                        LeveledAccumulator<Real>& into) const {
  const KeyRange rows{block.tokens.begin - keys.first_key, block.tokens.end - keys.first_key};
  const Index count = rows.end - rows.begin;
  const bool all = all_of_it(runs, keys.keys);
  const Reach reach = reach_of(block, all, taken);
  const Accumulator<Real>& state = into.at_key(keys.first_key);

  Real* weights = scratch.scores + rows.begin * stride_;
  alignas(64) Real row_max[std::size_t(most_lanes)], sum[std::size_t(most_lanes)],
      rescale[std::size_t(most_lanes)], factor[std::size_t(most_lanes)];
  std::fill_n(row_max, stride_, empty_max<Real>);
  std::fill_n(sum, stride_, Real(0));
  with_packets(packets_, [&]<int packets>() {
    highest_rows<packets>(weights, stride_, count, row_max);
    Policy::template exp_rows<packets>(weights, count, Real(1), row_max, sum, weights, stride_);
  });
  add_part(block, reach, scratch.scores + rows.end * stride_, row_max, sum, state, rescale, factor, raise);
  with_packets(packets_, [&]<int packets>() { scale_rows<packets>(weights, stride_, count, factor); });

  std::array<Run, Runs::capacity> of_block;
  std::size_t count_of_runs = 0;
  for (Run run : runs) {
    run.begin = (std::max)(run.begin, rows.begin);
    run.end = (std::min)(run.end, rows.end);
    if (run.begin < run.end) of_block[count_of_runs++] = run;
  }
  const bool hides = runs.any_partial() || !reach.none_shut || Base::changes_score;
  const bool finite = !hides || Policy::values_finite(keys.v + rows.begin * keys.v_stride, keys.v_stride,
                                                      count, state.columns);
  add_values(
      keys, {of_block.data(), count_of_runs}, scratch, state, rescale, [&](const Run&) { return !finite; },
      [&](const Run& run, const Real* from, Real* o) { add_values_past_hidden(keys, run, reach, from, o); });
}

/// Adds row max and row sum of a block to the state. For the block's own queries its log-sum-exp is that of its tokens
/// (`row_max`, `sum`), for the others it is the logit of its landmark. The caller multiplies the block's weights by
/// `factor` and the output so far by `rescale`. raise(row max, the block's log-sum-exp) returns the row max of both and
/// the rescale.
template <class Policy, Mask M, Score S, class BaseTile>
template <class Raise>
void LandmarkTile<Policy, M, S, BaseTile>::add_part(const LandmarkBlock& block, const Reach& reach,
                                                    const Real* landmark, const Real* row_max,
                                                    const Real* sum, const Accumulator<Real>& state,
                                                    Real* rescale, Real* factor, const Raise& raise) const {
  const Packet<Real> zero = broadcast(Real(0)), one = broadcast(Real(1)),
                     nothing = broadcast(empty_max<Real>);
  for (Index lane = 0; lane < stride_; lane += w) {
    const Packet<Real> before = load<Real>(state.row_max + lane), of_tokens = load<Real>(sum + lane);
    const Packet<Real> own = equal(load<Real>(reach.own + lane), one);
    const Packet<Real> is_empty = equal(of_tokens, zero);
    Packet<Real> open = equal(load<Real>(reach.open + lane), one);
    Packet<Real> logit = nothing;
    if (block.closed) {
      logit = select(open, load<Real>(landmark + lane), nothing);
      open = select(less(logit, nothing), zero, open);  // a score of -infinity
      if (!options_->leak) open = select(is_empty, zero, open);
      logit = select(open, logit, nothing);
    }
    const Packet<Real> log_weight = select(own, load<Real>(row_max + lane), logit);
    const auto [now, rescale_by] = raise(before, log_weight);
    const Packet<Real> share = exp_score(log_weight - now);
    const Packet<Real> of_remote = select(is_empty, zero, share / of_tokens);
    store(factor + lane, select(own, share, select(open, of_remote, zero)));
    const Packet<Real> added = select(own, share * of_tokens, select(open, share, zero));
    store(rescale + lane, rescale_by);
    store(state.row_max + lane, now);
    store(state.sum + lane, fma(load<Real>(state.sum + lane), rescale_by, added));
  }
  if (options_->gate_keep.data == nullptr) return;
  for (Index lane = 0; lane < stride_; ++lane) {
    if (reach.open[lane] != Real(0)) factor[lane] *= gate_keep(lane, block.index);
  }
}

template <class Policy, Mask M, Score S, class BaseTile>
void LandmarkTile<Policy, M, S, BaseTile>::add_values_past_hidden(const Block& keys, const Run& run,
                                                                  const Reach& reach, const Real* weights,
                                                                  Real* o) const {
  const Packet<Real> zero = broadcast(Real(0)), always = equal(zero, zero);
  for (Index j = run.begin; j < run.end; ++j) {
    for (int c = run.first_packet; c < run.first_packet + run.packets; ++c) {
      const Packet<Real> p = load(weights + (j - run.begin) * stride_ + (c - run.first_packet) * w);
      const Packet<Real> reached = load<Real>(reach.own + c * w) + load<Real>(reach.open + c * w);
      Packet<Real> hidden = equal(reached, zero);
      if constexpr (Base::changes_score) hidden = select(equal(p, zero), always, hidden);
      if constexpr (TileMask<Real, M>::may_hide) {
        if ((run.partial >> c & 1u) != 0)
          hidden = select(mask_.visible(c, keys.first_key + j), hidden, always);
      }
      for (Index column = 0; column < this->state_.columns(); ++column) {
        Real* to = o + column * stride_ + c * w;
        const Packet<Real> before = load<Real>(to);
        const Packet<Real> v = broadcast(Policy::value_of(keys.v, keys.v_stride, j, column));
        store(to, select(hidden, before, fma(v, p, before)));
      }
    }
  }
}

template <class Policy, Mask M, Score S, class BaseTile>
void LandmarkTile<Policy, M, S, BaseTile>::add_wide(const LandmarkBlock& block,
                                                    const Accumulator<Real>& tokens, LandmarkLanes taken,
                                                    const Scratch& scratch,
                                                    LeveledAccumulator<Real>& into) const {
  const Accumulator<Real>& state = into.at_key(block.tokens.begin);
  const Reach reach = reach_of(block, !TileMask<Real, M>::may_hide, taken);
  alignas(64) Real rescale[std::size_t(most_lanes)], factor[std::size_t(most_lanes)];
  add_part(block, reach, scratch.scores, tokens.row_max, tokens.sum, state, rescale, factor, raise);
  const Packet<Real> zero = broadcast(Real(0));
  for (Index at = 0; at < state.columns * stride_; at += stride_) {
    for (Index lane = 0; lane < stride_; lane += w) {
      const Packet<Real> by = load<Real>(factor + lane);
      // A factor of 0 does not hide an output that is NaN.
      const Packet<Real> o = select(equal(by, zero), zero, by * load<Real>(tokens.o + at + lane));
      Real* to = state.o + at + lane;
      store(to, fma(load<Real>(rescale + lane), load<Real>(to), o));
    }
  }
}

/// The CMT joins the group of each query as a token without a value. Its weight goes to the controlled blocks, which
/// share it according to their landmarks.
template <class Policy, Mask M, Score S, class BaseTile>
void LandmarkTile<Policy, M, S, BaseTile>::add_controlled(const Accumulator<Real>& state,
                                                          const Accumulator<Real>& controlled) const {
  const Packet<Real> zero = broadcast(Real(0));
  alignas(64) Real logits[std::size_t(w)];
  for (Index lane = 0; lane < stride_; lane += w) {
    for (Index i = 0; i < w; ++i) {
      const Real logit =
          static_cast<Real>(options_->control.cmt(lanes_.batch, lanes_.head(lane + i), lanes_.row(lane + i)));
      logits[i] = (std::max)(logit * score_unit<Real>, empty_max<Real>);
    }
    const Packet<Real> before = load<Real>(state.row_max + lane), logit = load<Real>(logits);
    const Packet<Real> now = lane_max(before, logit), rescale = exp_score(before - now);
    const Packet<Real> of_cmt =
        select(equal(logit, broadcast(empty_max<Real>)), zero, exp_score(logit - now));
    const Packet<Real> sum = fma(load<Real>(state.sum + lane), rescale, of_cmt);
    const Packet<Real> is_low = less(of_cmt, broadcast(static_cast<Real>(options_->control.cutoff)) * sum);
    const Packet<Real> of_controlled = load<Real>(controlled.sum + lane);
    const Packet<Real> share = select(equal(of_controlled, zero), zero, of_cmt / of_controlled);
    const Packet<Real> by = select(is_low, zero, share);
    store(state.row_max + lane, now);
    store(state.sum + lane, sum);
    for (Index column = 0; column < state.columns; ++column) {
      Real* to = state.o + column * stride_ + lane;
      const Packet<Real> added = load<Real>(controlled.o + column * stride_ + lane) * by;
      store(to, fma(rescale, load<Real>(to), select(equal(by, zero), zero, added)));
    }
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
