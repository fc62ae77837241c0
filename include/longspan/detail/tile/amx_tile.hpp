// One tile of queries on a processor with AMX: scores and weights of 32 keys at a time, values of a block.
#pragma once

#include "longspan/detail/tile/amx_arithmetic.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <algorithm>
#include <cstddef>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/amx_key_block.hpp"
#include "longspan/detail/tile/query_tile.hpp"
#include "longspan/detail/tile/tile_mask.hpp"
#include "longspan/mask.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Queries whose scores matrix tiles compute, 32 keys at a time.
template <class Unit, Mask M, Score S>
class AmxQueries : public QueryTile<AmxArithmetic<Unit>, M, S> {
 public:
  using Policy = AmxArithmetic<Unit>;
  using Base = QueryTile<Policy, M, S>;
  using Block = KeyBlock<Policy>;
  using Base::changes_score;
  using Base::w;

  static AmxQueries take(Arena& arena, Index head_dim, Index padded_value_dim, Index kv_len) {
    AmxQueries queries;
    static_cast<Base&>(queries) = Base::take(arena, head_dim, padded_value_dim, kv_len);
    return queries;
  }

 protected:
  using Base::factor_;
  using Base::head_dim_;
  using Base::lanes_;
  using Base::mask_;
  using Base::q_;
  using Base::score_;
  using Base::stride_;

  /// The factor that converts scores to score units.
  float score_factor() const { return changes_score ? 1.0f : factor_; }

  /// Computes s[j][lane] of the 32 keys from `first` on for the packets of the run, then applies score function and
  /// mask. Rows after the last key of the run are masked.
  void score_step(const Block& block, const Run& run, Index first, float* s) {
    const MatrixView<const typename Policy::Key> k = block.step(first);
    const Index lane = run.first_packet * w, keys = std::min<Index>(Policy::keys_in_step, run.end - first);
    with_packets(run.packets, [&]<int packets>() {
      Policy::template score_keys<packets>(k.data, k.row_stride, q_ + lane, head_dim_, s + lane, stride_);
      if constexpr (Policy::scales_rows)
        Policy::template scale_scores<packets>(block.k_scale + first, keys, s + lane, stride_);
    });
    if (changes_score || run.partial != 0 || keys < Policy::keys_in_step)
      change_scores(run, block.first_key + first, keys, s);
  }

  /// Adds the values `v` of the keys [begin, end) to the packets of a run.
  void add_values(const Block& block, const Run& run, const typename Policy::Value* v, Index begin, Index end,
                  const TileScratch<Policy>& scratch, const Accumulator<float>& state) const {
    const Index lane = run.first_packet * w;
    with_packets(run.packets, [&]<int packets>() {
      Policy::template add_values<packets>(v, block.v_stride, scratch.weights + begin / 2 * stride_ + lane,
                                           divide_up(end - begin, Policy::keys_in_step), state.o + lane,
                                           stride_);
    });
  }

  /// Adds the values of the 32 keys from `first` on, of which some may be infinite or NaN, which a weight of 0 does not
  /// hide. These are left out first, so that a lane that sees none of them has the bits that it has without them; then
  /// they are added to the lanes for which sees(c, j, p) holds, p being the weights of key j in packet c.
  template <class Sees>
  void add_values_past_hidden(const Block& block, const Run& run, Index first,
                              const TileScratch<Policy>& scratch, const Accumulator<float>& state,
                              const Sees& sees) const {
    const Index columns = block.v_stride, end = (std::min)(run.end, first + Policy::keys_in_step);
    auto* finite = reinterpret_cast<typename Policy::Value*>(scratch.block_output);
    Policy::copy_finite(block.v + first / 2 * columns, 16 * columns, finite);
    add_values(block, run, finite, first, end, scratch, state);
    for (Index j = first; j < end; ++j) {
      for (Index column = 0; column < columns; ++column) {
        const float value = Policy::value_of(block.v, columns, j, column);
        if (is_finite(value)) continue;
        for (int c = run.first_packet; c < run.first_packet + run.packets; ++c) {
          const Packet<float> p = Policy::weight_of(scratch.weights + c * w, j, stride_);
          float* to = state.o + column * stride_ + c * w;
          const Packet<float> before = load<float>(static_cast<const float*>(to));
          store(to, select(sees(c, j, p), fma(broadcast(value), p, before), before));
        }
      }
    }
  }

 private:
  void change_scores(const Run& run, Index first_key, Index keys, float* scores) {
    const Packet<float> by = broadcast(factor_), masked = broadcast(Policy::masked_score);
    for (int c = run.first_packet; c < run.first_packet + run.packets; ++c) {
      float* s = scores + c * w;
      if constexpr (changes_score) {
        for (Index j = 0; j < keys; ++j) store(s + j * stride_, load<float>(s + j * stride_) * by);
        if constexpr (StripScore<S, float>) {
          const ScoreStrip<float> strip{
              s,         stride_, lanes_.batch, lanes_.head(0), lanes_.position(c * w), lanes_.count - c * w,
              first_key, keys};
          change_strip(*score_, strip);
        }
      }
      const bool hides = TileMask<float, M>::may_hide && (run.partial >> c & 1u) != 0;
      for (Index j = 0; j < keys; ++j) {
        Packet<float> score = load<float>(s + j * stride_);
        if constexpr (changes_score) score = Base::change_score(score, c, first_key + j);
        if constexpr (TileMask<float, M>::may_hide) {
          if (hides) score = select(mask_.visible(c, first_key + j), score, masked);
        }
        store(s + j * stride_, score);
      }
      for (Index j = keys; j < Policy::keys_in_step; ++j) store(s + j * stride_, masked);
    }
  }
};

/// The row max of this tile is raised only if a score exceeds it by more than most_rise. This is rare, so nearly every
/// score is read only once.
///
/// For each block:
///   for each 32 keys
///     compute scores, apply score function and mask, compute weights and their sums
///     if the scores of a lane have risen too far: add the values so far, raise the row max of this lane, rescale what
///       it has, and compute the weights again
///   add the values of all keys
template <class Unit, Mask M, Score S>
class AmxTile : public AmxQueries<Unit, M, S> {
  using Queries = AmxQueries<Unit, M, S>;
  using Base = typename Queries::Base;

 public:
  using Policy = AmxArithmetic<Unit>;
  using Block = KeyBlock<Policy>;
  using Scratch = TileScratch<Policy>;
  using Base::changes_score;
  using Base::most_lanes;
  using Base::w;

  static AmxTile take(Arena& arena, Index head_dim, Index padded_value_dim, Index kv_len) {
    AmxTile tile;
    static_cast<Queries&>(tile) = Queries::take(arena, head_dim, padded_value_dim, kv_len);
    return tile;
  }

  void absorb(const Block& block, const Scratch& scratch) {
    const Runs runs = cut_into_runs<Policy::keys_in_step>(mask_, packets_, block.first_key, block.keys);
    if (runs.empty()) return;
    Pass pass(block, runs, scratch, state_.at_key(block.first_key));
    std::fill_n(pass.sum, stride_, 0.0f);
    look_at_max(pass);
    for (const Run& run : runs) {
      for (Index first = run.begin; first < run.end; first += Policy::keys_in_step)
        absorb_step(pass, run, first);
      if (Base::must_check_values(run) && !Base::values_finite(block, run)) {
        add_values(pass, run.begin);
        const auto sees_key = [&](int c, Index j, Packet<float> p) { return sees(block, run, c, j, p); };
        for (Index first = run.begin; first < run.end; first += Policy::keys_in_step)
          Queries::add_values_past_hidden(block, run, first, scratch, pass.state, sees_key);
        pass.first_waiting = run.end;
      }
    }
    add_values(pass, block.keys);
    for (Index lane = 0; lane < stride_; lane += w)
      store(pass.state.sum + lane, load<float>(pass.state.sum + lane) + load<float>(pass.sum + lane));
  }

 private:
  using Base::mask_;
  using Base::packets_;
  using Base::state_;
  using Base::stride_;

  /// The state of absorb().
  struct Pass {
    const Block& block;
    const Runs& runs;
    const Scratch& scratch;
    const Accumulator<float>& state;

    Pass(const Block& of_block, const Runs& its_runs, const Scratch& memory, const Accumulator<float>& into)
        : block(of_block), runs(its_runs), scratch(memory), state(into) {}

    Index first_waiting = 0;                         ///< state.o contains the values of the keys before
    bool has_huge_max = false;                       ///< see AmxArithmetic::exponent
    bool has_empty_lane = false;                     ///< a lane has seen no key
    alignas(64) float sum[std::size_t(most_lanes)];  ///< of the weights of this block
  };

  void look_at_max(Pass& pass) const {
    pass.has_huge_max = pass.has_empty_lane = false;
    for (Index lane = 0; lane < stride_; lane += w) {
      const Packet<float> row_max = load<float>(pass.state.row_max + lane);
      pass.has_huge_max = pass.has_huge_max || huge_lanes(row_max.raw) != 0;
      pass.has_empty_lane =
          pass.has_empty_lane ||
          _mm512_cmp_ps_mask(row_max.raw, _mm512_set1_ps(empty_max<float>), _CMP_EQ_OQ) != 0;
    }
  }

  /// The condition under which the queries in packet c, whose weights of key j are p, see this key.
  Packet<float> sees(const Block& block, const Run& run, int c, Index j, Packet<float> p) const {
    const Packet<float> zero = broadcast(0.0f), always = equal(zero, zero);
    const Packet<float> seen = changes_score ? select(equal(p, zero), zero, always) : always;
    if constexpr (TileMask<float, M>::may_hide) {
      if ((run.partial >> c & 1u) != 0) return select(mask_.visible(c, block.first_key + j), seen, zero);
    }
    return seen;
  }

  /// Computes scores and weights of the 32 keys from `first` on.
  void absorb_step(Pass& pass, const Run& run, Index first) {
    const Index lane = run.first_packet * w;
    Queries::score_step(pass.block, run, first, pass.scratch.scores);
    with_packets(run.packets, [&]<int packets>() {
      if (pass.has_empty_lane) raise_max<packets>(pass, first, lane);
      alignas(64) float sum[std::size_t(packets * w)];
      if (make_weights<packets>(pass, first, lane, sum) && raise_max<packets>(pass, first, lane))
        make_weights<packets>(pass, first, lane, sum);
      std::copy_n(sum, packets * w, pass.sum + lane);
    });
  }

  /// Returns true if a score is more than most_rise above the row max; the weights are then of no use.
  template <int packets>
  bool make_weights(const Pass& pass, Index first, Index lane, float* sum) const {
    const float* s = pass.scratch.scores + lane;
    const float* row_max = pass.state.row_max + lane;
    auto* weights = pass.scratch.weights + first / 2 * stride_ + lane;
    const float* v_scale = Policy::scales_rows ? pass.block.v_scale + first : nullptr;
    std::copy_n(pass.sum + lane, packets * w, sum);
    const float by = Queries::score_factor();
    const NothingAhead nothing;
    if (pass.has_huge_max)
      return Policy::template exp_keys<packets, true>(s, by, row_max, v_scale, sum, weights, stride_,
                                                      nothing);
    if (!pass.block.is_read_once)
      return Policy::template exp_keys<packets, false>(s, by, row_max, v_scale, sum, weights, stride_,
                                                       nothing);
    const Block& block = pass.block;
    const Index next = first + Policy::keys_in_step;
    const typename Policy::RowsAhead ahead{block.k + next * block.k_stride, block.k_stride, Base::head_dim_};
    return Policy::template exp_keys<packets, false>(s, by, row_max, v_scale, sum, weights, stride_, ahead);
  }

  /// Raises the row max of every lane whose highest score among the 32 keys from `first` on lies more than most_rise
  /// above it. Lanes do not influence each other.
  template <int packets>
  bool raise_max(Pass& pass, Index first, Index lane) {
    const Accumulator<float>& state = pass.state;
    const float* s = pass.scratch.scores + lane;
    const __m512 by = _mm512_set1_ps(Queries::score_factor()), most = _mm512_set1_ps(Policy::most_rise);
    alignas(64) float highest[std::size_t(packets * w)];
    std::fill_n(highest, packets * w, Policy::masked_score);
    highest_rows<packets>(s, stride_, Policy::keys_in_step, static_cast<float*>(highest));
    Packet<float> raised[std::size_t(packets)], rescale[std::size_t(packets)];
    bool any = false, any_seen = false;  // lanes to raise; those among them that have seen a key
    for (int c = 0; c < packets; ++c) {
      const Packet<float> score = load<float>(highest + c * w),
                          before = load<float>(state.row_max + lane + c * w);
      const __m512 rise = pass.has_huge_max ? Policy::template exponent<true>(score.raw, by, before.raw)
                                            : Policy::template exponent<false>(score.raw, by, before.raw);
      const __mmask16 risen = _mm512_cmp_ps_mask(rise, most, _CMP_GT_OQ);
      raised[c].raw = _mm512_mask_mul_ps(before.raw, risen, score.raw, by);
      rescale[c] = exp_score(before - raised[c]);
      rescale[c].raw = _mm512_mask_mov_ps(_mm512_set1_ps(1), risen, rescale[c].raw);
      any = any || risen != 0;
      any_seen = any_seen || _mm512_mask_cmp_ps_mask(risen, before.raw, _mm512_set1_ps(empty_max<float>),
                                                     _CMP_NEQ_UQ) != 0;
    }
    if (!any) return false;
    if (any_seen) add_values(pass, first);
    for (int c = 0; c < packets; ++c) {
      const auto scale = [&](float* x) { store(x, load<float>(static_cast<const float*>(x)) * rescale[c]); };
      const Index at = lane + c * w;
      store(state.row_max + at, raised[c]);
      if (!any_seen) continue;  // sums and outputs are 0
      scale(state.sum + at);
      scale(pass.sum + at);
      for (Index column = 0; column < state.columns; ++column) scale(state.o + column * stride_ + at);
    }
    look_at_max(pass);
    return true;
  }

  /// Adds the values of the keys before `end` that are not in the outputs yet, each to the packets that took part in
  /// its run.
  void add_values(Pass& pass, Index end) const {
    const Block& block = pass.block;
    for (const Run& run : pass.runs) {
      const Index from = (std::max)(run.begin, pass.first_waiting), to = (std::min)(run.end, end);
      if (from >= to) continue;
      Queries::add_values(block, run, block.v + from / 2 * block.v_stride, from, to, pass.scratch,
                          pass.state);
    }
    pass.first_waiting = end;
  }
};

template <class Unit, Mask M, Score S>
struct TileOf<AmxArithmetic<Unit>, M, S> {
  using type = AmxTile<Unit, M, S>;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END

#endif
