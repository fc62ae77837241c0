// Prefetches of single cache lines.
#pragma once

#include <cstdint>

#include "longspan/detail/tuning.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

inline constexpr Index cache_line = 64;

/// Prefetches the cache line at an address; `once`: it will be read only once. Never faults, whatever the address is.
/// The address is an integer, because a pointer must not leave its array.
template <bool once = false>
LONGSPAN_INLINE void prefetch_line(std::uintptr_t address) {
#if defined(__GNUC__) || defined(__clang__)
  constexpr int streaming = tuning::stream_prefetch == 0 ? 0 : tuning::stream_prefetch == 1 ? 2 : 3;
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, once ? streaming : 3);
#else
  static_cast<void>(address);
#endif
}

/// The same into the second-level cache.
LONGSPAN_INLINE void prefetch_line_to_l2(std::uintptr_t address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
#else
  static_cast<void>(address);
#endif
}

/// Prefetches the cache lines of `bytes` bytes that begin `ahead` bytes after `from`.
template <bool once = false>
LONGSPAN_INLINE void prefetch(const void* from, Index bytes, Index ahead = 0) {
  const auto first = reinterpret_cast<std::uintptr_t>(from) + static_cast<std::uintptr_t>(ahead);
  for (Index at = 0; at < bytes; at += cache_line)
    prefetch_line<once>(first + static_cast<std::uintptr_t>(at));
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
