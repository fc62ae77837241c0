// The task loop of the gradient of landmark attention.
#pragma once

#include <algorithm>
#include <cmath>

#include "longspan/detail/attend.hpp"
#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/gradient/backward.hpp"
#include "longspan/detail/gradient/landmark_key_tiles.hpp"
#include "longspan/detail/gradient/landmark_sums.hpp"
#include "longspan/detail/landmark/plan.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// As Backward, with chunks of whole landmark blocks in the place of groups of key tiles; a chunk belongs to the span
/// in which it begins. What needs more than one pass over keys:
///   a block wider than a group   its pieces are taken twice, first for the softmax of the block
///   controlled blocks            all keys of a KV head are one span, which is taken twice, first for the softmax of
///                                the landmarks of the controlled blocks
template <class Call, Mask M, Score S, Position P>
class LandmarkBackward : public Backward<LandmarkKeyTiles<typename Call::Real, M, S>, Call, M, S, P,
                                         LandmarkBackward<Call, M, S, P>> {
 public:
  using Real = typename Call::Real;
  using Tiles = LandmarkKeyTiles<Real, M, S>;
  using Base = Backward<Tiles, Call, M, S, P, LandmarkBackward>;

  /// `dcmt.data` is null if the gradient of the CMT is not wanted.
  LandmarkBackward(const Call& call, const LandmarkOptions& options, RowsView<float> dcmt, const M& mask,
                   const S& score, const P& position, Index workers)
      : Base(call, mask, score, position, workers), options_(options), dcmt_(dcmt) {
    const Index widest = widest_block(options.landmarks, call.forward.k.batch, call.forward.kv_len());
    has_wide_ = options.grouped && widest > keys_in_group<Real>;
    if (options.has_controlled() && plan_.spans > 0) {
      plan_.length = plan_.length * plan_.spans;
      plan_.spans = 1;
    }
  }

 private:
  friend Base;
  using Base::call_;
  using Base::forward;
  using Base::plan_;
  using Base::wave_;

  struct Worker : Base::Worker {
    LandmarkRows<Real> rows;
  };

  Worker cut_worker(Arena& arena) const {
    const auto& of = forward();
    Worker worker{Base::cut_worker(arena), {}};
    worker.rows = LandmarkRows<Real>::take(arena, of.group() * round_up(of.q_len(), rows_in_query_block),
                                           has_wide_, options_.has_controlled());
    return worker;
  }

  void cut_shared(Arena& arena) {
    Base::cut_shared(arena);
    blocks_ = LandmarkPlan::take(arena, options_.landmarks, forward().k.batch, forward().kv_len(),
                                 keys_in_group<Real>, options_.landmarks.same_in_all_rows(),
                                 [](Index, Index) { return false; });
  }

  void take_span(Worker& worker, Index n, Index slot, Index span) const {
    std::fill_n(&this->is_set(slot, n * forward().group(), 0), forward().group() * wave_.blocks(), false);
    if (options_.has_controlled()) {
      clear(worker.rows.controlled);
      for_each_chunk(n, span, [&](const LandmarkChunk& chunk) { measure_controlled(worker, n, chunk); });
      finish_controlled(worker, n);
    }
    for_each_chunk(n, span, [&](const LandmarkChunk& chunk) {
      if (has_two_passes(wave_.kv_head(n).batch, chunk)) measure_wide(worker, n, chunk);
      for_each_piece(worker, n, chunk, [&](Index first, Index keys) {
        for_each_query_block(
            worker, n, [&](QueryBlock<Real> block, const LandmarkRows<Real>& rows, Index query, Index at) {
              bool& set = this->is_set(slot, query, at);
              block.dq = this->sum_of(slot, query, at);
              block.dq_stride = wave_.padded_head_dim();
              block.dq_is_set = set;
              set |= worker.tiles.absorb(block, rows);
            });
        this->write_keys(worker, wave_.kv_head(n), first, keys);
      });
    });
  }

  template <class Work>
  void for_each_chunk(Index n, Index span, const Work& work) const {
    const KeyRange keys{span * plan_.length, (std::min)(forward().kv_len(), (span + 1) * plan_.length)};
    for (const LandmarkChunk& chunk : blocks_.chunks(wave_.kv_head(n).batch, keys)) {
      if (chunk.keys.begin >= keys.begin) work(chunk);
    }
  }

  /// Starts the tiles with the keys of a chunk, or with a piece of it after the other; then calls work(first, keys).
  template <class Work>
  void for_each_piece(Worker& worker, Index n, const LandmarkChunk& chunk, const Work& work) const {
    for (Index first = chunk.keys.begin; first < chunk.keys.end; first += keys_in_group<Real>) {
      const Index keys = (std::min)(keys_in_group<Real>, chunk.keys.end - first);
      worker.tiles.start(slice_rows(wave_.k(n), first, keys), slice_rows(wave_.v(n), first, keys), first,
                         chunk, options_, wave_.kv_head(n).batch, forward().kv_len(), this->mask_,
                         this->score_, forward().scale);
      work(first, keys);
    }
  }

  /// work(block, rows, query head of the wave, number of the block)
  template <class Work>
  void for_each_query_block(Worker& worker, Index n, const Work& work) const {
    for (Index g = 0; g < forward().group(); ++g) {
      const Index query = n * forward().group() + g;
      const MatrixView<const Real> q = wave_.q(query), dout = wave_.dout(query);
      worker.tiles.enter_head(wave_.query_head(query).batch, wave_.query_head(query).head,
                              forward().first_query);
      for (Index block = 0; block < wave_.blocks(); ++block) {
        const Index first = block * rows_in_query_block, count = wave_.rows_of_block(block);
        work(QueryBlock<Real>{slice_rows(q, first, count), slice_rows(dout, first, count),
                              wave_.shift(query) + first, wave_.delta(query) + first, first},
             worker.rows.from(g * wave_.padded_rows() + first), query, block);
      }
    }
  }

  template <class T>
  void clear(T* rows) const {
    std::fill_n(rows, forward().group() * wave_.padded_rows(), T());
  }

  bool has_two_passes(Index b, const LandmarkChunk& chunk) const {
    const bool closed = chunk.first_block < options_.landmarks.count(b, forward().kv_len());
    return options_.grouped && closed && Tiles::is_wide(chunk);
  }

  void measure_wide(Worker& worker, Index n, const LandmarkChunk& chunk) const {
    clear(worker.rows.wide);
    for_each_piece(worker, n, chunk, [&](Index, Index) {
      for_each_query_block(worker, n,
                           [&](const QueryBlock<Real>& block, const LandmarkRows<Real>& rows, Index, Index) {
                             worker.tiles.measure_wide(block, rows);
                           });
    });
  }

  void measure_controlled(Worker& worker, Index n, const LandmarkChunk& chunk) const {
    if (!has_controlled_block(wave_.kv_head(n).batch, chunk)) return;
    if (has_two_passes(wave_.kv_head(n).batch, chunk)) measure_wide(worker, n, chunk);
    for_each_piece(worker, n, chunk, [&](Index first, Index keys) {
      if (first + keys < chunk.keys.end) return;
      for_each_query_block(worker, n,
                           [&](const QueryBlock<Real>& block, const LandmarkRows<Real>& rows, Index, Index) {
                             worker.tiles.measure_controlled(block, rows);
                           });
    });
  }
  bool has_controlled_block(Index b, const LandmarkChunk& chunk) const {
    for (Index m = chunk.first_block; m < chunk.first_block + chunk.blocks; ++m) {
      if (m < options_.landmarks.count(b, forward().kv_len()) && options_.is_controlled(b, m)) return true;
    }
    return false;
  }

  /// The CMT has the weight w = exp(cmt - lse), unless it is cut off, and the controlled blocks share it: each has the
  /// gate w exp(score of its landmark) / sum of these, and the gradient of that score is gate (D_m - A), where A is
  /// the mean of D_m. The gradient of the CMT is w (A - D).
  void finish_controlled(Worker& worker, Index n) const {
    constexpr double unit = double(score_unit<Real>);
    for_each_query_block(
        worker, n, [&](const QueryBlock<Real>& block, const LandmarkRows<Real>& rows, Index query, Index) {
          const auto [b, h] = wave_.query_head(query);
          for (Index i = 0; i < block.q.rows; ++i) {
            const float cmt = options_.control.cmt(b, h, block.first_row + i);
            const double log_weight =
                is_minus_infinity(cmt) ? -1e300 : double(cmt) - double(block.shift[i]) / unit;
            const double weight = std::exp(log_weight);
            const bool is_cut = weight < options_.control.cutoff;
            const auto& seen = rows.controlled[i];
            const Real mean = is_cut ? Real(0) : seen.mean();
            rows.controlled_delta[i] = mean;
            rows.controlled_shift[i] =
                is_cut || seen.empty() || weight == 0
                    ? shift_of(minus_infinity<Real>())
                    : static_cast<Real>(double(seen.top) + unit * (std::log(seen.weights) - log_weight));
            if (dcmt_.data != nullptr) {
              dcmt_(b, h, block.first_row + i) =
                  weight == 0 ? 0.0f : static_cast<float>(weight * (double(mean) - double(block.delta[i])));
            }
          }
        });
  }

  const LandmarkOptions& options_;
  RowsView<float> dcmt_;
  LandmarkPlan blocks_;
  bool has_wide_ = false;
};

/// Writes dq, dk and dv of landmark attention, and dcmt if its data is not null.
template <class Call, Mask M, Score S, Position P, class E>
void differentiate_landmarks(const Call& call, const LandmarkOptions& options, RowsView<float> dcmt,
                             const M& mask, const S& score, const P& position, const E& executor,
                             Workspace& workspace) {
  run_where_it_pays(2.5 * call.forward.flop(), least_parallel_tile_flop, executor, [&](const auto& where) {
    LandmarkBackward<Call, M, S, P>(call, options, dcmt, mask, score, position, where.workers())
        .run(where, workspace);
  });
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
