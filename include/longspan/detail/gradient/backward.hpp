// The task loop of the backward pass: KV heads in groups, their keys in spans, one task for each span.
#pragma once

#include <algorithm>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/gradient/key_tiles.hpp"
#include "longspan/detail/gradient/rows.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// How the keys of a call are cut into spans. A task takes one span of one KV head through all queries: it owns the dk and
/// dv of these keys, and a sum of dq over them. The sums of all spans are then added in the order of the keys. The cuts
/// depend on the number of keys alone, and so do the bits of dq.
struct SpanPlan {
  static constexpr Index most_spans = 8;  ///< that are held at a time
  static constexpr Index longest_span = Index{1} << 13;

  Index span = 1;  ///< keys in a span
  Index spans = 0;

  SpanPlan(Index keys, Index keys_in_group_) {
    span = round_up(std::clamp(divide_up(keys, most_spans), Index{1}, longest_span), keys_in_group_);
    spans = divide_up(keys, span);
  }
};

/// For each wave of KV heads, and of at most SpanPlan::most_spans spans of their keys:
///   convert the rows of q, k, v and dout that the kernel cannot read in place; shift and D of each query
///   for each KV head and span, in parallel:
///     for each group of key tiles of the span: for each query head and each query block: KeyTiles::absorb
///   add up the sums of dq, in parallel over blocks of queries
template <class Call, Mask M, Score S, Position P>
class Backward {
 public:
  using Real = typename Call::Real;

  Backward(const Call& call, const M& mask, const S& score, const P& position, Index workers)
      : call_(call),
        mask_(mask),
        score_(score),
        position_(position),
        plan_(forward().kv_len(), keys_in_group<Real>) {
    // Many tasks in a wave keep the team busy; few heads keep the scratch memory small.
    const Index tasks_of_head = std::max<Index>(1, (std::min)(plan_.spans, SpanPlan::most_spans));
    heads_in_wave_ = std::clamp<Index>(divide_up(tasks_per_worker * workers, tasks_of_head), 1,
                                       std::max<Index>(1, forward().k.batch * forward().k.heads));
    if (workers == 1) heads_in_wave_ = 1;
  }

  template <class E>
  void run(const E& executor, Workspace& workspace) {
    const Index workers = executor.workers();
    Arena counting;
    cut_worker(counting);
    const Index worker_bytes = static_cast<Index>(counting.used());
    Arena shared_counting;
    cut_shared(shared_counting);
    std::byte* memory =
        workspace.reserve(static_cast<std::size_t>(worker_bytes * workers) + shared_counting.used());
    Arena arena(memory + worker_bytes * workers);
    cut_shared(arena);
    const Index all_heads = forward().k.batch * forward().k.heads;
    for (first_head_ = 0; first_head_ < all_heads; first_head_ += heads_in_wave_) {
      const Index heads = (std::min)(heads_in_wave_, all_heads - first_head_);
      prepare(executor, heads);
      Index first_span = 0;
      do {
        const Index spans = (std::min)(SpanPlan::most_spans, plan_.spans - first_span);
        executor.for_each(heads * spans, [&](Index task, Index worker) {
          Arena own(memory + worker * worker_bytes);
          Worker of_worker = cut_worker(own);
          // Under a causal mask the first spans take longest, so they come first.
          take_span(of_worker, task % heads, task / heads, first_span + task / heads);
        });
        add_queries(executor, heads, first_span, spans);
        first_span += spans;
      } while (first_span < plan_.spans);
    }
  }

 private:
  static constexpr Index tasks_per_worker = 8;
  using Tq = std::remove_const_t<typename decltype(Call::Forward::q)::Element>;
  using Tk = typename Call::Forward::Key;
  using Tv = typename Call::Forward::Value;
  using Td = std::remove_const_t<typename decltype(Call::dout)::Element>;
  static constexpr bool encodes = !std::is_same_v<P, no_position>;

  struct Worker {
    KeyTiles<Real, M, S> tiles;
    Real *dk = nullptr, *dv = nullptr;
  };

  const typename Call::Forward& forward() const { return call_.forward; }
  Index group() const { return forward().group(); }
  Index blocks() const { return divide_up(forward().q_len(), rows_in_query_block); }
  Index padded_rows() const { return blocks() * rows_in_query_block; }
  Index padded_head_dim() const { return round_up(forward().head_dim(), Index{lanes<Real>}); }
  bool in_bands() const { return plan_.spans > SpanPlan::most_spans; }

  Worker cut_worker(Arena& arena) const {
    Worker worker;
    worker.tiles = KeyTiles<Real, M, S>::take(arena, forward().head_dim(), forward().value_dim(),
                                              forward().q_len() * group());
    worker.dk = arena.take<Real>(keys_in_group<Real> * forward().head_dim());
    worker.dv = arena.take<Real>(keys_in_group<Real> * forward().value_dim());
    return worker;
  }

  void cut_shared(Arena& arena) {
    const Index queries = heads_in_wave_ * group(), rows = queries * padded_rows();
    q_ = RealRows<Real, Tq>::take(arena, forward().q, tile_rows, encodes, queries);
    dout_ = RealRows<Real, Td>::take(arena, call_.dout, tile_rows, false, queries);
    k_ = RealRows<Real, Tk>::take(arena, forward().k, lanes<Real>, encodes, heads_in_wave_);
    v_ = RealRows<Real, Tv>::take(arena, forward().v, 1, false, heads_in_wave_);
    shift_ = arena.take<Real>(rows);
    delta_ = arena.take<Real>(rows);
    const Index spans = (std::min)(SpanPlan::most_spans, plan_.spans);
    dq_ = arena.take<Real>(spans * rows * padded_head_dim());
    if (in_bands()) dq_before_ = arena.take<Real>(rows * padded_head_dim());
    is_set_ = arena.take<bool>(spans * queries * blocks());
  }

  template <class E>
  void prepare(const E& executor, Index heads) const {
    const Index of_queries = heads * group() * blocks();
    const Index key_blocks = divide_up(forward().kv_len(), rows_in_query_block);
    executor.for_each(of_queries + heads * key_blocks, [&](Index task, Index) {
      if (task < of_queries) {
        prepare_queries(task / blocks(), task % blocks() * rows_in_query_block);
      } else {
        prepare_keys((task - of_queries) / key_blocks,
                     (task - of_queries) % key_blocks * rows_in_query_block);
      }
    });
  }

  void prepare_queries(Index n, Index first) const {
    const Index head = first_head_ * group() + n, b = head / forward().q.heads, h = head % forward().q.heads;
    const Index count = (std::min)(rows_in_query_block, forward().q_len() - first);
    q_.prepare(n, head, first, count, position_, forward().first_query, Role::query);
    dout_.prepare(n, head, first, count, no_position{}, 0, Role::query);
    for (Index i = first; i < first + count; ++i) {
      const Real lse = forward().lse(b, h, i);
      const Real dlse = call_.dlse.data == nullptr ? Real(0) : call_.dlse(b, h, i);
      shift_[n * padded_rows() + i] = shift_of(lse);
      delta_[n * padded_rows() + i] =
          delta_of(call_.dout.row(b, h, i), forward().out.row(b, h, i), forward().value_dim(), dlse);
    }
  }

  void prepare_keys(Index n, Index first) const {
    const Index head = first_head_ + n, count = (std::min)(rows_in_query_block, forward().kv_len() - first);
    k_.prepare(n, head, first, count, position_, 0, Role::key);
    v_.prepare(n, head, first, count, no_position{}, 0, Role::key);
  }

  /// The n-th KV head of the wave, the slot-th span that is held.
  void take_span(Worker& worker, Index n, Index slot, Index span) const {
    const Index head = first_head_ + n, kv_len = forward().kv_len();
    bool* is_set = is_set_ + (slot * heads_in_wave_ + n) * group() * blocks();
    std::fill_n(is_set, group() * blocks(), false);
    const MatrixView<const Real> k = k_.matrix(n, head), v = v_.matrix(n, head);
    const Index end = (std::min)(kv_len, (span + 1) * plan_.span);
    for (Index first = span * plan_.span; first < end; first += keys_in_group<Real>) {
      const Index keys = (std::min)(keys_in_group<Real>, end - first);
      const auto rows_of = [&](const MatrixView<const Real>& x) {
        return MatrixView<const Real>{x.row(first), keys, x.cols, x.row_stride};
      };
      worker.tiles.start(rows_of(k), rows_of(v), first, mask_, score_, forward().scale);
      for (Index g = 0; g < group(); ++g) take_queries(worker, n, slot, g, is_set + g * blocks());
      write_keys(worker, head, first, keys);
    }
  }

  void take_queries(Worker& worker, Index n, Index slot, Index g, bool* is_set) const {
    const Index of_wave = n * group() + g, head = first_head_ * group() + of_wave;
    const MatrixView<const Real> q = q_.matrix(of_wave, head), dout = dout_.matrix(of_wave, head);
    worker.tiles.enter_head(head / forward().q.heads, head % forward().q.heads, forward().first_query);
    Real* dq = sum_of(slot, of_wave, 0);
    for (Index block = 0; block < blocks(); ++block) {
      const Index first = block * rows_in_query_block;
      const Index count = (std::min)(rows_in_query_block, forward().q_len() - first);
      const auto rows_of = [&](const MatrixView<const Real>& x) {
        return MatrixView<const Real>{x.row(first), count, x.cols, x.row_stride};
      };
      is_set[block] |=
          worker.tiles.absorb({rows_of(q), rows_of(dout), shift_ + of_wave * padded_rows() + first,
                               delta_ + of_wave * padded_rows() + first, first,
                               dq + first * padded_head_dim(), padded_head_dim(), is_set[block]});
    }
  }

  /// The rows from `first` on of a sum of dq over one span, for query head `n` of the wave.
  Real* sum_of(Index slot, Index n, Index first) const {
    return dq_ + ((slot * heads_in_wave_ * group() + n) * padded_rows() + first) * padded_head_dim();
  }

  void write_keys(Worker& worker, Index head, Index first, Index keys) const {
    const Index b = head / forward().k.heads, h = head % forward().k.heads;
    const MatrixView<Real> dk{worker.dk, keys, forward().head_dim(), forward().head_dim()},
        dv{worker.dv, keys, forward().value_dim(), forward().value_dim()};
    worker.tiles.finish(dk, dv);
    finish_rows(dk, forward().scale, position_, first, Role::key,
                call_.dk.slice_rows(first, keys).matrix(b, h));
    finish_rows(dv, 1, no_position{}, first, Role::key, call_.dv.slice_rows(first, keys).matrix(b, h));
  }

  /// Adds the sums over the spans [first_span, first_span + spans) to those before, and writes dq after the last.
  template <class E>
  void add_queries(const E& executor, Index heads, Index first_span, Index spans) const {
    executor.for_each(heads * group() * blocks(), [&](Index task, Index) {
      const Index n = task / blocks(), block = task % blocks(), first = block * rows_in_query_block;
      const Index count = (std::min)(rows_in_query_block, forward().q_len() - first);
      const Index size = count * padded_head_dim();
      Real* before = first_span == 0 ? nullptr : dq_before_ + (n * padded_rows() + first) * padded_head_dim();
      Real* sum = before;
      for (Index slot = 0; slot < spans; ++slot) {
        if (!is_set_[(slot * heads_in_wave_ * group() + n) * blocks() + block]) continue;
        Real* of_span = sum_of(slot, n, first);
        if (sum == nullptr) {
          sum = of_span;
          continue;
        }
        for (Index at = 0; at < size; at += lanes<Real>)
          store(sum + at,
                load(static_cast<const Real*>(sum + at)) + load(static_cast<const Real*>(of_span + at)));
      }
      if (sum == nullptr) {
        sum = spans > 0 ? sum_of(0, n, first) : nullptr;
        if (sum != nullptr) std::fill_n(sum, size, Real(0));
      }
      const Index head = first_head_ * group() + n;
      const MatrixView<Real> rows{sum, count, forward().head_dim(), padded_head_dim()};
      const auto dq =
          call_.dq.slice_rows(first, count).matrix(head / forward().q.heads, head % forward().q.heads);
      if (sum == nullptr) {  // no keys at all
        for (Index i = 0; i < count; ++i)
          std::fill_n(dq.row(i), dq.cols, static_cast<std::remove_reference_t<decltype(*dq.data)>>(0));
      } else if (first_span + spans < plan_.spans) {
        Real* total = dq_before_ + (n * padded_rows() + first) * padded_head_dim();
        if (sum != total) std::copy_n(sum, size, total);
      } else {
        finish_rows(rows, forward().scale, position_, forward().first_query + first, Role::query, dq);
      }
    });
  }

  const Call& call_;
  const M& mask_;
  const S& score_;
  const P& position_;
  SpanPlan plan_;
  Index heads_in_wave_ = 1, first_head_ = 0;
  RealRows<Real, Tq> q_;
  RealRows<Real, Td> dout_;
  RealRows<Real, Tk> k_;
  RealRows<Real, Tv> v_;
  Real *shift_ = nullptr, *delta_ = nullptr;  ///< [query heads of the wave][padded rows]
  Real* dq_ = nullptr;         ///< [spans][query heads of the wave][padded rows][padded head_dim]
  Real* dq_before_ = nullptr;  ///< the sums of the spans that are no longer held
  bool* is_set_ = nullptr;     ///< [spans][query heads of the wave][blocks]
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
