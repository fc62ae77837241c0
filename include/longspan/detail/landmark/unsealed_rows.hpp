// The rows of a landmark cache that are not sealed, and the rows of the last sealed blocks, which a truncation may
// unseal.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "longspan/detail/landmark/sealed_rows.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Keys without position encoding, and values: [batch][kv_heads][room][columns], of which the first size() rows are
/// used.
template <class Row>
class UnsealedRows {
 public:
  UnsealedRows(Index batch, Index kv_heads, Index head_dim, Index value_dim)
      : batch_(batch), kv_heads_(kv_heads), head_dim_(head_dim), value_dim_(value_dim) {}

  Index size() const noexcept { return size_; }
  Index bytes() const noexcept { return static_cast<Index>((k_.size() + v_.size()) * sizeof(Row)); }

  /// The rows from number `first` on.
  TensorView<const Row> k(Index first) const { return rows(k_, head_dim_, first); }
  TensorView<const Row> v(Index first) const { return rows(v_, value_dim_, first); }

  /// Appends rows. Changes nothing if memory runs out.
  template <class Tk, class Tv>
  void append(TensorView<Tk> k, TensorView<Tv> v) {
    if (size_ + k.rows > room_) make_room((std::max)(2 * room_, size_ + k.rows));
    for (Index n = 0; n < batch_ * kv_heads_; ++n) {
      const auto copy = [&](const auto& from, std::vector<Row>& to) {
        if (from.empty()) return;
        copy_rows(from.row(n / kv_heads_, n % kv_heads_, 0), from.row_stride, from.rows, from.cols,
                  to.data() + (n * room_ + size_) * from.cols);
      };
      copy(k, k_);
      copy(v, v_);
    }
    size_ += k.rows;
  }
  /// Removes the rows from number `size` on.
  void truncate(Index size) noexcept { size_ = size; }
  /// Removes the first `count` rows.
  void drop(Index count) noexcept {
    if (count == 0) return;
    const auto drop_front = [&](std::vector<Row>& rows, Index cols) {
      for (Index n = 0; n < batch_ * kv_heads_; ++n) {
        Row* first = rows.data() + n * room_ * cols;
        std::copy(first + count * cols, first + size_ * cols, first);
      }
    };
    drop_front(k_, head_dim_);
    drop_front(v_, value_dim_);
    size_ -= count;
  }

  /// A copy whose batch row b is batch row rows[b] of this object.
  UnsealedRows reordered(std::span<const Index> rows) const {
    UnsealedRows to = *this;
    const auto copy_row = [&](const std::vector<Row>& from, std::vector<Row>& into, Index b) {
      const Index count = static_cast<Index>(from.size()) / batch_;
      std::copy_n(from.data() + rows[at(b)] * count, count, into.data() + b * count);
    };
    for (Index b = 0; b < batch_; ++b) {
      copy_row(k_, to.k_, b);
      copy_row(v_, to.v_, b);
    }
    return to;
  }

  void save(StateWriter& writer) const {
    for (Index n = 0; n < batch_ * kv_heads_; ++n) {
      writer.array(k_.data() + n * room_ * head_dim_, size_ * head_dim_);
      writer.array(v_.data() + n * room_ * value_dim_, size_ * value_dim_);
    }
  }
  /// Reads `size` rows into an empty object.
  void load(StateReader& reader, Index size) {
    for (Index n = 0; n < batch_ * kv_heads_; ++n) {
      const auto k = reader.template array<Row>(size * head_dim_),
                 v = reader.template array<Row>(size * value_dim_);
      k_.insert(k_.end(), k.begin(), k.end());
      v_.insert(v_.end(), v.begin(), v.end());
    }
    size_ = room_ = size;
  }

 private:
  static std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
  TensorView<const Row> rows(const std::vector<Row>& of, Index cols, Index first) const {
    return {of.data() + (of.empty() ? 0 : first * cols),
            batch_,
            kv_heads_,
            size_ - first,
            cols,
            kv_heads_ * room_ * cols,
            room_ * cols,
            cols};
  }
  void make_room(Index room) {
    const auto grown = [&](const std::vector<Row>& rows, Index cols) {
      std::vector<Row> to(at(batch_ * kv_heads_ * room * cols));
      for (Index n = 0; n < batch_ * kv_heads_; ++n)
        std::copy_n(rows.data() + n * room_ * cols, size_ * cols, to.data() + n * room * cols);
      return to;
    };
    std::vector<Row> k = grown(k_, head_dim_), v = grown(v_, value_dim_);
    k_ = std::move(k);
    v_ = std::move(v);
    room_ = room;
  }

  Index batch_, kv_heads_, head_dim_, value_dim_;
  std::vector<Row> k_, v_;
  Index size_ = 0, room_ = 0;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
