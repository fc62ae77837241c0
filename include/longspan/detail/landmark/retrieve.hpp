// Retrieval from a landmark cache: scores of landmarks, the choice of the highest, and attention to blocks in place.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/decode/row_kernel.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Calls work.template operator()<count>() with a power of two of at most 8.
template <class Work>
void with_count(Index count, const Work& work) {
  if (count == 8) return work.template operator()<8>();
  if (count == 4) return work.template operator()<4>();
  if (count == 2) return work.template operator()<2>();
  work.template operator()<1>();
}

/// Moves the columns of a query to the order in which score_keys needs them for keys of T.
template <class T, class Real>
void interleave_columns([[maybe_unused]] Real* row, [[maybe_unused]] Index cols) {
  if constexpr (loads_in_pairs<Real, T>) {
    constexpr Index together = 2 * lanes<Real>;
    for (Index first = 0; first + together <= cols; first += together) {
      Real plain[std::size_t(together)];
      std::copy_n(row + first, together, plain);
      for (Index c = 0; c < together; ++c) row[first + interleaved_index<Real, T>(c, together)] = plain[c];
    }
  }
}

/// The maximum number of queries that are scored against landmarks together.
template <class Real>
inline constexpr Index queries_to_a_landmark = std::min<Index>(8, lanes<Real>);

/// scores_of(g)[j] = q[g].k[j] for the queries q and the landmarks k of one KV head. Reads k once for every
/// queries_to_a_landmark queries. The bits do not depend on which queries are scored together.
template <class Real, class Tk, class ScoresOf>
void score_landmarks(MatrixView<const Tk> k, MatrixView<const Real> q, const ScoresOf& scores_of) {
  constexpr Index w = lanes<Real>, keys_at_once = 256, most_queries = queries_to_a_landmark<Real>;
  alignas(64) Real piece[std::size_t(keys_at_once * most_queries + w)];
  for (Index first = 0; first < k.rows; first += keys_at_once) {
    const Index keys = (std::min)(keys_at_once, k.rows - first);
    for (Index g = 0; g < q.rows;) {
      const auto left = static_cast<std::size_t>((std::min)(most_queries, q.rows - g));
      const Index together = static_cast<Index>(std::bit_floor(left));
      with_count(together, [&]<int count>() {
        if constexpr (count <= most_queries) {
          score_keys<count>(k.row(first), k.row_stride, keys, q.row(g), q.row_stride, k.cols, piece);
          for (int n = 0; n < count; ++n) {
            Real* to = scores_of(g + n) + first;
            for (Index j = 0; j < keys; ++j) to[j] = piece[j * count + n];
          }
        }
      });
      g += together;
    }
  }
}

/// Replaces scores, in score units, by their softmax.
template <class Real>
void softmax_row(Real* s, Index count) {
  constexpr Index w = lanes<Real>;
  Real row_max = empty_max<Real>, sum = 0;
  for (Index j = 0; j < count; ++j) row_max = (std::max)(row_max, s[j]);
  for (Index j = 0; j < count; j += w) {
    const Index used = (std::min)(w, count - j);
    alignas(64) Real p[std::size_t(w)];
    store<Real>(p, exp_score(load_part<Real>(s + j, used) - broadcast(row_max)));
    for (Index i = 0; i < used; ++i) sum += s[j + i] = p[i];
  }
  for (Index j = 0; j < count; ++j) s[j] /= sum;
}

/// Writes the indices of the `k` highest of `count` scores to `chosen`, in rising order; of equal scores the lowest
/// index is chosen. `best` is scratch for k numbers.
template <class Real>
void choose_highest(const Real* scores, Index count, Index k, Index* chosen, Real* best) {
  constexpr Index w = lanes<Real>;
  const auto insert = [&](Index j, Index at) {
    for (; at > 0 && scores[j] > best[at - 1]; --at) {
      best[at] = best[at - 1];
      chosen[at] = chosen[at - 1];
    }
    best[at] = scores[j];
    chosen[at] = j;
  };
  for (Index j = 0; j < k; ++j) insert(j, j);
  Index first = k;
  for (; first + w <= count; first += w) {
    // Among many scores few are higher than the k highest so far, so a packet is compared at once.
    for (unsigned left = bits_of(less(broadcast(best[k - 1]), load(scores + first))); left != 0;
         left &= left - 1) {
      const Index j = first + std::countr_zero(left);
      if (scores[j] > best[k - 1]) insert(j, k - 1);
    }
  }
  for (; first < count; ++first) {
    if (scores[first] > best[k - 1]) insert(first, k - 1);
  }
  std::sort(chosen, chosen + k);
}

/// A cache of queries encoded relative to a few positions (places) of a block. Many blocks have the same place: with
/// stingy positions there are at most top_k + 1 places.
template <class Real>
struct PlacedRows {
  Real* rows;  ///< [most][size]
  Index size;
  Index* places;  ///< the place of each filled slot
  Index most;
  Index filled = 0;
  Index replaced = 0;

  /// The rows of a place. If they are not in the cache, fill(rows) writes them.
  template <class Fill>
  const Real* at(Index place, const Fill& fill) {
    Index slot = std::find(places, places + filled, place) - places;
    if (slot == filled) {
      slot = filled < most ? filled++ : replaced++ % most;
      places[slot] = place;
      fill(rows + slot * size);
    }
    return rows + slot * size;
  }
};

/// The running softmax of one query over its chosen blocks.
template <class Real>
struct RetrievedRow {
  Real* o;       ///< [padded columns]
  Real* scores;  ///< [keys of a block + packet]
  Real row_max = empty_max<Real>;
  Real sum = 0;

  /// Adds a block with the weight of its landmark, which is its last key and has no value. q consists of whole packets.
  template <class T>
  void absorb(const Real* q, Index q_stride, const KeyRun<T, T>& block) {
    constexpr Index w = lanes<Real>;
    constexpr bool is_scaled = std::is_same_v<T, std::int8_t>;
    const MatrixView<const T> k = block.k, v = block.v;
    score_keys<1>(k.data, k.row_stride, k.rows, q, q_stride, k.cols, scores);
    if constexpr (is_scaled) scale_scores(scores, block.k_scale, k.rows, 1);
    const Index tokens = k.rows - 1;
    if (tokens == 0) return;
    const Real logit = scores[tokens];
    std::fill(scores + tokens, scores + round_up(tokens, w), FloatArithmetic<Real>::masked_score);
    Packet<Real> highest = broadcast(empty_max<Real>), total = broadcast(Real(0));
    for (Index j = 0; j < tokens; j += w) highest = lane_max(highest, load<Real>(scores + j));
    const Packet<Real> block_top = broadcast(max_of_lanes(highest));
    for (Index j = 0; j < tokens; j += w) {
      const Packet<Real> p = exp_score(load<Real>(scores + j) - block_top);
      total = total + p;
      store(scores + j, p);
    }
    const Real now = (std::max)(row_max, logit);
    const Real rescale = exp_score_of(row_max - now), share = exp_score_of(logit - now);
    const Packet<Real> factor = broadcast(share / sum_in_pairs(total));
    for (Index j = 0; j < tokens; j += w) store(scores + j, load<Real>(scores + j) * factor);
    if constexpr (is_scaled) scale_scores(scores, block.v_scale, tokens, 1);
    add_rows_of_values(v, tokens, rescale);
    row_max = now;
    sum = sum * rescale + share;
  }

  /// Merges this state into the other part of the row, a normalised output with its natural log-sum-exp.
  void merge_into(Real* out, Real& lse, Index cols) const {
    if (sum == Real(0)) return;
    const Real own = lse_of(row_max, sum), highest = (std::max)(lse, own);
    const Real of_local = std::exp(lse - highest), of_blocks = std::exp(own - highest);
    const Real total = of_local + of_blocks;
    for (Index c = 0; c < cols; ++c)
      out[c] = (of_local == Real(0) ? Real(0) : of_local * out[c] / total) + of_blocks / total * (o[c] / sum);
    lse = highest + std::log(total);
  }

 private:
  /// o = rescale * o + the weighted sum of the rows of v, for several packets of columns at a time: a single
  /// accumulator would be bound by latency.
  template <class T>
  void add_rows_of_values(MatrixView<const T> v, Index rows, Real rescale) {
    constexpr Index w = lanes<Real>;
    constexpr int together =
        loads_in_pairs<Real, T> ? 3 : 4;  // an even number would be loaded in pairs, in interleaved order
    for (Index column = 0; column < v.cols;) {
      const Index left = v.cols - column;
      const auto add = [&]<int packets>() {
        add_values<1, packets, PrefetchHint::none>(v.data + column, v.row_stride, left, rows, scores, 1,
                                                   o + column, 0, &rescale);
        column += packets * w;
      };
      if (left >= together * w) {
        add.template operator()<together>();
      } else {
        add.template operator()<1>();
      }
    }
  }

  static Real exp_score_of(Real x) {
    alignas(64) Real lane[std::size_t(lanes<Real>)];
    store<Real>(lane, exp_score(broadcast(x)));
    return lane[0];
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
