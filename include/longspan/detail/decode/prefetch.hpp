// Iterates over the columns of a few rows while prefetching later rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// How far ahead rows are prefetched, in bytes.
inline constexpr Index prefetch_distance = tuning::prefetch_distance;

/// How a kernel prefetches later rows. `streaming`: the rows are read once; the non-temporal hint does not evict other
/// data, and a decode step from DRAM takes 3-10 % less time. `reused`: the rows are read again.
enum class PrefetchHint { none, streaming, reused };

/// Prefetches later rows while a kernel reads a few rows together, one cache line of each at a time.
///
/// Prefetches must be issued in the order of their addresses and spread over the loop; otherwise they defeat the
/// prefetcher of the processor. Percent of the stream rate with float keys, 4 queries, one thread, from DRAM: no
/// prefetch: 50, all lines of 4 rows at once: 67-72, this schedule: 83-87.
class Prefetcher {
 public:
  /// For `count` rows, `together` of which are read at a time. `next` is the address of the data read after the last
  /// row, or null if it is unknown.
  template <class T>
  Prefetcher(const T* rows, Index columns, Index row_stride, int together, Index count, const void* next)
      : stride_(static_cast<std::uintptr_t>(row_stride) * sizeof(T)) {
    const std::uintptr_t row_bytes = static_cast<std::uintptr_t>(columns) * sizeof(T);
    const Index rows_ahead = prefetch_distance / static_cast<Index>(std::max<std::uintptr_t>(1, row_bytes));
    const bool contiguous = row_bytes == stride_;
    const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(rows);
    ahead_ = first + (contiguous ? prefetch_distance : static_cast<std::uintptr_t>(rows_ahead) * stride_);
    apart_ = contiguous ? cache_line : stride_;
    step_ = contiguous ? cache_line * static_cast<std::uintptr_t>(together) : cache_line;
    if (next != nullptr) {
      last_ = count - rows_ahead;
      jump_ = reinterpret_cast<std::uintptr_t>(next) - first - static_cast<std::uintptr_t>(count) * stride_;
    }
  }

  /// Sets the prefetch address for the iteration that reads `row` and the rows after it.
  LONGSPAN_INLINE void go_to(Index row) {
    next_ = ahead_ + static_cast<std::uintptr_t>(row) * stride_ + (row < last_ ? 0 : jump_);
  }

  template <int rows, PrefetchHint hint>
  LONGSPAN_INLINE void prefetch_lines() {
    if constexpr (hint == PrefetchHint::none) return;
    LONGSPAN_UNROLL
    for (int j = 0; j < rows; ++j)
      prefetch_line<hint == PrefetchHint::streaming>(next_ + static_cast<std::uintptr_t>(j) * apart_);
    next_ += step_;
  }

 private:
  std::uintptr_t stride_, ahead_, apart_, step_, jump_ = 0, next_ = 0;
  Index last_ = 0;
};

/// Iterates over the columns of `rows` rows of T that are read together. Calls add_whole(column) for each packet, or
/// for each two packets that are loaded as a pair, and add_packet(load, column) for the rest, where load(address)
/// returns a packet. A single row is one left over, which is not prefetched, in a loop that is not unrolled.
template <class Real, class T, int rows, PrefetchHint hint, class AddWhole, class AddPacket>
LONGSPAN_INLINE void for_each_column(Index columns, Prefetcher lines, const AddWhole& add_whole,
                                     const AddPacket& add_packet) {
  constexpr Index w = lanes<Real>, step = loads_in_pairs<Real, T> ? 2 * w : w;
  constexpr Index line = (std::max)(step, cache_line / static_cast<Index>(sizeof(T)));
  constexpr bool is_left_over = rows == 1 && hint == PrefetchHint::none;
  Index column = 0;
  // What cannot happen is not compiled: each call of add_whole and add_packet is a copy of a kernel's body.
  if constexpr (!is_left_over) {
    LONGSPAN_NO_UNROLL
    for (; column + line <= columns; column += line) {
      lines.template prefetch_lines<rows, hint>();
      LONGSPAN_UNROLL
      for (Index c = 0; c < line; c += step) add_whole(column + c);
    }
    if (column == columns) return;
    lines.template prefetch_lines<rows, hint>();
  }
  if constexpr (is_left_over || line > step) {
    LONGSPAN_NO_UNROLL
    for (; column + step <= columns; column += step) add_whole(column);
  }
  if constexpr (step > w) {
    if (column + w <= columns) {
      add_packet([](const T* from) { return load_as<Real>(from); }, column);
      column += w;
    }
  }
  const Index left = columns - column;
  if (left > 0) add_packet([left](const T* from) { return load_part<Real>(from, left); }, column);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
