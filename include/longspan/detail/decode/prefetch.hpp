// A walk through the columns of some rows at a time that asks for the rows ahead.
#pragma once

#include <algorithm>
#include <cstdint>

#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Rows are asked for this far ahead, in bytes: 16 KB are equal, 2 and 4 KB 5-10 % slower.
inline constexpr Index prefetch_distance = 8192;

/// What a kernel asks for of the rows ahead. Rows that are read once do not drive others out of the caches: a step
/// of decoding over DRAM then takes 3-10 % less.
enum class PrefetchHint { none, streaming, reused };

/// Asks for the rows ahead while some rows are read together, a line of each at a time.
///
/// Only lines that are asked for in the order of their addresses, and spread over the work, let the processor run
/// ahead of them by itself. Keys of float for 4 queries, one thread over DRAM, % of the stream rate: all lines of
/// 4 rows at once 67-72, so 83-87, none 50.
class Prefetcher {
 public:
  /// For `count` rows, read `together` at a time. What is read behind the last of them is at `then`, if known.
  template <class T>
  Prefetcher(const T* rows, Index columns, Index row_stride, int together, Index count, const void* then)
      : stride_(static_cast<std::uintptr_t>(row_stride) * sizeof(T)) {
    const std::uintptr_t row_bytes = static_cast<std::uintptr_t>(columns) * sizeof(T);
    const Index rows_ahead = prefetch_distance / static_cast<Index>(std::max<std::uintptr_t>(1, row_bytes));
    const bool touch = row_bytes == stride_;
    const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(rows);
    ahead_ = first + (touch ? prefetch_distance : static_cast<std::uintptr_t>(rows_ahead) * stride_);
    apart_ = touch ? cache_line : stride_;
    step_ = touch ? cache_line * static_cast<std::uintptr_t>(together) : cache_line;
    if (then != nullptr) {
      last_ = count - rows_ahead;
      jump_ = reinterpret_cast<std::uintptr_t>(then) - first - static_cast<std::uintptr_t>(count) * stride_;
    }
  }

  /// Goes on to what is asked for while row `row` and those behind it are read.
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

/// Goes through the columns of `rows` rows of T that are read together: add_whole(column) for one packet, or two
/// that are loaded in pairs, add_packet(load, column) for what is left, where load gives a packet from an address.
template <class Real, class T, int rows, PrefetchHint hint, class AddWhole, class AddPacket>
LONGSPAN_INLINE void for_each_column(Index columns, Prefetcher lines, const AddWhole& add_whole,
                                     const AddPacket& add_packet) {
  constexpr Index w = lanes<Real>, step = loads_in_pairs<Real, T> ? 2 * w : w;
  constexpr Index line = (std::max)(step, cache_line / static_cast<Index>(sizeof(T)));
  Index column = 0;
  LONGSPAN_NO_UNROLL
  for (; column + line <= columns; column += line) {
    lines.template prefetch_lines<rows, hint>();
    LONGSPAN_UNROLL
    for (Index c = 0; c < line; c += step) add_whole(column + c);
  }
  if (column == columns) return;
  lines.template prefetch_lines<rows, hint>();
  LONGSPAN_NO_UNROLL
  for (; column + step <= columns; column += step) add_whole(column);
  if (column + w <= columns) {
    add_packet([](const T* from) { return load_as<Real>(from); }, column);
    column += w;
  }
  const Index left = columns - column;
  if (left > 0) add_packet([left](const T* from) { return load_part<Real>(from, left); }, column);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
