// A few tiles of keys with the grouped softmax of landmark attention, which take the queries of their KV head.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/gradient/landmark_sums.hpp"
#include "longspan/detail/gradient/products.hpp"
#include "longspan/detail/gradient/scored_key_tiles.hpp"
#include "longspan/detail/landmark/plan.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/mask.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The keys are whole landmark blocks, or a piece of one that is wider. S and dP are made for all of them, as in
/// KeyTiles. Then, for each query and landmark block m, with P = softmax of the scores of the block's tokens, D_m =
/// sum P dP and the gate g = exp(score of its landmark - lse):
///   the query's own block   W = exp(S - lse),  dS = W (dP - D)
///   another block           W = g P,           dS = W (dP - D_m),   and g (D_m - D) for the landmark
/// and the products of KeyTiles with W in the place of P. In a block that is hidden W = dS = 0, exactly.
template <class Real, Mask M, Score S>
class LandmarkKeyTiles : public ScoredKeyTiles<Real, M, S> {
 public:
  using Base = ScoredKeyTiles<Real, M, S>;
  using Base::changes_score;
  using Base::group;
  using Base::tile;
  using Base::w;

  static LandmarkKeyTiles take(Arena& arena, Index head_dim, Index value_dim, Index rows) {
    LandmarkKeyTiles t;
    static_cast<Base&>(t) = Base::take(arena, head_dim, value_dim, rows);
    return t;
  }

  /// Starts with keys of the landmark blocks of a chunk, from key `first_key` of batch row `batch` on.
  void start(MatrixView<const Real> k, MatrixView<const Real> v, Index first_key, const LandmarkChunk& chunk,
             const LandmarkOptions& options, Index batch, Index kv_len, const M& mask, const S& score,
             double scale) {
    Base::start(k, v, first_key, mask, score, scale);
    options_ = &options;
    kv_len_ = kv_len;
    is_wide_ = is_wide(chunk);
    for (parts_ = 0; parts_ < chunk.blocks; ++parts_) {
      const Index m = chunk.first_block + parts_;
      const LandmarkBlock block = landmark_block(options.landmarks, batch, m, kv_len);
      const auto lane_of = [&](Index key) { return std::clamp<Index>(key - first_key, 0, k.rows); };
      Part& part = part_[std::size_t(parts_)];
      part.block = m;
      part.begin = lane_of(block.tokens.begin);
      part.end = lane_of(block.tokens.end);
      part.closed = block.closed;
      part.landmark =
          block.closed && block.landmark() < first_key + k.rows ? block.landmark() - first_key : -1;
      part.controlled = block.closed && options.is_controlled(batch, m);
    }
  }
  static bool is_wide(const LandmarkChunk& chunk) { return chunk.length() > group; }

  /// Absorbs a block; blocks of a head come in rising order. Returns true if a key is visible: then its dq is set.
  bool absorb(const QueryBlock<Real>& block, const LandmarkRows<Real>& rows) {
    if (block.first_row % (Base::blocks_in_chunk * rows_in_query_block) == 0) this->carry();
    Seen seen;
    if (!make_scores(block, seen)) return false;
    find_own_blocks(block);
    for (Index n = 0; n < parts_; ++n) {
      const Part& part = part_[std::size_t(n)];
      if ((std::max)(part.end, part.landmark + 1) <= seen.first_lane || part.begin >= seen.end_lane) continue;
      if (changes_score || !seen.whole) {
        weigh<true>(block, part, rows);
      } else {
        weigh<false>(block, part, rows);
      }
    }
    this->add_products(block, seen);
    return true;
  }

  /// Adds these keys of a wide block to what each query of the block has seen of it.
  void measure_wide(const QueryBlock<Real>& block, const LandmarkRows<Real>& rows) {
    Seen seen;
    if (!make_scores(block, seen)) return;
    find_own_blocks(block);
    const Part& part = part_[0];
    const Edges edges = edges_of(part);
    for (Index i = 0; i < block.q.rows; ++i) {
      if (owns(i, part)) continue;
      if (part.begin < part.end) rows.wide[i].tokens.add(sums_of(i, edges));
      if (part.landmark >= 0) rows.wide[i].landmark = *weight_at(i, part.landmark);
    }
  }

  /// Adds the landmarks of the controlled blocks to what each query of the block has seen of them. Of a wide block, the
  /// piece with its landmark comes last, after measure_wide.
  void measure_controlled(const QueryBlock<Real>& block, const LandmarkRows<Real>& rows) {
    Seen seen;
    if (!make_scores(block, seen)) return;
    find_own_blocks(block);
    for (Index n = 0; n < parts_; ++n) {
      const Part& part = part_[std::size_t(n)];
      if (!part.controlled || part.landmark < 0) continue;
      const Edges edges = edges_of(part);
      for (Index i = 0; i < block.q.rows; ++i) {
        if (owns(i, part)) continue;
        const Real landmark = *weight_at(i, part.landmark);
        if (landmark == hidden_score) continue;
        const auto add = [&](const auto& tokens) {
          if (tokens.empty() && !options_->leak) return;
          rows.controlled[i].add(
              ScoreSums<Real, double>{landmark, 1, double(gate_keep(block, part, i) * tokens.mean())});
        };
        if (is_wide_) {
          add(rows.wide[i].tokens);
        } else {
          add(sums_of(i, edges));
        }
      }
    }
  }

 private:
  using Base::batch_;
  using Base::ds_;
  using Base::first_query_;
  using Base::has_slopes;
  using Base::head_;
  using Base::hidden_score;
  using Base::k_;
  using Base::make_scores;
  using Base::slopes_;
  using Base::weight_at;
  using Seen = typename Base::Seen;

  /// The lanes of one landmark block.
  struct Part {
    Index block = 0, begin = 0, end = 0;  ///< lanes [begin, end) hold tokens
    Index landmark = -1;                  ///< its lane; -1 if it is not among these keys
    bool closed = false, controlled = false;
  };

  /// Which lanes of the first and the last packet of a part are tokens of it.
  struct Edges {
    Index first_lane = 0;  ///< of the first packet
    Index packets = 0;
    Packet<Real> first, last;
  };

  bool owns(Index i, const Part& part) const {
    return !options_->grouped || own_block_[std::size_t(i)] == part.block;
  }
  Real gate_keep(const QueryBlock<Real>& block, const Part& part, Index i) const {
    if (options_->gate_keep.data == nullptr) return Real(1);
    return static_cast<Real>(options_->gate_keep.row(batch_, head_, block.first_row + i)[part.block]);
  }

  Edges edges_of(const Part& part) const {
    Edges edges;
    edges.first_lane = part.begin / w * w;
    edges.packets = part.begin < part.end ? divide_up(part.end - edges.first_lane, w) : 0;
    const auto tokens_of = [&](Index first) {
      alignas(64) Real is_token[std::size_t(w)];
      for (Index n = 0; n < w; ++n)
        is_token[n] = first + n >= part.begin && first + n < part.end ? Real(1) : Real(0);
      return equal(load(static_cast<const Real*>(is_token)), broadcast(Real(1)));
    };
    edges.first = tokens_of(edges.first_lane);
    edges.last = tokens_of(edges.first_lane + (edges.packets - 1) * w);
    return edges;
  }

  void find_own_blocks(const QueryBlock<Real>& block) {
    if (!options_->grouped) return;
    const longspan::landmarks& at = options_->landmarks;
    const Index first = first_query_ + block.first_row, count = at.count(batch_, kv_len_);
    Index m = at.block_of(batch_, (std::max)(first, Index{0}), kv_len_);
    for (Index i = 0; i < block.q.rows; ++i) {
      const Index position = first + i;
      while (m < count && at.key(batch_, m) < position) ++m;
      own_block_[std::size_t(i)] = position < 0 ? -1 : m;
    }
  }

  /// The sums over the visible tokens of a part. Leaves exp(score - top) in the place of its scores.
  ScoreSums<Real, Real> sums_of(Index i, const Edges& edges) const {
    if (edges.packets == 0) return {};
    const Packet<Real> zero = broadcast(Real(0)), lowest = broadcast(hidden_score);
    Packet<Real> highest = broadcast(empty_max<Real>);
    const auto tokens_of = [&](Index c) { return c == 0 ? edges.first : edges.last; };
    const auto is_edge = [&](Index c) { return c == 0 || c == edges.packets - 1; };
    for (Index c = 0; c < edges.packets; ++c) {
      Packet<Real> s = load(static_cast<const Real*>(weight_at(i, edges.first_lane + c * w)));
      if (is_edge(c)) s = select(tokens_of(c), s, lowest);
      highest = lane_max(highest, s);
    }
    ScoreSums<Real, Real> sums;
    sums.top = max_of_lanes(highest);
    const Packet<Real> top = broadcast(sums.top);
    Packet<Real> weights = zero, products = zero;
    for (Index c = 0; c < edges.packets; ++c) {
      Real* at = weight_at(i, edges.first_lane + c * w);
      const Packet<Real> s = load(static_cast<const Real*>(at));
      Packet<Real> e = exp_score(s - top),
                   dp = load(static_cast<const Real*>(ds_ + i * group + edges.first_lane + c * w));
      if (is_edge(c)) {
        store(at, select(tokens_of(c), e, s));
        e = select(tokens_of(c), e, zero);
        dp = select(tokens_of(c), dp, zero);
      } else {
        store(at, e);
      }
      weights = weights + e;
      products = fma(e, dp, products);
    }
    sums.weights = sum_of_lanes(weights);
    sums.products = sum_of_lanes(products);
    return sums;
  }

  /// How the numbers of a part become weights.
  struct Weighing {
    Real top = 0, factor = 1;  ///< W = factor * exp(score - top)
    Real delta = 0;            ///< dS = W (dP - delta)
  };

  /// `of_scores`: weights_ contains scores, otherwise exp(score - top).
  template <bool of_scores, bool hides>
  void set_tokens(Index i, const Edges& edges, const Weighing& by) const {
    const Packet<Real> zero = broadcast(Real(0)), top = broadcast(by.top), factor = broadcast(by.factor),
                       delta = broadcast(by.delta);
    for (Index c = 0; c < edges.packets; ++c) {
      Real *at = weight_at(i, edges.first_lane + c * w), *to = ds_ + i * group + edges.first_lane + c * w;
      const Packet<Real> before = load(static_cast<const Real*>(at)), dp = load(static_cast<const Real*>(to));
      Packet<Real> weight = factor * (of_scores ? exp_score(before - top) : before);
      Packet<Real> change = weight * (dp - delta);
      if constexpr (has_slopes)
        change = change * load(static_cast<const Real*>(slopes_ + i * group + edges.first_lane + c * w));
      if constexpr (hides) change = select(equal(weight, zero), zero, change);
      if (c == 0 || c == edges.packets - 1) {
        const Packet<Real> tokens = c == 0 ? edges.first : edges.last;
        weight = select(tokens, weight, before);
        change = select(tokens, change, dp);
      }
      store(at, weight);
      store(to, change);
    }
  }
  void clear_tokens(Index i, const Part& part) const {
    for (Index lane = part.begin; lane < part.end; ++lane)
      *weight_at(i, lane) = ds_[i * group + lane] = Real(0);
  }
  void set_landmark(Index i, const Part& part, Real change) const {
    if (part.landmark < 0) return;
    Real& to = ds_[i * group + part.landmark];
    *weight_at(i, part.landmark) = Real(0);
    if constexpr (has_slopes) {
      to = change == Real(0) ? Real(0) : change * slopes_[i * group + part.landmark];
    } else {
      to = change;
    }
  }

  /// Weights and gradients of the scores of a part, for all rows.
  template <bool hides>
  void weigh(const QueryBlock<Real>& block, const Part& part, const LandmarkRows<Real>& rows) const {
    const Edges edges = edges_of(part);
    const Real* shift = part.controlled ? rows.controlled_shift : block.shift;
    const Real* delta = part.controlled ? rows.controlled_delta : block.delta;
    alignas(64) Real landmark[std::size_t(rows_in_query_block)], gate[std::size_t(rows_in_query_block)];
    for (Index i = 0; i < block.q.rows; ++i) {
      landmark[i] = !part.closed || owns(i, part) ? hidden_score
                    : is_wide_                    ? rows.wide[i].landmark
                                                  : *weight_at(i, part.landmark);
    }
    for (Index i = 0; i < block.q.rows; i += w) {
      const Index count = (std::min)(w, block.q.rows - i);
      store(gate + i, exp_score(load_part<Real>(landmark + i, count) - load_part<Real>(shift + i, count)));
    }
    for (Index i = 0; i < block.q.rows; ++i) {
      if (owns(i, part)) {
        set_tokens<true, hides>(i, edges, {block.shift[i], Real(1), block.delta[i]});
        set_landmark(i, part, Real(0));
        continue;
      }
      const auto set = [&]<bool of_scores>(const auto& tokens, std::bool_constant<of_scores>) {
        const bool reached = landmark[i] != hidden_score && (!tokens.empty() || options_->leak);
        if (!reached || tokens.empty()) clear_tokens(i, part);
        if (!reached) return set_landmark(i, part, Real(0));
        const Real by = gate[i] * gate_keep(block, part, i);
        if (!tokens.empty()) {
          set_tokens<of_scores, hides>(i, edges,
                                       {tokens.top, static_cast<Real>(by / tokens.weights), tokens.mean()});
        }
        set_landmark(i, part, by * tokens.mean() - gate[i] * delta[i]);
      };
      if (landmark[i] == hidden_score) {
        set(ScoreSums<Real, Real>(), std::false_type());
      } else if (is_wide_) {
        set(rows.wide[i].tokens, std::true_type());
      } else {
        set(sums_of(i, edges), std::false_type());
      }
    }
  }

  const LandmarkOptions* options_ = nullptr;
  Index kv_len_ = 0;
  bool is_wide_ = false;  ///< the keys are a piece of a landmark block
  Index parts_ = 0;
  std::array<Part, std::size_t(group)> part_;
  std::array<Index, std::size_t(rows_in_query_block)> own_block_;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
