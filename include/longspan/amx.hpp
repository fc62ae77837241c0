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

/// Remembers a granted permission: Linux never revokes it.
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

/// Requests the permission of the operating system to use matrix tiles in this process, and returns true if the library
/// will use them from now on. Call it once, at any time, for instance at the start of the program; a second call costs
/// nothing.
///
///   int main() {
///     longspan::request_amx();   // has no effect without AMX
///
/// With tiles, bfloat16 attention is 2 to 6 times as fast as without on an Intel Xeon of the fourth generation or
/// later. The library never requests the permission on its own, because the permission changes the process. It
/// applies to all threads and to child processes. Each thread that uses tiles has 8 KB more to save at a context
/// switch and needs a signal stack that is 8 KB larger (Linux then rejects a smaller stack in sigaltstack). If
/// another library has already obtained the permission, this one uses tiles without this call.
///
/// Returns false, and changes nothing, if the code was compiled for a processor without AMX (use -march=sapphirerapids,
/// or -march=native on a processor with AMX), if the processor or the kernel (before Linux 5.16) does not support it,
/// or if a policy of the system forbids it. Results without tiles are the same within the documented error.
/// Throws    nothing.
inline bool request_amx() {
#if defined(LONGSPAN_TARGETS_AMX)
  constexpr long request_permission = 0x1023;
  if (!detail::amx_is_permitted()) ::syscall(SYS_arch_prctl, request_permission, detail::tile_data_state);
#endif
  return detail::amx_is_permitted();
}

LONGSPAN_NAMESPACE_END
