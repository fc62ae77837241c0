// Permission to use the matrix tiles (AMX) of Intel processors.
#pragma once

#include "longspan/version.hpp"

#if defined(LONGSPAN_TARGETS_AMX)
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#endif

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

#if defined(LONGSPAN_TARGETS_AMX)

/// The kernel's number of the tile registers among the parts of a process's state.
inline constexpr unsigned long tile_data_state = 18;

/// Remembers a granted permission: Linux never takes one back.
inline std::atomic<bool>& knows_amx_permission() {
  static std::atomic<bool> known{false};
  return known;
}

inline bool amx_is_permitted() {
  if (knows_amx_permission().load(std::memory_order_relaxed)) return true;
  constexpr long get_permissions = 0x1022;
  unsigned long permitted = 0;
  if (::syscall(SYS_arch_prctl, get_permissions, &permitted) != 0) return false;
  if ((permitted >> tile_data_state & 1) == 0) return false;
  knows_amx_permission().store(true, std::memory_order_relaxed);
  return true;
}

#elif defined(LONGSPAN_EMULATE_AMX)
inline bool amx_is_permitted() { return true; }
#else
inline bool amx_is_permitted() { return false; }
#endif

}  // namespace detail

/// Asks the operating system for the permission to use matrix tiles in this process, and says whether the library will
/// use them from now on. Call it once, before the first thread that attends is created or at any later time; a second
/// call costs nothing.
///
///   int main() {
///     longspan::request_amx();   // no harm where there is no AMX
///
/// With tiles, bfloat16 attention runs 3 to 8 times as fast as without on an Intel Xeon of the fourth generation or
/// later. The library never asks by itself, since the permission changes the process: it holds for all of its threads
/// and for its children, and each thread that uses tiles then has 8 KB more to save when it is switched, and needs a
/// signal stack that is 8 KB larger (sigaltstack of less is refused by Linux from then on). Where another library has
/// asked before, this one uses tiles without this call.
///
/// False, and nothing changes, where the code was compiled for a processor without AMX (-march=sapphirerapids or
/// -march=native on one that has it is needed), where the processor or the kernel (Linux 5.16) has none, or where
/// a policy of the system forbids it. Results without tiles are the same within the documented error.
/// Throws    nothing.
inline bool request_amx() {
#if defined(LONGSPAN_TARGETS_AMX)
  constexpr long request_permission = 0x1023;
  if (!detail::amx_is_permitted()) ::syscall(SYS_arch_prctl, request_permission, detail::tile_data_state);
#endif
  return detail::amx_is_permitted();
}

LONGSPAN_NAMESPACE_END
