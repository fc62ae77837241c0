// Memory for kernels, cut from one block that is reserved before they start.
#pragma once

#include <cstddef>
#include <limits>

#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

constexpr Index round_up(Index x, Index multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr Index divide_up(Index x, Index by) { return (x + by - 1) / by; }

/// Cuts 64-byte aligned arrays from a block, one after the other. Without a block it only counts bytes, so that the
/// code which takes the arrays also computes how many bytes they need.
class Arena {
 public:
  explicit Arena(std::byte* block = nullptr) : block_(block) {}

  template <class T>
  T* take(Index count) {
    return reinterpret_cast<T*>(take_bytes(count, sizeof(T)));
  }
  std::size_t used() const noexcept { return used_; }

 private:
  LONGSPAN_NOINLINE std::byte* take_bytes(Index count, std::size_t size) {
    constexpr std::size_t most = static_cast<std::size_t>((std::numeric_limits<Index>::max)()) / 2;
    if (static_cast<std::size_t>(count) > (most - used_) / size) {
      raise("longspan: the scratch memory of a call would be larger than the address space");
    }
    std::byte* array = block_ == nullptr ? nullptr : block_ + used_;
    used_ += static_cast<std::size_t>(round_up(count * static_cast<Index>(size), 64));
    return array;
  }

  std::byte* block_;
  std::size_t used_ = 0;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
