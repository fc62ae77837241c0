// What a landmark cache keeps: sealed blocks, their landmarks, and the keys and values that are not sealed
// yet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "longspan/detail/key_block.hpp"
#include "longspan/detail/state_file.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN
namespace detail {

template <class T>
class LandmarkStore {
 public:
  LandmarkStore(Index batch, Index kv_heads, Index head_dim, Index value_dim, Index block)
      : batch_(batch), kv_heads_(kv_heads), head_dim_(head_dim), value_dim_(value_dim), block_(block) {
    pages_.resize(at(batch));
    landmarks_.resize(at(batch * kv_heads));
  }

  /// Sealed blocks of each batch row, those that have left, and keys that are not sealed.
  Index blocks() const noexcept { return blocks_; }
  Index dropped() const noexcept { return dropped_; }
  Index open_keys() const noexcept { return open_; }
  Index bytes() const noexcept {
    const Index sealed = batch_ * blocks_ * (page_size() + kv_heads_ * head_dim_);
    return static_cast<Index>(sizeof(T)) * (sealed + static_cast<Index>(k_.size() + v_.size()));
  }

  /// Keys of a sealed block, the last its landmark, encoded as if the block stood at position 0; its values.
  MatrixView<const T> keys(Index b, Index h, Index n) const {
    return {pages_[at(b)][at(n)].get() + h * head_size(), block_, head_dim_, head_dim_};
  }
  MatrixView<const T> values(Index b, Index h, Index n) const {
    return {keys(b, h, n).row(block_), block_ - 1, value_dim_, value_dim_};
  }
  /// Landmarks of the blocks [first, first + count).
  MatrixView<const T> landmarks(Index b, Index h, Index first, Index count) const {
    return {landmarks_[at(b * kv_heads_ + h)].data() + first * head_dim_, count, head_dim_, head_dim_};
  }
  /// Keys, without positions, and values that are not sealed.
  TensorView<const T> open_k() const { return open_rows(k_, head_dim_); }
  TensorView<const T> open_v() const { return open_rows(v_, value_dim_); }

  template <class Tk, class Tv>
  void append(TensorView<Tk> k, TensorView<Tv> v) {
    if (open_ + k.rows > room_) make_room(std::max(2 * room_, open_ + k.rows));
    for (Index n = 0; n < batch_ * kv_heads_; ++n) {
      const auto copy = [&](const auto& from, std::vector<T>& to) {
        if (from.empty()) return;
        convert_rows(from.row(n / kv_heads_, n % kv_heads_, 0), from.row_stride, from.rows, from.cols,
                     to.data() + (n * room_ + open_) * from.cols, from.cols);
      };
      copy(k, k_);
      copy(v, v_);
    }
    open_ += k.rows;
  }

  /// The first `count` open blocks become pages; their landmarks are encoded as in a block at 0, or
  /// `as_in_text` where they stand in the stream.
  template <Position P, class E>
  void seal(Index count, const P& position, bool as_in_text, const E& executor);

  void drop(Index count) {
    for (auto& row : pages_) row.erase(row.begin(), row.begin() + count);
    for (auto& list : landmarks_) list.erase(list.begin(), list.begin() + count * head_dim_);
    blocks_ -= count;
    dropped_ += count;
  }

  /// Batch row b becomes what row rows[b] was.
  void reorder(std::span<const Index> rows) {
    const LandmarkStore before = *this;
    const auto copy_row = [&](const std::vector<T>& from, std::vector<T>& to, Index b, Index row) {
      const Index count = static_cast<Index>(from.size()) / batch_;
      std::copy_n(from.data() + row * count, count, to.data() + b * count);
    };
    for (Index b = 0; b < batch_; ++b) {
      const Index row = rows[at(b)];
      pages_[at(b)] = before.pages_[at(row)];
      for (Index h = 0; h < kv_heads_; ++h)
        landmarks_[at(b * kv_heads_ + h)] = before.landmarks_[at(row * kv_heads_ + h)];
      copy_row(before.k_, k_, b, row);
      copy_row(before.v_, v_, b, row);
    }
  }

  /// Bytes of a state of so many sealed blocks and open keys.
  Index payload_bytes(std::string_view function, Index blocks, Index open) const {
    const Index of_block = array_bytes<T>(function, batch_ * (page_size() + kv_heads_ * head_dim_));
    if (of_block > 0 && blocks > PTRDIFF_MAX / 2 / of_block)
      refuse(function, "the number of blocks", std::to_string(blocks), "fewer");
    return of_block * blocks + array_bytes<T>(function, batch_ * kv_heads_ * open * (head_dim_ + value_dim_));
  }
  void save(StateWriter& writer) const;
  /// Into an empty store.
  void load(StateReader& reader, Index blocks, Index dropped, Index open);

 private:
  /// A sealed block of one batch row, never changed and shared by copies: for each KV head keys
  /// [block][head_dim] and values [block - 1][value_dim].
  using Page = std::shared_ptr<const T>;

  static std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
  Index head_size() const noexcept { return block_ * head_dim_ + (block_ - 1) * value_dim_; }
  Index page_size() const noexcept { return kv_heads_ * head_size(); }
  TensorView<const T> open_rows(const std::vector<T>& rows, Index cols) const {
    return {rows.data(), batch_, kv_heads_, open_, cols, kv_heads_ * room_ * cols, room_ * cols, cols};
  }

  void make_room(Index room) {
    const auto grown = [&](const std::vector<T>& rows, Index cols) {
      std::vector<T> to(at(batch_ * kv_heads_ * room * cols));
      for (Index n = 0; n < batch_ * kv_heads_; ++n)
        std::copy_n(rows.data() + n * room_ * cols, open_ * cols, to.data() + n * room * cols);
      return to;
    };
    auto k = grown(k_, head_dim_), v = grown(v_, value_dim_);
    k_ = std::move(k);
    v_ = std::move(v);
    room_ = room;
  }

  Index batch_, kv_heads_, head_dim_, value_dim_, block_;
  Index blocks_ = 0, dropped_ = 0;
  std::vector<std::deque<Page>> pages_;    ///< of each batch row
  std::vector<std::vector<T>> landmarks_;  ///< of each batch row and KV head, [blocks][head_dim]
  std::vector<T> k_, v_;                   ///< [batch][kv_heads][room][cols]
  Index open_ = 0, room_ = 0;
};

template <class T>
template <Position P, class E>
void LandmarkStore<T>::seal(Index count, const P& position, bool as_in_text, const E& executor) {
  const Index d = head_dim_, dv = value_dim_, lanes = batch_ * kv_heads_;
  std::vector<std::shared_ptr<T>> pages;
  for (Index n = 0; n < batch_ * count; ++n) {
    const auto bytes = at(page_size()) * sizeof(T);
    pages.emplace_back(static_cast<T*>(::operator new (bytes, std::align_val_t{64})),
                       [](T* page) { ::operator delete (page, std::align_val_t{64}); });
  }
  for (auto& list : landmarks_) list.resize(at((blocks_ + count) * d));
  executor.for_each(lanes * count, [&](Index task, Index) {
    const Index n = task % count, lane = task / count;
    const T* raw = k_.data() + (lane * room_ + n * block_) * d;
    T* keys = pages[at(lane / kv_heads_ * count + n)].get() + lane % kv_heads_ * head_size();
    std::copy_n(raw, block_ * d, keys);
    std::copy_n(v_.data() + (lane * room_ + n * block_) * dv, (block_ - 1) * dv, keys + block_ * d);
    position.encode(MatrixView<T>{keys, block_, d, d}, 0, Role::key);
    T* landmark = landmarks_[at(lane)].data() + (blocks_ + n) * d;
    std::copy_n(raw + (block_ - 1) * d, d, landmark);
    const Index place = as_in_text ? (dropped_ + blocks_ + n) * block_ : 0;
    position.encode(MatrixView<T>{landmark, 1, d, d}, place + block_ - 1, Role::key);
  });
  for (Index n = 0; n < batch_ * count; ++n) pages_[at(n / count)].push_back(std::move(pages[at(n)]));
  const auto drop_front = [&](std::vector<T>& rows, Index cols) {
    for (Index lane = 0; lane < lanes; ++lane) {
      T* first = rows.data() + lane * room_ * cols;
      std::copy(first + count * block_ * cols, first + open_ * cols, first);
    }
  };
  drop_front(k_, d);
  drop_front(v_, dv);
  open_ -= count * block_;
  blocks_ += count;
}

template <class T>
void LandmarkStore<T>::save(StateWriter& writer) const {
  for (const auto& row : pages_) {
    for (const Page& page : row) writer.array(page.get(), page_size());
  }
  for (const auto& list : landmarks_) writer.array(list.data(), static_cast<Index>(list.size()));
  for (Index n = 0; n < batch_ * kv_heads_; ++n) {
    writer.array(k_.data() + n * room_ * head_dim_, open_ * head_dim_);
    writer.array(v_.data() + n * room_ * value_dim_, open_ * value_dim_);
  }
}

template <class T>
void LandmarkStore<T>::load(StateReader& reader, Index blocks, Index dropped, Index open) {
  for (auto& row : pages_) {
    for (Index n = 0; n < blocks; ++n) {
      const auto page = std::make_shared<std::vector<T>>(reader.template array<T>(page_size()));
      row.push_back(Page(page, page->data()));
    }
  }
  for (auto& list : landmarks_) list = reader.template array<T>(blocks * head_dim_);
  for (Index n = 0; n < batch_ * kv_heads_; ++n) {
    const auto k = reader.template array<T>(open * head_dim_),
               v = reader.template array<T>(open * value_dim_);
    k_.insert(k_.end(), k.begin(), k.end());
    v_.insert(v_.end(), v.begin(), v.end());
  }
  blocks_ = blocks;
  dropped_ = dropped;
  open_ = room_ = open;
}

}  // namespace detail
LONGSPAN_END
