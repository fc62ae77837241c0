// Dilated attention: each branch is computed in tiles on strided views of the tensors. The results of the branches are
// merged row by row, in the order of the branches, while the rows are in the cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>

#include "longspan/detail/attend.hpp"
#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/dilated/row_tiles.hpp"
#include "longspan/detail/dilated/rows.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/dilation.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The options of a call.
struct Dilation {
  std::span<const Branch> branches;
  Phase phase = Phase::modulo;
  Overlap overlap = Overlap::multiset;
  bool zero_padding = false;
};

/// Cuts a branch into groups, which are processed one after the other. A group is one segment or, if segments keep
/// few rows, as many segments as fit into 4096 tokens; a tile may then span several segments and has no idle lanes.
/// The cuts depend only on the branch.
struct BranchGroups {
  Index segment;
  Index step;
  Index length;      ///< tokens of a group
  Index in_segment;  ///< rows of a segment

  /// All positions are less than `end`, so segments and steps are cut to `end` without a change of the result.
  BranchGroups(const Branch& branch, Index end, bool shares_tiles)
      : segment((std::min)(branch.segment, end)), step((std::min)(branch.dilation, end)), length(segment) {
    constexpr Index most_tokens = 2048, most_rows = 256;
    if (shares_tiles && branch.segment % branch.dilation == 0 &&
        branch.segment <= (std::min)(most_tokens, end) && branch.segment / branch.dilation <= most_rows) {
      length = segment * (2 * most_tokens / segment);
      in_segment = segment / step;
    } else {
      in_segment = KeyRange::highest;
    }
  }
};

/// A source of the keys and values of a segment: the tensors of a call.
template <class Tk, class Tv>
struct TensorRows {
  using Key = Tk;
  using Value = Tv;
  /// True if the rows of several segments may be one matrix.
  static constexpr bool joins_segments = true;

  TensorView<const Tk> k;
  TensorView<const Tv> v;
  Index group;  ///< query heads per KV head

  /// `count` rows from the position `first` on, `step` apart, that head h keeps in branch n.
  KeyRun<Tk, Tv> rows(std::size_t, Index b, Index h, Index first, Index step, Index count) const {
    return {{k.row(b, h / group, first), count, k.cols, k.row_stride * step},
            {v.row(b, h / group, first), count, v.cols, v.row_stride * step},
            true};
  }
};

template <class Policy, class Source, class Tq, class To, Mask M, Score S, Position P, bool unmet>
class Dilated {
 public:
  using Tk = typename Source::Key;
  using Tv = typename Source::Value;
  using Call = Problem<Tq, Tk, Tv, To>;
  using Real = typename Policy::Real;

  /// Reads only the shapes of the keys and values in `call`: the rows come from `source`.
  Dilated(const Call& call, const Source& source, const Dilation& dilation, const M& mask, const S& score,
          const P& position, Index workers)
      : call_(call), source_(source), dilation_(dilation), mask_(mask), score_(score), position_(position) {
    // The rows of a task, about 256 KB of float outputs: enough rows for branches with a large step to fill their
    // tiles, and few enough for the L2 cache. (Half as many and four times as many are as fast.) If there are too few
    // tasks, they are cut finer, which changes no bit of the result.
    constexpr Index width = tile_lanes<Real>;
    Index tiles = 64;
    while (tiles > 4 && tiles * width * call.value_dim() > Index{1} << 16) tiles /= 2;
    const Index heads = call.q.batch * call.q.heads;
    while (tiles > 4 && heads * divide_up(call.q_len(), tiles * width) < 4 * workers) tiles /= 2;
    rows_in_task_ = (std::min)(tiles * width, call.q_len());
    tasks_in_head_ = divide_up(call.q_len(), rows_in_task_);
  }

  template <class E>
  void run(const E& executor, Workspace& workspace) {
    const WorkerScratch scratch(workspace, executor.workers(), [&](Arena& arena) { cut_worker(arena); });
    for (Index worker = 0; worker < executor.workers(); ++worker) {
      Arena arena = scratch.of_worker(worker);
      cut_worker(arena).tiles.clear();
    }
    executor.for_each(call_.q.batch * call_.q.heads * tasks_in_head_, [&](Index task, Index worker) {
      Arena arena = scratch.of_worker(worker);
      Worker own = cut_worker(arena);
      run_task(task, own);
    });
  }

 private:
  using TileMask =
      std::conditional_t<unmet, UnmetMask<M>, SegmentMask<std::conditional_t<unmet, everything, M>>>;
  using TileScore = decltype(dilated_score(std::declval<const S&>(), {}));
  using TilePosition = decltype(dilated_position(std::declval<const P&>(), {}));

  struct Worker {
    RowTiles<Policy, Tk, Tv, TileMask, TileScore, TilePosition> tiles;
    RowAccumulator<Real> rows;
  };

  /// Queries of one head: rows [first, first + count) of q.
  struct Queries {
    Index batch, head, first, count;
  };

  Index end() const { return (std::max)(call_.kv_len(), call_.first_query + call_.q_len()) + 1; }

  Worker cut_worker(Arena& arena) const {
    Index most_keys = 0;
    for (const Branch& branch : dilation_.branches) {
      const BranchGroups groups(branch, end(), Source::joins_segments);
      most_keys = (std::max)(most_keys, kept_rows((std::min)(groups.length, call_.kv_len()), 0, groups.step));
    }
    Worker worker;
    // Worth it where several groups of tiles meet the same keys: 8192 queries, segments of 2048 to 8192, take 4-6 %
    // less time (Intel AMX).
    const bool keeps = call_.q_len() > tiles_in_task * tile_lanes<Real>;
    worker.tiles = decltype(worker.tiles)::take(arena, call_.head_dim(), call_.value_dim(), most_keys,
                                                keeps ? static_cast<Index>(dilation_.branches.size()) : 0);
    worker.rows = RowAccumulator<Real>::take(arena, rows_in_task_, call_.value_dim());
    return worker;
  }

  /// Later tasks have higher heads and, within a head, lower rows, as in Forward.
  void run_task(Index task, Worker& worker) const {
    const Index head = task / tasks_in_head_, chunk = tasks_in_head_ - 1 - task % tasks_in_head_;
    const Index first = chunk * rows_in_task_;
    const Queries queries{head / call_.q.heads, head % call_.q.heads, first,
                          (std::min)(rows_in_task_, call_.q_len() - first)};
    worker.rows.queries = queries.count;
    worker.rows.clear();
    for (std::size_t n = 0; n < dilation_.branches.size(); ++n) absorb_branch(n, queries, worker);
    write_rows(worker.rows, queries.count, queries.batch, queries.head, first, call_.out, call_.lse);
  }

  void absorb_branch(std::size_t n, const Queries& queries, Worker& worker) const {
    const Branch& branch = dilation_.branches[n];
    const BranchGroups groups(branch, end(), Source::joins_segments);
    const Index offset = head_offset(dilation_.phase, queries.head, call_.q.heads, branch.dilation);
    const Index from = std::max<Index>(0, call_.first_query + queries.first);
    const Index to = call_.first_query + queries.first + queries.count;
    // Queries after the last key see the keys of their segment; a segment without keys adds nothing.
    for (Index begin = from / groups.length * groups.length; begin < (std::min)(to, call_.kv_len());
         begin += groups.length) {
      const Index length = (std::min)(groups.length, call_.kv_len() - begin);
      const DilatedRows rows{begin + offset, groups.step, groups.in_segment};
      const Index first_row = rows.row_from((std::max)(from, begin));
      const Index row_count = (std::min)(rows.row_from(to), kept_rows(groups.length, offset, groups.step)) -
                              std::max<Index>(0, first_row);
      if (row_count > 0)
        absorb_group(n, groups, rows, std::max<Index>(0, first_row), row_count, length, queries, worker);
    }
  }

  /// Absorbs the keys of a group's `length` tokens for the row_count queries from row first_row of the group on.
  void absorb_group(std::size_t n, const BranchGroups& groups, const DilatedRows& rows, Index first_row,
                    Index row_count, Index length, const Queries& queries, Worker& worker) const {
    const Index step = rows.step;
    const Index begin = rows.first / groups.length * groups.length;
    const Index keys = kept_rows(length, rows.first - begin, step);
    const Index row_of_q = rows.position(first_row) - call_.first_query;
    TensorView<const Tq> q = call_.q.slice_rows(row_of_q, row_count);
    q.row_stride *= step;
    const Index kv_head = queries.batch * call_.k.heads + queries.head / call_.group();
    const RowsToAttend<Tq, Tk, Tv> attended{
        q,
        queries.batch,
        queries.head,
        first_row,
        row_count,
        source_.rows(n, queries.batch, queries.head, rows.first, step, keys),
        static_cast<Index>(n),
        kv_head * end() + rows.first};
    const auto score = dilated_score(score_, rows);
    const auto position = dilated_position(position_, rows);
    worker.tiles.attend(attended, mask_of(n, rows), score, position, call_.scale,
                        [&](Index first, Index count, const Accumulator<Real>& seen) {
                          if (dilation_.zero_padding)
                            add_zero_keys(groups, rows, first_row + first, count, queries, seen);
                          merge_lanes(seen, count, call_.value_dim(), worker.rows,
                                      row_of_q + first * step - queries.first, step);
                        });
  }

  TileMask mask_of(std::size_t n, const DilatedRows& rows) const {
    if constexpr (unmet) {
      const bool once = dilation_.overlap == Overlap::set;
      return {&mask_, rows, dilation_.branches.first(once ? n : 0), dilation_.phase, call_.q.heads};
    } else {
      return {&mask_, rows};
    }
  }

  /// torchscale pads the last segment, and every segment to a multiple of the dilation, with rows of zeros and does not
  /// mask them: they are keys of score 0, which add to the row sum but not to the output.
  void add_zero_keys(const BranchGroups& groups, const DilatedRows& rows, Index first_row, Index count,
                     const Queries& queries, const Accumulator<Real>& seen) const {
    const Index segment = (std::min)(groups.segment, call_.kv_len()), b = queries.batch, h = queries.head;
    for (Index lane = 0; lane < count; ++lane) {
      const Index t = first_row + lane, n = rows.position(t), begin = n / groups.segment * groups.segment;
      if (begin >= call_.kv_len()) continue;  // this segment has no keys
      const Index offset = (n - begin) % groups.step;
      Index row = kept_rows((std::min)(segment, call_.kv_len() - begin), offset, rows.step);
      for (; row < divide_up(segment, rows.step); ++row) {
        const Index key = begin + offset + row * rows.step;
        if (sees(mask_, b, h, n, key)) add_key_of_zeros(seen, lane, b, h, n, key);
      }
    }
  }

  void add_key_of_zeros(const Accumulator<Real>& seen, Index lane, Index b, Index h, Index n,
                        Index key) const {
    const Real s = static_cast<Real>(score_(ScoreValue<S, Real>(0), b, h, n, key)) * score_unit<Real>;
    const Real row_max = (std::max)(seen.row_max[lane], s);
    const Real kept = std::exp((seen.row_max[lane] - row_max) / score_unit<Real>);
    seen.row_max[lane] = row_max;
    seen.sum[lane] = seen.sum[lane] * kept + std::exp((s - row_max) / score_unit<Real>);
    for (Index c = 0; c < seen.columns; ++c) seen.o[c * seen.stride + lane] *= kept;
  }

  const Call& call_;
  const Source& source_;
  const Dilation& dilation_;
  const M& mask_;
  const S& score_;
  const P& position_;
  Index rows_in_task_ = 0;
  Index tasks_in_head_ = 0;
};

/// Runs Dilated with the kind of tile mask that the call needs.
template <class Policy, class Source, class Tq, class Tk, class Tv, class To, Mask M, Score S, Position P,
          class E>
void run_dilated(const Problem<Tq, Tk, Tv, To>& call, const Source& source, const Dilation& dilation,
                 const M& mask, const S& score, const P& position, const E& executor, Workspace& workspace) {
  const auto run = [&]<bool unmet>(std::bool_constant<unmet>) {
    using Pass = Dilated<Policy, Source, Tq, To, M, S, P, unmet>;
    Pass(call, source, dilation, mask, score, position, executor.workers()).run(executor, workspace);
  };
  if constexpr (RangeMask<M>) {
    if (dilation.overlap == Overlap::multiset) return run(std::false_type());
  }
  run(std::true_type());
}

template <class Tq, class Tk, class Tv, class To, Mask M, Score S, Position P, class E>
void dilated_forward(const Problem<Tq, Tk, Tv, To>& call, const Dilation& dilation, const M& mask,
                     const S& score, const P& position, const E& executor, Workspace& workspace,
                     bool bf16_products) {
  if (call.out.batch == 0 || call.out.heads == 0 || call.out.rows == 0) return;
  const double flop = dilated_flop(dilation.branches, call.q.batch * call.q.heads, call.kv_len(),
                                   call.head_dim(), call.value_dim(), false, dilation.phase);
  const TensorRows<Tk, Tv> source{call.k, call.v, call.group()};
  run_where_it_pays(flop, least_parallel_tile_flop, executor, [&](const auto& where) {
    with_arithmetic<S, P>(call, bf16_products, where, [&]<class Policy>(const auto& on) {
      run_dilated<Policy>(call, source, dilation, mask, score, position, on, workspace);
    });
  });
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
