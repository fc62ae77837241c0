// A few tiles of keys, which take the queries of their KV head block by block and collect dk and dv.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/gradient/change_rows.hpp"
#include "longspan/detail/gradient/key_mask.hpp"
#include "longspan/detail/gradient/products.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/detail/tile/tile_mask.hpp"
#include "longspan/mask.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Consecutive queries of one head, at most rows_in_block of the tiles. The rows of q and dout can be read up to a
/// multiple of query_columns of the tiles.
template <class Real, class Row = Real>
struct QueryBlock {
  MatrixView<const Row> q, dout;
  const Real* shift = nullptr;  ///< the lse of each row, in score units
  const Real* delta = nullptr;  ///< D of each row
  Index first_row = 0;          ///< in its head
  Real* dq = nullptr;           ///< [rows_in_block][dq_stride]; contains garbage unless dq_is_set
  Index dq_stride = 0;          ///< a multiple of lanes
  bool dq_is_set = false;
};

/// Tiles that a worker takes through the queries together: dq is then read and written once for all of them.
inline constexpr Index key_tiles_in_group = 4;

template <class Real>
inline constexpr Index keys_in_group = key_tiles_in_group * tile_lanes<Real>;

/// For each query block and each tile, with keys in the lanes:
///   S = Q K^T and dP = dO V^T           K^T and V^T are packed once, Q and dO are read in place
///   P = exp(S - lse), dS = P (dP - D)
///   dV^T += dO^T P and dK^T += Q^T dS   sums stay in the lanes of their keys
/// and then once for all tiles: dQ += dS K.
template <class Real, Mask M, Score S>
class KeyTiles {
 public:
  using Row = Real;  ///< element of the rows that are read
  static constexpr Index rows_in_block = rows_in_query_block;
  static constexpr bool changes_score = !std::is_same_v<S, unchanged>;
  /// Rows are read up to multiples of so many columns.
  static constexpr Index query_columns = tile_rows, key_columns = lanes<Real>;
  static constexpr Index w = lanes<Real>, tile = tile_lanes<Real>, group = keys_in_group<Real>;

  /// `rows` queries will be absorbed.
  static KeyTiles take(Arena& arena, Index head_dim, Index value_dim, Index rows) {
    KeyTiles t;
    t.head_dim_ = head_dim;
    t.value_dim_ = value_dim;
    t.columns_ = round_up(head_dim, tile_rows) + round_up(value_dim, tile_rows);
    t.packed_ = arena.take<Real>((head_dim + value_dim) * group);
    t.sums_ = arena.take<Real>(t.columns_ * group);
    if (rows > blocks_in_chunk * rows_in_query_block) t.total_ = arena.take<Real>(t.columns_ * group);
    t.has_total_ = rows > blocks_in_chunk * rows_in_query_block;
    t.p_ = arena.take<Real>(rows_in_query_block * tile);
    t.ds_ = arena.take<Real>(rows_in_query_block * group);
    return t;
  }

  /// Starts with the keys [first_key, first_key + k.rows), at most keys_in_group. The rows of k can be read up to a
  /// multiple of `lanes` columns.
  void start(MatrixView<const Real> k, MatrixView<const Real> v, Index first_key, const M& mask,
             const S& score, double scale) {
    k_ = k;
    first_key_ = first_key;
    score_ = &score;
    tiles_ = divide_up(k.rows, tile);
    const Real factor = static_cast<Real>(scale * (changes_score ? 1.0 : double(score_unit<Real>)));
    for (Index t = 0; t < tiles_; ++t) {
      masks_[std::size_t(t)].prepare(mask, first_key + t * tile, keys_of(t));
      for (Index c = 0; c < packets_of(t); ++c) {
        const auto row_of = [&](const MatrixView<const Real>& rows) {
          return [&rows, first = t * tile + c * w](Index i) {
            return rows.row((std::min)(first + i, rows.rows - 1));
          };
        };
        FloatArithmetic<Real>::pack(row_of(k), head_dim_, factor, packed_k(t) + c * w, tile);
        FloatArithmetic<Real>::pack(row_of(v), value_dim_, Real(1), packed_v(t) + c * w, tile);
      }
    }
    std::fill_n(sums_, columns_ * group, Real(0));
    if (has_total_) std::fill_n(total_, columns_ * group, Real(0));
    k_is_finite_ = -1;
  }

  void enter_head(Index batch, Index head, Index first_query) {
    carry();
    batch_ = batch;
    head_ = head;
    first_query_ = first_query;
    for (Index t = 0; t < tiles_; ++t) masks_[std::size_t(t)].enter_head(batch, head, first_query);
  }

  /// Absorbs a block; blocks of a head come in rising order. Returns true if a key is visible: then its dq is set.
  bool absorb(const QueryBlock<Real>& block) {
    if (block.first_row % (blocks_in_chunk * rows_in_query_block) == 0) carry();
    Seen seen;
    if (!look(block, seen)) return false;
    if (!seen.whole) {
      for (Index i = 0; i < block.q.rows; ++i)
        std::fill(ds_ + i * group + seen.first_lane, ds_ + i * group + round_up(seen.end_lane, w), Real(0));
    }
    const bool finite = (seen.whole && !changes_score) || is_finite(block);
    for (Index t = 0; t < tiles_; ++t) {
      const Runs& runs = seen.runs_of[std::size_t(t)];
      for (const Run& run : runs) weigh(block, t, run);
      add_keys(block, t, runs, finite);
    }
    add_queries(block, seen, finite);
    return true;
  }

  /// For each row of a block, adds the sum of its weights and that of P dP over the keys. `block.delta` must be 0.
  void measure(const QueryBlock<Real>& block, Real* weight, Real* mean) {
    for (Index t = 0; t < tiles_; ++t) {
      const Runs runs = cut_into_runs(masks_[std::size_t(t)], static_cast<int>(packets_of(t)),
                                      block.first_row, block.q.rows);
      for (const Run& run : runs) {
        weigh<true>(block, t, run);
        for (Index i = run.begin; i < run.end; ++i) {
          Packet<Real> of_weights = broadcast(Real(0)), of_products = of_weights;
          for (Index lane = run.first_packet * w; lane < (run.first_packet + run.packets) * w; lane += w) {
            const Index count = (std::min)(w, keys_of(t) - lane);
            of_weights = of_weights + load_part<Real>(p_ + i * tile + lane, count);
            of_products = of_products + load_part<Real>(ds_ + i * group + t * tile + lane, count);
          }
          weight[i] += sum_in_pairs(of_weights);
          mean[i] += sum_in_pairs(of_products);
        }
      }
    }
  }

  /// Writes dk / scale and dv as rows, [keys][cols].
  void finish(MatrixView<Real> dk, MatrixView<Real> dv) {
    carry();
    const Real* sums = has_total_ ? total_ : sums_;
    for (Index t = 0; t < tiles_; ++t) {
      const Real* of_tile = sums + t * columns_ * tile;
      write(of_tile, t, dk);
      write(of_tile + round_up(head_dim_, tile_rows) * tile, t, dv);
    }
  }

 protected:
  /// Query blocks are absorbed in chunks whose sums are added first, so that rounding errors do not grow with q_len.
  static constexpr Index blocks_in_chunk = keys_in_chunk / rows_in_query_block;

  Index keys_of(Index t) const { return (std::min)(tile, k_.rows - t * tile); }
  Index packets_of(Index t) const { return divide_up(keys_of(t), w); }
  Real* packed_k(Index t) const { return packed_ + t * (head_dim_ + value_dim_) * tile; }
  Real* packed_v(Index t) const { return packed_k(t) + head_dim_ * tile; }
  Real* sums_k(Index t) const { return sums_ + t * columns_ * tile; }
  Real* sums_v(Index t) const { return sums_k(t) + round_up(head_dim_, tile_rows) * tile; }

  void carry() {
    if (!has_total_) return;
    for (Index at = 0; at < tiles_ * columns_ * tile; at += w) {
      store(total_ + at,
            load(static_cast<const Real*>(total_ + at)) + load(static_cast<const Real*>(sums_ + at)));
      store(sums_ + at, broadcast(Real(0)));
    }
  }

  /// What a query block sees of the keys.
  struct Seen {
    std::array<Runs, std::size_t(key_tiles_in_group)> runs_of;
    Index first_lane = group, end_lane = 0;
    bool whole = true;  ///< every pair is visible
  };

  /// Returns false if every pair is hidden.
  bool look(const QueryBlock<Real>& block, Seen& seen) {
    for (Index t = 0; t < tiles_; ++t) {
      Runs& runs = seen.runs_of[std::size_t(t)];
      runs = cut_into_runs(masks_[std::size_t(t)], static_cast<int>(packets_of(t)), block.first_row,
                           block.q.rows);
      seen.whole &= runs.count == 1 && runs.begin()->partial == 0 && runs.begin()->packets == packets_of(t) &&
                    runs.begin()->end - runs.begin()->begin == block.q.rows;
      for (const Run& run : runs) {
        seen.first_lane = (std::min)(seen.first_lane, t * tile + run.first_packet * w);
        seen.end_lane = (std::max)(seen.end_lane, t * tile + (run.first_packet + run.packets) * w);
      }
    }
    if (seen.first_lane >= seen.end_lane) return false;
    seen.end_lane = (std::min)(seen.end_lane, k_.rows);
    return true;
  }

  /// A zero does not cancel a factor that is NaN or infinite.
  bool is_finite(const QueryBlock<Real>& block) {
    using Float = FloatArithmetic<Real>;
    if (k_is_finite_ < 0) k_is_finite_ = Float::values_finite(k_.data, k_.row_stride, k_.rows, k_.cols);
    return k_is_finite_ != 0 &&
           Float::values_finite(block.q.data, block.q.row_stride, block.q.rows, block.q.cols) &&
           Float::values_finite(block.dout.data, block.dout.row_stride, block.dout.rows, block.dout.cols);
  }

  /// S and dP for a run of rows of a tile, with `tile` and `group` lanes from row to row.
  void make_products(const QueryBlock<Real>& block, Index t, const Run& run, Real* s, Real* dp) const {
    const Index lane = run.first_packet * w, rows = run.end - run.begin;
    with_packets(run.packets, [&]<int packets>() {
      multiply_rows<tile_rows, packets, false>(block.q.row(run.begin), block.q.row_stride, rows,
                                               packed_k(t) + lane, tile, head_dim_, s, tile);
      multiply_rows<tile_rows, packets, false>(block.dout.row(run.begin), block.dout.row_stride, rows,
                                               packed_v(t) + lane, tile, value_dim_, dp, group);
    });
  }

  /// Scores, weights and their gradients for a run of rows of a tile; with `of_changed` the gradients of the scores
  /// that the score function has changed.
  template <bool of_changed = false>
  void weigh(const QueryBlock<Real>& block, Index t, const Run& run) const {
    constexpr bool has_slopes = changes_score && !only_adds<S> && !of_changed;
    const Index lane = run.first_packet * w, begin = run.begin;
    Real *p = p_ + begin * tile + lane, *ds = ds_ + begin * group + t * tile + lane;
    make_products(block, t, run, p, ds);
    const bool hides = KeyMask<Real, M>::may_hide && run.partial != 0;
    for (Index i = begin; i < run.end; ++i, p += tile, ds += group) {
      alignas(64) Real slope[std::size_t(tile)];
      if constexpr (changes_score) {
        const ScoreRow<Real> row{p,
                                 batch_,
                                 head_,
                                 first_query_ + block.first_row + i,
                                 first_key_ + t * tile + lane,
                                 (std::min)(run.packets * w, keys_of(t) - lane)};
        if constexpr (has_slopes) slopes_of(*score_, row, slope);
        change_row(*score_, row);
      }
      const Packet<Real> shift = broadcast(block.shift[i]), delta = broadcast(block.delta[i]),
                         zero = broadcast(Real(0));
      for (int c = 0; c < run.packets; ++c) {
        Packet<Real> s = load(static_cast<const Real*>(p + c * w)), hidden = less(zero, zero);
        if constexpr (changes_score) {
          const Packet<Real> lowest = broadcast(FloatArithmetic<Real>::masked_score);
          s = lane_max(s * broadcast(score_unit<Real>), lowest);
          hidden = equal(s, lowest);
        }
        if constexpr (KeyMask<Real, M>::may_hide) {
          if (hides) {
            hidden = select(masks_[std::size_t(t)].visible(run.first_packet + c, block.first_row + i), hidden,
                            equal(zero, zero));
          }
        }
        Packet<Real> weight = exp_score(s - shift);
        Packet<Real> change = weight * (load(static_cast<const Real*>(ds + c * w)) - delta);
        if constexpr (has_slopes) change = change * load(static_cast<const Real*>(slope + c * w));
        if (changes_score || hides) {
          weight = select(hidden, zero, weight);
          change = select(hidden, zero, change);
        }
        store(p + c * w, weight);
        store(ds + c * w, change);
      }
    }
  }

  /// dV^T += dO^T P and dK^T += Q^T dS for the keys of a tile. `finite`: no factor is NaN or infinite.
  void add_keys(const QueryBlock<Real>& block, Index t, const Runs& runs, bool finite) const {
    if (!finite) return add_nonzero_keys(block, t, runs);
    std::array<RowRun, Runs::capacity> rows;
    alignas(64) Real ones[std::size_t(tile)];
    std::fill_n(ones, tile, Real(1));
    // value_rows takes runs that follow each other.
    for (int first = 0, next = 0; first < runs.count; first = next) {
      const Index begin = runs.run[std::size_t(first)].begin;
      for (next = first; next < runs.count; ++next) {
        const Run& run = runs.run[std::size_t(next)];
        if (next > first && runs.run[std::size_t(next - 1)].end != run.begin) break;
        rows[std::size_t(next)] = {run.end - run.begin, run.first_packet, run.packets};
      }
      const std::span<const RowRun> part(rows.data() + first, static_cast<std::size_t>(next - first));
      with_packets(static_cast<int>(packets_of(t)), [&]<int packets>() {
        const std::integral_constant<Index, tile> tile_stride;
        const std::integral_constant<Index, group> group_stride;
        value_rows<packets>(block.dout.row(begin), block.dout.row_stride, round_up(value_dim_, tile_rows),
                            static_cast<const Real*>(p_ + begin * tile), tile_stride, part, sums_v(t),
                            tile_stride, Accumulate::rescale, static_cast<const Real*>(ones));
        value_rows<packets>(block.q.row(begin), block.q.row_stride, round_up(head_dim_, tile_rows),
                            static_cast<const Real*>(ds_ + begin * group + t * tile), group_stride, part,
                            sums_k(t), tile_stride, Accumulate::rescale, static_cast<const Real*>(ones));
      });
    }
  }

  /// dQ += dS K for all keys that are seen.
  void add_queries(const QueryBlock<Real>& block, const Seen& seen, bool finite) const {
    if (!finite) return add_nonzero_queries(block, seen);
    const Real *ds = ds_ + seen.first_lane, *k = k_.row(seen.first_lane);
    const Index packets = divide_up(head_dim_, w), keys = seen.end_lane - seen.first_lane;
    if (block.dq_is_set) {
      multiply_columns<true>(ds, group, block.q.rows, k, k_.row_stride, keys, block.dq, block.dq_stride,
                             packets);
    } else {
      multiply_columns<false>(ds, group, block.q.rows, k, k_.row_stride, keys, block.dq, block.dq_stride,
                              packets);
    }
  }

  // The same products for blocks in which a factor is not finite. A weight, or a dS, of exactly 0 stands for a hidden
  // pair: no factor of it counts. The bits are those of the sums above.

  /// a * b + c with the rounding that a packet has.
  static Real add_product(Real a, Real b, Real c) {
    if constexpr (has_fused_multiply_add) {
      return std::fma(a, b, c);
    } else {
      return opaque(a * b) + c;
    }
  }

  void add_nonzero_keys(const QueryBlock<Real>& block, Index t, const Runs& runs) const {
    for (Index lane = 0; lane < keys_of(t); ++lane) {
      const auto add = [&](const MatrixView<const Real>& x, const Real* weights, Index stride, Real* sums) {
        for (Index c = 0; c < x.cols; ++c) {
          Real sum = 0;
          for (const Run& run : runs) {
            if (lane < run.first_packet * w || lane >= (run.first_packet + run.packets) * w) continue;
            for (Index i = run.begin; i < run.end; ++i) {
              const Real weight = weights[i * stride + lane];
              if (weight != Real(0)) sum = add_product(x.row(i)[c], weight, sum);
            }
          }
          sums[c * tile + lane] += sum;
        }
      };
      add(block.dout, p_, tile, sums_v(t));
      add(block.q, ds_ + t * tile, group, sums_k(t));
    }
  }

  void add_nonzero_queries(const QueryBlock<Real>& block, const Seen& seen) const {
    for (Index i = 0; i < block.q.rows; ++i) {
      Real* dq = block.dq + i * block.dq_stride;
      for (Index c = 0; c < head_dim_; ++c) {
        Real sum = 0;
        for (Index lane = seen.first_lane; lane < seen.end_lane; ++lane) {
          const Real ds = ds_[i * group + lane];
          if (ds != Real(0)) sum = add_product(ds, k_.row(lane)[c], sum);
        }
        dq[c] = block.dq_is_set ? dq[c] + sum : sum;
      }
    }
  }

  void write(const Real* sums, Index t, MatrixView<Real> to) const {
    for (Index key = 0; key < keys_of(t); ++key) {
      Real* row = to.row(t * tile + key);
      for (Index c = 0; c < to.cols; ++c) row[c] = sums[c * tile + key] + Real(0);  // no output is -0
    }
  }

  MatrixView<const Real> k_;
  Index first_key_ = 0, tiles_ = 0, batch_ = 0, head_ = 0, first_query_ = 0;
  const S* score_ = nullptr;
  Index head_dim_ = 0, value_dim_ = 0;
  Index columns_ = 0;       ///< of a tile's sums: those of dk, then those of dv
  Real* packed_ = nullptr;  ///< of each tile K^T, then V^T, [columns][tile]
  Real* sums_ = nullptr;    ///< of each tile dK^T, then dV^T
  Real* total_ = nullptr;   ///< the sums of the chunks before
  bool has_total_ = false;
  Real* p_ = nullptr;             ///< S, then P of one tile, [rows_in_query_block][tile]
  Real* ds_ = nullptr;            ///< dP, then dS of all tiles, [rows_in_query_block][group]
  signed char k_is_finite_ = -1;  ///< -1: not yet known
  std::array<KeyMask<Real, M>, std::size_t(key_tiles_in_group)> masks_;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
