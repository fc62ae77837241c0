// Attention for a few queries to a KV head: each key and value row is read once for all of them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/decode/change_scores.hpp"
#include "longspan/detail/decode/row_accumulator.hpp"
#include "longspan/detail/decode/row_kernel.hpp"
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

/// Up to so many queries (q_len times the heads of a group) take this path; more are as fast in the lanes.
inline constexpr Index most_decode_queries = 8;

template <class Tq, class Tk, class Tv, class To, class Keys, Mask M, Score S>
class Decode {
 public:
  using Call = Problem<Tq, Tk, Tv, To>;
  using Real = typename Call::Real;
  using Run = KeyRun<Tk, Tv>;
  static constexpr Index w = lanes<Real>;

  /// Of the call's own k and v only the shapes are read: the rows are in `keys`.
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
    const Index workers = executor.workers(), kv_heads = call_.k.batch * call_.k.heads;
    Arena counting;
    cut_worker(counting);
    const Index worker_bytes = static_cast<Index>(counting.used()), parts_at = worker_bytes * workers;
    cut_parts(counting, kv_heads * chunks_);
    std::byte* memory = workspace.reserve(static_cast<std::size_t>(parts_at) + counting.used());

    Arena arena(memory + parts_at);
    RowAccumulator<Real>* parts = cut_parts(arena, kv_heads * chunks_);
    executor.for_each(kv_heads * chunks_, [&](Index part, Index worker_index) {
      Arena own(memory + worker_index * worker_bytes);
      const Worker worker = cut_worker(own);
      absorb_chunk(part / chunks_, chunk(part % chunks_), worker, parts[part]);
      if (chunks_ == 1) write(part, parts[part]);
    });
    if (chunks_ > 1) {
      executor.for_each(kv_heads, [&](Index kv_head, Index) { join(kv_head, parts + kv_head * chunks_); });
    }
  }

 private:
  /// Rows are in no cache, and nobody reads them again before the next call, unless in a pass for more slots.
  static constexpr PrefetchHint hint =
      w >= most_decode_queries ? PrefetchHint::streaming : PrefetchHint::reused;
  static constexpr bool is_scaled = std::is_same_v<Tk, std::int8_t>;
  static constexpr bool changes_score = !std::is_same_v<S, unchanged>;
  /// One query reads K and V fastest in long chunks of each (256 keys: 88 % of the stream rate, 64: 83 %), and
  /// more queries are as fast. Being the same for all, a query's bits do not tell how many others there are.
  static constexpr Index block_keys = 256;

  struct Worker {
    Real* q = nullptr;           ///< [slots][q_stride], scaled, zero behind head_dim
    Real* scores = nullptr;      ///< [block_keys * slots of a pass], and one packet
    bool* seen = nullptr;        ///< the same shape
    Real* value_sums = nullptr;  ///< as large as the rows of o of all slots
  };

  /// Only chunks that somebody sees are work: the last token of 2^20 under a window of 2^12 would else
  /// take 2.3 ms, where that of 2^13 takes 1.1.
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

  /// The columns of rows of T that are loaded in pairs of packets.
  template <class T>
  static Index columns_in_pairs(Index columns) {
    return loads_in_pairs<Real, T> ? columns / (2 * w) * (2 * w) : 0;
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
      for (; c < columns_in_pairs<Tk>(call_.head_dim()); ++c) {
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
    // A run is taken in when the next is known, whose keys are then asked for in time.
    Run run;
    KeyRange run_keys;
    const auto absorb = [&](const Tk* next_keys) {
      if (!run_keys.empty()) absorb_run(queries, run, run_keys, next_keys, worker, state);
    };
    Index done = from;
    for (const KeyRange& range : key_ranges(mask_, queries.tile(0, queries_, {0, 0}))) {
      const Index end = (std::min)(range.end, to);
      Index first = (std::max)(done, (std::max)(range.begin, from) / block_keys * block_keys);
      for (; first < end; first += block_keys) {
        KeyRange left{first, (std::min)(first + block_keys, to)};
        while (!left.empty()) {
          const Run next = keys_.run(queries.batch, kv_head % call_.k.heads, left);
          const Index begin = std::exchange(left.begin, left.begin + next.k.rows);
          if (!next.is_kept) continue;
          absorb(next.k.data);
          run = next;
          run_keys = {begin, left.begin};
        }
      }
      done = first;
    }
    absorb(nullptr);
  }

  /// All queries at once, as far as a packet has lanes for them.
  void absorb_run(const QueryLanes& queries, const Run& run, KeyRange keys, const Tk* next_keys,
                  const Worker& worker, const RowAccumulator<Real>& state) const {
    const Coverage seen = classify(mask_, queries.tile(0, queries_, keys));
    if (seen == Coverage::none) return;
    const Index count = std::min<Index>(w, slots_);
    for (Index first = 0; first < slots_; first += count)
      absorb_pass(queries, first, count, run, keys, next_keys, seen, worker, state);
  }

  /// work.operator()<n>() where n = `wanted` is 1, 2, 4 or 8, and at most `most`.
  template <Index most, class Work>
  static void with_power_of_two(Index wanted, const Work& work) {
    if constexpr (most >= 8) {
      if (wanted == 8) return work.template operator()<8>();
    }
    if constexpr (most >= 4) {
      if (wanted == 4) return work.template operator()<4>();
    }
    if constexpr (most >= 2) {
      if (wanted == 2) return work.template operator()<2>();
    }
    work.template operator()<1>();
  }

  /// The kernels are compiled for each number of queries, this function once for all of them.
  void absorb_pass(const QueryLanes& queries, Index first, Index count, const Run& run, KeyRange range,
                   const Tk* next_keys, Coverage seen, const Worker& worker,
                   const RowAccumulator<Real>& state) const {
    const Index keys = run.k.rows;
    // Arrays are as fast, or faster with 8 queries, where the rows behind the block are asked for.
    const bool is_short = keys < block_keys;
    with_power_of_two<w>(count, [&]<int slots>() {
      score_keys<slots, hint>(run.k.data, run.k.row_stride, keys, worker.q + first * q_stride(), q_stride(),
                              call_.head_dim(), worker.scores, is_short ? run.v.data : nullptr);
    });
    if constexpr (is_scaled) scale_scores(worker.scores, run.k_scale, keys, count);
    const Index scores = round_up(keys, w) * count;
    if (seen == Coverage::some) hide(queries, first, count, range, worker);
    if constexpr (changes_score) seen = change(queries, first, count, range, seen, worker);
    std::fill(worker.scores + keys * count, worker.scores + scores, FloatArithmetic<Real>::masked_score);

    alignas(64) Real rescale[std::size_t(w)];
    with_power_of_two<w>(
        count, [&]<int slots>() { state.template weigh<slots>(worker.scores, scores, first, rescale); });
    if constexpr (is_scaled) scale_scores(worker.scores, run.v_scale, keys, count);
    const bool plain = seen == Coverage::all || all_finite(run);
    if (!plain) return add_seen_values(run.v, worker, first, count, state, rescale);
    with_power_of_two<w>(count, [&]<int slots>() {
      add_values_of_pass<slots>(run.v, worker, first, state, rescale, is_short ? next_keys : nullptr);
    });
  }

  /// Accumulators of add_values: as many as leave registers for the rows.
  static constexpr int value_accumulators = vector_registers == 32 ? 16 : 8;
  static constexpr int most_value_packets = vector_registers == 32 ? 8 : 4;

  template <int count>
  void add_values_of_pass(MatrixView<const Tv> v, const Worker& worker, Index first,
                          const RowAccumulator<Real>& state, const Real* rescale, const Tk* next_keys) const {
    Real* o = state.o + first * state.stride;
    if constexpr (count > 1) {
      if (!fits_registers<count>(state.stride / w)) {
        return add_long_values<count, hint>(v.data, v.row_stride, v.cols, v.rows, worker.scores,
                                            worker.value_sums, o, state.stride, rescale, next_keys);
      }
    }
    const Index in_pairs = columns_in_pairs<Tv>(v.cols);
    for (Index column = 0; column < state.stride;) {
      const Index left = (column < in_pairs ? in_pairs : state.stride) - column;
      const Index packets =
          std::min<Index>(most_value_packets, static_cast<Index>(std::bit_floor(std::size_t(left / w))));
      constexpr Index widest = (std::min)(most_value_packets, value_accumulators / count);
      with_power_of_two<widest>(packets, [&]<int wide>() {
        add_values<count, wide, hint>(v.data + column, v.row_stride,
                                      (std::min)(w, v.cols - column - (wide - 1) * w), v.rows, worker.scores,
                                      count, o + column, state.stride, rescale);
      });
      column += packets * w;
    }
  }

  /// Do the sums of whole rows of `packets` packets fit in registers?
  template <int count>
  static bool fits_registers(Index packets) {
    return std::has_single_bit(std::size_t(packets)) && packets <= most_value_packets &&
           packets * count <= value_accumulators;
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

  /// Takes the scores through the score function. `some` where that, or the mask before, hides a key.
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

  bool all_finite(const Run& run) const {
    if constexpr (is_scaled) {
      return std::all_of(run.v_scale, run.v_scale + run.v.rows, [](float x) { return is_finite(x); });
    }
    for (Index j = 0; j < run.v.rows; ++j) {
      const Tv* row = run.v.row(j);
      Real zero = 0;
      const Real by = opaque(zero);  // as in FloatArithmetic::values_finite
      for (Index c = 0; c < run.v.cols; ++c) zero += static_cast<Real>(row[c]) * by;
      if (!is_finite(zero)) return false;
    }
    return true;
  }

  /// A weight of 0 does not hide a value that is NaN or infinite: here hidden pairs are left out one by one.
  void add_seen_values(MatrixView<const Tv> v, const Worker& worker, Index first, Index count,
                       const RowAccumulator<Real>& state, const Real* rescale) const {
    for (Index g = 0; g < count; ++g) {
      Real* o = state.o + (first + g) * state.stride;
      for (Index c = 0; c < state.stride; c += w) {
        Packet<Real> sum = broadcast(Real(0));
        for (Index j = 0; j < v.rows; ++j) {
          const Index at = j * count + g;
          if (!worker.seen[at]) continue;
          alignas(64) Real row[std::size_t(w)] = {};
          for (Index i = 0; i < (std::min)(w, call_.value_dim() - c); ++i)
            row[i] = static_cast<Real>(v.row(j)[column_of_index<Real, Tv>(c + i, call_.value_dim())]);
          sum = fma(broadcast(worker.scores[at]), load<Real>(row), sum);
        }
        store(o + c, fma(broadcast(rescale[g]), load<Real>(o + c), sum));
      }
    }
  }

  /// Chunks to spans, spans to the whole, as everywhere (see keys_in_chunk).
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
      for (; c < columns_in_pairs<Tv>(call_.value_dim()); ++c) {
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
  /// The queries up to a power of two: those behind repeat the last one, so that rows are read once. Seven heads to
  /// a KV head take 0.76 of the time of passes of 4, 2 and 1.
  Index slots_;
  KeyRanges seen_;  ///< numbers of chunks
  Index chunks_ = 1;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
