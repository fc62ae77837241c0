// The key tiles of the backward pass on a processor with AMX: all five products of bfloat16 by matrix tiles.
#pragma once

#include "longspan/detail/tile/amx_arithmetic.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/finite.hpp"
#include "longspan/detail/gradient/change_rows.hpp"
#include "longspan/detail/gradient/key_mask.hpp"
#include "longspan/detail/gradient/key_tiles.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/bf16_weights.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/tile_mask.hpp"
#include "longspan/mask.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// KeyTiles with products of bfloat16. P and dS are rounded to bfloat16, sums are float.
///
///   S and dP    [32 queries][keys]    Q and dO are read in place, K and V are packed once
///   dV^T, dK^T  [column][key]         dO and Q are transposed for each block; P and dS in pairs of queries
///   dQ          [32 queries][column]  dS as rows of bfloat16; K in pairs of keys
template <class Unit, Mask M, Score S>
class AmxKeyTiles {
 public:
  using Policy = AmxArithmetic<Unit>;
  using Real = float;
  using Row = Eigen::bfloat16;
  using Pair = typename Policy::Pair;
  static constexpr bool changes_score = !std::is_same_v<S, unchanged>;
  static constexpr Index w = lanes<float>, tile = tile_lanes<float>, group = keys_in_group<float>;
  static constexpr Index rows_in_block = rows_in_tile_query_block, rows_in_step = Policy::keys_in_step;
  /// Rows are read up to multiples of so many columns.
  static constexpr Index query_columns = Policy::columns_in_step, key_columns = 1;

  static AmxKeyTiles take(Arena& arena, Index head_dim, Index value_dim, Index rows) {
    AmxKeyTiles t;
    t.head_dim_ = head_dim;
    t.value_dim_ = value_dim;
    t.k_rows_ = Policy::query_rows(head_dim);
    t.v_rows_ = Policy::query_rows(value_dim);
    t.dk_columns_ = round_up(head_dim, Policy::columns_in_tile);
    t.dv_columns_ = round_up(value_dim, Policy::columns_in_tile);
    t.packed_ = arena.take<Pair>((t.k_rows_ + t.v_rows_) * group);
    t.key_pairs_ = arena.take<Pair>(group / 2 * t.dk_columns_);
    t.sums_ = arena.take<float>((t.dk_columns_ + t.dv_columns_) * group);
    t.has_total_ = rows > blocks_in_chunk * rows_in_block;
    if (t.has_total_) t.total_ = arena.take<float>((t.dk_columns_ + t.dv_columns_) * group);
    t.queries_ = arena.take<Pair>(rows_in_block / 2 * t.dk_columns_);
    t.douts_ = arena.take<Pair>(rows_in_block / 2 * t.dv_columns_);
    t.last_q_ = arena.take<Row>(rows_in_step * 2 * t.k_rows_);
    t.last_dout_ = arena.take<Row>(rows_in_step * 2 * t.v_rows_);
    t.s_ = arena.take<float>(rows_in_step * tile);
    t.dp_ = arena.take<float>(rows_in_step * tile);
    t.p_pairs_ = arena.take<Pair>(rows_in_block / 2 * tile);
    t.ds_pairs_ = arena.take<Pair>(rows_in_block / 2 * tile);
    t.ds_ = arena.take<Row>(rows_in_block * group);
    return t;
  }

  void start(MatrixView<const Row> k, MatrixView<const Row> v, Index first_key, const M& mask, const S& score,
             double scale) {
    k_ = k;
    first_key_ = first_key;
    score_ = &score;
    scale_ = static_cast<float>(scale);
    tiles_ = divide_up(k.rows, tile);
    for (Index t = 0; t < tiles_; ++t) {
      masks_[std::size_t(t)].prepare(mask, first_key + t * tile, keys_of(t));
      for (Index c = 0; c < packets_of(t); ++c) {
        const auto row_of = [&](const MatrixView<const Row>& rows) {
          return [&rows, first = t * tile + c * w](Index i) {
            return rows.row((std::min)(first + i, rows.rows - 1));
          };
        };
        Policy::pack(row_of(k), head_dim_, 1, packed_k(t) + c * w, tile);
        Policy::pack(row_of(v), value_dim_, 1, packed_v(t) + c * w, tile);
      }
    }
    Policy::pair_rows(k.data, k.row_stride, k.rows, k.cols, key_pairs_, dk_columns_);
    k_is_finite_ = Policy::values_finite(key_pairs_, dk_columns_, round_up(k.rows, 32) / 2, dk_columns_);
    std::fill_n(sums_, (dk_columns_ + dv_columns_) * group, 0.0f);
    if (has_total_) std::fill_n(total_, (dk_columns_ + dv_columns_) * group, 0.0f);
  }

  void enter_head(Index batch, Index head, Index first_query) {
    carry();
    batch_ = batch;
    head_ = head;
    first_query_ = first_query;
    for (Index t = 0; t < tiles_; ++t) masks_[std::size_t(t)].enter_head(batch, head, first_query);
  }

  /// As KeyTiles::absorb.
  bool absorb(const QueryBlock<float, Row>& block) {
    if (block.first_row % (blocks_in_chunk * rows_in_block) == 0) carry();
    std::array<Runs, std::size_t(key_tiles_in_group)> runs_of;
    bool whole = true, any = false;
    for (Index t = 0; t < tiles_; ++t) {
      Runs& runs = runs_of[std::size_t(t)];
      const int packets = static_cast<int>(packets_of(t));
      runs = cut_into_runs<rows_in_step>(masks_[std::size_t(t)], packets, block.first_row, block.q.rows);
      any |= !runs.empty();
      whole &= runs.count == 1 && runs.begin()->partial == 0 && runs.begin()->packets == packets &&
               runs.begin()->end - runs.begin()->begin == block.q.rows;
    }
    if (!any) return false;
    const Index padded_keys = round_up(k_.rows, rows_in_step);
    if (!whole || padded_keys != k_.rows || block.q.rows % rows_in_step != 0) {
      for (Index i = 0; i < round_up(block.q.rows, rows_in_step); ++i)
        std::fill_n(ds_ + i * group, padded_keys, Row(0));
    }
    copy_last_step(block);
    Policy::transpose_values(block.q.data, block.q.row_stride, block.q.rows, head_dim_, queries_,
                             dk_columns_);
    Policy::transpose_values(block.dout.data, block.dout.row_stride, block.dout.rows, value_dim_, douts_,
                             dv_columns_);
    const bool hides = !whole || changes_score;
    const bool finite = k_is_finite_ && (!hides || (blocks_finite(queries_, dk_columns_, block.q.rows) &&
                                                    blocks_finite(douts_, dv_columns_, block.q.rows)));
    if (!finite) make_finite(block.q.rows);
    for (Index t = 0; t < tiles_; ++t) {
      for (const Run& run : runs_of[std::size_t(t)]) {
        for (Index first = run.begin; first < run.end; first += rows_in_step) weigh(block, t, run, first);
        add_keys(t, run);
        if (!finite) add_past_hidden(block, t, run);
      }
    }
    add_queries(block, padded_keys);
    if (!finite) add_queries_past_hidden(block, runs_of);
    return true;
  }

  /// As KeyTiles::finish.
  void finish(MatrixView<float> dk, MatrixView<float> dv) {
    carry();
    const float* sums = has_total_ ? total_ : sums_;
    for (Index t = 0; t < tiles_; ++t) {
      const float* of_tile = sums + t * (dk_columns_ + dv_columns_) * tile;
      write(of_tile, t, dk);
      write(of_tile + dk_columns_ * tile, t, dv);
    }
  }

 private:
  static constexpr Index blocks_in_chunk = keys_in_chunk / rows_in_block;

  Index keys_of(Index t) const { return (std::min)(tile, k_.rows - t * tile); }
  Index packets_of(Index t) const { return divide_up(keys_of(t), w); }
  Pair* packed_k(Index t) const { return packed_ + t * (k_rows_ + v_rows_) * tile; }
  Pair* packed_v(Index t) const { return packed_k(t) + k_rows_ * tile; }
  float* sums_k(Index t) const { return sums_ + t * (dk_columns_ + dv_columns_) * tile; }
  float* sums_v(Index t) const { return sums_k(t) + dk_columns_ * tile; }

  void carry() {
    if (!has_total_) return;
    for (Index at = 0; at < tiles_ * (dk_columns_ + dv_columns_) * tile; at += w) {
      store(total_ + at, load<float>(total_ + at) + load<float>(sums_ + at));
      store(sums_ + at, broadcast(0.0f));
    }
  }

  /// Rows are read 32 at a time: the last ones of a head, with rows of 0 after them, are copied.
  void copy_last_step(const QueryBlock<float, Row>& block) const {
    const Index whole = block.q.rows / rows_in_step * rows_in_step, rows = block.q.rows - whole;
    if (rows == 0) return;
    const auto copy = [&](const MatrixView<const Row>& from, Row* to, Index cols) {
      Policy::round_rows(from.row(whole), from.row_stride, rows, from.cols, to, cols);
      std::fill_n(to + rows * cols, (rows_in_step - rows) * cols, Row(0));
    };
    copy(block.q, last_q_, 2 * k_rows_);
    copy(block.dout, last_dout_, 2 * v_rows_);
  }

  static bool blocks_finite(const Pair* pairs, Index columns, Index rows) {
    return Policy::values_finite(pairs, columns, round_up(rows, 32) / 2, columns);
  }

  /// Sets numbers that are not finite to 0, for products with weights of 0.
  void make_finite(Index rows) const {
    const Index pairs = round_up(rows, 32) / 2;
    Policy::copy_finite(queries_, pairs * dk_columns_, queries_);
    Policy::copy_finite(douts_, pairs * dv_columns_, douts_);
    Policy::copy_finite(key_pairs_, round_up(k_.rows, 32) / 2 * dk_columns_, key_pairs_);
  }

  /// Weights and their gradients of 32 rows of a run: P and dS in pairs of rows, and dS as rows.
  void weigh(const QueryBlock<float, Row>& block, Index t, const Run& run, Index first) const {
    const Index lane = run.first_packet * w;
    const bool is_last = first + rows_in_step > block.q.rows;
    const Row *q = is_last ? last_q_ : block.q.row(first),
              *dout = is_last ? last_dout_ : block.dout.row(first);
    const Index q_stride = is_last ? 2 * k_rows_ : block.q.row_stride,
                dout_stride = is_last ? 2 * v_rows_ : block.dout.row_stride;
    with_packets(run.packets, [&]<int packets>() {
      Policy::template multiply_rows<packets>(q, q_stride, packed_k(t) + lane, tile, head_dim_, s_ + lane,
                                              tile, false);
      Policy::template multiply_rows<packets>(dout, dout_stride, packed_v(t) + lane, tile, value_dim_,
                                              dp_ + lane, tile, false);
    });
    const bool hides = KeyMask<float, M>::may_hide && run.partial != 0;
    for (Index i = 0; i < rows_in_step; i += 2) {
      for (int c = run.first_packet; c < run.first_packet + run.packets; ++c) {
        Packet<float> p[2], ds[2];
        for (Index n = 0; n < 2; ++n) {
          if (first + i + n < block.q.rows) {
            weigh_packet(block, t, c, first + i + n, i + n, hides, p[n], ds[n]);
            store_as(ds_ + (first + i + n) * group + t * tile + c * w, kept_lanes(t, c, ds[n]));
          } else {
            p[n] = ds[n] = broadcast(0.0f);
          }
        }
        const Index at = (first + i) / 2 * tile + c * w;
        Policy::store_weights(p_pairs_ + at, p[0], p[1]);
        Policy::store_weights(ds_pairs_ + at, ds[0], ds[1]);
      }
    }
  }

  /// x, with 0 in the lanes after the last key, whose products with rows of 0 must not be NaN.
  Packet<float> kept_lanes(Index t, int c, Packet<float> x) const {
    const Index keys = keys_of(t) - c * w;
    if (keys >= w) return x;
    return {_mm512_maskz_mov_ps(static_cast<__mmask16>((1u << keys) - 1), x.raw)};
  }

  /// Row `row` of the block, which is row i of the step.
  LONGSPAN_INLINE void weigh_packet(const QueryBlock<float, Row>& block, Index t, int c, Index row, Index i,
                                    bool hides, Packet<float>& p, Packet<float>& ds) const {
    const Packet<float> zero = broadcast(0.0f), shift = broadcast(block.shift[row]);
    float* scores = s_ + i * tile + c * w;
    Packet<float> s = load<float>(scores), slope = broadcast(1.0f), hidden = less(zero, zero);
    if constexpr (changes_score) {
      store(scores, s * broadcast(scale_));
      const ScoreRow<float> changed{scores,
                                    batch_,
                                    head_,
                                    first_query_ + block.first_row + row,
                                    first_key_ + t * tile + c * w,
                                    (std::min)(w, keys_of(t) - c * w)};
      if constexpr (!only_adds<S>) {
        alignas(64) float slopes[std::size_t(w)];
        slopes_of(*score_, changed, slopes);
        slope = load<float>(slopes);
      }
      change_row(*score_, changed);
      const Packet<float> lowest = broadcast(FloatArithmetic<float>::masked_score);
      s = lane_max(load<float>(scores) * broadcast(score_unit<float>), lowest);
      hidden = equal(s, lowest);
      p = coarse_exp_score(s - shift);
    } else {
      p = coarse_exp_score(fma(s, broadcast(scale_ * score_unit<float>), zero - shift));
    }
    if constexpr (KeyMask<float, M>::may_hide) {
      if (hides) {
        hidden = select(masks_[std::size_t(t)].visible(c, block.first_row + row), hidden, equal(zero, zero));
      }
    }
    ds = p * (load<float>(dp_ + i * tile + c * w) - broadcast(block.delta[row]));
    if constexpr (changes_score && !only_adds<S>) ds = ds * slope;
    if (changes_score || hides) {
      p = select(hidden, zero, p);
      ds = select(hidden, zero, ds);
    }
  }

  void add_keys(Index t, const Run& run) const {
    const Index lane = run.first_packet * w, steps = divide_up(run.end - run.begin, rows_in_step),
                pairs = run.begin / 2;
    with_packets(run.packets, [&]<int packets>() {
      Policy::template add_values<packets>(douts_ + pairs * dv_columns_, dv_columns_,
                                           p_pairs_ + pairs * tile + lane, steps, sums_v(t) + lane, tile);
      Policy::template add_values<packets>(queries_ + pairs * dk_columns_, dk_columns_,
                                           ds_pairs_ + pairs * tile + lane, steps, sums_k(t) + lane, tile);
    });
  }

  void add_queries(const QueryBlock<float, Row>& block, Index padded_keys) const {
    for (Index row = 0; row < block.q.rows; row += rows_in_step) {
      for (Index column = 0; column < dk_columns_; column += 2 * w) {
        const auto add = [&]<int packets>() {
          Policy::template multiply_rows<packets>(ds_ + row * group, group, key_pairs_ + column, dk_columns_,
                                                  padded_keys, block.dq + row * block.dq_stride + column,
                                                  block.dq_stride, block.dq_is_set);
        };
        if (column + w < dk_columns_) {
          add.template operator()<2>();
        } else {
          add.template operator()<1>();
        }
      }
    }
  }

  // Numbers that are not finite are added to the visible pairs alone. A weight of exactly 0 counts as hidden where a
  // score function may hide keys.

  template <class Add>
  void for_each_visible(const QueryBlock<float, Row>& block, Index t, const Run& run, const Add& add) const {
    for (Index i = run.begin; i < (std::min)(run.end, block.q.rows); ++i) {
      const Index end = (std::min)((run.first_packet + run.packets) * w, keys_of(t));
      for (Index lane = run.first_packet * w; lane < end; ++lane) {
        if (run.partial != 0 && (masks_[std::size_t(t)].seen_by(block.first_row + i) >> lane & 1u) == 0)
          continue;
        const auto weight = [&](const Pair* pairs) {
          const Pair pair = pairs[i / 2 * tile + lane];
          return std::bit_cast<float>(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
        };
        if (changes_score && weight(p_pairs_) == 0) continue;
        add(i, lane, weight(p_pairs_), weight(ds_pairs_));
      }
    }
  }

  void add_past_hidden(const QueryBlock<float, Row>& block, Index t, const Run& run) const {
    const auto add = [&](const MatrixView<const Row>& x, Index i, Index lane, float weight, float* sums) {
      for (Index c = 0; c < x.cols; ++c) {
        const float number = static_cast<float>(x.row(i)[c]);
        if (!detail::is_finite(number)) sums[c * tile + lane] += number * weight;
      }
    };
    for_each_visible(block, t, run, [&](Index i, Index lane, float p, float ds) {
      add(block.dout, i, lane, p, sums_v(t));
      add(block.q, i, lane, ds, sums_k(t));
    });
  }

  void add_queries_past_hidden(const QueryBlock<float, Row>& block,
                               const std::array<Runs, std::size_t(key_tiles_in_group)>& runs_of) const {
    for (Index t = 0; t < tiles_; ++t) {
      for (const Run& run : runs_of[std::size_t(t)]) {
        for (Index i = run.begin; i < (std::min)(run.end, block.q.rows); ++i) {
          const Index end = (std::min)((run.first_packet + run.packets) * w, keys_of(t));
          for (Index lane = run.first_packet * w; lane < end; ++lane) {
            const auto& mask = masks_[std::size_t(t)];
            const float ds = static_cast<float>(ds_[i * group + t * tile + lane]);
            if (run.partial != 0 && (mask.seen_by(block.first_row + i) >> lane & 1u) == 0) continue;
            if (changes_score && ds == 0) continue;
            for (Index c = 0; c < head_dim_; ++c) {
              const float number = static_cast<float>(k_.row(t * tile + lane)[c]);
              if (!detail::is_finite(number)) block.dq[i * block.dq_stride + c] += number * ds;
            }
          }
        }
      }
    }
  }

  void write(const float* sums, Index t, MatrixView<float> to) const {
    for (Index key = 0; key < keys_of(t); ++key) {
      float* row = to.row(t * tile + key);
      for (Index c = 0; c < to.cols; ++c) row[c] = sums[c * tile + key];
    }
  }

  MatrixView<const Row> k_;
  Index first_key_ = 0, tiles_ = 0, batch_ = 0, head_ = 0, first_query_ = 0;
  const S* score_ = nullptr;
  float scale_ = 1;
  Index head_dim_ = 0, value_dim_ = 0;
  Index k_rows_ = 0, v_rows_ = 0;          ///< rows of pairs of K^T and V^T
  Index dk_columns_ = 0, dv_columns_ = 0;  ///< columns of the sums, multiples of 16
  Pair* packed_ = nullptr;                 ///< of each tile K^T, then V^T, [pairs of columns][tile]
  Pair* key_pairs_ = nullptr;              ///< [group / 2][dk_columns]
  float* sums_ = nullptr;                  ///< of each tile dK^T, then dV^T, [columns][tile]
  float* total_ = nullptr;                 ///< the sums of the chunks before
  bool has_total_ = false;
  Pair *queries_ = nullptr, *douts_ = nullptr;     ///< Q^T and dO^T of a block
  Row *last_q_ = nullptr, *last_dout_ = nullptr;   ///< [32][columns], see copy_last_step
  float *s_ = nullptr, *dp_ = nullptr;             ///< [32][tile]
  Pair *p_pairs_ = nullptr, *ds_pairs_ = nullptr;  ///< [rows_in_block / 2][tile]
  Row* ds_ = nullptr;                              ///< [rows_in_block][group]
  bool k_is_finite_ = true;
  std::array<KeyMask<float, M>, std::size_t(key_tiles_in_group)> masks_;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END

#endif
