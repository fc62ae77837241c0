#include "longspan/detail/call/parallel.hpp"

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/catch.hpp"

using longspan::Index;
namespace detail = longspan::detail;

namespace {

std::string text_thrown_by(const detail::FirstFailure& failure) {
  try {
    failure.rethrow();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

void fail_in(detail::FirstFailure& failure, Index task) {
  failure.guard(task, [&] { throw std::runtime_error("task " + std::to_string(task)); });
}

}  // namespace

TEST_CASE("FirstFailure: keeps the exception of the task with the smallest number", "[parallel]") {
  for (const std::vector<Index>& order : {std::vector<Index>{3, 5, 9}, {9, 5, 3}, {5, 3, 9}, {5, 9, 3}}) {
    detail::FirstFailure failure;
    for (const Index task : order) fail_in(failure, task);
    CHECK(text_thrown_by(failure) == "task 3");
  }
  detail::FirstFailure of_task_0;
  fail_in(of_task_0, 0);
  fail_in(of_task_0, 1);
  CHECK(text_thrown_by(of_task_0) == "task 0");
}

TEST_CASE("FirstFailure: without a failure rethrow does nothing", "[parallel]") {
  detail::FirstFailure failure;
  int calls = 0;
  failure.guard(1, [&] { ++calls; });
  CHECK(calls == 1);
  CHECK_NOTHROW(failure.rethrow());
}

TEST_CASE("team_size: the requested number, at least one", "[parallel]") {
#if defined(_OPENMP)
  CHECK(detail::team_size(5) == 5);
  CHECK(detail::team_size(0) == omp_get_max_threads());
  CHECK(detail::team_size(-3) == omp_get_max_threads());
  std::atomic<int> ones{0};
#pragma omp parallel num_threads(2)
  if (detail::team_size(5) == 1) ++ones;
  CHECK(ones == 2);
#else
  CHECK(detail::team_size(5) == 1);
  CHECK(detail::team_size(0) == 1);
#endif
}

TEST_CASE("parallel_for: one worker runs the tasks in order", "[parallel]") {
  for (const Index threads : {1, 4}) {
    const Index count = threads == 1 ? 20 : 1;  // one task needs no team, whatever the number of threads
    std::vector<Index> order;
    auto task = [&](Index t, Index worker) {
      if (worker == 0) order.push_back(t);
    };
    detail::parallel_for(threads, count, task);
    std::vector<Index> rising;
    for (Index t = 0; t < count; ++t) rising.push_back(t);
    CHECK(order == rising);
  }
}

TEST_CASE("parallel_for: no more workers than tasks", "[parallel]") {
  std::atomic<Index> highest{0}, calls{0};
  auto task = [&](Index, Index worker) {
    ++calls;
    Index seen = highest;
    while (worker > seen && !highest.compare_exchange_weak(seen, worker)) {
    }
  };
  detail::parallel_for(16, 3, task);
  CHECK(calls == 3);
  CHECK(highest < 3);
  detail::parallel_for(16, 0, task);
  CHECK(calls == 3);
}

TEST_CASE("parallel_for: a task that throws does not stop the others of a team", "[parallel]") {
#if defined(_OPENMP)
  std::atomic<int> calls{0};
  auto task = [&](Index t, Index) {
    ++calls;
    if (t % 2 == 0) throw std::runtime_error("task " + std::to_string(t));
  };
  std::string text;
  try {
    detail::parallel_for(3, 30, task);
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  CHECK(text == "task 0");
  CHECK(calls == 30);
#else
  SUCCEED("compiled without OpenMP");
#endif
}
