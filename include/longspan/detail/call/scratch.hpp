// The scratch memory of a call, cut from its workspace.
#pragma once

#include <cstddef>

#include "longspan/detail/call/arena.hpp"
#include "longspan/execution.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Runs take(arena) twice: first to count the bytes, then to hand out the arrays. Returns the second result.
template <class Take>
auto take_scratch(Workspace& workspace, const Take& take) {
  Arena counting;
  take(counting);
  Arena arena(workspace.reserve(counting.used()));
  return take(arena);
}

/// The scratch memory of a parallel call: equal parts for the workers, then one that all share.
class WorkerScratch {
 public:
  /// take_own(arena) and take_shared(arena) only count bytes here: see of_worker and shared.
  template <class TakeOwn, class TakeShared>
  WorkerScratch(Workspace& workspace, Index workers, const TakeOwn& take_own, const TakeShared& take_shared) {
    Arena own, common;
    take_own(own);
    take_shared(common);
    own_bytes_ = static_cast<Index>(own.used());
    shared_at_ = own_bytes_ * workers;
    memory_ = workspace.reserve(static_cast<std::size_t>(shared_at_) + common.used());
  }
  template <class TakeOwn>
  WorkerScratch(Workspace& workspace, Index workers, const TakeOwn& take_own)
      : WorkerScratch(workspace, workers, take_own, [](Arena&) {}) {}

  /// The memory for the arrays of take_own. Each task cuts them anew, which keeps what they contain.
  Arena of_worker(Index worker) const { return Arena(memory_ + worker * own_bytes_); }
  /// The memory for the arrays of take_shared.
  Arena shared() const { return Arena(memory_ + shared_at_); }

 private:
  std::byte* memory_ = nullptr;
  Index own_bytes_ = 0;
  Index shared_at_ = 0;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
