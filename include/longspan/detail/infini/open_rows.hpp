// Keys and values of a segment that is not full yet, side by side for all batch rows.
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

LONGSPAN_BEGIN
namespace detail {

template <class T>
class OpenRows {
 public:
  explicit OpenRows(const StreamShape& shape) : shape_(shape) {}

  Index room() const noexcept { return room_; }
  Index bytes() const noexcept { return static_cast<Index>((k_.capacity() + v_.capacity()) * sizeof(T)); }

  /// The first `count` keys of batch rows [b, b + rows).
  TensorView<T> keys(Index b, Index rows, Index count) {
    return batch_rows(compact_view(k_.data(), shape_.batch, shape_.kv_heads, room_, shape_.head_dim), b, rows)
        .slice_rows(0, count);
  }
  TensorView<T> values(Index b, Index rows, Index count) {
    return batch_rows(compact_view(v_.data(), shape_.batch, shape_.kv_heads, room_, shape_.value_dim), b,
                      rows)
        .slice_rows(0, count);
  }

  /// Room for so many; of batch row b the first filled[b] are kept.
  void resize(Index room, const std::vector<std::int64_t>& filled) {
    const auto moved = [&](const std::vector<T>& from, Index cols) {
      const Index heads = shape_.batch * shape_.kv_heads;
      std::vector<T> to(static_cast<std::size_t>(heads * room * cols));
      for (Index head = 0; head < heads; ++head) {
        const Index rows = filled[static_cast<std::size_t>(head / shape_.kv_heads)];
        std::copy_n(from.begin() + head * room_ * cols, rows * cols, to.begin() + head * room * cols);
      }
      return to;
    };
    std::vector<T> k = moved(k_, shape_.head_dim), v = moved(v_, shape_.value_dim);
    k_ = std::move(k);
    v_ = std::move(v);
    room_ = room;
  }

  /// Rows behind the first `filled` of batch rows [b, b + rows).
  template <class Tk, class Tv>
  void append(TensorView<Tk> k, TensorView<Tv> v, Index b, Index rows, Index filled) {
    copy(k, keys(b, rows, filled + k.rows).slice_rows(filled, k.rows));
    copy(v, values(b, rows, filled + v.rows).slice_rows(filled, v.rows));
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
LONGSPAN_END
