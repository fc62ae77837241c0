// Memory for the keys and values of consecutive tokens: its layout, shared ownership, and reuse.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// a * b, or the largest Index if the product exceeds it. Neither factor is negative.
constexpr Index bounded_product(Index a, Index b) noexcept {
  constexpr Index most = (std::numeric_limits<Index>::max)();
  return b != 0 && a > most / b ? most : a * b;
}

/// The memory of one page, shared by all streams that contain its tokens; null if default-constructed.
class Page {
 public:
  Page() = default;
  explicit Page(Index bytes)
      : memory_(static_cast<std::byte*>(
            ::operator new(static_cast<std::size_t>(bytes) + header_bytes, std::align_val_t{header_bytes}))) {
    new (memory_) Header;
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
  /// True if there is no other owner. Reads by former owners then happened before this call.
  bool is_own() const noexcept { return owners().load(std::memory_order_acquire) == 1; }

 private:
  friend class FreePages;
  struct Header {
    std::atomic<Index> owners{1};
    std::byte* next_free = nullptr;  ///< the memory of the next page in the list of FreePages
  };
  static constexpr std::size_t header_bytes = 64;
  static_assert(sizeof(Header) <= header_bytes && std::is_trivially_destructible_v<Header>);

  Header& header() const noexcept { return *std::launder(reinterpret_cast<Header*>(memory_)); }
  std::atomic<Index>& owners() const noexcept { return header().owners; }

  std::byte* memory_ = nullptr;
};

/// The layout of a page: keys [kv_heads][rows][head_dim], values [kv_heads][rows][value_dim], and for int8 the scales
/// of keys and of values, [kv_heads][rows] each.
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
  /// No product overflows if rows * row_bytes() is at most half of the largest Index.
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

/// A thread-safe list of pages without an owner, for reuse, shared by a stream and its copies. The pages' headers
/// contain the links of the list, so that `give`, which runs in destructors, never allocates.
class FreePages {
 public:
  FreePages() = default;
  FreePages(const FreePages&) = delete;
  FreePages& operator=(const FreePages&) = delete;
  ~FreePages() {
    while (first_ != nullptr) pop();
  }

  template <class Layout>
  Page take(const Layout& layout) {
    {
      const std::lock_guard lock(mutex_);
      if (first_ != nullptr) return pop();
    }
    return layout.allocate();
  }
  void give(Page page) noexcept {
    if (!page.exists() || !page.is_own()) return;
    const std::lock_guard lock(mutex_);
    push(std::move(page));
  }
  /// Makes sure that the list has at least `count` pages.
  template <class Layout>
  void reserve(const Layout& layout, Index count) {
    const std::lock_guard lock(mutex_);
    while (count_ < count) push(layout.allocate());
  }

 private:
  void push(Page page) noexcept {
    page.header().next_free = std::exchange(first_, page.memory_);
    page.memory_ = nullptr;
    ++count_;
  }
  Page pop() noexcept {
    Page page;
    page.memory_ = first_;
    first_ = page.header().next_free;
    --count_;
    return page;
  }

  std::mutex mutex_;
  std::byte* first_ = nullptr;
  Index count_ = 0;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
