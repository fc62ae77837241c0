// The rows that a landmark cache keeps: sealed blocks in memory or in a file, their landmarks, and the keys and values
// that are not sealed yet.
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

#include "longspan/detail/landmark/block_counts.hpp"
#include "longspan/detail/landmark/sealed_rows.hpp"
#include "longspan/detail/landmark/unsealed_rows.hpp"
#include "longspan/detail/storage/block_file.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/position.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// BlockCounts determines which blocks are sealed and dropped. The store keeps what a truncation may bring back: the
/// rows of sealed blocks that may be unsealed, and dropped blocks that may return. `settle` frees everything else and
/// writes final blocks to the file.
template <StoredElement T>
class LandmarkStore {
 public:
  using Open = typename SealedRows<T>::Open;

  LandmarkStore(const StreamShape& shape, const BlockCounts& counts)
      : batch_(shape.batch),
        kv_heads_(shape.kv_heads),
        head_dim_(shape.head_dim),
        value_dim_(shape.value_dim),
        counts_(counts),
        rows_{counts.block, shape.head_dim, shape.value_dim},
        unsealed_(shape.batch, shape.kv_heads, shape.head_dim, shape.value_dim) {
    pages_.resize(at(batch_));
    landmarks_.resize(at(batch_ * kv_heads_));
  }
  LandmarkStore(const LandmarkStore&) = default;
  LandmarkStore(LandmarkStore&&) noexcept = default;
  LandmarkStore& operator=(const LandmarkStore&) = delete;  // copy, then move: a copy may run out of memory
  LandmarkStore& operator=(LandmarkStore&&) noexcept = default;
  ~LandmarkStore() = default;

  const BlockCounts& counts() const noexcept { return counts_; }

  /// Keeps final blocks in a file from now on, after the blocks that the file already contains. The store must be
  /// empty.
  void open(const std::string& path, const BlockFileKind& kind, Index resident);
  bool has_file() const noexcept { return writer_.file != nullptr; }
  void rename_file(const std::string& path) { writer_.file->rename(path); }

  /// Throws Error if the file has no space for the blocks that become final after `tokens` more tokens.
  void reserve(Index tokens) {
    if (has_file()) writer_.file->reserve(counts_.settled_at(counts_.tokens + tokens) - counts_.settled);
  }
  /// Bytes of a block in the file.
  Index file_bytes() const {
    return batch_ * file_page_bytes() + batch_ * kv_heads_ * head_dim_ * static_cast<Index>(sizeof(Open));
  }

  /// The number of blocks, counted per KV head, that may be read before the file's pages are released. No limit in
  /// memory.
  Index heads_at_once() const noexcept {
    return of_file_ == nullptr ? PTRDIFF_MAX : std::max<Index>(1, resident_ / head_bytes());
  }
  /// Announces the reading of `heads` blocks, counted per KV head; releases the file's pages if the limit is exceeded.
  void expect_reading(Index heads) {
    if (of_file_ == nullptr) return;
    if (read_ + heads > heads_at_once()) {
      of_file_->release();
      read_ = 0;
    }
    read_ += heads;
  }

  Index bytes() const noexcept {
    const Index kept = counts_.sealed - gone_, in_memory = counts_.sealed - (std::max)(gone_, filed_);
    return static_cast<Index>(sizeof(T)) * batch_ * in_memory * page_size() +
           static_cast<Index>(sizeof(Open)) * batch_ * kept * kv_heads_ * head_dim_ + unsealed_.bytes();
  }

  /// Keys and values of block n of those that can be retrieved. The last key is the landmark. Keys are encoded as if
  /// the block began at position 0.
  KeyRun<T, T> rows(Index b, Index h, Index n) const {
    return rows_.run(pages_[at(b)][at(kept(n))].get() + h * rows_.size());
  }
  /// The landmarks of the blocks [first, first + count) of those that can be retrieved.
  MatrixView<const Open> landmarks(Index b, Index h, Index first, Index count) const {
    return {landmarks_[at(b * kv_heads_ + h)].data() + kept(first) * head_dim_, count, head_dim_, head_dim_};
  }
  /// Keys (without position encoding) and values that are not sealed.
  TensorView<const Open> open_k() const { return unsealed_.k(sealed_rows()); }
  TensorView<const Open> open_v() const { return unsealed_.v(sealed_rows()); }

  /// Appends tokens. Changes nothing if memory runs out.
  template <class Tk, class Tv>
  void append(TensorView<Tk> k, TensorView<Tv> v) {
    unsealed_.append(k, v);
    counts_.tokens += k.rows;
  }

  /// Seals the full blocks that are due. Their landmarks are encoded as in a block at position 0, or, `as_in_text`, at
  /// their positions in the stream. Can be undone until `settle`.
  template <Position P, class E>
  void seal(const P& position, bool as_in_text, const E& executor);

  /// Drops the blocks that are due, writes final blocks to the file, and frees what no truncation can bring back.
  /// Changes nothing if it throws.
  void settle() { settle(counts_); }
  /// Drops the `count` oldest blocks permanently.
  void drop(Index count) {
    BlockCounts next = counts_;
    next.let_go = counts_.dropped + count;
    settle(next);
  }

  /// Removes the tokens from number `tokens` on. `tokens` is at least counts().least().
  void truncate(Index tokens) noexcept {
    BlockCounts to = counts_;
    to.truncate(tokens);
    go_back(to);
  }
  /// Returns to the state that had the counts `to`, provided that nothing has been settled since then.
  void go_back(const BlockCounts& to) noexcept {
    counts_ = to;
    const Index kept = counts_.sealed - gone_;
    for (auto& row : pages_) row.resize(at(kept));
    for (auto& list : landmarks_) list.resize(at(kept * head_dim_));
    unsealed_.truncate(counts_.tokens - counts_.settled * counts_.block);
  }

  /// Replaces batch row b by the previous batch row rows[b]. Changes nothing if memory runs out.
  void reorder(std::span<const Index> rows) {
    std::vector<std::deque<Page>> pages;
    std::vector<std::vector<Open>> landmarks;
    for (const Index row : rows) {
      pages.push_back(pages_[at(row)]);
      for (Index h = 0; h < kv_heads_; ++h) landmarks.push_back(landmarks_[at(row * kv_heads_ + h)]);
    }
    unsealed_ = unsealed_.reordered(rows);
    pages_ = std::move(pages);
    landmarks_ = std::move(landmarks);
  }

  void save(StateWriter& writer) const;
  Index payload_bytes(std::string_view function) const;
  /// Reads into an empty store. `counts` are the counts of the file, which the caller has checked.
  void load(StateReader& reader, const BlockCounts& counts);

 private:
  /// A sealed block of one batch row: SealedRows for each KV head. Copies of the store share it; it never changes.
  using Page = std::shared_ptr<const T>;

  /// The right to write to the file, which is not copied: a copy of the store reads the blocks that it shares, and
  /// keeps its own new blocks in memory.
  struct Writer {
    std::shared_ptr<BlockFile> file;

    Writer() = default;
    ~Writer() = default;
    Writer(const Writer&) noexcept {}
    Writer(Writer&&) noexcept = default;
    Writer& operator=(const Writer&) = delete;
    Writer& operator=(Writer&&) noexcept = default;
  };

  static std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
  Index head_bytes() const noexcept {
    return std::max<Index>(1, rows_.size() * static_cast<Index>(sizeof(T)));
  }
  Index page_size() const noexcept { return kv_heads_ * rows_.size(); }
  Index file_page_bytes() const noexcept { return round_up(page_size() * static_cast<Index>(sizeof(T)), 64); }
  /// The index among the kept blocks of block n of those that can be retrieved.
  Index kept(Index n) const noexcept { return counts_.dropped - gone_ + n; }
  /// The number of rows of sealed blocks that are kept because a truncation may unseal them.
  Index sealed_rows() const noexcept { return (counts_.sealed - counts_.settled) * counts_.block; }

  void settle(BlockCounts next);
  void write_blocks(const BlockCounts& next);
  std::vector<Page> pages_of_file(Index number) const;

  Index batch_, kv_heads_, head_dim_, value_dim_;
  BlockCounts counts_;
  Index gone_ = 0;   ///< blocks that are not kept any more; at most counts_.dropped
  Index filed_ = 0;  ///< blocks before this one are in the file; at most counts_.settled
  SealedRows<T> rows_;
  std::vector<std::deque<Page>> pages_;       ///< of each batch row, from block gone_ on
  std::vector<std::vector<Open>> landmarks_;  ///< of each batch row and KV head, [blocks][head_dim]
  UnsealedRows<Open> unsealed_;               ///< from block counts_.settled on

  Writer writer_;
  std::shared_ptr<BlockFile> of_file_;  ///< the file that blocks are read from, null if all are in memory
  std::vector<std::byte> written_;      ///< the bytes of a block that is being written to the file
  Index resident_ = 0, read_ = 0;       ///< bytes; blocks per KV head read since pages were last released
};

template <StoredElement T>
template <Position P, class E>
void LandmarkStore<T>::seal(const P& position, bool as_in_text, const E& executor) {
  const Index sealed = counts_.sealed_at(counts_.tokens), count = sealed - counts_.sealed;
  if (count <= 0) return;
  for (auto& list : landmarks_) list.resize(at((sealed - gone_) * head_dim_));
  std::vector<std::shared_ptr<T>> pages(at(batch_ * count));
  for (auto& page : pages) {
    const auto bytes = at(page_size()) * sizeof(T);
    page.reset(static_cast<T*>(::operator new(bytes, std::align_val_t{64})),
               [](T* rows) { ::operator delete(rows, std::align_val_t{64}); });
  }
  const auto k = open_k(), v = open_v();
  executor.for_each(batch_ * kv_heads_ * count, [&](Index task, Index) {
    const Index n = task % count, head = task / count, b = head / kv_heads_, h = head % kv_heads_,
                number = counts_.sealed + n, first = n * counts_.block;
    rows_.seal(k.row(b, h, first), v.row(b, h, first), position,
               pages[at(b * count + n)].get() + h * rows_.size());
    Open* landmark = landmarks_[at(head)].data() + (number - gone_) * head_dim_;
    std::copy_n(k.row(b, h, first + counts_.block - 1), head_dim_, landmark);
    rows_.encode(position, landmark, 1, (as_in_text ? number * counts_.block : 0) + counts_.block - 1);
  });
  for (Index n = 0; n < batch_ * count; ++n) pages_[at(n / count)].push_back(std::move(pages[at(n)]));
  counts_.sealed = sealed;
}

template <StoredElement T>
void LandmarkStore<T>::settle(BlockCounts next) {
  next.settled = next.settled_at(next.tokens);
  next.dropped = next.dropped_at(next.sealed);
  if (has_file() && (next.settled > counts_.settled || next.gone() > gone_)) write_blocks(next);
  // From here on nothing throws.
  unsealed_.drop((next.settled - counts_.settled) * next.block);
  if (const Index count = next.gone() - gone_; count > 0) {
    for (auto& row : pages_) row.erase(row.begin(), row.begin() + count);
    for (auto& list : landmarks_) list.erase(list.begin(), list.begin() + count * head_dim_);
    gone_ += count;
  }
  counts_ = next;
}

template <StoredElement T>
void LandmarkStore<T>::save(StateWriter& writer) const {
  const std::vector<std::uint8_t> marks(at(counts_.sealed - gone_), std::uint8_t{1});
  writer.array(marks.data(), std::ssize(marks));
  for (const auto& row : pages_) {
    for (const Page& page : row) writer.array(page.get(), page_size());
  }
  for (const auto& list : landmarks_) writer.array(list.data(), std::ssize(list));
  unsealed_.save(writer);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END

#include "longspan/detail/landmark/store-inl.hpp"
