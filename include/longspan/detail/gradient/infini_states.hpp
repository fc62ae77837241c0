// The memories of Infini-attention before each segment, and the gradient that is carried back through them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/gradient/infini_memory.hpp"
#include "longspan/detail/infini/local.hpp"
#include "longspan/execution.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

struct InfiniSegment {
  Index number = 0, begin = 0, rows = 0;
};

/// The memory before segment s is computed from that before segment s - 1. Every `checkpoint_segments`-th memory is
/// kept, and those between two of them only for one group of segments, so that `restore` computes them again.
///
/// The rows of a segment are cut into spans, whose sums are computed in parallel and then added in order. The cuts
/// depend on the length of a segment alone, and so do the bits of every sum.
template <class Call, class Gradient>
class InfiniStates {
 public:
  using Real = typename Call::Real;
  using Feature = std::remove_cvref_t<decltype(std::declval<const Gradient&>().attend.feature)>;
  using Rows = StateRows<Real, Feature>;

  InfiniStates(const Call& call, const Gradient& gradient)
      : call_(call),
        of_(gradient),
        sizes_{call.head_dim(), call.value_dim()},
        longest_((std::min)(gradient.attend.segment, call.kv_len())),
        segments_(longest_ == 0 ? 0 : (call.kv_len() - 1) / longest_ + 1),
        apart_(std::clamp<Index>(gradient.checkpoint_segments, 1, std::max<Index>(1, segments_))) {
    constexpr Index most_spans = 16, shortest_span = 2 * rows_in_query_block;
    span_ = round_up((std::max)(divide_up(longest_, most_spans), shortest_span), rows_in_query_block);
    spans_ = divide_up(longest_, span_);
  }

  void cut(Arena& arena, Index workers) {
    Arena counting;
    Rows::take(counting, sizes_);
    worker_bytes_ = static_cast<Index>(counting.used());
    worker_memory_ = arena.take<std::byte>(worker_bytes_ * workers);
    const Index heads = call_.k.batch * call_.k.heads;
    kept_ = arena.take<Real>((divide_up(segments_, apart_) + 1) * heads * sizes_.size());
    between_ = arena.take<Real>((apart_ - 1) * heads * sizes_.size());
    change_ = arena.take<Real>(heads * sizes_.size());
    for (Real** of : {&state_transposed_, &change_transposed_})
      *of = arena.take<Real>(heads * sizes_.transposed_size());
    sums_ = arena.take<Real>(heads * spans_ * sizes_.sum_size());
  }

  const StateSizes<Real>& sizes() const { return sizes_; }
  Index segments() const { return segments_; }
  Index longest_segment() const { return longest_; }
  Index spans() const { return spans_; }
  Rows rows(Index worker) const {
    Arena arena(worker_memory_ + worker * worker_bytes_);
    return Rows::take(arena, sizes_);
  }
  InfiniSegment segment(Index s) const {
    return {s, s * longest_, (std::min)(longest_, call_.kv_len() - s * longest_)};
  }
  /// The rows of a segment that batch row b has.
  Index rows_of(const InfiniSegment& part, Index b) const {
    const auto& lengths = of_.attend.lengths;
    return lengths.empty()
               ? part.rows
               : std::clamp<Index>(lengths[static_cast<std::size_t>(b)] - part.begin, 0, part.rows);
  }
  /// False as long as nothing has been written to the memory.
  bool reads(Index s) const { return s > 0 || of_.initial.m.data != nullptr; }

  /// Computes the memory before each segment, and copies the gradient of the final memory.
  template <class E>
  void start(const E& executor) {
    copy_in(of_.initial, at(0));
    has_change_ = of_.dfinal.m.data != nullptr;
    copy_in(of_.dfinal, change_);
    for (Index s = 0; s + 1 < segments_; ++s) advance(s, executor);
  }

  /// Makes the memory before segment s available. To be called for each segment, the last one first.
  template <class E>
  void restore(Index s, const E& executor) {
    if (s % apart_ != apart_ - 1 || s + 1 == segments_) return;
    for (Index before = s + 1 - apart_; before < s; ++before) advance(before, executor);
  }

  /// Whether the gradient of what segment s writes is not 0.
  bool writes(Index s) const {
    return has_change_ && (s + 1 < segments_ || segment(s).rows == of_.attend.segment);
  }

  /// Transposes the memory before segment s and the carried gradient.
  template <class E>
  void transpose(Index s, const E& executor) const {
    for_each_chunk(executor, [&](Index head, Index first, Index last) {
      transpose_rows(at(s) + head * sizes_.size(), first, last,
                     state_transposed_ + head * sizes_.transposed_size());
      if (has_change_) {
        transpose_rows(change_ + head * sizes_.size(), first, last,
                       change_transposed_ + head * sizes_.transposed_size());
      }
    });
  }
  State<Real> state(Index s, Index head) const {
    return {at(s) + head * sizes_.size(), state_transposed_ + head * sizes_.transposed_size()};
  }

  /// Adds the gradient of the write of one span of keys to dk and dv.
  template <Position P>
  void differentiate_write(const InfiniSegment& part, Index task, Index worker, const P& encoding,
                           const TensorView<Real>& dk, const TensorView<Real>& dv) const {
    const Index head = task / spans_, b = head / call_.k.heads, h = head % call_.k.heads;
    const bool reads_first = of_.attend.rule == InfiniRule::delta && reads(part.number);
    const State<Real> change{change_ + head * sizes_.size(),
                             change_transposed_ + head * sizes_.transposed_size()};
    Real* sum = sums_ + task * sizes_.sum_size();
    Rows of_block = rows(worker);
    const auto rows_from = [](const TensorView<Real>& x, Index of_batch, Index of_head, Index first,
                              Index count) { return x.slice_rows(first, count).matrix(of_batch, of_head); };
    const bool any = for_each_block(part, b, task % spans_, [&](Index first, Index count, bool is_first) {
      load(of_block, part, b, h, first, count, encoding, reads_first);
      of_block.differentiate_write(change);
      of_block.add_values_to(rows_from(dv, b, h, first, count));
      if (reads_first) {
        of_block.differentiate_difference();
        of_block.add_read_gradient(sum, is_first);
        of_block.differentiate_read(state(part.number, head), true);
      }
      of_block.add_to(rows_from(dk, b, h, first, count), of_.attend.feature, encoding, first, Role::key);
    });
    if (!any) std::fill_n(sum, sizes_.sum_size(), Real(0));
  }

  /// The carried gradient becomes that of the memory before segment s: the gradient of the memory after it, the sums of
  /// differentiate_write (if the segment was `written`), and `read_sums`, [query heads][spans], unless they are null.
  template <class E>
  void carry_back(Index s, bool written, const Real* read_sums, const E& executor) {
    const bool adds_writes = written && of_.attend.rule == InfiniRule::delta && reads(s);
    const Index group_sums = call_.group() * spans_;
    for_each_chunk(executor, [&](Index head, Index first, Index last) {
      Real* change = change_ + head * sizes_.size();
      if (!has_change_) std::fill(change + first, change + last, Real(0));
      if (adds_writes)
        add_sums(change, change, sums_ + head * spans_ * sizes_.sum_size(), spans_, first, last);
      if (read_sums != nullptr) {
        add_sums(change, change, read_sums + head * group_sums * sizes_.sum_size(), group_sums, first, last);
      }
    });
    has_change_ = has_change_ || adds_writes || read_sums != nullptr;
  }
  void drop_change() { has_change_ = false; }

  /// Writes the carried gradient.
  void copy_out(const InfiniState<float>& to) const {
    if (to.m.data == nullptr) return;
    for_each_row([&](Index b, Index h, Index r, Index at) {
      const Real* row = change_ + at;
      for (Index c = 0; c < sizes_.value_dim; ++c)
        to.m.row(b, h, r)[c] = has_change_ ? static_cast<float>(row[c]) : 0.0f;
      to.z(b, h, r) = has_change_ ? static_cast<float>(row[sizes_.value_dim]) : 0.0f;
    });
  }

  /// Calls work(first, count, is_first) for each block of rows of a span. Returns false if the span has no rows.
  template <class Work>
  bool for_each_block(const InfiniSegment& part, Index b, Index span, const Work& work) const {
    const Index begin = span * span_, end = (std::min)(begin + span_, rows_of(part, b));
    for (Index first = begin; first < end; first += rows_in_query_block)
      work(first, (std::min)(rows_in_query_block, end - first), first == begin);
    return begin < end;
  }

  /// Calls work(encoding) with the position encoding of queries and keys for the memory.
  template <class Work>
  void with_encoding(const InfiniSegment& part, const Work& work) const {
    using P = decltype(position_of(of_.attend.local));
    if constexpr (!std::is_same_v<P, no_position>) {
      if (of_.attend.memory_uses_positions) {
        return work(ShiftedPosition<P>{position_of(of_.attend.local),
                                       of_.attend.absolute_positions ? part.begin : 0});
      }
    }
    work(no_position{});
  }

 private:
  /// The memories before segment s, [kv heads][head_dim][columns].
  Real* at(Index s) const {
    const Index size = call_.k.batch * call_.k.heads * sizes_.size();
    return s % apart_ == 0 ? kept_ + s / apart_ * size : between_ + (s % apart_ - 1) * size;
  }

  /// Computes the memory after segment s from the memory before it.
  template <class E>
  void advance(Index s, const E& executor) {
    const InfiniSegment part = segment(s);
    const bool reads_first = of_.attend.rule == InfiniRule::delta && reads(s);
    with_encoding(part, [&](const auto& encoding) {
      executor.for_each(call_.k.batch * call_.k.heads * spans_, [&](Index task, Index worker) {
        const Index head = task / spans_, b = head / call_.k.heads;
        Real* sum = sums_ + task * sizes_.sum_size();
        Rows of_block = rows(worker);
        const bool any = for_each_block(part, b, task % spans_, [&](Index first, Index count, bool is_first) {
          load(of_block, part, b, head % call_.k.heads, first, count, encoding, reads_first);
          of_block.add_write(sum, is_first);
        });
        if (!any) std::fill_n(sum, sizes_.sum_size(), Real(0));
      });
    });
    for_each_chunk(executor, [&](Index head, Index first, Index last) {
      add_sums(at(s + 1) + head * sizes_.size(), at(s) + head * sizes_.size(),
               sums_ + head * spans_ * sizes_.sum_size(), spans_, first, last);
    });
  }

  /// Loads keys and what is written for them.
  template <Position P>
  void load(Rows& of_block, const InfiniSegment& part, Index b, Index h, Index first, Index count,
            const P& encoding, bool reads_first) const {
    const auto rows_from = [&](const auto& x) {
      return x.slice_rows(part.begin + first, count).matrix(b, h);
    };
    of_block.load_rows(rows_from(call_.k), of_.attend.feature, encoding, first, Role::key);
    of_block.load_values(rows_from(call_.v));
    if (!reads_first) return;
    of_block.read(state(part.number, b * call_.k.heads + h));
    of_block.subtract_read();
  }

  /// Calls work(head, first, last) for a few rows of the state of each KV head: its numbers [first, last).
  template <class E, class Work>
  void for_each_chunk(const E& executor, const Work& work) const {
    constexpr Index rows_in_chunk = 16;
    const Index chunks = divide_up(sizes_.head_dim, rows_in_chunk);
    executor.for_each(call_.k.batch * call_.k.heads * chunks, [&](Index task, Index) {
      const Index first = task % chunks * rows_in_chunk;
      const Index last = (std::min)(first + rows_in_chunk, sizes_.head_dim);
      work(task / chunks, first * sizes_.columns(), last * sizes_.columns());
    });
  }

  /// to = from + (the sum of `count` sums), for the numbers [first, last).
  void add_sums(Real* to, const Real* from, const Real* sums, Index count, Index first, Index last) const {
    for (Index x = first; x < last; x += lanes<Real>) {
      Packet<Real> sum = detail::load(sums + x);
      for (Index n = 1; n < count; ++n) sum = sum + detail::load(sums + n * sizes_.sum_size() + x);
      store(to + x, detail::load(from + x) + sum);
    }
  }

  void transpose_rows(const Real* from, Index first, Index last, Real* to) const {
    const Index columns = sizes_.columns(), d = sizes_.padded_head_dim();
    const Index end = last == sizes_.size() ? d : last / columns;
    for (Index r = first / columns; r < end; ++r) {
      for (Index c = 0; c <= sizes_.value_dim; ++c)
        to[c * d + r] = r < sizes_.head_dim ? from[r * columns + c] : Real(0);
    }
  }

  /// Calls work(b, h, row, at) for each row of the state of each KV head, where `at` is the number of its first
  /// element.
  template <class Work>
  void for_each_row(const Work& work) const {
    for (Index b = 0; b < call_.k.batch; ++b) {
      for (Index h = 0; h < call_.k.heads; ++h) {
        for (Index r = 0; r < sizes_.head_dim; ++r)
          work(b, h, r, (b * call_.k.heads + h) * sizes_.size() + r * sizes_.columns());
      }
    }
  }
  void copy_in(const InfiniState<const float>& from, Real* to) const {
    std::fill_n(to, call_.k.batch * call_.k.heads * sizes_.size(), Real(0));
    if (from.m.data == nullptr) return;
    for_each_row([&](Index b, Index h, Index r, Index at) {
      std::copy_n(from.m.row(b, h, r), sizes_.value_dim, to + at);
      to[at + sizes_.value_dim] = from.z(b, h, r);
    });
  }

  const Call& call_;
  const Gradient& of_;
  StateSizes<Real> sizes_;
  Index longest_ = 0, segments_ = 0, apart_ = 1, span_ = 1, spans_ = 0;
  bool has_change_ = false;  ///< false while the carried gradient is 0
  std::byte* worker_memory_ = nullptr;
  Index worker_bytes_ = 0;
  Real *kept_ = nullptr, *between_ = nullptr;  ///< [memories][kv heads][head_dim][columns]
  Real* change_ = nullptr;                     ///< the carried gradient, [kv heads][head_dim][columns]
  Real *state_transposed_ = nullptr, *change_transposed_ = nullptr;
  Real* sums_ = nullptr;  ///< [kv heads][spans]
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
