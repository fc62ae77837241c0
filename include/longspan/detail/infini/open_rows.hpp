// Keys and values of the segment that is not full yet, and of closed segments that may be reopened, for all batch rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "longspan/detail/call/slices.hpp"
#include "longspan/element.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// What a batch row keeps of the most recently closed segments, so that they can be reopened.
struct ClosedSegments {
  Index begin = 0;             ///< tokens before the first of these segments
  Index rows = 0;              ///< rows of all of them together
  std::vector<Index> lengths;  ///< rows of each, the oldest first

  bool operator==(const ClosedSegments&) const = default;

  void clear() noexcept {
    begin = rows = 0;
    lengths.clear();
  }
  /// Reserves memory for one more segment, so that `append` cannot fail.
  void make_room() {
    if (lengths.size() == lengths.capacity()) lengths.reserve(2 * lengths.size() + 4);
  }
  void append(Index length) noexcept {
    lengths.push_back(length);
    rows += length;
  }
  /// Drops the first `count` segments.
  void drop(std::size_t count) noexcept {
    for (std::size_t n = 0; n < count; ++n) {
      begin += lengths[n];
      rows -= lengths[n];
    }
    lengths.erase(lengths.begin(), lengths.begin() + static_cast<std::ptrdiff_t>(count));
  }
  /// Drops the segments that end after token number `tokens`.
  void drop_after(Index tokens) noexcept {
    for (; !lengths.empty() && begin + rows > tokens; lengths.pop_back()) rows -= lengths.back();
  }
};

template <class T>
class OpenRows {
 public:
  explicit OpenRows(const StreamShape& shape) : shape_(shape) {}

  Index room() const noexcept { return room_; }
  Index bytes() const noexcept { return static_cast<Index>((k_.capacity() + v_.capacity()) * sizeof(T)); }

  /// Keys [first, first + count) of batch rows [b, b + rows).
  TensorView<T> keys(Index b, Index rows, Index first, Index count) {
    return batch_rows(compact_view(k_.data(), shape_.batch, shape_.kv_heads, room_, shape_.head_dim), b, rows)
        .slice_rows(first, count);
  }
  TensorView<T> values(Index b, Index rows, Index first, Index count) {
    return batch_rows(compact_view(v_.data(), shape_.batch, shape_.kv_heads, room_, shape_.value_dim), b,
                      rows)
        .slice_rows(first, count);
  }

  /// Changes the room to `room` rows; keeps the first stored[b] rows of batch row b.
  void resize(Index room, const std::vector<std::int64_t>& stored) {
    const auto moved = [&](const std::vector<T>& from, Index cols) {
      const Index heads = shape_.batch * shape_.kv_heads;
      std::vector<T> to(static_cast<std::size_t>(heads * room * cols));
      for (Index head = 0; head < heads; ++head) {
        const Index rows = stored[static_cast<std::size_t>(head / shape_.kv_heads)];
        std::copy_n(from.begin() + head * room_ * cols, rows * cols, to.begin() + head * room * cols);
      }
      return to;
    };
    std::vector<T> k = moved(k_, shape_.head_dim), v = moved(v_, shape_.value_dim);
    k_ = std::move(k);
    v_ = std::move(v);
    room_ = room;
  }

  /// Copies k and v to the rows from `first` on of the batch rows [b, b + rows).
  template <class Tk, class Tv>
  void write(TensorView<Tk> k, TensorView<Tv> v, Index b, Index rows, Index first) {
    copy(k, keys(b, rows, first, k.rows));
    copy(v, values(b, rows, first, v.rows));
  }

  /// Drops the first `count` rows of batch row b and moves the next `kept` rows to the front.
  void drop(Index b, Index count, Index kept) {
    const auto move = [&](std::vector<T>& rows, Index cols) {
      for (Index head = b * shape_.kv_heads; head < (b + 1) * shape_.kv_heads; ++head) {
        const auto first = rows.begin() + head * room_ * cols;
        std::copy(first + count * cols, first + (count + kept) * cols, first);
      }
    };
    move(k_, shape_.head_dim);
    move(v_, shape_.value_dim);
  }

 private:
  template <class From>
  static void copy(TensorView<From> from, TensorView<T> to) {
    for (Index b = 0; b < to.batch; ++b) {
      for (Index h = 0; h < to.heads; ++h) {
        for (Index i = 0; i < to.rows; ++i) {
          const From* row = from.row(b, h, i);
          std::transform(row, row + to.cols, to.row(b, h, i), [](From x) {
            if constexpr (std::is_same_v<std::remove_const_t<From>, T>) {
              return x;
            } else {
              return static_cast<T>(static_cast<Arithmetic<T>>(x));
            }
          });
        }
      }
    }
  }

  StreamShape shape_;
  std::vector<T> k_, v_;  ///< [batch, kv_heads, room, cols]
  Index room_ = 0;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
