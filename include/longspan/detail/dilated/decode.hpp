// Dilated attention for one query per head: decodes the branches as if they were batch rows, then merges them.
#pragma once

#include <algorithm>
#include <span>
#include <type_traits>

#include "longspan/detail/attend.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/call/slices.hpp"
#include "longspan/detail/decode/decode.hpp"
#include "longspan/detail/dilated/forward.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/dilation.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/partial.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The keys that a causal query sees in each branch, numbered from the first key of its segment. Branch n takes the
/// place of batch row n in Decode.
template <class Source>
class BranchKeys {
 public:
  using Key = typename Source::Key;
  using Value = typename Source::Value;

  BranchKeys(const Source& source, const Dilation& dilation, Index b, Index heads, Index position,
             Index head_dim, Index value_dim)
      : source_(source),
        dilation_(dilation),
        b_(b),
        heads_(heads),
        position_(position),
        head_dim_(head_dim),
        value_dim_(value_dim) {}

  /// The longest run that begins at keys.begin and ends at keys.end or earlier.
  KeyRun<Key, Value> run(Index n, Index h, KeyRange keys) const {
    const Index count = (std::min)(keys.end, seen(n, h)) - keys.begin, wanted = keys.end - keys.begin;
    if (count <= 0) return {{nullptr, wanted, head_dim_, 0}, {nullptr, wanted, value_dim_, 0}, false};
    const Branch& branch = branch_of(n);
    const Index first = position_ / branch.segment * branch.segment + offset(n, h);
    const auto rows = source_.rows(static_cast<std::size_t>(n), b_, h, first, branch.dilation, seen(n, h));
    return slice_rows(rows, keys.begin, count);
  }

  /// The largest number of keys of any branch.
  Index most() const {
    Index most = 0;
    for (const Branch& branch : dilation_.branches)
      most = (std::max)(most, position_ % branch.segment / branch.dilation + 1);
    return most;
  }

 private:
  const Branch& branch_of(Index n) const { return dilation_.branches[static_cast<std::size_t>(n)]; }
  Index offset(Index n, Index h) const {
    return head_offset(dilation_.phase, h, heads_, branch_of(n).dilation);
  }
  /// The number of keys that the query sees in branch n; 0 if the branch does not keep the query's own row.
  Index seen(Index n, Index h) const {
    const Index row = position_ % branch_of(n).segment - offset(n, h), step = branch_of(n).dilation;
    return row >= 0 && row % step == 0 ? row / step + 1 : 0;
  }

  const Source& source_;
  const Dilation& dilation_;
  Index b_, heads_, position_, head_dim_, value_dim_;
};

/// One branch of BranchKeys, in the place of batch row 0.
template <class Source>
struct OneBranchKeys {
  const BranchKeys<Source>& keys;
  Index branch;

  auto run(Index, Index h, KeyRange range) const { return keys.run(branch, h, range); }
};

/// The score of a query and keys that are numbered from the first key of their segment in one branch.
template <Score S>
struct BranchScore {
  const S& score;
  const Dilation& dilation;
  Branch branch;
  Index b, heads;
  Index begin;  ///< of the segment

  template <class Real>
  Real operator()(Real s, Index, Index h, Index t, Index u) const {
    using Value = ScoreValue<S, Real>;
    const Index first = begin + head_offset(dilation.phase, h, heads, branch.dilation);
    return static_cast<Real>(
        score(static_cast<Value>(s), b, h, first + t * branch.dilation, first + u * branch.dilation));
  }
  template <class Real>
  requires PacketScore<S, Packet<Real>>
  Packet<Real> on_packet(Packet<Real> s, Index h, Packet<Real> distance) const {
    return score.on_packet(s, h, distance * broadcast(static_cast<Real>(branch.dilation)));
  }
};

/// A causal call with one query per head, with keys whose positions are already encoded. Rows are read once; a tile
/// would compute 16 queries, 15 of which do not exist. One token after 4096 others (8 heads, d = 64, one thread): this
/// 162 us, tiles 737 us.
template <class Tq, class Tk, class Tv, class To, class Source, Score S, class E>
void decode_dilated(const Problem<Tq, Tk, Tv, To>& call, const Source& source, const Dilation& dilation,
                    const S& score, const E& executor, Workspace& workspace) {
  using Real = Arithmetic<Tq>;
  const Index heads = call.q.heads, branches = std::ssize(dilation.branches);
  for (Index b = 0; b < call.q.batch; ++b) {
    const BranchKeys<Source> keys(source, dilation, b, heads, call.first_query, call.head_dim(),
                                  call.value_dim());
    TensorView<Real> outs, whole;
    RowsView<Real> lses, lse;
    Partial<const Real>* parts = nullptr;
    take_scratch(workspace, [&](Arena& arena) {
      outs = compact_view(arena.take<Real>(branches * heads * call.value_dim()), branches, heads, 1,
                          call.value_dim());
      lses = compact_rows_view(arena.take<Real>(branches * heads), branches, heads, 1);
      whole = compact_view(arena.take<Real>(heads * call.value_dim()), 1, heads, 1, call.value_dim());
      lse = compact_rows_view(arena.take<Real>(heads), 1, heads, 1);
      parts = arena.take<Partial<const Real>>(branches);
    });
    TensorView<const Tq> q = batch_rows(call.q, b, 1);
    q.batch = branches;
    q.batch_stride = 0;
    const TensorView<const Tk> k{nullptr, branches, heads, keys.most(), call.head_dim(), 0, 0, 0};
    const TensorView<const Tv> v{nullptr, branches, heads, keys.most(), call.value_dim(), 0, 0, 0};
    const Problem<Tq, Tk, Tv, Real> of_branches{q, k, v, outs, lses, 0, call.scale};
    const auto decode = [&](const auto& problem, const auto& its_keys, const auto& its_score) {
      run_where_it_pays(problem.flop(), least_parallel_decode_flop, executor, [&](const auto& where) {
        Decode(problem, its_keys, everything{}, its_score).run(where, workspace.inner());
      });
    };
    if constexpr (std::is_same_v<S, unchanged>) {
      decode(of_branches, keys, score);
    } else {
      // A score needs the positions of keys, which differ from branch to branch.
      for (Index n = 0; n < branches; ++n) {
        const Branch& branch = dilation.branches[static_cast<std::size_t>(n)];
        const Index into = call.first_query % branch.segment;
        auto of_branch = of_branches;
        of_branch.q.batch = of_branch.k.batch = of_branch.v.batch = 1;
        of_branch.out = batch_rows(outs, n, 1);
        of_branch.lse = batch_rows(lses, n, 1);
        of_branch.first_query = into / branch.dilation;
        decode(of_branch, OneBranchKeys<Source>{keys, n},
               BranchScore<S>{score, dilation, branch, b, heads, call.first_query - into});
      }
    }
    for (Index n = 0; n < branches; ++n)
      parts[n] = {TensorView<const Real>(batch_rows(outs, n, 1)),
                  RowsView<const Real>(batch_rows(lses, n, 1))};
    merge(std::span<const Partial<const Real>>(parts, static_cast<std::size_t>(branches)),
          Partial<Real>{whole, lse}, serial{});
    for (Index h = 0; h < heads; ++h) {
      const Real* from = whole.row(0, h, 0);
      std::transform(from, from + call.value_dim(), call.out.row(b, h, 0),
                     [](Real x) { return static_cast<To>(x); });
      if (call.lse.data != nullptr) call.lse(b, h, 0) = lse(0, h, 0);
    }
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
