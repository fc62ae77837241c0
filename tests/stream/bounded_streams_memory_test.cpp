// dilated_cache and infini_memory when memory runs out: each allocation of each call fails in turn.
#include <algorithm>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "longspan/stream/dilated_cache.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/random.hpp"
#include "support/saved.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::serial;

template <class Stream, class C>
void extend_serially(Stream& stream, C& call, Index first, Index count) {
  stream.extend(std::as_const(call.q).view().slice_rows(first, count),
                std::as_const(call.k).view().slice_rows(first, count),
                std::as_const(call.v).view().slice_rows(first, count),
                call.out.view().slice_rows(first, count), serial{});
}

/// Calls work(copy of the stream) with each allocation failing in turn, and then check(copy).
template <class Stream, class Work, class Check>
void for_each_failure(const Stream& stream, const Work& work, const Check& check) {
  long failures = 0;
  for (bool failed = true; failed; ++failures) {
    Stream copy = stream;
    failed = runs_out_of_memory(failures, [&] { work(copy); });
    if (failed) check(copy);
  }
  CHECK(failures > 1);
}

/// Operations that change nothing when they fail: assignment, load, and truncate if `is_exact`.
template <class Stream>
void check_strong_guarantees(const Stream& stream, const Stream& other) {
  const std::string before = saved(stream), state = saved(other);
  const auto is_unchanged = [&](const Stream& left) { REQUIRE(saved(left) == before); };
  for_each_failure(
      stream, [&](Stream& copy) { copy = other; }, is_unchanged);
  std::istringstream from(state);
  for_each_failure(
      stream,
      [&](Stream& copy) {
        from.clear();
        from.seekg(0);
        copy.load(from);
      },
      is_unchanged);
}

}  // namespace

TEST_CASE("dilated_cache: a call without enough memory changes nothing, or appends the first tokens",
          "[state][memory]") {
  Random random(1);
  Call<float> call(Shape{2, 2, 1, 3000, 3000, 4, 4}, Values::normal, random), wanted = call.unrun();
  const longspan::dilated_attention attend{
      {{16, 1}, {50, 3}}, causal{}, longspan::rotary(longspan::Pairing::half_split)};
  auto stream = attend.stream({2, 2, 1, 4, 4}), other = stream, whole = stream;
  extend_serially(stream, call, 0, 37);
  extend_serially(other, call, 0, 90);
  check_strong_guarantees(stream, other);
  extend_serially(whole, wanted, 0, 2500);
  const std::string state = saved(whole);
  for_each_failure(
      stream, [&](auto& copy) { extend_serially(copy, call, 37, 2463); },
      [&](auto& copy) {
        REQUIRE(copy.size() >= 37);
        extend_serially(copy, call, copy.size(), 2500 - copy.size());
        REQUIRE(saved(copy) == state);
      });
}

TEST_CASE("infini_memory: a call without enough memory changes nothing, or appends the first tokens",
          "[state][memory][infini]") {
  Random random(2);
  for (const Index rollback : {0, 30}) {
    Call<float> call(Shape{2, 2, 1, 200, 200, 4, 4}, Values::normal, random);
    longspan::infini_attention attend;
    attend.segment = 8;
    attend.rule = longspan::InfiniRule::delta;
    auto stream = attend.stream({2, 2, 1, 4, 4}, {.rollback = rollback}), other = stream, whole = stream;
    extend_serially(stream, call, 0, 37);
    extend_serially(other, call, 0, 90);
    check_strong_guarantees(stream, other);
    if (rollback > 0) {
      for_each_failure(
          stream, [](auto& copy) { copy.truncate(20, serial{}); },
          [&](auto& copy) { REQUIRE(saved(copy) == saved(stream)); });
    }
    for (const Index count : {1, 2, 30}) {
      for_each_failure(
          stream,
          [&](auto& copy) {
            const auto part = [&](const auto& x) { return std::as_const(x).view().slice_rows(37, count); };
            copy.peek(part(call.q), part(call.k), part(call.v), call.out.view().slice_rows(37, count),
                      serial{});
          },
          [&](auto& copy) { REQUIRE(saved(copy) == saved(stream)); });
    }

    // Batch rows may then have different sizes; each continues from its own.
    const auto memory_of = [](const auto& of) {
      std::vector<float> numbers;
      for (Index b = 0; b < 2; ++b) {
        for (Index c = 0; c < 4; ++c) {
          numbers.push_back(of.norm(b, 0, c));
          for (Index column = 0; column < 4; ++column) numbers.push_back(of.memory(b, 0, c, column));
        }
      }
      return numbers;
    };
    extend_serially(whole, call, 0, 150);
    for_each_failure(
        stream, [&](auto& copy) { extend_serially(copy, call, 37, 113); },
        [&](auto& copy) {
          std::istringstream file(saved(copy));
          auto loaded = attend.stream({2, 2, 1, 4, 4}, {.rollback = rollback});
          loaded.load(file);
          for (Index b = 0; b < 2; ++b) {
            REQUIRE(loaded.size(b) >= 37);
            const Index left = 150 - loaded.size(b);
            const auto part = [&](const auto& x) {
              return longspan::detail::batch_row(std::as_const(x).view(), b).slice_rows(150 - left, left);
            };
            loaded.append(b, part(call.k), part(call.v), serial{});
            REQUIRE(loaded.size(b) == 150);
          }
          REQUIRE(memory_of(loaded) == memory_of(whole));
        });
  }
}
