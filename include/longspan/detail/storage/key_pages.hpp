// Keys and values of a stream in pages, which copies of the stream share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/storage/page.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/position.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The rows of all tokens, `page` tokens in a page; if `page` is 0 there is one page, which grows.
///
/// A copy shares the pages. A stream copies a shared page before it writes to it, so only the last, partially filled
/// page of a stream is ever copied. If a function throws, the rows are unchanged; room for more may have been
/// allocated.
template <StoredElement T>
class KeyPages {
 public:
  using Real = ArithmeticOf<T>;
  static constexpr bool is_scaled = PageLayout<T>::is_scaled;

  KeyPages(const StreamShape& shape, Index page)
      : layout_{shape.kv_heads, page, shape.head_dim, shape.value_dim},
        grows_(page == 0),
        free_(std::make_shared<FreePages>()),
        pages_(at(shape.batch)) {}
  KeyPages(const KeyPages&) = default;
  KeyPages(KeyPages&&) noexcept = default;
  KeyPages& operator=(KeyPages other) noexcept {
    std::swap(layout_, other.layout_);
    std::swap(grows_, other.grows_);
    std::swap(free_, other.free_);
    std::swap(pages_, other.pages_);
    std::swap(scratch_, other.scratch_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~KeyPages() { release_pages(0); }

  /// The largest number of tokens for which no product of sizes overflows.
  static Index most_tokens(const StreamShape& shape) noexcept {
    const Index cols = shape.head_dim > (std::numeric_limits<Index>::max)() - shape.value_dim
                           ? (std::numeric_limits<Index>::max)()
                           : shape.head_dim + shape.value_dim;
    // An upper bound: every element takes a double and a scale, and there is a list of pages for each batch row.
    const Index heads = (std::max)({Index{1}, shape.heads, shape.kv_heads});
    const Index of_token =
        bounded_product(bounded_product(std::max<Index>(1, cols), 16), bounded_product(heads, shape.batch));
    return (std::min)(Index{1} << 44, (std::numeric_limits<Index>::max)() / 4 / std::max<Index>(1, of_token));
  }

  Index size() const noexcept { return size_; }
  Index bytes() const noexcept {
    Index pages = 0;
    for (const auto& of_row : pages_)
      pages += std::count_if(of_row.begin(), of_row.end(), [](const Page& page) { return page.exists(); });
    return pages * layout_.bytes();
  }

  /// For the kernels: the rows from keys.begin on, up to the end of their page or keys.end.
  KeyRun<T, T> run(Index b, Index h, KeyRange keys) const {
    const Index n = keys.begin / layout_.rows, row = keys.begin - n * layout_.rows;
    const Index count = (std::min)(keys.end - keys.begin, layout_.rows - row);
    const Page& page = pages_[at(b)][at(n)];
    KeyRun<T, T> run;
    run.k = {nullptr, count, layout_.head_dim, layout_.head_dim};
    run.v = {nullptr, count, layout_.value_dim, layout_.value_dim};
    run.is_kept = page.exists();
    if (!run.is_kept) return run;
    run.k.data = layout_.keys(page, h, row);
    run.v.data = layout_.values(page, h, row);
    if constexpr (is_scaled) {
      run.k_scale = layout_.k_scales(page, h, row);
      run.v_scale = layout_.v_scales(page, h, row);
    }
    return run;
  }

  /// Reserves memory for `tokens` tokens, so that appending them allocates nothing.
  void reserve(Index tokens) {
    if (grows_) {
      if (tokens > layout_.rows) grow(tokens);
      return;
    }
    const Index pages = divide_up(tokens, layout_.rows);
    Index missing = 0;
    for (auto& of_row : pages_) {
      of_row.reserve(at(pages));
      missing += std::max<Index>(0, pages - std::ssize(of_row));
    }
    free_->reserve(layout_, missing);
  }

  /// Appends rows of k and v; keys are encoded at their positions.
  template <class Tk, class Tv, Position P, class E>
  void append(TensorView<Tk> k, TensorView<Tv> v, const P& position, const E& executor) {
    make_room(k.rows);
    if constexpr (!std::is_same_v<P, no_position>) {
      scratch_.resize((std::max)(scratch_.size(), at(executor.workers() * rows_at_once * layout_.head_dim)));
    }
    executor.for_each(k.batch * k.heads, [&](Index head, [[maybe_unused]] Index worker) {
      const Index b = head / k.heads, h = head % k.heads;
      for (Index i = 0, count = 0; i < k.rows; i += count) {
        const Index row = (size_ + i) % layout_.rows;
        count = (std::min)({rows_at_once, k.rows - i, layout_.rows - row});
        const Page& page = pages_[at(b)][at((size_ + i) / layout_.rows)];
        if constexpr (std::is_same_v<P, no_position>) {
          store_keys(k.row(b, h, i), k.row_stride, count, page, h, row);
        } else {
          Real* scratch = scratch_.data() + worker * rows_at_once * layout_.head_dim;
          for (Index n = 0; n < count; ++n)
            store_row(k.row(b, h, i + n), layout_.head_dim, scratch + n * layout_.head_dim);
          position.encode(MatrixView<Real>{scratch, count, layout_.head_dim, layout_.head_dim}, size_ + i,
                          Role::key);
          store_keys(scratch, layout_.head_dim, count, page, h, row);
        }
        for (Index n = 0; n < count; ++n) {
          T* to = layout_.values(page, h, row + n);
          if constexpr (is_scaled) {
            store_row(v.row(b, h, i + n), layout_.value_dim, to, *layout_.v_scales(page, h, row + n));
          } else {
            store_row(v.row(b, h, i + n), layout_.value_dim, to);
          }
        }
      }
    });
    size_ += k.rows;
  }

  /// Evicts, of the pages [first, end) of batch row b, which are full, those that contain none of the keys `kept`.
  void keep_only(Index b, const KeyRanges& kept, Index first, Index end) noexcept {
    if (grows_) return;
    auto& pages = pages_[at(b)];
    for (Index n = first; n < end; ++n) {
      Page& page = pages[at(n)];
      if (!overlap(kept, {n * layout_.rows, (n + 1) * layout_.rows})) give(std::move(page));
    }
  }
  /// The number of the first token after all evicted pages.
  Index end_of_evicted() const noexcept {
    Index end = 0;
    for (const auto& of_row : pages_) {
      for (Index n = std::ssize(of_row); n > end; --n) {
        if (!of_row[at(n - 1)].exists()) end = n;
      }
    }
    return end * layout_.rows;
  }
  /// True if batch row b still has those of the keys that come before `size`, and the page to which token `size`
  /// would be written.
  bool keeps(Index b, const KeyRanges& keys, Index size) const noexcept {
    if (grows_) return true;
    for (Index n = 0; n < divide_up(size, layout_.rows); ++n) {
      const KeyRange rows{n * layout_.rows, (std::min)(size, (n + 1) * layout_.rows)};
      const bool open = rows.end < (n + 1) * layout_.rows;
      if (!pages_[at(b)][at(n)].exists() && (open || overlap(keys, rows))) return false;
    }
    return true;
  }

  /// Removes the tokens from number `size` on.
  void truncate(Index size) noexcept {
    if (!grows_) release_pages(divide_up(size, layout_.rows));
    size_ = size;
  }

  /// Replaces batch row b by the previous batch row rows[b].
  void reorder(std::span<const Index> rows) {
    std::vector<std::vector<Page>> pages;
    for (const Index row : rows) pages.push_back(pages_[at(row)]);
    std::swap(pages_, pages);
    for (auto& of_row : pages) {
      for (Page& page : of_row) give(std::move(page));
    }
  }

  void save(StateWriter& writer) const;
  void load(StateReader& reader, Index size);
  /// The number of bytes that `save` writes.
  Index payload_bytes() const { return payload_bytes(kept_parts(), size_); }

 private:
  std::vector<std::int64_t> kept_parts() const;
  Index payload_bytes(const std::vector<std::int64_t>& kept, Index size) const;
  void copy_part(const std::byte* from, const Page& page, Index first, Index count) const;
  /// The number of rows that are encoded together before they are written to the page.
  static constexpr Index rows_at_once = 16;

  static std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
  static bool overlap(const KeyRanges& ranges, KeyRange rows) noexcept {
    return std::any_of(ranges.begin(), ranges.end(), [&](const KeyRange& x) { return x.overlaps(rows); });
  }
  /// The number of tokens of a part of a file: those of a page, or 4096 of a page that grows.
  Index part() const { return grows_ ? 4096 : layout_.rows; }
  Index part(Index n, Index size) const { return (std::min)(part(), size - n * part()); }
  /// Calls work(array, count) for each array of the page with rows of one head's tokens [first, first + count).
  template <class Work>
  void for_arrays(const Page& page, Index h, Index first, Index count, const Work& work) const {
    work(layout_.keys(page, h, first), count * layout_.head_dim);
    work(layout_.values(page, h, first), count * layout_.value_dim);
    if constexpr (is_scaled) {
      work(layout_.k_scales(page, h, first), count);
      work(layout_.v_scales(page, h, first), count);
    }
  }

  template <class From>
  void store_keys(const From* from, Index stride, Index count, const Page& page, Index h, Index row) const {
    for (Index n = 0; n < count; ++n, from += stride) {
      T* to = layout_.keys(page, h, row + n);
      if constexpr (is_scaled) {
        store_row(from, layout_.head_dim, to, *layout_.k_scales(page, h, row + n));
      } else {
        store_row(from, layout_.head_dim, to);
      }
    }
  }

  void give(Page page) noexcept {
    if (!grows_) free_->give(std::move(page));
  }
  void release_pages(Index first) noexcept {
    for (auto& of_row : pages_) {
      for (; std::ssize(of_row) > first; of_row.pop_back()) give(std::move(of_row.back()));
    }
  }

  /// Makes pages for `more` tokens; none of the pages that will be written is shared.
  void make_room(Index more) {
    if (more == 0) return;
    if (grows_ && size_ + more > layout_.rows) return grow((std::max)(size_ + more, 2 * layout_.rows));
    const Index first = size_ / layout_.rows, last = (size_ + more - 1) / layout_.rows;
    for (auto& of_row : pages_) {
      if (first < std::ssize(of_row) && !of_row[at(first)].is_own()) {
        Page copy = grows_ ? layout_.allocate() : free_->take(layout_);
        layout_.copy_rows(of_row[at(first)], copy, layout_, size_ - first * layout_.rows);
        of_row[at(first)] = std::move(copy);
      }
      while (std::ssize(of_row) <= last) of_row.push_back(free_->take(layout_));
    }
  }
  void grow(Index rows) {
    PageLayout<T> larger = layout_;
    larger.rows = rows;
    std::vector<std::vector<Page>> pages(pages_.size());
    for (std::size_t b = 0; b < pages.size(); ++b) {
      pages[b].push_back(larger.allocate());
      if (size_ > 0) layout_.copy_rows(pages_[b][0], pages[b][0], larger, size_);
    }
    std::swap(pages_, pages);
    layout_ = larger;
  }

  PageLayout<T> layout_;
  bool grows_;
  std::shared_ptr<FreePages> free_;
  std::vector<std::vector<Page>> pages_;  ///< of each batch row; an evicted page is null
  std::vector<Real> scratch_;             ///< [workers][rows_at_once][head_dim]
  Index size_ = 0;
};

template <StoredElement T>
std::vector<std::int64_t> KeyPages<T>::kept_parts() const {
  std::vector<std::int64_t> kept;
  for (Index n = 0; !pages_.empty() && n < divide_up(size_, part()); ++n) {
    for (const auto& of_row : pages_) kept.push_back(grows_ || of_row[at(n)].exists());
  }
  return kept;
}

template <StoredElement T>
Index KeyPages<T>::payload_bytes(const std::vector<std::int64_t>& kept, Index size) const {
  Index bytes = std::ssize(kept) * static_cast<Index>(sizeof(std::int64_t));
  for (Index n = 0; n < std::ssize(kept); ++n) {
    if (kept[at(n)] != 0) bytes += layout_.row_bytes() * part(n / std::ssize(pages_), size);
  }
  return bytes;
}

/// Writes for each part and batch row whether it is kept, and then the rows of those that are.
template <StoredElement T>
void KeyPages<T>::save(StateWriter& writer) const {
  const auto kept = kept_parts();
  writer.array(kept.data(), std::ssize(kept));
  for (Index i = 0; i < std::ssize(kept); ++i) {
    if (kept[at(i)] == 0) continue;
    const Index n = i / std::ssize(pages_), b = i % std::ssize(pages_);
    for (Index h = 0; h < layout_.kv_heads; ++h) {
      for_arrays(pages_[at(b)][at(grows_ ? 0 : n)], h, grows_ ? n * part() : 0, part(n, size_),
                 [&](const auto* array, Index count) { writer.array(array, count); });
    }
  }
}

/// Reads into an empty object, which the caller discards if the file ends early. `size` is at most most_tokens().
/// Memory for the rows of a part is allocated only after these rows have been read.
template <StoredElement T>
void KeyPages<T>::load(StateReader& reader, Index size) {
  const Index batch = std::ssize(pages_), parts = batch == 0 ? 0 : divide_up(size, part());
  const Index flags = bounded_product(parts, batch);
  reader.expect_payload_of_at_least(bounded_product(flags, static_cast<Index>(sizeof(std::int64_t))));
  const auto kept = reader.template array<std::int64_t>(flags);
  for (const std::int64_t flag : kept) {
    if (flag != 1 && (grows_ || flag != 0))
      reader.reject("a flag of kept rows", std::to_string(flag), grows_ ? "1" : "0 or 1");
  }
  reader.expect_payload(payload_bytes(kept, size));
  for (Index n = 0; n < parts; ++n) {
    const Index count = part(n, size);
    for (Index b = 0; b < batch; ++b) {
      auto& pages = pages_[at(b)];
      if (!grows_) pages.emplace_back();
      if (kept[at(n * batch + b)] != 0) {
        const auto rows = reader.template array<std::byte>(count * layout_.row_bytes());
        if (grows_ && n == 0) layout_.rows = count;
        if (grows_ && size_ + count > layout_.rows) grow((std::max)(size_ + count, 2 * layout_.rows));
        if (!grows_) pages.back() = layout_.allocate();
        if (grows_ && n == 0) pages.push_back(layout_.allocate());
        copy_part(rows.data(), pages.back(), grows_ ? n * part() : 0, count);
      }
    }
    size_ += count;
  }
  size_ = size;
}

/// Copies rows in the layout of a file to the rows [first, first + count) of a page.
template <StoredElement T>
void KeyPages<T>::copy_part(const std::byte* from, const Page& page, Index first, Index count) const {
  for (Index h = 0; h < layout_.kv_heads; ++h) {
    for_arrays(page, h, first, count, [&](auto* array, Index length) {
      const auto bytes = static_cast<std::size_t>(length) * sizeof(*array);
      if (bytes > 0) std::memcpy(array, from, bytes);
      from += bytes;
    });
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
