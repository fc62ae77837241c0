// A tile of queries under the grouped softmax of landmark attention, by matrix tiles.
#pragma once

#include "longspan/detail/tile/amx_arithmetic.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstddef>

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

/// Supports neither controlled blocks nor blocks that are wider than a chunk.
///
/// For each chunk of landmark blocks:
///   compute the scores of all keys
///   for each block: its softmax, and the factor of its weights in each row
///   multiply all weights by the factors of their blocks, and add the values of the chunk
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
    tile.factors_ = arena.take<float>((keys_in_tile_chunk + 1) * most_lanes);
    return tile;
  }

  void absorb_chunk(const LandmarkChunk& chunk, const Block& keys, const Scratch& scratch) {
    const Runs runs = cut_into_runs<Policy::keys_in_step>(mask_, packets_, keys.first_key, keys.keys);
    if (runs.empty()) return;
    const Index rows = round_up(keys.keys, Policy::keys_in_step);
    const bool all = Base::all_of_it(runs, keys.keys);
    if (!all) std::fill_n(scratch.scores, rows * stride_, Policy::masked_score);
    for (const Run& run : runs) {
      for (Index first = run.begin; first < run.end; first += Policy::keys_in_step)
        Queries::score_step(keys, run, first, scratch.scores + first * stride_);
    }

    const Accumulator<float>& state = state_.at_key(keys.first_key);
    std::array<const float*, std::size_t(keys_in_tile_chunk)> factor_of;  // of each key, null: no weight
    factor_of.fill(nullptr);
    alignas(64) float rescale[std::size_t(most_lanes)], all_rescales[std::size_t(most_lanes)];
    for (Index n = 0; n < chunk.blocks; ++n) {
      const LandmarkBlock block =
          landmark_block(options_->landmarks, lanes_.batch, chunk.first_block + n, chunk.keys.end);
      const KeyRange tokens{block.tokens.begin - keys.first_key, block.tokens.end - keys.first_key};
      float* factor = factors_ + n * most_lanes;
      absorb_softmax(block, tokens, all, scratch, state, rescale, factor);
      for (Index j = tokens.begin; j < tokens.end; ++j) factor_of[std::size_t(j)] = factor;
      // Factors refer to the row max after the last block.
      for (Index before = 0; before < n; ++before) multiply(factors_ + before * most_lanes, rescale);
      if (n == 0) {
        std::copy_n(rescale, stride_, all_rescales);
      } else {
        multiply(all_rescales, rescale);
      }
    }
    with_packets(packets_, [&]<int packets>() {
      make_weights<packets>(scratch, rows, factor_of);
      for (Index column = 0; column < state.columns; ++column) {
        for (int c = 0; c < packets; ++c)
          multiply_packet(state.o + column * stride_ + c * w, all_rescales + c * w);
      }
    });
    // Landmarks have a weight of 0, which does not hide a value that is NaN.
    if (keys.values_finite < 0)
      keys.values_finite = Policy::values_finite(keys.v, keys.v_stride, divide_up(keys.keys, 2), 0) ? 1 : 0;
    const bool finite = keys.values_finite != 0;
    const auto has_weight = [](int, Index, Packet<float> p) {
      const Packet<float> zero = broadcast(0.0f);
      return select(equal(p, zero), zero, equal(zero, zero));
    };
    for (const Run& run : runs) {
      if (finite) {
        Queries::add_values(keys, run, keys.v + run.begin / 2 * keys.v_stride, run.begin, run.end, scratch,
                            state);
      } else {
        for (Index first = run.begin; first < run.end; first += Policy::keys_in_step)
          Queries::add_values_past_hidden(keys, run, first, scratch, state, has_weight);
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

  static void multiply_packet(float* x, const float* by) {
    store(x, load<float>(static_cast<const float*>(x)) * load<float>(by));
  }
  void multiply(float* x, const float* by) const {
    for (Index lane = 0; lane < stride_; lane += w) multiply_packet(x + lane, by + lane);
  }

  /// The softmax within a block, whose scores become exp_score(score - row max of the block), and its part of the row:
  /// `factor` for its weights, `rescale` for what came before.
  void absorb_softmax(const LandmarkBlock& block, KeyRange tokens, bool all, const Scratch& scratch,
                      const Accumulator<float>& state, float* rescale, float* factor) const {
    const auto reach = Base::reach_of(block, all, {});
    const Packet<float> by = broadcast(Queries::score_factor());
    float* s = scratch.scores + tokens.begin * stride_;
    alignas(64) float row_max[std::size_t(most_lanes)], sum[std::size_t(most_lanes)],
        landmark[std::size_t(most_lanes)];
    std::fill_n(row_max, stride_, Policy::masked_score);
    std::fill_n(sum, stride_, 0.0f);
    const Index count = tokens.end - tokens.begin;
    with_packets(packets_, [&]<int packets>() {
      highest_rows<packets>(static_cast<const float*>(s), stride_, count, static_cast<float*>(row_max));
      bool any_huge = false;
      for (int c = 0; c < packets; ++c) {
        const Packet<float> highest =
            lane_max(load<float>(row_max + c * w) * by, broadcast(empty_max<float>));
        store(row_max + c * w, highest);
        any_huge = any_huge || huge_lanes(highest.raw) != 0;
        if (block.closed) store(landmark + c * w, load<float>(s + count * stride_ + c * w) * by);
      }
      if (any_huge) {
        Policy::template exp_rows<packets, true>(s, count, Queries::score_factor(), row_max, sum, stride_);
      } else {
        Policy::template exp_rows<packets, false>(s, count, Queries::score_factor(), row_max, sum, stride_);
      }
    });
    Base::add_part(block, reach, landmark, row_max, sum, state, rescale, factor);
  }

  /// weights[j / 2] of two keys, each exp score times the factor of its block. A lane whose factor is 0 has weight 0,
  /// even where its exp score is NaN.
  template <int packets>
  void make_weights(const Scratch& scratch, Index rows,
                    const std::array<const float*, std::size_t(keys_in_tile_chunk)>& factor_of) const {
    const float* s = scratch.scores;
    auto* weights = scratch.weights;
    for (Index j = 0; j < rows; j += 2, s += 2 * stride_, weights += stride_) {
      const float *first = factor_of[std::size_t(j)], *second = factor_of[std::size_t(j + 1)];
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) {
        const Packet<float> x = weight(s, first, c), y = weight(s + stride_, second, c);
        Policy::store_weights(weights + c * w, x, y);
      }
    }
  }
  static LONGSPAN_INLINE Packet<float> weight(const float* exp_score, const float* factor, int c) {
    if (factor == nullptr) return broadcast(0.0f);
    const __m512 by = _mm512_loadu_ps(factor + c * w);
    const __mmask16 has_weight = _mm512_cmp_ps_mask(by, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return {_mm512_maskz_mul_ps(has_weight, _mm512_loadu_ps(exp_score + c * w), by)};
  }

  float* factors_ = nullptr;  ///< [blocks of a chunk][most_lanes]
};

}  // namespace detail
LONGSPAN_NAMESPACE_END

LONGSPAN_INTRINSICS_END

#endif
