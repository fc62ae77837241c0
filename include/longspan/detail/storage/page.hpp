// Memory for the keys and values of a run of tokens: how it is laid out, shared and handed on.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN
namespace detail {

/// The memory of one page, shared by all streams that hold its tokens; null if default constructed.
class Page {
 public:
  Page() = default;
  explicit Page(Index bytes)
      : memory_(static_cast<std::byte*>(
            ::operator new(static_cast<std::size_t>(bytes) + header_bytes, std::align_val_t{header_bytes}))) {
    new (memory_) Owners(1);
  }
  Page(const Page& other) noexcept : memory_(other.memory_) {
    if (memory_ != nullptr) owners().fetch_add(1, std::memory_order_relaxed);
  }
  Page(Page&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
  Page& operator=(Page other) noexcept {
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~Page() {
    if (memory_ != nullptr && owners().fetch_sub(1, std::memory_order_acq_rel) == 1)
      ::operator delete(memory_, std::align_val_t{header_bytes});
  }

  bool exists() const noexcept { return memory_ != nullptr; }
  std::byte* data() const noexcept { return memory_ + header_bytes; }
  /// Is there no other owner? What one that has let go read of it has then been read.
  bool is_own() const noexcept { return owners().load(std::memory_order_acquire) == 1; }

 private:
  using Owners = std::atomic<Index>;
  static constexpr std::size_t header_bytes = 64;

  Owners& owners() const noexcept { return *std::launder(reinterpret_cast<Owners*>(memory_)); }

  std::byte* memory_ = nullptr;
};

/// Where the parts of a page are: keys [kv_heads][rows][head_dim], values [kv_heads][rows][value_dim], and
/// for int8 the scales of either [kv_heads][rows].
template <StoredElement T>
struct PageLayout {
  static constexpr bool is_scaled = std::is_same_v<T, std::int8_t>;

  Index kv_heads = 0;
  Index rows = 0;
  Index head_dim = 0;
  Index value_dim = 0;

  Index row_bytes() const noexcept {
    return kv_heads * ((head_dim + value_dim) * static_cast<Index>(sizeof(T)) +
                       (is_scaled ? 2 * static_cast<Index>(sizeof(float)) : 0));
  }
  Index bytes() const noexcept { return v_scales_at() + scale_bytes(); }
  T* keys(const Page& page, Index h, Index row) const noexcept {
    return reinterpret_cast<T*>(page.data()) + (h * rows + row) * head_dim;
  }
  T* values(const Page& page, Index h, Index row) const noexcept {
    return reinterpret_cast<T*>(page.data() + values_at()) + (h * rows + row) * value_dim;
  }
  float* k_scales(const Page& page, Index h, Index row) const noexcept {
    return reinterpret_cast<float*>(page.data() + k_scales_at()) + h * rows + row;
  }
  float* v_scales(const Page& page, Index h, Index row) const noexcept {
    return reinterpret_cast<float*>(page.data() + v_scales_at()) + h * rows + row;
  }

  Page allocate() const { return Page(bytes()); }

  /// Copies the first `count` rows of a page.
  void copy_rows(const Page& from, const Page& to, const PageLayout& layout_of_to, Index count) const {
    for (Index h = 0; h < kv_heads; ++h) {
      std::copy_n(keys(from, h, 0), count * head_dim, layout_of_to.keys(to, h, 0));
      std::copy_n(values(from, h, 0), count * value_dim, layout_of_to.values(to, h, 0));
      if constexpr (is_scaled) {
        std::copy_n(k_scales(from, h, 0), count, layout_of_to.k_scales(to, h, 0));
        std::copy_n(v_scales(from, h, 0), count, layout_of_to.v_scales(to, h, 0));
      }
    }
  }

 private:
  Index values_at() const noexcept {
    return round_up(kv_heads * rows * head_dim * static_cast<Index>(sizeof(T)), 64);
  }
  Index k_scales_at() const noexcept {
    return values_at() + round_up(kv_heads * rows * value_dim * static_cast<Index>(sizeof(T)), 64);
  }
  Index scale_bytes() const noexcept {
    return is_scaled ? round_up(kv_heads * rows * static_cast<Index>(sizeof(float)), 64) : 0;
  }
  Index v_scales_at() const noexcept { return k_scales_at() + scale_bytes(); }
};

/// Pages that nobody holds, for whoever needs one next. Streams that are copies of each other share it, and
/// may live on different threads.
class FreePages {
 public:
  template <class Layout>
  Page take(const Layout& layout) {
    {
      const std::lock_guard lock(mutex_);
      if (!pages_.empty()) {
        Page page = std::move(pages_.back());
        pages_.pop_back();
        return page;
      }
    }
    return layout.allocate();
  }
  void give(Page page) {
    if (!page.exists() || !page.is_own()) return;
    const std::lock_guard lock(mutex_);
    pages_.push_back(std::move(page));
  }
  template <class Layout>
  void reserve(const Layout& layout, Index count) {
    const std::lock_guard lock(mutex_);
    while (std::ssize(pages_) < count) pages_.push_back(layout.allocate());
  }

 private:
  std::mutex mutex_;
  std::vector<Page> pages_;
};

}  // namespace detail
LONGSPAN_END
