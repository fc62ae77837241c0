// Tasks run with denormal numbers as 0, and leave no trace of it.
#include "longspan/detail/call/denormals.hpp"

#include <cfenv>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "longspan/execution.hpp"
#include "support/catch.hpp"
#include "support/floating_point_mode.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using longspan::detail::DenormalsAreZero;

TEST_CASE("denormal numbers are 0 while a DenormalsAreZero lives, and numbers again after it",
          "[denormals]") {
  const FloatingPointMode before;
  CHECK_FALSE(denormals_count_as_zero());
  {
    const DenormalsAreZero outer;
    CHECK(denormals_count_as_zero() == can_ignore_denormals);
    {
      const DenormalsAreZero inner;
      CHECK(denormals_count_as_zero() == can_ignore_denormals);
    }
    CHECK(denormals_count_as_zero() == can_ignore_denormals);
  }
  CHECK_FALSE(denormals_count_as_zero());
  CHECK(before.is_that_of_this_thread());
}

TEST_CASE("the rounding mode of a caller stays while a DenormalsAreZero lives", "[denormals]") {
  const int before = std::fegetround();
  REQUIRE(std::fesetround(FE_TOWARDZERO) == 0);
  int within = 0;
  {
    const DenormalsAreZero mode;
    within = std::fegetround();
  }
  const int after = std::fegetround();
  std::fesetround(before);
  CHECK(within == FE_TOWARDZERO);
  CHECK(after == FE_TOWARDZERO);
}

template <class E>
void check_tasks(const E& executor) {
  constexpr Index tasks = 64;
  std::vector<int> as_zero(tasks), before_task(tasks);
  longspan::detail::run_without_denormals(executor, [&](const auto& wrapped) {
    CHECK(wrapped.workers() == executor.workers());
    wrapped.for_each(tasks, [&](Index t, Index) { as_zero[std::size_t(t)] = denormals_count_as_zero(); });
  });
  CHECK(as_zero == std::vector<int>(tasks, can_ignore_denormals));
  executor.for_each(tasks, [&](Index t, Index) { before_task[std::size_t(t)] = denormals_count_as_zero(); });
  CHECK(before_task == std::vector<int>(tasks, 0));
}

TEST_CASE("the tasks of every executor take denormal numbers for 0, and its threads do not", "[denormals]") {
  check_tasks(longspan::serial{});
  check_tasks(longspan::openmp{3});
  check_tasks(ThreadPool(3));
}

TEST_CASE("a task that throws leaves the mode of its thread as it was", "[denormals]") {
  const FloatingPointMode before;
  longspan::detail::run_without_denormals(longspan::serial{}, [](const auto& executor) {
    CHECK_THROWS_AS(executor.for_each(3, [](Index, Index) { throw std::runtime_error("task"); }),
                    std::runtime_error);
  });
  CHECK(before.is_that_of_this_thread());
}

}  // namespace
