// Parallel loops: the only OpenMP pragmas of the library.
#pragma once

#include <algorithm>

#include "longspan/version.hpp"
#include "longspan/view.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__cpp_exceptions)
#include <exception>
#endif

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The number of threads of a parallel loop started here, if `wanted` are requested (0: OpenMP's default).
inline Index team_size(Index wanted) noexcept {
#if defined(_OPENMP)
  if (omp_in_parallel()) return 1;
  return std::max<Index>(1, wanted > 0 ? wanted : omp_get_max_threads());
#else
  static_cast<void>(wanted);
  return 1;
#endif
}

/// Keeps the exception of the task with the smallest number, to throw it again after the parallel loop: an exception
/// that leaves an OpenMP region ends the program.
class FirstFailure {
 public:
  template <class Work>
  void guard([[maybe_unused]] Index task, Work&& work) {
#if defined(__cpp_exceptions)
    try {
      work();
    } catch (...) {
#if defined(_OPENMP)
#pragma omp critical(longspan_first_failure)
#endif
      if (!failure_ || task < task_) {
        failure_ = std::current_exception();
        task_ = task;
      }
    }
#else
    work();
#endif
  }

  void rethrow() const {
#if defined(__cpp_exceptions)
    if (failure_) std::rethrow_exception(failure_);
#endif
  }

 private:
#if defined(__cpp_exceptions)
  std::exception_ptr failure_;
  Index task_ = 0;
#endif
};

/// Calls task(t, worker) for each t in [0, tasks). Tasks are handed out one at a time, lowest first: if the operating
/// system preempts a core, only its current task is delayed, not a whole static share.
template <class Task>
void parallel_for([[maybe_unused]] Index threads, Index tasks, Task& task) {
#if defined(_OPENMP)
  if (const Index team = (std::min)(threads, tasks); team > 1) {
    FirstFailure failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(team))
    for (Index t = 0; t < tasks; ++t) {
      failure.guard(t, [&] { task(t, static_cast<Index>(omp_get_thread_num())); });
    }
    failure.rethrow();
    return;
  }
#endif
  for (Index t = 0; t < tasks; ++t) task(t, Index{0});
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
