#include "longspan/execution.hpp"

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/thread_pool.hpp"

using longspan::Execution;
using longspan::Index;
using longspan::openmp;
using longspan::serial;
using longspan::Workspace;

namespace {

/// Counts the aligned allocations of this program, and can make them fail.
struct Allocations {
  int made = 0;
  int freed = 0;
  bool fail = false;
};
Allocations allocations;

}  // namespace

// g++ warns about a mismatch of new and delete when it inlines only one of them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
#endif
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  if (allocations.fail) throw std::bad_alloc();
  const std::size_t to = static_cast<std::size_t>(alignment);
  void* memory = std::aligned_alloc(to, (bytes + to - 1) / to * to);
  if (memory == nullptr) throw std::bad_alloc();
  ++allocations.made;
  return memory;
}
void operator delete(void* memory, std::align_val_t) noexcept {
  ++allocations.freed;
  std::free(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t alignment) noexcept {
  ::operator delete(memory, alignment);
}

namespace {

/// Records how an executor ran `count` tasks.
struct Record {
  bool each_once = true;
  bool workers_valid = true;
  bool worker_shared = false;  ///< two tasks that ran at the same time had the same worker number
};

template <class E>
Record record(const E& executor, Index count) {
  const Index workers = executor.workers();
  std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count)),
      busy(static_cast<std::size_t>(workers));
  std::atomic<bool> valid{true}, shared{false};
  executor.for_each(count, [&](Index task, Index worker) {
    if (task < 0 || task >= count || worker < 0 || worker >= workers) {
      valid = false;
      return;
    }
    std::atomic<int>& mine = busy[static_cast<std::size_t>(worker)];
    if (mine.fetch_add(1) != 0) shared = true;
    ++calls[static_cast<std::size_t>(task)];
    std::this_thread::yield();
    --mine;
  });
  Record record;
  for (const auto& c : calls) record.each_once &= c == 1;
  record.workers_valid = valid;
  record.worker_shared = shared;
  return record;
}

template <class E>
void check_executor(const E& executor) {
  for (const Index count : {0, 1, 2, 3, 7, 64, 1000}) {
    const Record of_run = record(executor, count);
    INFO(count << " tasks, " << executor.workers() << " workers");
    CHECK(of_run.each_once);
    CHECK(of_run.workers_valid);
    CHECK_FALSE(of_run.worker_shared);
  }
}

struct NoWorkers {
  template <class Task>
  void for_each(Index, Task&&) const {}
};
struct NotConst {
  Index workers() { return 1; }
  template <class Task>
  void for_each(Index, Task&&) {}
};

struct TaskFailure : std::runtime_error {
  explicit TaskFailure(Index task) : std::runtime_error("task " + std::to_string(task)), number(task) {}
  Index number;
};

}  // namespace

TEST_CASE("executors: each task runs once, and concurrent tasks have different workers", "[execution]") {
  CHECK(serial{}.workers() == 1);
  check_executor(serial{});
  check_executor(openmp{});
  for (const Index threads : {1, 2, 3, 7, 16}) check_executor(openmp{threads});
  check_executor(test::ThreadPool(3));
}

TEST_CASE("openmp: has the requested number of threads", "[execution]") {
#if defined(_OPENMP)
  CHECK(openmp{}.workers() == omp_get_max_threads());
  for (const Index threads : {1, 2, 3, 16}) CHECK(openmp{threads}.workers() == threads);
  // None of the five tasks ends before all have begun, so only a team of five threads can finish.
  constexpr int team = 5;
  const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  std::atomic<int> begun{0}, met{0};
  openmp{team}.for_each(team, [&](Index, Index) {
    ++begun;
    while (begun < team && std::chrono::steady_clock::now() < patience) std::this_thread::yield();
    if (begun == team) ++met;
  });
  CHECK(met == team);
#else
  CHECK(openmp{}.workers() == 1);
  CHECK(openmp{16}.workers() == 1);
#endif
}

TEST_CASE("openmp: changes no global setting of the process", "[execution]") {
#if defined(_OPENMP)
  const int threads = omp_get_max_threads(), levels = omp_get_max_active_levels(),
            dynamic = omp_get_dynamic();
  openmp{threads + 3}.for_each(100, [](Index, Index) {});
  CHECK(omp_get_max_threads() == threads);
  CHECK(omp_get_max_active_levels() == levels);
  CHECK(omp_get_dynamic() == dynamic);
#else
  SUCCEED("compiled without OpenMP");
#endif
}

TEST_CASE("openmp: inside a parallel region it runs on the calling thread", "[execution]") {
  std::array<std::atomic<int>, 4> inner_calls{};
  std::atomic<bool> serial_inside{true};
  openmp{2}.for_each(4, [&](Index task, Index) {
    const auto here = std::this_thread::get_id();
#if defined(_OPENMP)
    if (openmp{3}.workers() != 1) serial_inside = false;
#endif
    openmp{3}.for_each(5, [&](Index, Index worker) {
      if (worker != 0 || std::this_thread::get_id() != here) serial_inside = false;
      ++inner_calls[static_cast<std::size_t>(task)];
    });
  });
  CHECK(serial_inside);
  for (const auto& calls : inner_calls) CHECK(calls == 5);
}

TEST_CASE("openmp: throws the exception of the smallest task", "[execution][errors]") {
  for (const Index threads : {1, 2, 3, 7}) {
    int right = 0, other_type = 0;
    for (int round = 0; round < 200; ++round) {
      const Index first = round % 60;
      try {
        openmp{threads}.for_each(64, [&](Index task, Index) {
          if (task == first || task == first + 2 || task == 63) throw TaskFailure(task);
        });
      } catch (const TaskFailure& failure) {
        right += failure.number == first && failure.what() == "task " + std::to_string(first);
      } catch (...) {
        ++other_type;
      }
    }
    INFO(threads << " threads");
    CHECK(right == 200);
    CHECK(other_type == 0);
  }
}

TEST_CASE("openmp: works again after a task has thrown", "[execution][errors]") {
  CHECK_THROWS_AS(openmp{3}.for_each(8, [](Index task, Index) { throw TaskFailure(task); }), TaskFailure);
  check_executor(openmp{3});
}

TEST_CASE("Executor, ExecutionLike: the types that satisfy them", "[execution]") {
  STATIC_REQUIRE(longspan::Executor<serial>);
  STATIC_REQUIRE(longspan::Executor<openmp>);
  STATIC_REQUIRE(longspan::Executor<const openmp&>);
  STATIC_REQUIRE(longspan::Executor<test::ThreadPool>);
  STATIC_REQUIRE(longspan::Executor<const test::ThreadPool&>);
  STATIC_REQUIRE_FALSE(longspan::Executor<int>);
  STATIC_REQUIRE_FALSE(longspan::Executor<Workspace>);
  STATIC_REQUIRE_FALSE(longspan::Executor<NoWorkers>);
  STATIC_REQUIRE_FALSE(longspan::Executor<NotConst>);

  STATIC_REQUIRE(longspan::ExecutionLike<Execution<>&>);
  STATIC_REQUIRE(longspan::ExecutionLike<Execution<serial>>);
  STATIC_REQUIRE(longspan::ExecutionLike<serial>);
  STATIC_REQUIRE_FALSE(longspan::ExecutionLike<Workspace&>);
  STATIC_REQUIRE_FALSE(longspan::ExecutionLike<float*>);
}

TEST_CASE("Workspace: grows to the largest call and is then reused", "[execution]") {
  const Allocations before = allocations;
  {
    Workspace workspace;
    CHECK(workspace.bytes() == 0);
    std::byte* memory = workspace.reserve(100);
    CHECK(workspace.bytes() == 100);
    CHECK(workspace.reserve(100) == memory);
    CHECK(workspace.reserve(1) == memory);
    CHECK(workspace.reserve(0) == memory);
    CHECK(workspace.bytes() == 100);
    CHECK(allocations.made == before.made + 1);

    memory = workspace.reserve(5000);
    CHECK(workspace.bytes() == 5000);
    memory[4999] = std::byte{1};
    CHECK(workspace.reserve(3000) == memory);
    CHECK(allocations.made == before.made + 2);
    CHECK(allocations.freed == before.freed + 1);  // it never has two blocks
  }
  CHECK(allocations.freed == before.freed + 2);
}

TEST_CASE("Workspace: moves its memory, and the one moved from can be used again", "[execution]") {
  STATIC_REQUIRE_FALSE(std::is_copy_constructible_v<Workspace>);
  const Allocations before = allocations;
  {
    Workspace from;
    std::byte* memory = from.reserve(100);
    from.inner().reserve(20);
    Workspace to(std::move(from));
    CHECK(to.bytes() == 120);
    CHECK(to.reserve(100) == memory);
    CHECK(from.bytes() == 0);
    memory = from.reserve(50);
    REQUIRE(memory != nullptr);
    memory[49] = std::byte{1};
    to = std::move(from);
    CHECK(to.reserve(50) == memory);
    CHECK(to.bytes() == 50);
    CHECK(from.bytes() == 0);
  }
  CHECK(allocations.made - before.made == allocations.freed - before.freed);
}

TEST_CASE("Workspace: memory is aligned to a cache line", "[execution]") {
  STATIC_REQUIRE(Workspace::alignment == 64);
  bool aligned = true;
  for (std::size_t bytes = 1; bytes < 400; bytes += 3) {
    Workspace workspace;
    aligned &= reinterpret_cast<std::uintptr_t>(workspace.reserve(bytes)) % 64 == 0;
  }
  CHECK(aligned);
}

TEST_CASE("Workspace: a failed allocation throws and leaves it usable", "[execution][errors]") {
  Workspace workspace;
  workspace.reserve(100);
  allocations.fail = true;
  CHECK_THROWS_AS(workspace.reserve(200), std::bad_alloc);
  allocations.fail = false;
  CHECK(workspace.bytes() == 0);
  std::byte* memory = workspace.reserve(50);
  REQUIRE(memory != nullptr);
  memory[49] = std::byte{1};
  CHECK(workspace.bytes() == 50);
}

TEST_CASE("Execution: keeps its workspace from call to call", "[execution]") {
  Execution<serial> execution;
  const std::byte* memory = nullptr;
  longspan::detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
    STATIC_REQUIRE(std::is_same_v<decltype(executor), const longspan::detail::WithoutDenormals&>);
    memory = workspace.reserve(1000);
  });
  CHECK(execution.workspace.bytes() == 1000);
  longspan::detail::with_workspace(
      execution, [&](const auto&, Workspace& workspace) { CHECK(workspace.reserve(900) == memory); });
  longspan::detail::with_executor(execution, [](const auto& executor) {
    STATIC_REQUIRE(std::is_same_v<decltype(executor), const longspan::detail::WithoutDenormals&>);
    CHECK(executor.workers() == 1);
  });

  Execution moved = std::move(execution);
  CHECK(moved.workspace.reserve(1) == memory);
}

TEST_CASE("Execution: can be made from an executor", "[execution]") {
  const Execution on_three(openmp{3});
  STATIC_REQUIRE(std::is_same_v<decltype(on_three), const Execution<openmp>>);
  CHECK(on_three.executor.threads == 3);
  CHECK(Execution<>{}.executor.threads == 0);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<openmp, Execution<openmp>>);
}

TEST_CASE("with_workspace: an executor alone gets a workspace for the call", "[execution]") {
  const Allocations before = allocations;
  const openmp executor{3};
  longspan::detail::with_workspace(executor, [&](const auto& given, Workspace& workspace) {
    CHECK(given.workers() == executor.workers());
    CHECK(workspace.bytes() == 0);
    workspace.reserve(10);
  });
  CHECK(allocations.made == before.made + 1);
  CHECK(allocations.freed == before.freed + 1);
  longspan::detail::with_executor(executor,
                                  [&](const auto& given) { CHECK(given.workers() == executor.workers()); });
}
