#include "longspan/detail/call/scratch.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "support/catch.hpp"

using longspan::Index;
using longspan::Workspace;
using namespace longspan::detail;

TEST_CASE("take_scratch: the arrays lie one after the other in the workspace", "[scratch]") {
  Workspace workspace;
  const auto take = [](Arena& arena) {
    return std::pair<char*, double*>{arena.take<char>(3), arena.take<double>(5)};
  };
  const auto [a, b] = take_scratch(workspace, take);
  CHECK(reinterpret_cast<std::uintptr_t>(a) % Workspace::alignment == 0);
  CHECK(reinterpret_cast<std::byte*>(b) == reinterpret_cast<std::byte*>(a) + 64);
  CHECK(workspace.bytes() == 128);
  CHECK(take_scratch(workspace, take).first == a);
}

TEST_CASE(
    "WorkerScratch: the parts of the workers and the shared one do not overlap, and keep what is in them",
    "[scratch]") {
  Workspace workspace;
  constexpr Index workers = 5, own_floats = 20, shared_floats = 7;
  const WorkerScratch scratch(
      workspace, workers, [](Arena& arena) { arena.take<float>(own_floats); },
      [](Arena& arena) { arena.take<float>(shared_floats); });
  const auto own = [&](Index worker) {
    Arena arena = scratch.of_worker(worker);
    return arena.take<float>(own_floats);
  };
  for (Index worker = 0; worker < workers; ++worker)
    std::fill_n(own(worker), own_floats, static_cast<float>(worker));
  Arena arena = scratch.shared();
  std::fill_n(arena.take<float>(shared_floats), shared_floats, -1.0f);
  bool kept = true;
  for (Index worker = 0; worker < workers; ++worker) {
    const float *begin = own(worker), *end = begin + own_floats;
    kept &= std::all_of(begin, end, [&](float x) { return x == static_cast<float>(worker); });
  }
  CHECK(kept);
  CHECK(workspace.bytes() == workers * 128 + 64);
}

TEST_CASE("WorkerScratch: nothing shared, and no workers", "[scratch]") {
  Workspace workspace;
  const WorkerScratch scratch(workspace, 3, [](Arena& arena) { arena.take<double>(8); });
  CHECK(workspace.bytes() == 3 * 64);
  Workspace empty;
  const WorkerScratch none(empty, 0, [](Arena& arena) { arena.take<double>(8); });
  CHECK(empty.bytes() == 0);
}
