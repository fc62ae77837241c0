// A tile of queries under the grouped softmax of landmark attention, by matrix tiles.
#pragma once

#include "longspan/detail/tile/amx_arithmetic.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/landmark/plan.hpp"
#include "longspan/detail/landmark/tile.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/amx_tile.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_INTRINSICS_BEGIN

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Supports neither controlled blocks nor blocks that are wider than a key block.
///
/// For each chunk of landmark blocks:
///   for each block
///     compute the scores of its keys, its softmax, and its part of each row
///     multiply its weights by that part
///   add the values of the chunk
///
/// Only the scores of one block are in memory, since those of a chunk leave no room in the first-level cache for
/// weights and queries (128 keys: 40 % more time for scores at head_dim 64). As in AmxTile, the row max is raised only
/// if the logarithm of a block's weight exceeds it by more than most_rise: rescaling all outputs for each chunk takes
/// 6 %.
///
/// The softmax of a block divides by its sum, so its exponentials may refer to any number near the block's maximum. A
/// block begins with the number of the block before, and the maximum is only sought if a sum shows that it may be far
/// away. Whether a lane then takes the maximum depends on the maximum, not on the sum, so that a lane has the same bits
/// where other lanes let it be sought.
template <class Unit, Mask M, Score S>
class AmxLandmarkTile : public LandmarkTile<AmxArithmetic<Unit>, M, S, AmxQueries<Unit, M, S>> {
  using Base = LandmarkTile<AmxArithmetic<Unit>, M, S, AmxQueries<Unit, M, S>>;
  using Queries = AmxQueries<Unit, M, S>;

 public:
  using Policy = AmxArithmetic<Unit>;
  using Block = KeyBlock<Policy>;
  using Scratch = TileScratch<Policy>;
  using Base::most_lanes;
  using Base::w;

  static AmxLandmarkTile take(Arena& arena, Index head_dim, Index padded_value_dim, Index kv_len, Index,
                              bool) {
    AmxLandmarkTile tile;
    static_cast<Base&>(tile) = Base::take(arena, head_dim, padded_value_dim, kv_len, 0, false);
    tile.factors_ = arena.take<float>((Policy::keys_in_block + 1) * most_lanes);
    return tile;
  }

  template <class... Arguments>
  void start(const QueryLanes& queries, const Arguments&... arguments) {
    Base::start(queries, arguments...);
    std::fill_n(reference_, most_lanes, 0.0f);
    has_huge_reference_ = false;
  }

  void absorb_chunk(const LandmarkChunk& chunk, const Block& keys, const Scratch& scratch) {
    const Runs runs = cut_into_runs<Policy::keys_in_step>(mask_, packets_, keys.first_key, keys.keys);
    if (runs.empty()) return;
    Pass pass(keys, runs, scratch, state_.at_key(keys.first_key), Base::all_of_it(runs, keys.keys));
    for (Index n = 0; n < chunk.blocks; ++n) {
      const LandmarkBlock block =
          landmark_block(options_->landmarks, lanes_.batch, chunk.first_block + n, chunk.keys.end);
      const KeyRange tokens{block.tokens.begin - keys.first_key, block.tokens.end - keys.first_key};
      std::fill(pass.block_of.begin() + tokens.begin, pass.block_of.begin() + tokens.end,
                static_cast<BlockIndex>(n));
      absorb_softmax(pass, block, tokens, n);
      // The second key of a pair may belong to the next block.
      const bool is_last = n + 1 == chunk.blocks;
      make_weights(
          pass, is_last ? round_up(keys.keys, Policy::keys_in_step) : (block.end() - keys.first_key) / 2 * 2);
    }
    // Landmarks have a weight of 0, which does not hide a value that is NaN.
    signed char& is_finite = keys.kept_finite != nullptr ? *keys.kept_finite : keys.values_finite;
    if (is_finite < 0)
      is_finite = Policy::values_finite(keys.v, keys.v_stride, divide_up(keys.keys, 2), 0) ? 1 : 0;
    const bool finite = is_finite != 0;
    const auto has_weight = [](int, Index, Packet<float> p) {
      const Packet<float> zero = broadcast(0.0f);
      return select(equal(p, zero), zero, equal(zero, zero));
    };
    for (const Run& run : runs) {
      if (finite) {
        Queries::add_values(keys, run, keys.v + run.begin / 2 * keys.v_stride, run.begin, run.end, scratch,
                            pass.state);
      } else {
        for (Index first = run.begin; first < run.end; first += Policy::keys_in_step)
          Queries::add_values_past_hidden(keys, run, first, scratch, pass.state, has_weight);
      }
    }
  }

 private:
  using Base::lanes_;
  using Base::mask_;
  using Base::options_;
  using Base::packets_;
  using Base::state_;
  using Base::stride_;

  /// A block counted within its chunk.
  using BlockIndex = short;
  static constexpr BlockIndex none = -1;

  /// The state of absorb_chunk(). Keys are counted within the chunk.
  struct Pass {
    const Block& keys;
    const Runs& runs;
    const Scratch& scratch;
    const Accumulator<float>& state;
    const bool all;  ///< all queries see all keys

    Pass(const Block& of_chunk, const Runs& its_runs, const Scratch& memory, const Accumulator<float>& into,
         bool sees_all)
        : keys(of_chunk), runs(its_runs), scratch(memory), state(into), all(sees_all) {
      block_of.fill(none);
    }

    Index first_score = 0;  ///< the key of the first row of scratch.scores
    Index scored = 0;       ///< the keys before have scores
    Index weighed = 0;      ///< the keys before have weights
    /// Of each key; `none` for landmarks and after the last key.
    std::array<BlockIndex, std::size_t(Policy::keys_in_block)> block_of;
  };

  float* scores_of(const Pass& pass, Index key) const {
    return pass.scratch.scores + (key - pass.first_score) * stride_;
  }

  /// Lets scratch.scores begin with the step of `key`, which may have scores or exp scores already.
  void begin_at(Pass& pass, Index key) const {
    const Index first = key / Policy::keys_in_step * Policy::keys_in_step;
    if (first == pass.first_score) return;
    if (first < pass.scored)
      std::copy_n(scores_of(pass, first), (pass.scored - first) * stride_, pass.scratch.scores);
    pass.first_score = first;
  }

  /// Computes the scores of the keys before `end`, in whole steps. Calls done(first) after each.
  template <class Done>
  void score_keys(Pass& pass, Index end, const Done& done) {
    for (; pass.scored < end; pass.scored += Policy::keys_in_step) {
      for (const Run& run : pass.runs) {
        if (run.begin <= pass.scored && pass.scored < run.end)
          Queries::score_step(pass.keys, run, pass.scored, scores_of(pass, pass.scored));
      }
      done(pass.scored);
    }
  }

  void multiply(float* x, const float* by) const {
    for (Index lane = 0; lane < stride_; lane += w)
      store(x + lane, load<float>(static_cast<const float*>(x) + lane) * load<float>(by + lane));
  }

  /// Calls work.operator()<packets>(first key, last key + 1, first lane) for what packets see of the keys [begin, end).
  template <class Work>
  static void for_each_part(const Pass& pass, Index begin, Index end, const Work& work) {
    for (const Run& run : pass.runs) {
      const Index from = (std::max)(run.begin, begin), to = (std::min)(run.end, end);
      if (from >= to) continue;
      with_packets(run.packets,
                   [&]<int packets>() { work.template operator()<packets>(from, to, run.first_packet * w); });
    }
  }

  /// Replaces the scores of the tokens by exp_score(score - reference_), and adds these to `sum`.
  void exp_tokens(const Pass& pass, KeyRange tokens, float* sum) const {
    const float by = Queries::score_factor();
    for_each_part(pass, tokens.begin, tokens.end, [&]<int packets>(Index first, Index end, Index lane) {
      float* s = scores_of(pass, first) + lane;
      if (has_huge_reference_) {
        Policy::template exp_rows<packets, true>(s, end - first, by, reference_ + lane, sum + lane, stride_);
      } else {
        Policy::template exp_rows<packets, false>(s, end - first, by, reference_ + lane, sum + lane, stride_);
      }
    });
  }

  /// Are all sums so that no maximum can be farther than most_distance from its reference?
  bool sums_are_near(const float* sum) const {
    bool near = true;
    for (Index lane = 0; lane < stride_; lane += w) {
      const __m512 x = _mm512_loadu_ps(sum + lane);
      const __mmask16 enough = _mm512_cmp_ps_mask(x, _mm512_set1_ps(0x1p-32f), _CMP_GE_OQ);
      near = near && _mm512_mask_cmp_ps_mask(enough, x, _mm512_set1_ps(0x1p39f), _CMP_LE_OQ) == 0xffff;
    }
    return near;
  }
  static constexpr float most_distance = 41;  ///< 2^-32 is the sum of at most 256 exp scores

  /// The reference becomes the maximum of a lane's scores where it is farther than most_distance away.
  void refer_to_max(const Pass& pass, KeyRange tokens) {
    alignas(64) float highest[std::size_t(most_lanes)];
    std::fill_n(highest, stride_, Policy::masked_score);
    for_each_part(pass, tokens.begin, tokens.end, [&]<int packets>(Index first, Index end, Index lane) {
      highest_rows<packets>(static_cast<const float*>(scores_of(pass, first)) + lane, stride_, end - first,
                            highest + lane);
    });
    has_huge_reference_ = false;
    for (Index lane = 0; lane < stride_; lane += w) {
      const __m512 row_max =
          _mm512_mul_ps(_mm512_loadu_ps(highest + lane), _mm512_set1_ps(Queries::score_factor()));
      const __m512 before = _mm512_loadu_ps(reference_ + lane);
      const __mmask16 seen = _mm512_cmp_ps_mask(row_max, _mm512_set1_ps(empty_max<float>), _CMP_GT_OQ);
      const __mmask16 is_far = _mm512_mask_cmp_ps_mask(seen, _mm512_abs_ps(_mm512_sub_ps(row_max, before)),
                                                       _mm512_set1_ps(most_distance), _CMP_GT_OQ);
      const __m512 now = _mm512_mask_mov_ps(before, is_far, row_max);
      _mm512_storeu_ps(reference_ + lane, now);
      has_huge_reference_ = has_huge_reference_ || huge_lanes(now) != 0;
    }
  }

  /// The exp scores of a block and their sums. Scores reach up to the block's landmark.
  void exp_block(Pass& pass, KeyRange tokens, Index end, float* sum) {
    begin_at(pass, tokens.begin);
    std::fill_n(sum, stride_, 0.0f);
    const bool sees_all = pass.all && !Base::changes_score;
    if (sees_all) {
      exp_tokens(pass, {tokens.begin, (std::min)(pass.scored, tokens.end)}, sum);
      score_keys(pass, end, [&](Index first) {
        exp_tokens(pass,
                   {(std::max)(first, tokens.begin), (std::min)(first + Policy::keys_in_step, tokens.end)},
                   sum);
      });
      if (sums_are_near(sum)) return;
      // Computes the scores again. A key before the block may still wait for its weight.
      alignas(64) float waiting[std::size_t(2 * most_lanes)];
      const Index waiting_size = (tokens.begin - pass.weighed) * stride_;
      std::copy_n(scores_of(pass, pass.weighed), waiting_size, waiting);
      pass.scored = pass.first_score;
      score_keys(pass, end, [](Index) {});
      std::copy_n(waiting, waiting_size, scores_of(pass, pass.weighed));
      std::fill_n(sum, stride_, 0.0f);
    } else {
      score_keys(pass, end, [](Index) {});
    }
    refer_to_max(pass, tokens);
    exp_tokens(pass, tokens, sum);
  }

  /// The softmax within block n of the chunk, and its part of the row: factor n.
  void absorb_softmax(Pass& pass, const LandmarkBlock& block, KeyRange tokens, Index n) {
    alignas(64) float row_max[std::size_t(most_lanes)], sum[std::size_t(most_lanes)],
        landmark[std::size_t(most_lanes)], rescale[std::size_t(most_lanes)], scale[std::size_t(most_lanes)];
    exp_block(pass, tokens, tokens.end + block.closed, static_cast<float*>(sum));
    for (Index lane = 0; lane < stride_; lane += w) {
      // The power of two in a sum goes to the row max.
      const __m512 x = _mm512_loadu_ps(sum + lane), zero = _mm512_setzero_ps();
      const __mmask16 is_empty = _mm512_cmp_ps_mask(x, zero, _CMP_EQ_OQ);
      const __mmask16 is_positive = _mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ);
      const __mmask16 is_number =
          _mm512_mask_cmp_ps_mask(is_positive, x, _mm512_set1_ps(0x1p100f), _CMP_LT_OQ);
      const __m512 exponent = _mm512_maskz_getexp_ps(is_number, x), down = _mm512_sub_ps(zero, exponent);
      const __m512 referred = _mm512_add_ps(_mm512_loadu_ps(reference_ + lane), exponent);
      _mm512_storeu_ps(row_max + lane,
                       _mm512_mask_mov_ps(referred, is_empty, _mm512_set1_ps(empty_max<float>)));
      _mm512_storeu_ps(sum + lane, _mm512_scalef_ps(x, down));
      _mm512_storeu_ps(scale + lane, _mm512_scalef_ps(_mm512_set1_ps(1), down));
      if (block.closed) {
        const Packet<float> by = broadcast(Queries::score_factor());
        store(landmark + lane,
              load<float>(static_cast<const float*>(scores_of(pass, tokens.end)) + lane) * by);
      }
    }
    bool any_raised = false;  // of the lanes that have seen a key
    // A row max is an integer, and a rescale a power of two: it leaves weights as they have been rounded.
    const auto raise = [&](Packet<float> before, Packet<float> log_weight) {
      const Packet<float> rise = log_weight - before;
      const __mmask16 risen = _mm512_cmp_ps_mask(rise.raw, _mm512_set1_ps(Policy::most_rise), _CMP_GT_OQ);
      std::pair<Packet<float>, Packet<float>> raised{before, broadcast(1.0f)};
      if (risen == 0) return raised;
      any_raised = any_raised || _mm512_mask_cmp_ps_mask(risen, before.raw, _mm512_set1_ps(empty_max<float>),
                                                         _CMP_NEQ_UQ) != 0;
      constexpr int upwards = 2 | 8;
      raised.first.raw = _mm512_mask_roundscale_ps(before.raw, risen, log_weight.raw, upwards);
      raised.second = exp_score(before - raised.first);
      return raised;
    };
    Base::add_part(block, Base::reach_of(block, pass.all, {}), landmark, row_max, sum, pass.state, rescale,
                   factors_ + n * most_lanes, raise);
    multiply(factors_ + n * most_lanes, scale);
    if (any_raised) rescale_all(pass, n, rescale);
  }

  /// Rescales outputs, factors of the blocks before block n, and weights.
  void rescale_all(const Pass& pass, Index n, const float* rescale) const {
    for (Index column = 0; column < pass.state.columns; ++column)
      multiply(pass.state.o + column * stride_, rescale);
    for (Index before = 0; before < n; ++before) multiply(factors_ + before * most_lanes, rescale);
    for_each_part(pass, 0, pass.weighed, [&]<int packets>(Index first, Index end, Index lane) {
      auto* weights = pass.scratch.weights + lane;
      for (Index j = first; j < end; j += 2) {
        for (Index at = 0; at < packets * w; at += w) {
          const Packet<float> scale = load<float>(rescale + lane + at);
          Policy::store_weights(weights + j / 2 * stride_ + at,
                                Policy::weight_of(weights + at, j, stride_) * scale,
                                Policy::weight_of(weights + at, j + 1, stride_) * scale);
        }
      }
    });
  }

  /// weights[j / 2] of two keys, for the keys before `end`: each exp score times the factor of its block.
  void make_weights(Pass& pass, Index end) const {
    // Up to whole steps, which are multiplied with the values.
    for_each_part(pass, pass.weighed, end, [&]<int packets>(Index first, Index last, Index lane) {
      if (last == pass.keys.keys) last = round_up(last, Policy::keys_in_step);
      for (Index j = first; j < last;) {
        const float* s = scores_of(pass, j) + lane;
        auto* weights = pass.scratch.weights + j / 2 * stride_ + lane;
        const BlockIndex block = pass.block_of[std::size_t(j)], next = pass.block_of[std::size_t(j + 1)];
        if (block != next || block == none) {
          for (int c = 0; c < packets; ++c) {
            Policy::store_weights(weights + c * w, weight(s + c * w, block, lane + c * w),
                                  weight(s + stride_ + c * w, next, lane + c * w));
          }
          j += 2;
          continue;
        }
        Factor factor[std::size_t(packets)];
        LONGSPAN_UNROLL
        for (int c = 0; c < packets; ++c) factor[c] = factor_of(block, lane + c * w);
        do {
          LONGSPAN_UNROLL
          for (int c = 0; c < packets; ++c) {
            Policy::store_weights(weights + c * w, factor[c].times(s + c * w),
                                  factor[c].times(s + stride_ + c * w));
          }
          j += 2;
          s += 2 * stride_;
          weights += stride_;
        } while (j < last && pass.block_of[std::size_t(j + 1)] == block);
      }
    });
    pass.weighed = end;
  }

  /// A lane whose factor is 0 has weight 0, even where its exp score is NaN.
  struct Factor {
    __m512 by;
    __mmask16 has_weight;

    LONGSPAN_INLINE Packet<float> times(const float* exp_score) const {
      return {_mm512_maskz_mul_ps(has_weight, _mm512_loadu_ps(exp_score), by)};
    }
  };
  LONGSPAN_INLINE Factor factor_of(Index block, Index lane) const {
    const __m512 by = _mm512_loadu_ps(factors_ + block * most_lanes + lane);
    return {by, _mm512_cmp_ps_mask(by, _mm512_setzero_ps(), _CMP_NEQ_UQ)};
  }
  LONGSPAN_INLINE Packet<float> weight(const float* exp_score, Index block, Index lane) const {
    return block == none ? broadcast(0.0f) : factor_of(block, lane).times(exp_score);
  }

  float* factors_ = nullptr;  ///< [blocks of a chunk][most_lanes]
  alignas(64) float reference_[std::size_t(most_lanes)] = {};
  bool has_huge_reference_ = false;  ///< see AmxArithmetic::exponent
};

}  // namespace detail
LONGSPAN_NAMESPACE_END

LONGSPAN_INTRINSICS_END

#endif
