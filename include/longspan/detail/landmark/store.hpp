// What a landmark cache keeps: sealed blocks, in memory or in a file, their landmarks, and the keys and
// values that are not sealed yet.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/landmark/sealed_rows.hpp"
#include "longspan/detail/storage/block_file.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN
namespace detail {

template <StoredElement T>
class LandmarkStore {
 public:
  using Open = typename SealedRows<T>::Open;

  LandmarkStore(Index batch, Index kv_heads, Index head_dim, Index value_dim, Index block)
      : batch_(batch),
        kv_heads_(kv_heads),
        head_dim_(head_dim),
        value_dim_(value_dim),
        block_(block),
        rows_{block, head_dim, value_dim} {
    pages_.resize(at(batch));
    landmarks_.resize(at(batch * kv_heads));
  }

  /// Keeps blocks in a file from now on, after those that the file holds already. Of an empty store.
  void open(const std::string& path, const BlockFileKind& kind, Index resident);
  bool has_file() const noexcept { return writer_.file != nullptr; }
  void remove_file() const { writer_.file->remove(); }

  /// Throws where the file has no space for `count` more blocks.
  void reserve(Index count) {
    if (has_file()) writer_.file->reserve(count);
  }
  /// Bytes of a block in a file.
  Index file_bytes() const {
    return batch_ * file_page_bytes() + batch_ * kv_heads_ * head_dim_ * static_cast<Index>(sizeof(Open));
  }

  /// How many heads of blocks may be read before the pages of the file are given back; all, in memory.
  Index heads_at_once() const noexcept {
    return of_file_ == nullptr ? PTRDIFF_MAX : std::max<Index>(1, resident_ / head_bytes());
  }
  /// That many are about to be read.
  void expect_reading(Index heads) {
    if (of_file_ == nullptr) return;
    if (read_ + heads > heads_at_once()) {
      of_file_->release();
      read_ = 0;
    }
    read_ += heads;
  }

  /// Sealed blocks of each batch row, those that have left, and keys that are not sealed.
  Index blocks() const noexcept { return blocks_; }
  Index dropped() const noexcept { return dropped_; }
  Index open_keys() const noexcept { return open_; }
  Index bytes() const noexcept {
    const Index sealed = batch_ * (blocks_ - in_file_) * page_size(),
                landmarks = batch_ * blocks_ * kv_heads_ * head_dim_;
    return static_cast<Index>(sizeof(T)) * sealed +
           static_cast<Index>(sizeof(Open)) * (landmarks + static_cast<Index>(k_.size() + v_.size()));
  }

  /// Keys of a sealed block, the last its landmark, encoded as if the block stood at position 0; its values.
  KeyRun<T, T> rows(Index b, Index h, Index n) const {
    return rows_.run(pages_[at(b)][at(n)].get() + h * rows_.size());
  }
  /// Landmarks of the blocks [first, first + count).
  MatrixView<const Open> landmarks(Index b, Index h, Index first, Index count) const {
    return {landmarks_[at(b * kv_heads_ + h)].data() + first * head_dim_, count, head_dim_, head_dim_};
  }
  /// Keys, without positions, and values that are not sealed.
  TensorView<const Open> open_k() const { return open_rows(k_, head_dim_); }
  TensorView<const Open> open_v() const { return open_rows(v_, value_dim_); }

  /// Forgets keys that are not sealed, but for the first `open`.
  void truncate(Index open) noexcept { open_ = open; }

  template <class Tk, class Tv>
  void append(TensorView<Tk> k, TensorView<Tv> v) {
    if (open_ + k.rows > room_) make_room(std::max(2 * room_, open_ + k.rows));
    for (Index n = 0; n < batch_ * kv_heads_; ++n) {
      const auto copy = [&](const auto& from, std::vector<Open>& to) {
        if (from.empty()) return;
        copy_rows(from.row(n / kv_heads_, n % kv_heads_, 0), from.row_stride, from.rows, from.cols,
                  to.data() + (n * room_ + open_) * from.cols);
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
    if (has_file()) writer_.file->count(0, dropped_ + count);
    for (auto& row : pages_) row.erase(row.begin(), row.begin() + count);
    for (auto& list : landmarks_) list.erase(list.begin(), list.begin() + count * head_dim_);
    blocks_ -= count;
    dropped_ += count;
    in_file_ -= std::min(in_file_, count);  // the oldest: a copy keeps later ones in memory
  }

  /// Batch row b becomes what row rows[b] was.
  void reorder(std::span<const Index> rows) {
    const LandmarkStore before = *this;
    const auto copy_row = [&](const std::vector<Open>& from, std::vector<Open>& to, Index b, Index row) {
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
    const Index of_block = array_bytes<T>(function, batch_ * page_size()) +
                           array_bytes<Open>(function, batch_ * kv_heads_ * head_dim_);
    if (of_block > 0 && blocks > PTRDIFF_MAX / 2 / of_block)
      refuse(function, "the number of blocks", std::to_string(blocks), "fewer");
    return of_block * blocks +
           array_bytes<Open>(function, batch_ * kv_heads_ * open * (head_dim_ + value_dim_));
  }
  void save(StateWriter& writer) const;
  /// Accumulate an empty store.
  void load(StateReader& reader, Index blocks, Index dropped, Index open);

 private:
  /// A sealed block of one batch row, never changed and shared by copies: SealedRows for each KV head.
  using Page = std::shared_ptr<const T>;

  /// Who writes to a file. A copy reads the blocks that it shares, and keeps its own in memory.
  struct Writer {
    std::shared_ptr<BlockFile> file;

    Writer() = default;
    ~Writer() = default;
    Writer(const Writer&) noexcept {}
    Writer& operator=(const Writer& other) noexcept {
      if (this != &other) file = nullptr;
      return *this;
    }
    Writer(Writer&&) noexcept = default;
    Writer& operator=(Writer&&) noexcept = default;
  };

  static std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
  Index head_bytes() const noexcept {
    return std::max<Index>(1, rows_.size() * static_cast<Index>(sizeof(T)));
  }
  Index page_size() const noexcept { return kv_heads_ * rows_.size(); }
  Index file_page_bytes() const noexcept { return round_up(page_size() * static_cast<Index>(sizeof(T)), 64); }

  template <class Encode, class E>
  void seal_in_memory(Index count, const Encode& encode, const E& executor);
  template <class Encode, class E>
  void seal_in_file(Index count, const Encode& encode, const E& executor);
  void add_pages_of_file(Index number);
  TensorView<const Open> open_rows(const std::vector<Open>& rows, Index cols) const {
    return {rows.data(), batch_, kv_heads_, open_, cols, kv_heads_ * room_ * cols, room_ * cols, cols};
  }

  void make_room(Index room) {
    const auto grown = [&](const std::vector<Open>& rows, Index cols) {
      std::vector<Open> to(at(batch_ * kv_heads_ * room * cols));
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
  SealedRows<T> rows_;
  std::vector<std::deque<Page>> pages_;       ///< of each batch row
  std::vector<std::vector<Open>> landmarks_;  ///< of each batch row and KV head, [blocks][head_dim]
  std::vector<Open> k_, v_;                   ///< [batch][kv_heads][room][cols]
  Index open_ = 0, room_ = 0;

  Writer writer_;
  std::shared_ptr<BlockFile> of_file_;  ///< whose blocks are read, null where all are in memory
  std::vector<std::byte> written_;      ///< a block on its way into the file
  Index in_file_ = 0;                   ///< of the blocks that are kept
  Index resident_ = 0, read_ = 0;       ///< bytes; heads of blocks since pages were released
};

template <StoredElement T>
template <Position P, class E>
void LandmarkStore<T>::seal(Index count, const P& position, bool as_in_text, const E& executor) {
  for (auto& list : landmarks_) list.resize(at((blocks_ + count) * head_dim_));
  const auto encode = [&](Index lane, Index n, T* rows) {
    const Index first = lane * room_ + n * block_, place = as_in_text ? (dropped_ + blocks_ + n) * block_ : 0;
    rows_.seal(k_.data() + first * head_dim_, v_.data() + first * value_dim_, position, rows);
    Open* landmark = landmarks_[at(lane)].data() + (blocks_ + n) * head_dim_;
    std::copy_n(k_.data() + (first + block_ - 1) * head_dim_, head_dim_, landmark);
    rows_.encode(position, landmark, 1, place + block_ - 1);
  };
  if (has_file()) {
    seal_in_file(count, encode, executor);
  } else {
    seal_in_memory(count, encode, executor);
  }
  const auto drop_front = [&](std::vector<Open>& rows, Index cols) {
    for (Index lane = 0; lane < batch_ * kv_heads_; ++lane) {
      Open* first = rows.data() + lane * room_ * cols;
      std::copy(first + count * block_ * cols, first + open_ * cols, first);
    }
  };
  drop_front(k_, head_dim_);
  drop_front(v_, value_dim_);
  open_ -= count * block_;
  blocks_ += count;
}

template <StoredElement T>
template <class Encode, class E>
void LandmarkStore<T>::seal_in_memory(Index count, const Encode& encode, const E& executor) {
  std::vector<std::shared_ptr<T>> pages;
  for (Index n = 0; n < batch_ * count; ++n) {
    const auto bytes = at(page_size()) * sizeof(T);
    pages.emplace_back(static_cast<T*>(::operator new(bytes, std::align_val_t{64})),
                       [](T* page) { ::operator delete(page, std::align_val_t{64}); });
  }
  executor.for_each(batch_ * kv_heads_ * count, [&](Index task, Index) {
    const Index n = task % count, lane = task / count;
    encode(lane, n, pages[at(lane / kv_heads_ * count + n)].get() + lane % kv_heads_ * rows_.size());
  });
  for (Index n = 0; n < batch_ * count; ++n) pages_[at(n / count)].push_back(std::move(pages[at(n)]));
}

/// A block in the file: its pages, one for each batch row, and its landmarks.
template <StoredElement T>
template <class Encode, class E>
void LandmarkStore<T>::seal_in_file(Index count, const Encode& encode, const E& executor) {
  BlockFile& file = *writer_.file;
  const Index first = file.blocks();
  file.reserve(count);
  written_.resize(at(file_bytes()));
  for (Index n = 0; n < count; ++n) {
    executor.for_each(batch_ * kv_heads_, [&](Index lane, Index) {
      std::byte* page = written_.data() + lane / kv_heads_ * file_page_bytes();
      encode(lane, n, reinterpret_cast<T*>(page) + lane % kv_heads_ * rows_.size());
      const Open* landmark = landmarks_[at(lane)].data() + (blocks_ + n) * head_dim_;
      const auto bytes = at(head_dim_) * sizeof(Open);
      std::memcpy(written_.data() + at(batch_ * file_page_bytes()) + at(lane) * bytes, landmark, bytes);
    });
    file.write(n, written_.data());
  }
  file.count(count, dropped_);
  for (Index n = first; n < first + count; ++n) add_pages_of_file(n);
}

template <StoredElement T>
void LandmarkStore<T>::add_pages_of_file(Index number) {
  const std::shared_ptr<BlockFile> file = writer_.file;
  const std::shared_ptr<const std::byte> block(file->block(number),
                                               [file, number](const std::byte*) { file->give_back(number); });
  for (Index b = 0; b < batch_; ++b)
    pages_[at(b)].push_back(Page(block, reinterpret_cast<const T*>(block.get() + b * file_page_bytes())));
  ++in_file_;
}

template <StoredElement T>
void LandmarkStore<T>::open(const std::string& path, const BlockFileKind& kind, Index resident) {
  writer_.file = std::make_shared<BlockFile>(path, kind, [&](Index, const std::byte* block) {
    const auto* landmark = block + batch_ * file_page_bytes();
    for (auto& list : landmarks_) {
      list.resize(list.size() + at(head_dim_));
      const auto bytes = at(head_dim_) * sizeof(Open);
      if (bytes > 0) std::memcpy(list.data() + list.size() - at(head_dim_), landmark, bytes);
      landmark += bytes;
    }
  });
  of_file_ = writer_.file;
  resident_ = resident;
  dropped_ = of_file_->dropped();
  blocks_ = of_file_->blocks() - dropped_;
  for (Index n = 0; n < blocks_; ++n) add_pages_of_file(dropped_ + n);
}

template <StoredElement T>
void LandmarkStore<T>::save(StateWriter& writer) const {
  for (const auto& row : pages_) {
    for (const Page& page : row) writer.array(page.get(), page_size());
  }
  for (const auto& list : landmarks_) writer.array(list.data(), blocks_ * head_dim_);
  for (Index n = 0; n < batch_ * kv_heads_; ++n) {
    writer.array(k_.data() + n * room_ * head_dim_, open_ * head_dim_);
    writer.array(v_.data() + n * room_ * value_dim_, open_ * value_dim_);
  }
}

template <StoredElement T>
void LandmarkStore<T>::load(StateReader& reader, Index blocks, Index dropped, Index open) {
  for (auto& row : pages_) {
    for (Index n = 0; n < blocks; ++n) {
      const auto page = std::make_shared<std::vector<T>>(reader.template array<T>(page_size()));
      row.push_back(Page(page, page->data()));
    }
  }
  for (auto& list : landmarks_) list = reader.template array<Open>(blocks * head_dim_);
  for (Index n = 0; n < batch_ * kv_heads_; ++n) {
    const auto k = reader.template array<Open>(open * head_dim_),
               v = reader.template array<Open>(open * value_dim_);
    k_.insert(k_.end(), k.begin(), k.end());
    v_.insert(v_.end(), v.begin(), v.end());
  }
  blocks_ = blocks;
  dropped_ = dropped;
  open_ = room_ = open;
}

}  // namespace detail
LONGSPAN_END
