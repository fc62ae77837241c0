// Tiles of keys whose scores with a block of queries are all made before the first of them becomes a weight.
#pragma once

#include <algorithm>
#include <array>
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

/// KeyTiles in two steps: `make_scores` makes S and dP of all tiles, then a derived class turns S into weights and dP
/// into dS, and `add_products` adds to dV, dK and dQ what these weights contribute. A weight, or a dS, of exactly 0
/// stands for a hidden pair: no factor of it counts, even if it is NaN.
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
  using Base::batch_;
  using Base::ds_;
  using Base::first_key_;
  using Base::first_query_;
  using Base::head_;
  using Base::is_finite;
  using Base::k_;
  using Base::keys_of;
  using Base::masks_;
  using Base::p_;
  using Base::packets_of;
  using Base::score_;
  using Base::tiles_;

  static constexpr bool has_slopes = changes_score && !only_adds<S>;
  static constexpr Real hidden_score = FloatArithmetic<Real>::masked_score;

  using Seen = typename Base::Seen;

  Real* weight_at(Index i, Index lane) const {
    return weights_ + (lane / tile * rows_in_query_block + i) * tile + lane % tile;
  }

  /// Scores into weights_ (in score units, hidden_score where a pair is hidden) and dP into ds_ (0 there). Returns
  /// false if every pair is hidden.
  bool make_scores(const QueryBlock<Real>& block, Seen& seen) {
    if (!Base::look(block, seen)) return false;
    if (!seen.whole) {
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
    const bool finite = is_finite(block);
    for (Index t = 0; t < tiles_; ++t) {
      p_ = weights_ + t * rows_in_query_block * tile;
      Base::add_keys(block, t, seen.runs_of[std::size_t(t)], finite);
    }
    Base::add_queries(block, seen, finite);
  }

 private:
  void score_run(const QueryBlock<Real>& block, Index t, const Run& run) const {
    const Index lane = run.first_packet * w, begin = run.begin;
    Real *s = weight_at(begin, t * tile + lane), *dp = ds_ + begin * group + t * tile + lane;
    Base::make_products(block, t, run, s, dp);
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

 protected:
  Real* weights_ = nullptr;  ///< S, then W of all tiles, [tiles][rows_in_query_block][tile]
  Real* slopes_ = nullptr;   ///< derivatives of the score function, [rows_in_query_block][group]
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
