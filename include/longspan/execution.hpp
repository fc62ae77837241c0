// Executors, which run the tasks of a call, and the workspace, which is its reusable scratch memory.
#pragma once

#include <concepts>
#include <cstddef>
#include <new>
#include <type_traits>
#include <utility>

#include "longspan/detail/call/denormals.hpp"
#include "longspan/detail/call/parallel.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// Runs all tasks on the calling thread.
struct serial {
  Index workers() const noexcept { return 1; }

  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    for (Index t = 0; t < tasks; ++t) task(t, Index{0});
  }
};

/// Runs tasks on a team of OpenMP threads. The default executor. If `threads` is 0, OpenMP chooses their number
/// (OMP_NUM_THREADS).
///
/// Inside a parallel region, and in a program compiled without OpenMP, all tasks run on the calling thread. It changes
/// no global setting of the process; in particular it does not call omp_set_num_threads.
///
/// A child process made by fork() does not have the threads of its parent. If the parent has run a parallel call
/// before, the first parallel call of the child hangs (with GNU's OpenMP): pass `serial{}` in the child, fork before
/// the first parallel call, or call exec in the child.
struct openmp {
  Index threads = 0;

  Index workers() const noexcept { return detail::team_size(threads); }

  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    detail::parallel_for(workers(), tasks, task);
  }
};

/// Anything that runs tasks. A framework's thread pool can be adapted with these two members.
///
///   workers()             the maximum number of tasks that run at the same time
///   for_each(n, task)     calls task(t, worker) once for each t in [0, n), with 0 <= worker < workers(); two tasks
///                         that run at the same time have different worker numbers. Returns when all are done
///
/// Results do not depend on the executor, to the bit: the shapes alone determine the tasks, and results are merged in a
/// fixed order.
///
/// While a task of the library runs, its thread treats denormal numbers (below 2^-126 for float) as 0, on x86-64 and
/// AArch64. When the task ends, even by an exception, the previous mode of the thread is restored. The executor's own
/// code is not affected; a user-defined score, mask, position encoding or feature map that a task calls is.
template <class E>
concept Executor = requires(const std::remove_cvref_t<E>& executor, void (*task)(Index, Index)) {
  { executor.workers() } -> std::convertible_to<Index>;
  executor.for_each(Index{1}, task);
};

/// Scratch memory that grows to the size that the largest call needs and is then reused, so that a repeated call
/// allocates nothing. Two calls that run at the same time must not share one.
class Workspace {
 public:
  static constexpr std::size_t alignment = 64;

  Workspace() = default;
  Workspace(Workspace&& other) noexcept { swap(other); }
  Workspace& operator=(Workspace&& other) noexcept {
    Workspace old(std::move(other));
    swap(old);
    return *this;
  }
  /// Not inlined into itself, once for each inner workspace.
  LONGSPAN_NOINLINE ~Workspace() {
    release();
    delete inner_;
  }

  /// Returns at least `bytes` bytes, 64-byte aligned, with unspecified contents. Throws std::bad_alloc.
  std::byte* reserve(std::size_t bytes) {
    if (bytes > size_) {
      release();
      memory_ = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{alignment}));
      size_ = bytes;
    }
    return memory_;
  }

  Index bytes() const noexcept {
    return static_cast<Index>(size_) + (inner_ == nullptr ? 0 : inner_->bytes());
  }

  /// A second workspace, for a functor that calls another functor while it uses this one.
  Workspace& inner() {
    if (inner_ == nullptr) inner_ = new Workspace;
    return *inner_;
  }

 private:
  void swap(Workspace& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(size_, other.size_);
    std::swap(inner_, other.inner_);
  }
  void release() noexcept {
    if (memory_ != nullptr) ::operator delete(memory_, std::align_val_t{alignment});
    memory_ = nullptr;
    size_ = 0;
  }

  // No std::unique_ptr: <memory> would take 5 % of the compile time of Eigen's own headers.
  std::byte* memory_ = nullptr;
  std::size_t size_ = 0;
  Workspace* inner_ = nullptr;
};

/// An executor with a workspace: the optional last argument of every functor. With one Execution for each calling
/// thread, nothing is allocated from the second call of a shape on. A functor called without one runs on `openmp{}` and
/// allocates its scratch memory for each call.
template <Executor E = openmp>
struct Execution {
  E executor{};
  Workspace workspace{};

  Execution() = default;
  explicit Execution(E runs_on) : executor(std::move(runs_on)) {}
};

namespace detail {

/// An Execution that refers to an executor and a workspace owned elsewhere.
template <Executor E>
struct ExecutionRef {
  const E& executor;
  Workspace& workspace;
};

template <class X>
inline constexpr bool is_execution = false;
template <class E>
inline constexpr bool is_execution<Execution<E>> = true;
template <class E>
inline constexpr bool is_execution<ExecutionRef<E>> = true;

}  // namespace detail

/// The last argument of a functor: an Execution (by reference), or an executor alone.
template <class X>
concept ExecutionLike = detail::is_execution<std::remove_cvref_t<X>> || Executor<X>;

namespace detail {

/// Calls work(executor, workspace) with the parts of an Execution, or with an executor and a workspace for this call.
template <class E, class Work>
void with_workspace(E& execution, const Work& work) {
  if constexpr (is_execution<std::remove_cvref_t<E>>) {
    run_without_denormals(execution.executor,
                          [&](const auto& executor) { work(executor, execution.workspace); });
  } else {
    Workspace workspace;
    run_without_denormals(execution, [&](const auto& executor) { work(executor, workspace); });
  }
}

/// Calls work(executor) with the executor of an Execution, or with the executor itself.
template <class E, class Work>
void with_executor(E& execution, const Work& work) {
  if constexpr (is_execution<std::remove_cvref_t<E>>) {
    run_without_denormals(execution.executor, work);
  } else {
    run_without_denormals(execution, work);
  }
}

}  // namespace detail

LONGSPAN_NAMESPACE_END
