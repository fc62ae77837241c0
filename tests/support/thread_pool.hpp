// An executor as a framework's thread pool would provide it.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "longspan/view.hpp"

namespace test {

using longspan::Index;

/// Creates new threads for each call.
class ThreadPool {
 public:
  explicit ThreadPool(Index threads) : threads_(threads) {}

  Index workers() const noexcept { return threads_; }

  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    std::atomic<Index> next{0};
    std::vector<std::thread> team;
    for (Index worker = 0; worker < threads_; ++worker) {
      team.emplace_back([&, worker] {
        for (Index t = next++; t < tasks; t = next++) task(t, worker);
      });
    }
    for (std::thread& thread : team) thread.join();
  }

 private:
  Index threads_;
};

}  // namespace test
