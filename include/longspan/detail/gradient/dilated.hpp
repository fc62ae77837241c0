// The backward pass of dilated attention: branch after branch, each on strided views of the rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "longspan/detail/attend.hpp"
#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/dilated/forward.hpp"
#include "longspan/detail/dilated/rows.hpp"
#include "longspan/detail/gradient/key_tiles.hpp"
#include "longspan/detail/gradient/products_of.hpp"
#include "longspan/detail/gradient/rows.hpp"
#include "longspan/detail/gradient/wave.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/dilation.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// For each wave of KV heads, and each branch:
///   if the weights of the branches count as constants: find D of each query in this branch
///   for each KV head and group of segments, in parallel:
///     for each query head and each group of key tiles: the queries of the segments, as the tiles take them
/// and then the sums of all branches are written. A task owns the queries and the keys of its segments.
template <class Products, class Call, Mask M, Score S, Position P, bool unmet>
class DilatedBackward {
 public:
  using Real = typename Call::Real;

  DilatedBackward(const Call& call, const Dilation& dilation, bool detached, const M& mask, const S& score,
                  const P& position, Index workers)
      : call_(call),
        dilation_(dilation),
        detached_(detached),
        mask_(mask),
        score_(score),
        position_(position) {
    const Index all_heads = std::max<Index>(1, forward().k.batch * forward().k.heads);
    heads_in_wave_ = workers == 1 ? 1 : (std::min)(2 * workers, all_heads);
  }

  template <class E>
  void run(const E& executor, Workspace& workspace) {
    const WorkerScratch scratch(
        workspace, executor.workers(), [&](Arena& arena) { cut_worker(arena); },
        [&](Arena& arena) { cut_shared(arena); });
    Arena shared = scratch.shared();
    cut_shared(shared);
    for (Index first_head = 0; wave_.enter(executor, first_head); first_head += heads_in_wave_) {
      for_each_block(executor, [&](Sum, Index, Index, const MatrixView<Real>& rows) {
        for (Index i = 0; i < rows.rows; ++i) std::fill_n(rows.row(i), rows.row_stride, Real(0));
      });
      for (std::size_t n = 0; n < dilation_.branches.size(); ++n) {
        const BranchGroups groups = groups_of(n);
        const Index tasks = wave_.heads() * divide_up(forward().kv_len(), groups.length);
        executor.for_each(tasks, [&](Index task, Index worker) {
          Arena own = scratch.of_worker(worker);
          Worker of_worker = cut_worker(own);
          take_group(n, groups, task % wave_.heads(), task / wave_.heads() * groups.length, of_worker);
        });
      }
      write(executor);
    }
  }

 private:
  using BranchMask =
      std::conditional_t<unmet, UnmetMask<M>, SegmentMask<std::conditional_t<unmet, everything, M>>>;
  using BranchScore = decltype(dilated_score(std::declval<const S&>(), {}));

  using Tiles = typename Products::template Tiles<BranchMask, BranchScore>;
  using Row = typename Tiles::Row;

  struct Worker {
    Tiles tiles;
    Real *dk = nullptr, *dv = nullptr;        ///< of a group of key tiles
    Real* dq = nullptr;                       ///< of a query block that is not full
    Real *shift = nullptr, *delta = nullptr;  ///< of the queries of a segment
    Real* weight = nullptr;                   ///< of the branch in them
  };

  /// The queries of one head that a task takes: rows of the branch from `first` on.
  struct Queries {
    Index n = 0;  ///< the head, in the wave
    DilatedRows rows;
    Index first = 0, count = 0;
    Index keys = 0;
  };

  const typename Call::Forward& forward() const { return call_.forward; }
  Index end() const { return (std::max)(forward().kv_len(), forward().first_query + forward().q_len()) + 1; }
  BranchGroups groups_of(std::size_t n) const { return {dilation_.branches[n], end(), true}; }
  Index padded_value_dim() const { return round_up(forward().value_dim(), Index{lanes<Real>}); }

  Worker cut_worker(Arena& arena) const {
    Index most_queries = 0;
    for (std::size_t n = 0; n < dilation_.branches.size(); ++n) {
      const BranchGroups groups = groups_of(n);
      most_queries =
          (std::max)(most_queries, (std::min)(forward().q_len(), kept_rows(groups.length, 0, groups.step)));
    }
    Worker worker;
    worker.tiles = Tiles::take(arena, forward().head_dim(), forward().value_dim(), most_queries);
    worker.dk = arena.take<Real>(keys_in_group<Real> * forward().head_dim());
    worker.dv = arena.take<Real>(keys_in_group<Real> * forward().value_dim());
    worker.dq = arena.take<Real>(Tiles::rows_in_block * round_up(forward().head_dim(), Index{lanes<Real>}));
    worker.shift = arena.take<Real>(most_queries);
    worker.delta = arena.take<Real>(most_queries);
    worker.weight = arena.take<Real>(most_queries);
    return worker;
  }

  void cut_shared(Arena& arena) {
    wave_ = Wave<Call, Tiles, P>::take(arena, call_, position_, heads_in_wave_);
    dq_ = arena.take<Real>(heads_in_wave_ * forward().group() * forward().q_len() * wave_.padded_head_dim());
    dk_ = arena.take<Real>(heads_in_wave_ * forward().kv_len() * wave_.padded_head_dim());
    dv_ = arena.take<Real>(heads_in_wave_ * forward().kv_len() * padded_value_dim());
  }

  // The sums of a head of the wave.
  MatrixView<Real> dq(Index n) const {
    const Index cols = wave_.padded_head_dim();
    return {dq_ + n * forward().q_len() * cols, forward().q_len(), forward().head_dim(), cols};
  }
  MatrixView<Real> dk(Index n) const {
    const Index cols = wave_.padded_head_dim();
    return {dk_ + n * forward().kv_len() * cols, forward().kv_len(), forward().head_dim(), cols};
  }
  MatrixView<Real> dv(Index n) const {
    const Index cols = padded_value_dim();
    return {dv_ + n * forward().kv_len() * cols, forward().kv_len(), forward().value_dim(), cols};
  }

  /// `count` rows from position `first` on, `step` apart.
  template <class T>
  static MatrixView<T> strided(const MatrixView<T>& x, Index first, Index step, Index count) {
    return {x.row(first), count, x.cols, x.row_stride * step};
  }

  BranchMask mask_of(std::size_t n, const DilatedRows& rows) const {
    if constexpr (unmet) {
      const bool once = dilation_.overlap == Overlap::set;
      return {&mask_, rows, dilation_.branches.first(once ? n : 0), dilation_.phase, forward().q.heads};
    } else {
      return {&mask_, rows};
    }
  }

  /// The segments that begin at position `begin`, for the query heads of the KV head `kv`.
  void take_group(std::size_t n, const BranchGroups& groups, Index kv, Index begin, Worker& worker) const {
    for (Index g = 0; g < forward().group(); ++g) {
      Queries queries;
      queries.n = kv * forward().group() + g;
      const Index offset = head_offset(dilation_.phase, wave_.query_head(queries.n).head, forward().q.heads,
                                       dilation_.branches[n].dilation);
      queries.rows = {begin + offset, groups.step, groups.in_segment};
      queries.keys = kept_rows((std::min)(groups.length, forward().kv_len() - begin), offset, groups.step);
      const Index from = std::max<Index>(0, forward().first_query),
                  to = forward().first_query + forward().q_len();
      queries.first = std::max<Index>(0, queries.rows.row_from((std::max)(from, begin)));
      queries.count = (std::min)(queries.rows.row_from(to), kept_rows(groups.length, offset, groups.step)) -
                      queries.first;
      if (queries.keys > 0 && queries.count > 0) take_head(n, queries, kv, worker);
    }
  }

  void take_head(std::size_t n, const Queries& queries, Index kv, Worker& worker) const {
    const Index step = queries.rows.step;
    const Index first_row = queries.rows.position(queries.first) - forward().first_query;
    for (Index i = 0; i < queries.count; ++i) {
      worker.shift[i] = wave_.shift(queries.n)[first_row + i * step];
      worker.delta[i] = wave_.delta(queries.n)[first_row + i * step];
    }
    const BranchMask mask = mask_of(n, queries.rows);
    const auto score = dilated_score(score_, queries.rows);
    if (detached_) find_means(n, queries, kv, mask, score, worker);
    for_each_key_group(queries, kv, mask, score, worker, [&](Index first, Index keys) {
      for_each_query_block(queries, worker,
                           [&](QueryBlock<Real, Row>& block) { absorb(queries, block, worker); });
      const MatrixView<Real> to_k{worker.dk, keys, forward().head_dim(), forward().head_dim()},
          to_v{worker.dv, keys, forward().value_dim(), forward().value_dim()};
      worker.tiles.finish(to_k, to_v);
      add_rows(to_k, strided(dk(kv), queries.rows.position(first), step, keys));
      add_rows(to_v, strided(dv(kv), queries.rows.position(first), step, keys));
    });
  }

  /// Starts the tiles with each group of keys in turn, and calls work(first, keys).
  template <class Score_, class Work>
  void for_each_key_group(const Queries& queries, Index kv, const BranchMask& mask, const Score_& score,
                          Worker& worker, const Work& work) const {
    for (Index first = 0; first < queries.keys; first += keys_in_group<Real>) {
      const Index keys = (std::min)(keys_in_group<Real>, queries.keys - first),
                  at = queries.rows.position(first);
      worker.tiles.start(strided(wave_.k(kv), at, queries.rows.step, keys),
                         strided(wave_.v(kv), at, queries.rows.step, keys), first, mask, score,
                         forward().scale);
      const auto [b, h] = wave_.query_head(queries.n);
      worker.tiles.enter_head(b, h, queries.first);
      work(first, keys);
    }
  }

  template <class Work>
  void for_each_query_block(const Queries& queries, const Worker& worker, const Work& work) const {
    const Index step = queries.rows.step;
    for (Index first = 0; first < queries.count; first += Tiles::rows_in_block) {
      const Index count = (std::min)(Tiles::rows_in_block, queries.count - first);
      const Index at = queries.rows.position(queries.first + first) - forward().first_query;
      QueryBlock<Real, Row> block{strided(wave_.q(queries.n), at, step, count),
                                  strided(wave_.dout(queries.n), at, step, count), worker.shift + first,
                                  worker.delta + first, first};
      work(block);
    }
  }

  /// The product for dq writes whole register tiles, so a block that is not full gets memory of its own.
  void absorb(const Queries& queries, QueryBlock<Real, Row>& block, Worker& worker) const {
    const Index at = queries.rows.position(queries.first + block.first_row) - forward().first_query;
    const MatrixView<Real> to = strided(dq(queries.n), at, queries.rows.step, block.q.rows);
    block.dq_is_set = block.q.rows == Tiles::rows_in_block;
    block.dq = block.dq_is_set ? to.data : worker.dq;
    block.dq_stride = block.dq_is_set ? to.row_stride : wave_.padded_head_dim();
    if (worker.tiles.absorb(block) && !block.dq_is_set)
      add_rows(MatrixView<Real>{worker.dq, to.rows, to.cols, wave_.padded_head_dim()}, to);
  }

  static void add_rows(const MatrixView<Real>& from, const MatrixView<Real>& to) {
    for (Index i = 0; i < from.rows; ++i) {
      const Real* x = from.row(i);
      Real* y = to.row(i);
      for (Index c = 0; c < from.cols; ++c) y[c] += x[c];
    }
  }

  /// D of each query in this branch alone: the mean of dP over the keys of the branch, including keys of zeros.
  void find_means(std::size_t n, const Queries& queries, Index kv, const BranchMask& mask,
                  const BranchScore& score, Worker& worker) const {
    std::fill_n(worker.delta, queries.count, Real(0));
    std::fill_n(worker.weight, queries.count, Real(0));
    Real zeros[std::size_t(Tiles::rows_in_block)] = {}, means[std::size_t(Tiles::rows_in_block)];
    for_each_key_group(queries, kv, mask, score, worker, [&](Index, Index) {
      for_each_query_block(queries, worker, [&](QueryBlock<Real, Row>& block) {
        std::fill_n(means, block.q.rows, Real(0));
        block.delta = zeros;
        if constexpr (Products::measures) worker.tiles.measure(block, worker.weight + block.first_row, means);
        for (Index i = 0; i < block.q.rows; ++i) worker.delta[block.first_row + i] += means[i];
      });
    });
    for (Index i = 0; i < queries.count; ++i) {
      if (dilation_.zero_padding) worker.weight[i] += weight_of_zeros(n, queries, i, worker.shift[i]);
      worker.delta[i] = worker.weight[i] == Real(0) ? Real(0) : worker.delta[i] / worker.weight[i];
    }
  }

  /// The weights of the zeros that torchscale appends to the segment of a query (see Dilated::add_zero_keys).
  Real weight_of_zeros(std::size_t n, const Queries& queries, Index i, Real shift) const {
    const BranchGroups groups = groups_of(n);
    const Index segment = (std::min)(groups.segment, forward().kv_len());
    const auto [b, h] = wave_.query_head(queries.n);
    const Index position = queries.rows.position(queries.first + i);
    const Index begin = position / groups.segment * groups.segment;
    if (begin >= forward().kv_len()) return Real(0);
    const Index offset = (position - begin) % groups.step;
    Real sum = 0;
    Index row = kept_rows((std::min)(segment, forward().kv_len() - begin), offset, groups.step);
    for (; row < divide_up(segment, groups.step); ++row) {
      const Index key = begin + offset + row * groups.step;
      if (!sees(mask_, b, h, position, key)) continue;
      const Real s = static_cast<Real>(score_(ScoreValue<S, Real>(0), b, h, position, key));
      sum += std::exp(s - shift / score_unit<Real>);
    }
    return sum;
  }

  enum class Sum : unsigned char { dq, dk, dv };

  /// work(sum, n, first, rows) for blocks of rows of the sums of each head n, from row `first` on, in parallel.
  template <class E, class Work>
  void for_each_block(const E& executor, const Work& work) const {
    const auto take = [&](Sum sum, const MatrixView<Real>& all, Index n, Index block) {
      const Index first = block * Tiles::rows_in_block;
      work(sum, n, first, slice_rows(all, first, (std::min)(Tiles::rows_in_block, all.rows - first)));
    };
    const Index of_queries = wave_.queries() * wave_.blocks();
    const Index of_head = divide_up(forward().kv_len(), Tiles::rows_in_block);
    executor.for_each(of_queries + wave_.heads() * of_head, [&](Index task, Index) {
      if (task < of_queries) {
        const Index n = task / wave_.blocks();
        return take(Sum::dq, dq(n), n, task % wave_.blocks());
      }
      const Index n = (task - of_queries) / of_head, block = (task - of_queries) % of_head;
      take(Sum::dk, dk(n), n, block);
      take(Sum::dv, dv(n), n, block);
    });
  }

  template <class E>
  void write(const E& executor) const {
    for_each_block(executor, [&](Sum sum, Index n, Index first, const MatrixView<Real>& rows) {
      const auto [b, h] = sum == Sum::dq ? wave_.query_head(n) : wave_.kv_head(n);
      const auto rows_of = [&, batch = b, head = h](const auto& to) {
        return to.slice_rows(first, rows.rows).matrix(batch, head);
      };
      switch (sum) {
        case Sum::dq:
          return finish_rows(rows, forward().scale, position_, forward().first_query + first, Role::query,
                             rows_of(call_.dq));
        case Sum::dk:
          return finish_rows(rows, forward().scale, position_, first, Role::key, rows_of(call_.dk));
        case Sum::dv:
          return finish_rows(rows, 1, no_position{}, first, Role::key, rows_of(call_.dv));
      }
    });
  }

  const Call& call_;
  const Dilation& dilation_;
  bool detached_;
  const M& mask_;
  const S& score_;
  const P& position_;
  Index heads_in_wave_ = 1;
  Wave<Call, Tiles, P> wave_;
  Real *dq_ = nullptr, *dk_ = nullptr,
       *dv_ = nullptr;  ///< sums over the branches, [heads of the wave][rows][padded]
};

/// Writes dq, dk and dv of dilated attention.
template <class Call, Mask M, Score S, Position P, class E>
void differentiate_dilated(const Call& call, const Dilation& dilation, bool detached, const M& mask,
                           const S& score, const P& position, const E& executor, Workspace& workspace,
                           bool bf16_products) {
  const auto& forward = call.forward;
  const double flop = dilated_flop(dilation.branches, forward.q.batch * forward.q.heads, forward.kv_len(),
                                   forward.head_dim(), forward.value_dim(), false, dilation.phase);
  run_where_it_pays(2.5 * flop, least_parallel_tile_flop, executor, [&](const auto& where) {
    with_products<P>(call, bf16_products && !detached, where, [&]<class Products>(const auto& on) {
      const auto run = [&]<bool unmet>(std::bool_constant<unmet>) {
        DilatedBackward<Products, Call, M, S, P, unmet>(call, dilation, detached, mask, score, position,
                                                        on.workers())
            .run(on, workspace);
      };
      if constexpr (RangeMask<M>) {
        if (dilation.overlap == Overlap::multiset) return run(std::false_type());
      }
      run(std::true_type());
    });
  });
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
