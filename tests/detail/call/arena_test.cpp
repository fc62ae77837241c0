#include "longspan/detail/call/arena.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/refusal.hpp"

using longspan::Index;
using longspan::detail::Arena;

namespace {

struct Arrays {
  char* a;
  double* b;
  float* c;
  std::int16_t* d;
};

Arrays cut(Arena& arena) {
  return {arena.take<char>(1), arena.take<double>(9), arena.take<float>(0), arena.take<std::int16_t>(33)};
}

}  // namespace

TEST_CASE("round_up, divide_up: match counting", "[scratch]") {
  for (Index by = 1; by < 70; ++by) {
    Index multiple = 0;
    bool right = true;
    for (Index x = 0; x < 300; ++x) {
      if (x > multiple) multiple += by;
      right &= longspan::detail::round_up(x, by) == multiple;
      right &= longspan::detail::divide_up(x, by) == multiple / by;
    }
    CHECK(right);
  }
  STATIC_REQUIRE(longspan::detail::round_up(65, 64) == 128);
}

TEST_CASE("Arena: hands out aligned arrays one after the other", "[scratch]") {
  alignas(64) std::byte block[512];
  Arena arena(block);
  const Arrays arrays = cut(arena);
  const auto offset = [&](const void* x) { return reinterpret_cast<const std::byte*>(x) - block; };
  CHECK(offset(arrays.a) == 0);
  CHECK(offset(arrays.b) == 64);
  CHECK(offset(arrays.c) == 192);
  CHECK(offset(arrays.d) == 192);
  CHECK(arena.used() == 192 + 128);
}

TEST_CASE("Arena: without a block it counts the bytes that the same arrays need", "[scratch]") {
  alignas(64) std::byte block[512];
  Arena counting, cutting(block);
  const Arrays none = cut(counting);
  cut(cutting);
  CHECK(none.a == nullptr);
  CHECK(none.b == nullptr);
  CHECK(none.d == nullptr);
  CHECK(counting.used() == cutting.used());
}

TEST_CASE("Arena: arrays do not overlap", "[scratch]") {
  Arena counting;
  const std::vector<Index> counts{5, 0, 17, 64, 1, 16, 33};
  for (const Index count : counts) counting.take<float>(count);
  std::vector<std::byte> memory(counting.used() + 64);
  std::byte* block = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
  Arena arena(block);
  std::vector<float*> arrays;
  for (const Index count : counts) arrays.push_back(arena.take<float>(count));
  for (std::size_t n = 0; n < counts.size(); ++n) std::fill_n(arrays[n], counts[n], static_cast<float>(n));
  bool kept = true;
  for (std::size_t n = 0; n < counts.size(); ++n) {
    for (Index i = 0; i < counts[n]; ++i) kept &= arrays[n][i] == static_cast<float>(n);
  }
  CHECK(kept);
  CHECK(arena.used() == counting.used());
}

TEST_CASE("Arena: more than the address space is refused without overflow", "[scratch][errors]") {
  constexpr Index most = std::numeric_limits<Index>::max();
  const char* sentence = "longspan: the scratch memory of a call would be larger than the address space";
  Arena arena;
  CHECK(test::refusal([&] { arena.take<double>(most / 4); }) == sentence);
  CHECK(test::refusal([&] { arena.take<char>(most); }) == sentence);
  CHECK(arena.used() == 0);
  arena.take<char>(most / 4);
  arena.take<char>(most / 8);
  CHECK(test::refusal([&] { arena.take<char>(most / 4); }) == sentence);
  CHECK(arena.used() >= static_cast<std::size_t>(most / 4 + most / 8));
}
