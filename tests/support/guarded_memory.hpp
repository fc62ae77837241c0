// Memory in which a read or write outside an array is noticed. For Linux and macOS.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "longspan/view.hpp"

namespace test {

using longspan::Index;

/// Pages of address space; only pages that are touched use memory.
class Pages {
 public:
  explicit Pages(std::size_t bytes) : bytes_(bytes) {
    void* at =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<std::byte*>(at);
  }
  ~Pages() { ::munmap(begin_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  std::byte* begin() const { return begin_; }
  /// From now on any access to these bytes, which are whole pages, ends the program.
  void forbid(std::size_t from, std::size_t count) {
    if (::mprotect(begin_ + from, count, PROT_NONE) != 0) throw std::bad_alloc();
  }

  static std::size_t size() { return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)); }

 private:
  std::byte* begin_ = nullptr;
  std::size_t bytes_;
};

enum class Guard { before, behind };

/// `count` elements with a forbidden page directly before the first or after the last of them.
template <class T>
class GuardedArray {
 public:
  GuardedArray(Index count, Guard where) : pages_(whole_pages(count) + 2 * Pages::size()) {
    const std::size_t page = Pages::size(), used = static_cast<std::size_t>(count) * sizeof(T);
    pages_.forbid(0, page);
    pages_.forbid(page + whole_pages(count), page);
    const std::size_t at = where == Guard::before ? page : page + whole_pages(count) - used;
    data_ = reinterpret_cast<T*>(pages_.begin() + at);
  }
  T* data() const { return data_; }

 private:
  static std::size_t whole_pages(Index count) {
    const std::size_t page = Pages::size(), bytes = static_cast<std::size_t>(count) * sizeof(T);
    return (bytes + page - 1) / page * page;
  }

  Pages pages_;
  T* data_ = nullptr;
};

/// A buffer in which a test may write only the rows of a view. Everything else contains a NaN pattern: 64 elements
/// before and after, and the gaps between rows. The first element is `misalignment` bytes, a multiple of sizeof(T),
/// after a 64-byte boundary.
template <class T>
class Sentinels {
 public:
  explicit Sentinels(Index count, std::size_t misalignment = 0)
      : memory_((static_cast<std::size_t>(count) + 2 * margin) * sizeof(T) + 128, pattern) {
    const auto at = reinterpret_cast<std::uintptr_t>(memory_.data());
    offset_ = (64 - at % 64) % 64 + misalignment + margin * sizeof(T);
  }
  T* data() { return reinterpret_cast<T*>(memory_.data() + offset_); }

  /// True if every byte outside these rows is unchanged and every element within them was written.
  bool only_rows_written(const longspan::TensorView<T>& rows) const {
    std::vector<bool> allowed(memory_.size());
    for (Index b = 0; b < rows.batch; ++b) {
      for (Index h = 0; h < rows.heads; ++h) {
        for (Index i = 0; i < rows.rows; ++i) {
          for (Index c = 0; c < rows.cols; ++c) {
            const auto at = static_cast<std::size_t>(
                reinterpret_cast<const unsigned char*>(rows.row(b, h, i) + c) - memory_.data());
            bool written = false;
            for (std::size_t byte = at; byte < at + sizeof(T); ++byte) {
              allowed[byte] = true;
              written = written || memory_[byte] != pattern;
            }
            if (!written) return false;
          }
        }
      }
    }
    for (std::size_t byte = 0; byte < memory_.size(); ++byte) {
      if (!allowed[byte] && memory_[byte] != pattern) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char pattern = 0xff;  // NaN in every element type
  static constexpr std::size_t margin = 64;

  std::vector<unsigned char> memory_;
  std::size_t offset_ = 0;
};

}  // namespace test
