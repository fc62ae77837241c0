// Attention for a few queries per KV head: each key and value row is read once for all of them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/decode/change_scores.hpp"
#include "longspan/detail/decode/row_accumulator.hpp"
#include "longspan/detail/decode/row_pass.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/execution.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <class Tq, class Tk, class Tv, class To, class Keys, Mask M, Score S>
class Decode {
 public:
  using Call = Problem<Tq, Tk, Tv, To>;
  using Real = typename Call::Real;
  using Run = KeyRun<Tk, Tv>;
  using Pass = RowPass<Real, Tk, Tv>;
  static constexpr Index w = lanes<Real>;

  /// Reads only the shapes of the call's k and v: the rows come from `keys`.
  Decode(const Call& call, const Keys& keys, const M& mask, const S& score)
      : call_(call),
        keys_(keys),
        mask_(mask),
        score_(score),
        queries_(call.q_len() * call.group()),
        slots_(static_cast<Index>(std::bit_ceil(std::size_t(queries_)))) {
    find_chunks();
  }

  template <class E>
  void run(const E& executor, Workspace& workspace) {
    const Index kv_heads = call_.k.batch * call_.k.heads;
    const WorkerScratch scratch(
        workspace, executor.workers(), [&](Arena& arena) { cut_worker(arena); },
        [&](Arena& arena) { cut_parts(arena, kv_heads * chunks_); });
    Arena arena = scratch.shared();
    RowAccumulator<Real>* parts = cut_parts(arena, kv_heads * chunks_);
    executor.for_each(kv_heads * chunks_, [&](Index part, Index worker_index) {
      Arena own = scratch.of_worker(worker_index);
      const Worker worker = cut_worker(own);
      absorb_chunk(part / chunks_, chunk(part % chunks_), worker, parts[part]);
      if (chunks_ == 1) write(part, parts[part]);
    });
    if (chunks_ > 1) {
      executor.for_each(kv_heads, [&](Index kv_head, Index) { join(kv_head, parts + kv_head * chunks_); });
    }
  }

 private:
  static constexpr bool changes_score = !std::is_same_v<S, unchanged>;
  /// With one query, long alternating blocks of K and V are read fastest (percent of the stream rate with 256 keys: 88,
  /// with 64 keys: 83); with more queries the length makes no difference. One length for all calls keeps the bits of a
  /// query independent of the number of other queries.
  static constexpr Index block_keys = 256;

  struct Worker {
    Real* q = nullptr;           ///< [slots][q_stride], scaled, zero after head_dim
    Real* scores = nullptr;      ///< [block_keys * slots of a pass], plus one packet
    bool* seen = nullptr;        ///< the same shape
    Real* value_sums = nullptr;  ///< [slots][value_dim rounded up to whole packets]
  };

  /// Only key chunks that some query may see become tasks. Without this, decoding the last of 2^20 tokens with a window
  /// of 2^12 takes 2.3 ms instead of the 1.1 ms of the last of 2^13 tokens.
  void find_chunks() {
    if (call_.kv_len() <= keys_in_chunk) return seen_.add({0, 1});
    for (Index kv_head = 0; kv_head < call_.k.batch * call_.k.heads; ++kv_head) {
      const KeyRanges seen = intersection(key_ranges(mask_, queries_of(kv_head).tile(0, queries_, {0, 0})),
                                          KeyRanges(KeyRange{0, call_.kv_len()}));
      for (const KeyRange& keys : seen)
        seen_.add({keys.begin / keys_in_chunk, divide_up(keys.end, keys_in_chunk)});
    }
    if (seen_.empty()) return seen_.add({0, 1});
    chunks_ = 0;
    for (const KeyRange& range : seen_) chunks_ += range.end - range.begin;
  }
  Index chunk(Index n) const {
    const KeyRange* range = seen_.begin();
    for (; n >= range->end - range->begin; ++range) n -= range->end - range->begin;
    return range->begin + n;
  }

  Index q_stride() const { return round_up(call_.head_dim(), w); }

  Worker cut_worker(Arena& arena) const {
    constexpr Index scores = block_keys * most_decode_queries + lanes<Real>;
    return {arena.take<Real>(slots_ * q_stride()), arena.take<Real>(scores), arena.take<bool>(scores),
            arena.take<Real>(slots_ * round_up(call_.value_dim(), w))};
  }

  RowAccumulator<Real>* cut_parts(Arena& arena, Index count) const {
    auto* parts = arena.take<RowAccumulator<Real>>(count);
    for (Index i = 0; i < count; ++i) {
      const auto part = RowAccumulator<Real>::take(arena, slots_, call_.value_dim());
      if (parts != nullptr) parts[i] = part;
    }
    return parts;
  }

  QueryLanes queries_of(Index kv_head) const {
    return {kv_head / call_.k.heads, kv_head % call_.k.heads * call_.group(), call_.group(), 0, queries_,
            call_.first_query};
  }

  void pack_queries(const QueryLanes& queries, Real* q) const {
    const Real factor = static_cast<Real>(call_.scale * (changes_score ? 1.0 : double(score_unit<Real>)));
    for (Index g = 0; g < slots_; ++g) {
      const Tq* row = call_.q.row(queries.batch, queries.head(g), queries.row(g));
      Real* to = q + g * q_stride();
      Index c = 0;
      for (; c < columns_in_pairs<Real, Tk>(call_.head_dim()); ++c) {
        to[interleaved_index<Real, Tk>(c, call_.head_dim())] = static_cast<Real>(row[c]) * factor;
      }
      for (; c + w <= call_.head_dim(); c += w) store(to + c, load_as<Real>(row + c) * broadcast(factor));
      if (c < q_stride()) store(to + c, load_part<Real>(row + c, call_.head_dim() - c) * broadcast(factor));
    }
  }

  void absorb_chunk(Index kv_head, Index chunk, const Worker& worker,
                    const RowAccumulator<Real>& state) const {
    const QueryLanes queries = queries_of(kv_head);
    state.clear();
    pack_queries(queries, worker.q);
    const Index from = chunk * keys_in_chunk, to = (std::min)(call_.kv_len(), from + keys_in_chunk);
    // Each run is absorbed only when the next one is known, so that the keys of the next run can be prefetched.
    Run run;
    KeyRange run_keys;
    const auto absorb = [&](const Tk* next_keys) {
      if (!run_keys.empty()) absorb_run(queries, run, run_keys, next_keys, worker, state);
    };
    const KeyRanges ranges = key_ranges(mask_, queries.tile(0, queries_, {0, 0}));
    for_each_block(ranges, {from, to}, block_keys, [&](KeyRange of_block) {
      const Index head = kv_head % call_.k.heads;
      for_each_run(keys_, queries.batch, head, of_block, [&](const Run& next, KeyRange of_run) {
        absorb(next.k.data);
        run = next;
        run_keys = of_run;
      });
    });
    absorb(nullptr);
  }

  /// Absorbs a run for as many queries at a time as a packet has lanes.
  void absorb_run(const QueryLanes& queries, const Run& run, KeyRange keys, const Tk* next_keys,
                  const Worker& worker, const RowAccumulator<Real>& state) const {
    const Coverage seen = classify(mask_, queries.tile(0, queries_, keys));
    if (seen == Coverage::none) return;
    const Index count = std::min<Index>(w, slots_);
    for (Index first = 0; first < slots_; first += count)
      absorb_pass(queries, first, count, run, keys, next_keys, seen, worker, state);
  }

  /// `count` queries from `first` on.
  void absorb_pass(const QueryLanes& queries, Index first, Index count, const Run& run, KeyRange range,
                   const Tk* next_keys, Coverage seen, const Worker& worker,
                   const RowAccumulator<Real>& state) const {
    const Index keys = run.k.rows;
    // For contiguous arrays, prefetching the rows after the block is as fast as prefetching the next read, and faster
    // with 8 queries.
    const bool is_short = keys < block_keys;
    Pass::score(run, count, worker.q + first * q_stride(), q_stride(), call_.head_dim(), worker.scores,
                is_short ? run.v.data : nullptr);
    const Index scores = round_up(keys, w) * count;
    if (seen == Coverage::some) hide(queries, first, count, range, worker);
    if constexpr (changes_score) seen = change(queries, first, count, range, seen, worker);
    std::fill(worker.scores + keys * count, worker.scores + scores, FloatArithmetic<Real>::masked_score);

    alignas(64) Real rescale[std::size_t(w)];
    Pass::weigh(run, count, worker.scores, scores, first, state, rescale);
    if (seen == Coverage::all || Pass::all_finite(run)) {
      Pass::add_values(run, count, worker.scores, worker.value_sums, first, state, rescale,
                       is_short ? next_keys : nullptr);
    } else {
      Pass::add_seen_values(run, count, worker.scores, worker.seen, first, state, rescale);
    }
  }

  void hide(const QueryLanes& queries, Index first, Index count, KeyRange keys, const Worker& worker) const {
    for (Index g = 0; g < count; ++g) {
      const Index head = queries.head(first + g), position = queries.position(first + g);
      for (Index j = keys.begin; j < keys.end; j += 64) {
        const Index end = (std::min)(keys.end, j + 64);
        std::uint64_t bits = seen_bits(mask_, queries.batch, head, position, j, low_bits(end - j));
        for (Index at = (j - keys.begin) * count + g; at < (end - keys.begin) * count;
             at += count, bits >>= 1) {
          worker.seen[at] = (bits & 1) != 0;
          if (!worker.seen[at]) worker.scores[at] = FloatArithmetic<Real>::masked_score;
        }
      }
    }
  }

  /// Applies the score function. Returns Coverage::some if it, or the mask before it, hides a key.
  Coverage change(const QueryLanes& queries, Index first, Index count, KeyRange keys, Coverage seen,
                  const Worker& worker) const {
    const bool masked = seen == Coverage::some;
    const bool hides = change_scores(
        ScoreBlock<Real>{worker.scores, masked ? worker.seen : nullptr, queries, first, count, keys}, score_);
    if (!masked && !hides) return Coverage::all;
    for (Index at = 0; at < (keys.end - keys.begin) * count; ++at) {
      const bool sees =
          (!masked || worker.seen[at]) && worker.scores[at] != FloatArithmetic<Real>::masked_score;
      worker.seen[at] = sees;
      if (!sees) worker.scores[at] = FloatArithmetic<Real>::masked_score;
    }
    return Coverage::some;
  }

  /// Merges chunks into spans, and spans into the result (see keys_in_chunk for the reason).
  void join(Index kv_head, RowAccumulator<Real>* parts) const {
    constexpr Index in_span = keys_in_span / keys_in_chunk;
    for (Index first = 0, next = 0; first < chunks_; first = next) {
      const auto same_span = [&](Index n) { return chunk(n) / in_span == chunk(first) / in_span; };
      for (next = first + 1; next < chunks_ && same_span(next); ++next) parts[first].merge(parts[next]);
      if (first > 0) parts[0].merge(parts[first]);
    }
    write(kv_head, parts[0]);
  }

  void write(Index kv_head, const RowAccumulator<Real>& state) const {
    const QueryLanes queries = queries_of(kv_head);
    for (Index g = 0; g < queries_; ++g) {
      To* row = call_.out.row(queries.batch, queries.head(g), queries.row(g));
      const Real factor = state.sum[g] == Real(0) ? Real(0) : 1 / state.sum[g];
      const Real* o = state.o + g * state.stride;
      Index c = 0;
      for (; c < columns_in_pairs<Real, Tv>(call_.value_dim()); ++c) {
        row[c] = static_cast<To>(o[interleaved_index<Real, Tv>(c, call_.value_dim())] * factor);
      }
      for (; c + w <= call_.value_dim(); c += w) store_as(row + c, load(o + c) * broadcast(factor));
      for (; c < call_.value_dim(); ++c) row[c] = static_cast<To>(o[c] * factor);
      if (call_.lse.data != nullptr) {
        call_.lse(queries.batch, queries.head(g), queries.row(g)) = lse_of(state.row_max[g], state.sum[g]);
      }
    }
  }

  const Call& call_;
  const Keys& keys_;
  const M& mask_;
  const S& score_;
  Index queries_;
  /// The number of queries rounded up to a power of two; surplus slots repeat the last query. All queries then share
  /// one pass over the rows: with seven heads per KV head it takes 0.76 of the time of passes of 4, 2 and 1 queries.
  Index slots_;
  KeyRanges seen_;  ///< the visible chunks, by their numbers
  Index chunks_ = 1;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
