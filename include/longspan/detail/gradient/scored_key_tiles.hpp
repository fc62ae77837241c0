// Tiles of keys whose scores with a block of queries are all made before the first of them becomes a weight.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/gradient/change_rows.hpp"
#include "longspan/detail/gradient/key_mask.hpp"
#include "longspan/detail/gradient/key_tiles.hpp"
#include "longspan/detail/gradient/products.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/tile_mask.hpp"
#include "longspan/mask.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// KeyTiles in two steps: `make_scores` makes S and dP of all tiles, then a derived class turns S into weights and dP into dS,
/// and `add_products` adds to dV, dK and dQ what these weights contribute. A weight, or a dS, of exactly 0 stands for a
/// hidden pair: no factor of it counts, even if it is NaN.
template <class Real, Mask M, Score S>
class ScoredKeyTiles : public KeyTiles<Real, M, S> {
 public:
  using Base = KeyTiles<Real, M, S>;
  using Base::changes_score;
  using Base::group;
  using Base::tile;
  using Base::w;

  static ScoredKeyTiles take(Arena& arena, Index head_dim, Index value_dim, Index rows) {
    ScoredKeyTiles t;
    static_cast<Base&>(t) = Base::take(arena, head_dim, value_dim, rows);
    t.weights_ = arena.take<Real>(rows_in_query_block * group);
    if (has_slopes) t.slopes_ = arena.take<Real>(rows_in_query_block * group);
    return t;
  }

 protected:
  using Base::add_keys;
  using Base::batch_;
  using Base::ds_;
  using Base::first_key_;
  using Base::first_query_;
  using Base::head_;
  using Base::head_dim_;
  using Base::is_finite;
  using Base::k_;
  using Base::keys_of;
  using Base::masks_;
  using Base::p_;
  using Base::packets_of;
  using Base::score_;
  using Base::tiles_;
  using Base::value_dim_;

  static constexpr bool has_slopes = changes_score && !only_adds<S>;
  static constexpr Real hidden_score = FloatArithmetic<Real>::masked_score;

  /// What a query block sees of the keys.
  struct Seen {
    std::array<Runs, std::size_t(key_tiles_in_group)> runs_of;
    Index first_lane = group, end_lane = 0;
    bool hides = changes_score;  ///< a pair within the lanes may be hidden
  };

  Real* weight_at(Index i, Index lane) const {
    return weights_ + (lane / tile * rows_in_query_block + i) * tile + lane % tile;
  }

  /// Scores into weights_ (in score units, hidden_score where a pair is hidden) and dP into ds_ (0 there). Returns false
  /// if every pair is hidden.
  bool make_scores(const QueryBlock<Real>& block, Seen& seen) {
    bool whole = true;
    for (Index t = 0; t < tiles_; ++t) {
      Runs& runs = seen.runs_of[std::size_t(t)];
      runs = cut_into_runs(masks_[std::size_t(t)], static_cast<int>(packets_of(t)), block.first_row,
                           block.q.rows);
      whole &= runs.count == 1 && runs.begin()->partial == 0 && runs.begin()->packets == packets_of(t) &&
               runs.begin()->end - runs.begin()->begin == block.q.rows;
      for (const Run& run : runs) {
        seen.first_lane = (std::min)(seen.first_lane, t * tile + run.first_packet * w);
        seen.end_lane = (std::max)(seen.end_lane, t * tile + (run.first_packet + run.packets) * w);
      }
    }
    if (seen.first_lane >= seen.end_lane) return false;
    seen.end_lane = (std::min)(seen.end_lane, k_.rows);
    seen.hides |= !whole;
    if (!whole) {
      std::fill_n(weights_, tiles_ * rows_in_query_block * tile, hidden_score);
      std::fill_n(ds_, block.q.rows * group, Real(0));
      if (has_slopes) std::fill_n(slopes_, block.q.rows * group, Real(0));
    }
    for (Index t = 0; t < tiles_; ++t) {
      for (const Run& run : seen.runs_of[std::size_t(t)]) score_run(block, t, run);
    }
    return true;
  }

  void add_products(const QueryBlock<Real>& block, const Seen& seen) {
    // A weight of 0 does not cancel a factor that is NaN or infinite.
    const bool finite = is_finite(block);
    for (Index t = 0; t < tiles_; ++t) {
      const Runs& runs = seen.runs_of[std::size_t(t)];
      if (runs.empty()) continue;
      p_ = weights_ + t * rows_in_query_block * tile;
      if (finite) {
        add_keys(block, t, runs);
      } else {
        add_nonzero(block, t, runs);
      }
    }
    if (!finite) {
      add_nonzero_queries(block, seen);
      return;
    }
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

 private:
  void score_run(const QueryBlock<Real>& block, Index t, const Run& run) const {
    const Index lane = run.first_packet * w, begin = run.begin, rows = run.end - run.begin;
    Real *s = weight_at(begin, t * tile + lane), *dp = ds_ + begin * group + t * tile + lane;
    with_packets(run.packets, [&]<int packets>() {
      multiply_rows<tile_rows, packets, false>(block.q.row(begin), block.q.row_stride, rows,
                                               this->packed_k(t) + lane, tile, head_dim_, s, tile);
      multiply_rows<tile_rows, packets, false>(block.dout.row(begin), block.dout.row_stride, rows,
                                               this->packed_v(t) + lane, tile, value_dim_, dp, group);
    });
    const bool hides = KeyMask<Real, M>::may_hide && run.partial != 0;
    if (!changes_score && !hides) return;
    const Packet<Real> zero = broadcast(Real(0)), lowest = broadcast(hidden_score);
    for (Index i = begin; i < run.end; ++i, s += tile, dp += group) {
      if constexpr (changes_score) {
        const ScoreRow<Real> row{s,
                                 batch_,
                                 head_,
                                 first_query_ + block.first_row + i,
                                 first_key_ + t * tile + lane,
                                 (std::min)(run.packets * w, keys_of(t) - lane)};
        if constexpr (has_slopes) slopes_of(*score_, row, slopes_ + i * group + t * tile + lane);
        change_row(*score_, row);
      }
      for (int c = 0; c < run.packets; ++c) {
        Packet<Real> of_pair = load(static_cast<const Real*>(s + c * w)), hidden = less(zero, zero);
        if constexpr (changes_score) {
          of_pair = lane_max(of_pair * broadcast(score_unit<Real>), lowest);
          hidden = equal(of_pair, lowest);
        }
        if constexpr (KeyMask<Real, M>::may_hide) {
          if (hides) {
            hidden = select(masks_[std::size_t(t)].visible(run.first_packet + c, block.first_row + i), hidden,
                            equal(zero, zero));
          }
        }
        store(s + c * w, select(hidden, lowest, of_pair));
        store(dp + c * w, select(hidden, zero, load(static_cast<const Real*>(dp + c * w))));
      }
    }
  }

  // The products without the pairs whose weight is 0, with the same bits, for blocks in which a factor is not finite.

  void add_nonzero(const QueryBlock<Real>& block, Index t, const Runs& runs) const {
    for (Index lane = 0; lane < keys_of(t); ++lane) {
      const auto add = [&](const MatrixView<const Real>& x, const Real* weights, Index stride, Real* sums) {
        for (Index c = 0; c < x.cols; ++c) {
          Real sum = 0;
          for (const Run& run : runs) {
            if (lane < run.first_packet * w || lane >= (run.first_packet + run.packets) * w) continue;
            for (Index i = run.begin; i < run.end; ++i) {
              const Real weight = weights[i * stride + lane];
              if (weight != Real(0)) sum = this->add_product(x.row(i)[c], weight, sum);
            }
          }
          sums[c * tile + lane] += sum;
        }
      };
      add(block.dout, p_, tile, this->sums_v(t));
      add(block.q, ds_ + t * tile, group, this->sums_k(t));
    }
  }

  void add_nonzero_queries(const QueryBlock<Real>& block, const Seen& seen) const {
    for (Index i = 0; i < block.q.rows; ++i) {
      Real* dq = block.dq + i * block.dq_stride;
      for (Index c = 0; c < head_dim_; ++c) {
        Real sum = 0;
        for (Index lane = seen.first_lane; lane < seen.end_lane; ++lane) {
          const Real ds = ds_[i * group + lane];
          if (ds != Real(0)) sum = this->add_product(ds, k_.row(lane)[c], sum);
        }
        dq[c] = block.dq_is_set ? dq[c] + sum : sum;
      }
    }
  }

 protected:
  Real* weights_ = nullptr;  ///< S, then W of all tiles, [tiles][rows_in_query_block][tile]
  Real* slopes_ = nullptr;   ///< derivatives of the score function, [rows_in_query_block][group]
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
