// Where a call runs and which memory it works in: executors and the reusable workspace.
#pragma once

#include <concepts>
#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "longspan/detail/call/denormals.hpp"
#include "longspan/detail/call/parallel.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// Runs on the caller's thread.
struct serial {
  Index workers() const noexcept { return 1; }

  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    for (Index t = 0; t < tasks; ++t) task(t, Index{0});
  }
};

/// A team of OpenMP threads; `threads` = 0 takes what OpenMP would (OMP_NUM_THREADS). The default.
///
/// Inside a parallel region, and in a program compiled without OpenMP, it runs on the caller's thread. It
/// sets nothing: neither omp_set_num_threads nor any other global of the process.
///
/// A child of fork() does not have the threads of its parent. If the parent has run a parallel call before, the
/// first one of the child hangs (GNU's OpenMP): pass `serial{}` in the child, fork before the first parallel call,
/// or call exec in the child.
struct openmp {
  Index threads = 0;

  Index workers() const noexcept { return detail::team_size(threads); }

  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    detail::parallel_for(workers(), tasks, task);
  }
};

/// Anything that runs tasks: a framework's thread pool fits with these two members.
///
///   workers()             at most so many tasks run at one time
///   for_each(n, task)     calls task(t, worker) once for each t in [0, n), with 0 <= worker < workers() and
///                         no worker number in use by two tasks at one time; returns when all are done
///
/// Results do not depend on the executor, to the bit: work is cut by shape and merged in a fixed order.
///
/// While a task of the library runs, its thread takes denormal numbers (below 2^-126 for float) for 0, on x86-64 and
/// AArch64; when the task ends, also by an exception, the mode of the thread is what it was. An executor sees nothing
/// of it. A score, mask, position encoding or feature map of yours that a task calls does.
template <class E>
concept Executor = requires(const std::remove_cvref_t<E>& executor, void (*task)(Index, Index)) {
  { executor.workers() } -> std::convertible_to<Index>;
  executor.for_each(Index{1}, task);
};

/// Scratch memory that grows to what the largest call needed and is then reused: no call allocates twice.
/// Not for two calls at one time.
class Workspace {
 public:
  static constexpr std::size_t alignment = 64;

  /// At least `bytes` bytes, 64-byte aligned, contents unspecified. Throws std::bad_alloc.
  std::byte* reserve(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{alignment})));
      size_ = bytes;
    }
    return memory_.get();
  }

  Index bytes() const noexcept {
    return static_cast<Index>(size_) + (inner_ == nullptr ? 0 : inner_->bytes());
  }

  /// A workspace beside this one, for a functor that calls another while it uses its own.
  Workspace& inner() {
    if (inner_ == nullptr) inner_ = std::make_unique<Workspace>();
    return *inner_;
  }

 private:
  struct Release {
    void operator()(std::byte* memory) const noexcept {
      ::operator delete(memory, std::align_val_t{alignment});
    }
  };
  std::unique_ptr<std::byte, Release> memory_;
  std::size_t size_ = 0;
  std::unique_ptr<Workspace> inner_;
};

/// An executor with a workspace: the optional last argument of every functor. Keep one for each calling
/// thread, and from the second call of a shape on nothing is allocated. A functor called without one runs on
/// `openmp{}` and allocates its scratch for the length of the call.
template <Executor E = openmp>
struct Execution {
  E executor{};
  Workspace workspace{};

  Execution() = default;
  explicit Execution(E runs_on) : executor(std::move(runs_on)) {}
};

namespace detail {

/// An Execution of parts that somebody else holds.
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

/// What a functor takes as its last argument: an Execution (by reference), or an executor alone.
template <class X>
concept ExecutionLike = detail::is_execution<std::remove_cvref_t<X>> || Executor<X>;

namespace detail {

/// work(executor, workspace) for an Execution, or for an executor alone with a workspace for this call.
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

/// work(executor) for an Execution or an executor.
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
