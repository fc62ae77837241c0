// Tasks treat denormal numbers as 0 and restore the mode of their thread.
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

TEST_CASE("DenormalsAreZero: denormal numbers are 0 during its lifetime only", "[denormals]") {
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

TEST_CASE("DenormalsAreZero: keeps the rounding mode of the caller", "[denormals]") {
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

TEST_CASE("denormals: the tasks of every executor treat them as 0, its threads do not", "[denormals]") {
  check_tasks(longspan::serial{});
  check_tasks(longspan::openmp{3});
  check_tasks(ThreadPool(3));
}

TEST_CASE("denormals: a task that throws restores the mode of its thread", "[denormals]") {
  const FloatingPointMode before;
  longspan::detail::run_without_denormals(longspan::serial{}, [](const auto& executor) {
    CHECK_THROWS_AS(executor.for_each(3, [](Index, Index) { throw std::runtime_error("task"); }),
                    std::runtime_error);
  });
  CHECK(before.is_that_of_this_thread());
}

}  // namespace
