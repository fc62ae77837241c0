// The steps of a landmark_cache for a chunk: attend to the open tokens, choose blocks, attend to the blocks, write the
// outputs, report the mass.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>
#include <vector>

#include "longspan/detail/attend.hpp"
#include "longspan/detail/landmark/forward.hpp"
#include "longspan/detail/landmark/mass.hpp"
#include "longspan/detail/landmark/retrieve.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// A mask of the keys that are not landmarks.
struct all_but_landmarks {
  Index block = 1;

  constexpr bool sees(Index, Index j) const noexcept { return (j + 1) % block != 0; }
  constexpr Coverage classify(const Tile& tile) const noexcept {
    if (tile.first_key / block == (tile.first_key + tile.keys) / block) return Coverage::all;
    return tile.keys == 1 ? Coverage::none : Coverage::some;
  }
};

}  // namespace detail

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
template <class Call, class E>
void landmark_cache<T, P, Map, Finder>::attend_open(const Call& call, const E& executor,
                                                    Workspace& workspace) {
  const Index rows = shape_.batch * shape_.heads * chunk_;
  out_.resize(at(rows * shape_.value_dim));
  lse_.resize(at(rows));
  using Tq = std::remove_const_t<typename decltype(call.q)::Element>;
  using Open = typename detail::SealedRows<T>::Open;
  const detail::Problem<Tq, Open, Open, Real> problem{
      call.q,
      store_.open_k(),
      store_.open_v(),
      compact_view(out_.data(), shape_.batch, shape_.heads, chunk_, shape_.value_dim),
      compact_rows_view(lse_.data(), shape_.batch, shape_.heads, chunk_),
      first_,
      scale()};
  if (options_.exact_window) {
    return detail::attend(problem, causal{} & detail::all_but_landmarks{options_.block_size}, unchanged{},
                          position_, executor, workspace, false);
  }
  detail::LandmarkOptions options;
  options.landmarks = landmarks::every(options_.block_size);
  detail::landmark_forward(problem, options, causal{}, unchanged{}, position_, executor, workspace, false);
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
template <class Call, class E>
void landmark_cache<T, P, Map, Finder>::choose(const Call& call, const E& executor) {
  // An index is called query by query.
  const Index tokens = finds ? 1 : std::max<Index>(1, detail::queries_to_a_landmark<Real> / group()),
              q_room = tokens * group() * padded_head_dim();
  choice_.start(chunk_, held_.blocks, held_.top_k, executor.workers());
  worker_rows_.resize(at(executor.workers() * q_room));
  const Index at_once = choice_.tokens_at_once();
  for (Index first = 0; first < chunk_; first += at_once) {
    const Index count = (std::min)(at_once, chunk_ - first), tasks = detail::divide_up(count, tokens);
    executor.for_each(shape_.batch * shape_.kv_heads * tasks, [&](Index task, Index worker) {
      const Index i = task % tasks * tokens, h = task / tasks % shape_.kv_heads,
                  b = task / tasks / shape_.kv_heads;
      score_blocks(call, b, h, first + i, (std::min)(tokens, count - i),
                   worker_rows_.data() + worker * q_room,
                   [&](Index g, Index token) { return choice_.scores(b, h * group() + g, i + token); });
    });
    choice_.take(first, count, executor);
  }
  choice_.finish();
}

/// Computes the scores of all landmarks of a KV head for the queries of its group at `tokens` tokens from i on.
/// Blocks at the same place share one encoding of the query and are scored together.
template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
template <class Call, class ScoresOf>
void landmark_cache<T, P, Map, Finder>::score_blocks(const Call& call, Index b, Index kv_head, Index i,
                                                     Index tokens, Real* q, const ScoresOf& scores_of) const {
  const Index of_token = group() * padded_head_dim();
  for (Index begin = 0, end = 0; begin < held_.blocks; begin = end) {
    const Index shift = map_.scored(held_, begin) - stored_place(begin);
    end = begin + 1;
    while (end < held_.blocks && map_.scored(held_, end) - stored_place(end) == shift) ++end;
    if (begin == 0 || encodes) {
      for (Index t = 0; t < tokens; ++t)
        encode_queries(call.q, b, kv_head, i + t, position_of(i + t) - shift, q + t * of_token);
    }
    const MatrixView<const Real> queries{q, tokens * group(), shape_.head_dim, padded_head_dim()};
    const auto scores_of_row = [&](Index row) { return scores_of(row % group(), row / group()); };
    if (finds && end - begin > held_.top_k) {
      score_candidates(b, kv_head, {begin, end}, queries, scores_of_row);
    } else {
      detail::score_landmarks<Real>(store_.landmarks(b, kv_head, begin, end - begin), queries,
                                    [&](Index row) { return scores_of_row(row) + begin; });
    }
  }
}

/// The same for those blocks of a range that the index proposes; the others get the masked score, so that they are
/// chosen last.
template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
template <class ScoresOf>
void landmark_cache<T, P, Map, Finder>::score_candidates(Index b, Index kv_head, KeyRange blocks,
                                                         MatrixView<const Real> queries,
                                                         const ScoresOf& scores_of) const {
  for (Index g = 0; g < queries.rows; ++g) {
    Real* of_query = scores_of(g);
    std::fill(of_query + blocks.begin, of_query + blocks.end, detail::FloatArithmetic<Real>::masked_score);
    const MatrixView<const Real> query{queries.row(g), 1, queries.cols, queries.row_stride};
    std::vector<Real> plain(at(query.cols));
    for (Index c = 0; c < query.cols; ++c)
      plain[at(c)] = query.row(0)[detail::interleaved_index<Real, T>(c, query.cols)];
    for (const Index number : finder_.candidates(b, kv_head, std::span<const Real>(plain))) {
      const Index n = number - held_.dropped;
      if (!blocks.contains(n)) continue;
      detail::score_landmarks<Real>(store_.landmarks(b, kv_head, n, 1), query,
                                    [&](Index) { return of_query + n; });
    }
  }
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
template <class Call, class E>
void landmark_cache<T, P, Map, Finder>::attend_blocks(const Call& call, const E& executor) {
  const Index padded_value_dim = detail::round_up(shape_.value_dim, w), q_room = group() * padded_head_dim(),
              scores_room = detail::round_up(options_.block_size, w) + w, most_places = held_.top_k + 1,
              room = padded_value_dim + scores_room + most_places * q_room;
  worker_rows_.resize(at(executor.workers() * room));
  worker_places_.resize(at(executor.workers() * most_places));
  const auto attend = [&](Index task, Index worker) {
    const Index i = task % chunk_, kv_head = task / chunk_ % shape_.kv_heads,
                b = task / chunk_ / shape_.kv_heads;
    Real* o = worker_rows_.data() + worker * room;
    detail::PlacedRows<Real> placed{o + padded_value_dim + scores_room, q_room,
                                    worker_places_.data() + worker * most_places, most_places};
    const auto queries_at = [&](Index place) {
      return placed.at(place, [&](Real* to) { encode_queries(call.q, b, kv_head, i, place, to); });
    };
    for (Index g = 0; g < group(); ++g) {
      const Index h = kv_head * group() + g, row = (b * shape_.heads + h) * chunk_ + i;
      std::fill_n(o, padded_value_dim, Real(0));
      detail::RetrievedRow<Real> retrieved{o, o + padded_value_dim};
      const std::span<const Index> chosen = choice_.of(b, h, i);
      for (Index rank = 0; rank < held_.top_k; ++rank) {
        const Index n = chosen[at(rank)],
                    place = encodes ? position_of(i) - map_.attended(held_, n, rank) : 0;
        retrieved.absorb(queries_at(place) + g * padded_head_dim(), padded_head_dim(),
                         store_.rows(b, kv_head, n));
      }
      retrieved.merge_into(out_.data() + row * shape_.value_dim, lse_[at(row)], shape_.value_dim);
    }
  };
  const Index tasks = shape_.batch * shape_.kv_heads * chunk_, of_task = group() * held_.top_k,
              at_once = std::max<Index>(1, store_.heads_at_once() / of_task);
  for (Index first = 0; first < tasks; first += (std::min)(at_once, tasks - first)) {
    const Index count = (std::min)(at_once, tasks - first);
    store_.expect_reading(count * of_task);
    executor.for_each(count, [&](Index task, Index worker) { attend(first + task, worker); });
  }
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
template <class Call>
void landmark_cache<T, P, Map, Finder>::write(const Call& call) const {
  using To = typename decltype(call.out)::Element;
  for (Index row = 0; row < shape_.batch * shape_.heads * chunk_; ++row) {
    const Index i = row % chunk_, h = row / chunk_ % shape_.heads, b = row / chunk_ / shape_.heads;
    To* to = call.out.row(b, h, i);
    for (Index c = 0; c < shape_.value_dim; ++c)
      to[c] = static_cast<To>(out_[at(row * shape_.value_dim + c)]);
    if (call.lse.data != nullptr) call.lse(b, h, i) = lse_[at(row)];
  }
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
template <class Call, class E>
void landmark_cache<T, P, Map, Finder>::weigh_tokens(const Call& call, const E& executor) {
  const Index d = shape_.head_dim, open = store_.counts().open(), kv_rows = shape_.batch * shape_.kv_heads;
  open_keys_.resize(at(kv_rows * open * d));
  executor.for_each(kv_rows, [&](Index kv_row, Index) {
    Real* keys = open_keys_.data() + kv_row * open * d;
    const auto raw = store_.open_k().matrix(kv_row / shape_.kv_heads, kv_row % shape_.kv_heads);
    detail::copy_rows(raw.data, raw.row_stride, open, d, keys);
    position_.encode(MatrixView<Real>{keys, open, d, d}, 0, Role::key);
  });

  const Index q_room = group() * padded_head_dim(), most_places = held_.top_k + 1,
              room = detail::round_up(options_.block_size, w) + w + (1 + most_places) * q_room;
  worker_rows_.resize((std::max)(worker_rows_.size(), at(executor.workers() * room)));
  worker_places_.resize((std::max)(worker_places_.size(), at(executor.workers() * most_places)));
  masses_.resize(at(shape_.batch * shape_.heads * chunk_));
  const auto weigh = [&](Index task, Index worker) {
    const Index i = task % chunk_, kv_head = task / chunk_ % shape_.kv_heads,
                b = task / chunk_ / shape_.kv_heads;
    Real* open_queries = worker_rows_.data() + worker * room;
    detail::PlacedRows<Real> placed{open_queries + q_room, q_room,
                                    worker_places_.data() + worker * most_places, most_places};
    Real* scores = placed.rows + most_places * q_room;
    const auto query_at = [&](Index g, Index place) {
      const Real* rows = placed.at(encodes ? position_of(i) - place : 0, [&](Real* to) {
        encode_queries(call.q, b, kv_head, i, encodes ? position_of(i) - place : 0, to);
      });
      return rows + g * padded_head_dim();
    };
    encode_queries<Real>(call.q, b, kv_head, i, encodes ? first_ + i : 0, open_queries);
    const MatrixView<const Real> open_rows{open_keys_.data() + (b * shape_.kv_heads + kv_head) * open * d,
                                           open, d, d};
    for (Index g = 0; g < group(); ++g) {
      detail::ScoreMass<Real> attended, dropped;
      for (Index j = 0; j <= first_ + i; j += options_.block_size) {
        const Index tokens = (std::min)(options_.block_size - 1, first_ + i + 1 - j);
        detail::add_sample<Real>(open_queries + g * padded_head_dim(), padded_head_dim(),
                                 {{open_rows.row(j), open - j, d, d}, {}, true},
                                 TokenSample::of(tokens, tokens), tokens, scores, attended);
      }
      const Index h = kv_head * group() + g, tokens = options_.block_size - 1;
      const std::span<const Index> chosen = retrieved(b, h, i);
      const auto sample = TokenSample::of(tokens, options_.mass_sample);
      for (Index n = 0, rank = 0; n < held_.blocks; ++n) {
        const bool is_chosen = rank < held_.top_k && chosen[at(rank)] == n;
        const Real* q = query_at(g, is_chosen ? map_.attended(held_, n, rank) : map_.scored(held_, n));
        detail::add_sample<T>(q, padded_head_dim(), store_.rows(b, kv_head, n),
                              is_chosen ? TokenSample::of(tokens, tokens) : sample, tokens, scores,
                              is_chosen ? attended : dropped);
        if (is_chosen) ++rank;
      }
      masses_[at((b * shape_.heads + h) * chunk_ + i)] = {attended.lse(), dropped.lse()};
    }
  };
  const Index tasks = kv_rows * chunk_, of_task = std::max<Index>(1, held_.blocks),
              at_once = std::max<Index>(1, store_.heads_at_once() / of_task);
  for (Index first = 0; first < tasks; first += (std::min)(at_once, tasks - first)) {
    const Index count = (std::min)(at_once, tasks - first);
    store_.expect_reading(count * of_task);
    executor.for_each(count, [&](Index task, Index worker) { weigh(first + task, worker); });
  }
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
void landmark_cache<T, P, Map, Finder>::decode_block(Index b, Index n, TensorView<Real> k,
                                                     TensorView<Real> v) const {
  check_block("landmark_cache::decode_block", b, n);
  detail::check_tokens("landmark_cache::decode_block", k, v, 1, shape_);
  if (k.rows != options_.block_size - 1)
    detail::refuse("landmark_cache::decode_block", "the number of rows of k", std::to_string(k.rows),
                   std::to_string(options_.block_size - 1));
  for (Index h = 0; h < shape_.kv_heads; ++h) {
    const auto run = store_.rows(b, h, n);
    for (Index j = 0; j < k.rows; ++j) {
      if constexpr (std::is_same_v<T, std::int8_t>) {
        detail::convert_rows(run.k.row(j), k.cols, run.k_scale + j, 1, k.cols, k.row(0, h, j), k.cols);
        detail::convert_rows(run.v.row(j), v.cols, run.v_scale + j, 1, v.cols, v.row(0, h, j), v.cols);
      } else {
        detail::convert_rows(run.k.row(j), k.cols, 1, k.cols, k.row(0, h, j), k.cols);
        detail::convert_rows(run.v.row(j), v.cols, 1, v.cols, v.row(0, h, j), v.cols);
      }
    }
  }
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
LandmarkMass landmark_cache<T, P, Map, Finder>::mass(Index b, Index h, Index i) const {
  if (options_.mass_sample == 0) detail::refuse("landmark_cache::mass", "mass_sample", "0", "at least 1");
  const auto query = at((b * shape_.heads + h) * chunk_ + i);
  if (i < 0 || i >= chunk_ || query >= masses_.size()) {
    detail::refuse("landmark_cache::mass", "the query", std::to_string(i),
                   "one of the " + std::to_string(chunk_) + " of the last call");
  }
  return masses_[query];
}

LONGSPAN_NAMESPACE_END
