// The task loop of the backward pass: KV heads in waves, their keys in spans, one task for each span.
#pragma once

#include <algorithm>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/gradient/key_tiles.hpp"
#include "longspan/detail/gradient/rows.hpp"
#include "longspan/detail/gradient/wave.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// How the keys of a call are cut into spans. A task takes one span of one KV head through all queries: it owns the dk
/// and dv of these keys, and a sum of dq over them. The sums of all spans are then added in the order of the keys. The
/// cuts depend on the number of keys alone, and so do the bits of dq.
struct SpanPlan {
  static constexpr Index most_held = 8;  ///< spans whose sums of dq are held at a time
  static constexpr Index longest = Index{1} << 13;

  Index length = 1;  ///< keys in a span
  Index spans = 0;

  SpanPlan(Index keys, Index multiple) {
    length = round_up(std::clamp(divide_up(keys, most_held), Index{1}, longest), multiple);
    spans = divide_up(keys, length);
  }
  Index held() const { return (std::min)(most_held, spans); }
};

/// For each wave of KV heads, and at most SpanPlan::most_held spans of their keys at a time:
///   for each KV head and span, in parallel:
///     for each group of key tiles of the span, each query head and each query block: Tiles::absorb
///   add up the sums of dq, in parallel over blocks of queries
template <class Tiles, class Call, Mask M, Score S, Position P>
class Backward {
 public:
  using Real = typename Call::Real;

  Backward(const Call& call, const M& mask, const S& score, const P& position, Index workers)
      : call_(call),
        mask_(mask),
        score_(score),
        position_(position),
        plan_(call.forward.kv_len(), keys_in_group<Real>) {
    // Many tasks in a wave keep the team busy; few heads keep the scratch memory small.
    constexpr Index tasks_per_worker = 8;
    const Index all_heads = std::max<Index>(1, call.forward.k.batch * call.forward.k.heads);
    const Index wanted = divide_up(tasks_per_worker * workers, std::max<Index>(1, plan_.held()));
    heads_in_wave_ = workers == 1 ? 1 : std::clamp<Index>(wanted, 1, all_heads);
  }

  template <class E>
  void run(const E& executor, Workspace& workspace) {
    const WorkerScratch scratch(
        workspace, executor.workers(), [&](Arena& arena) { cut_worker(arena); },
        [&](Arena& arena) { cut_shared(arena); });
    Arena shared = scratch.shared();
    cut_shared(shared);
    for (Index first_head = 0; wave_.enter(executor, first_head); first_head += heads_in_wave_) {
      Index first_span = 0;
      do {
        const Index spans = (std::min)(SpanPlan::most_held, plan_.spans - first_span);
        executor.for_each(wave_.heads() * spans, [&](Index task, Index worker) {
          Arena own = scratch.of_worker(worker);
          Worker of_worker = cut_worker(own);
          // Under a causal mask the first spans take longest, so they come first.
          const Index slot = task / wave_.heads();
          take_span(of_worker, task % wave_.heads(), slot, first_span + slot);
        });
        add_queries(executor, first_span, spans);
        first_span += spans;
      } while (first_span < plan_.spans);
    }
  }

 private:
  struct Worker {
    Tiles tiles;
    Real *dk = nullptr, *dv = nullptr;
  };

  const typename Call::Forward& forward() const { return call_.forward; }

  Worker cut_worker(Arena& arena) const {
    Worker worker;
    worker.tiles = Tiles::take(arena, forward().head_dim(), forward().value_dim(),
                               forward().q_len() * forward().group());
    worker.dk = arena.take<Real>(keys_in_group<Real> * forward().head_dim());
    worker.dv = arena.take<Real>(keys_in_group<Real> * forward().value_dim());
    return worker;
  }

  void cut_shared(Arena& arena) {
    wave_ = Wave<Call, Tiles, P>::take(arena, call_, position_, heads_in_wave_);
    queries_ = heads_in_wave_ * forward().group();
    const Index of_span = queries_ * wave_.padded_rows() * wave_.padded_head_dim();
    dq_ = arena.take<Real>(plan_.held() * of_span);
    if (plan_.spans > SpanPlan::most_held) dq_before_ = arena.take<Real>(of_span);
    is_set_ = arena.take<bool>(plan_.held() * queries_ * wave_.blocks());
  }

  /// The rows of block `block` of a sum of dq over the slot-th span that is held, for query head n of the wave.
  Real* sum_of(Index slot, Index n, Index block) const { return of_head(dq_, slot * queries_ + n, block); }
  Real* of_head(Real* sums, Index n, Index block) const {
    return sums + (n * wave_.padded_rows() + block * Tiles::rows_in_block) * wave_.padded_head_dim();
  }
  bool& is_set(Index slot, Index n, Index block) const {
    return is_set_[(slot * queries_ + n) * wave_.blocks() + block];
  }

  void take_span(Worker& worker, Index n, Index slot, Index span) const {
    std::fill_n(&is_set(slot, n * forward().group(), 0), forward().group() * wave_.blocks(), false);
    const MatrixView<const typename Tiles::Row> k = wave_.k(n), v = wave_.v(n);
    const Index end = (std::min)(forward().kv_len(), (span + 1) * plan_.length);
    for (Index first = span * plan_.length; first < end; first += keys_in_group<Real>) {
      const Index keys = (std::min)(keys_in_group<Real>, end - first);
      worker.tiles.start(slice_rows(k, first, keys), slice_rows(v, first, keys), first, mask_, score_,
                         forward().scale);
      for (Index g = 0; g < forward().group(); ++g) take_queries(worker, n * forward().group() + g, slot);
      write_keys(worker, wave_.kv_head(n), first, keys);
    }
  }

  void take_queries(Worker& worker, Index n, Index slot) const {
    const MatrixView<const typename Tiles::Row> q = wave_.q(n), dout = wave_.dout(n);
    worker.tiles.enter_head(wave_.query_head(n).batch, wave_.query_head(n).head, forward().first_query);
    for (Index block = 0; block < wave_.blocks(); ++block) {
      const Index first = block * Tiles::rows_in_block, count = wave_.rows_of_block(block);
      bool& set = is_set(slot, n, block);
      set |= worker.tiles.absorb({slice_rows(q, first, count), slice_rows(dout, first, count),
                                  wave_.shift(n) + first, wave_.delta(n) + first, first,
                                  sum_of(slot, n, block), wave_.padded_head_dim(), set});
    }
  }

  void write_keys(Worker& worker, const typename Wave<Call, Tiles, P>::Head& to, Index first,
                  Index keys) const {
    const MatrixView<Real> dk{worker.dk, keys, forward().head_dim(), forward().head_dim()},
        dv{worker.dv, keys, forward().value_dim(), forward().value_dim()};
    worker.tiles.finish(dk, dv);
    finish_rows(dk, forward().scale, position_, first, Role::key,
                call_.dk.slice_rows(first, keys).matrix(to.batch, to.head));
    finish_rows(dv, 1, no_position{}, first, Role::key,
                call_.dv.slice_rows(first, keys).matrix(to.batch, to.head));
  }

  /// Adds the sums over the spans [first_span, first_span + spans) to those before, and writes dq after the last.
  template <class E>
  void add_queries(const E& executor, Index first_span, Index spans) const {
    executor.for_each(wave_.queries() * wave_.blocks(), [&](Index task, Index) {
      const Index n = task / wave_.blocks(), block = task % wave_.blocks();
      const Index rows = wave_.rows_of_block(block), size = rows * wave_.padded_head_dim();
      Real* before = first_span == 0 ? nullptr : of_head(dq_before_, n, block);
      Real* sum = before;
      for (Index slot = 0; slot < spans; ++slot) {
        if (!is_set(slot, n, block)) continue;
        Real* of_span = sum_of(slot, n, block);
        if (sum == nullptr) {
          sum = of_span;
          continue;
        }
        for (Index at = 0; at < size; at += lanes<Real>) {
          store(sum + at,
                load(static_cast<const Real*>(sum + at)) + load(static_cast<const Real*>(of_span + at)));
        }
      }
      if (first_span + spans < plan_.spans) {
        Real* total = of_head(dq_before_, n, block);
        if (sum == nullptr) std::fill_n(total, size, Real(0));
        if (sum != nullptr && sum != total) std::copy_n(sum, size, total);
        return;
      }
      const auto [b, h] = wave_.query_head(n);
      const Index first = block * Tiles::rows_in_block;
      const auto dq = call_.dq.slice_rows(first, rows).matrix(b, h);
      if (sum == nullptr) {
        using To = std::remove_reference_t<decltype(*dq.data)>;
        for (Index i = 0; i < rows; ++i) std::fill_n(dq.row(i), dq.cols, To(0));
        return;
      }
      finish_rows(MatrixView<Real>{sum, rows, forward().head_dim(), wave_.padded_head_dim()}, forward().scale,
                  position_, forward().first_query + first, Role::query, dq);
    });
  }

  const Call& call_;
  const M& mask_;
  const S& score_;
  const P& position_;
  SpanPlan plan_;
  Index heads_in_wave_ = 1;
  Index queries_ = 1;  ///< query heads of a wave
  Wave<Call, Tiles, P> wave_;
  Real* dq_ = nullptr;         ///< [spans][query heads of the wave][padded rows][padded head_dim]
  Real* dq_before_ = nullptr;  ///< the sums of the spans that are no longer held
  bool* is_set_ = nullptr;     ///< [spans][query heads of the wave][blocks]
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
