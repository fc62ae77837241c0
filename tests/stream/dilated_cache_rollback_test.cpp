#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "longspan/stream/dilated_cache.hpp"
#include "support/refusal.hpp"
#include "support/rollback.hpp"

namespace {

using namespace test;
using longspan::Branch;
using longspan::causal;
using longspan::dilated_attention;
using Branches = std::vector<Branch>;

/// Segments shorter and longer than the rollback, with dilations that divide them or do not.
const std::vector<Branches> schedules{
    {{16, 1}, {64, 4}}, {{4, 1}, {12, 3}, {50, 7}}, {{1, 1}, {9, 2}}, {{30, 3}, {Index{1} << 62, 2}}};

template <class Attend>
void check_rollback_of(Attend attend, Random& random) {
  attend.branches = random.pick(schedules);
  attend.phase = random.pick({longspan::Phase::modulo, longspan::Phase::blocked});
  attend.overlap = random.pick({longspan::Overlap::multiset, longspan::Overlap::set});
  const Shape shape{random.between(1, 2), 4, random.pick({1, 2, 4}), 0, 0, 8, random.pick({4, 12})};
  const Index rollback = random.pick({0, 1, 16, 40});
  const auto fresh = [&]<class T>(T) {
    return [&] { return attend.template stream<T>(stream_shape(shape), {.rollback = rollback}); };
  };
  const RollbackStory story{150, rollback, random.pick({1, 4, 12, 40})};
  check_rollback(fresh(float{}), shape, random, story);
  check_rollback(fresh(std::int8_t{}), shape, random, story);
}

}  // namespace

TEST_CASE("dilated_cache: removed tokens change no bit of later outputs", "[law][bits]") {
  for_each_case(40, [](Random& random) {
    check_rollback_of(dilated_attention{schedules[0]}, random);
    check_rollback_of(dilated_attention{schedules[0], longspan::rotary(longspan::Pairing::half_split),
                                        causal{} & longspan::window{.left = 20}},
                      random);
  });
}

TEST_CASE("dilated_cache: the same with bfloat16 rows and encoded keys", "[law][bits]") {
  for_each_case(10, [](Random& random) {
    const dilated_attention attend{random.pick(schedules), causal{},
                                   longspan::rotary(longspan::Pairing::interleaved)};
    const Shape shape{2, 4, 2, 0, 0, 8, 6};
    check_rollback([&] { return attend.stream<Eigen::bfloat16>(stream_shape(shape)); }, shape, random);
  });
}

TEST_CASE("dilated_cache: how far it can be truncated, and the error beyond that", "[errors]") {
  Random random(1);
  Call<float> call(Shape{1, 2, 1, 300, 300, 4, 4}, Values::normal, random);
  const dilated_attention attend{Branches{{20, 1}, {64, 3}}};
  for (const Index rollback : {0, 1, 16, 40}) {
    auto stream = attend.stream({1, 2, 1, 4, 4}, {.rollback = rollback});
    for (Index n = 0; n < 300; n += 7) {
      extend(stream, call, n, std::min<Index>(7, 300 - n));
      for (Index back = 0; back <= std::min(rollback, stream.size()); ++back)
        REQUIRE(stream.can_truncate(stream.size() - back));
      CHECK_FALSE(stream.can_truncate(-1));
      CHECK_FALSE(stream.can_truncate(stream.size() + 1));
    }
  }
  // 130 tokens, rollback 16: the segment of token 114 in the first branch begins at 100, that in the
  // second one at 64.
  auto stream = attend.stream({1, 2, 1, 4, 4});
  extend(stream, call, 0, 130);
  CHECK(stream.can_truncate(100));
  CHECK_FALSE(stream.can_truncate(99));
  CHECK(refusal([&] { stream.truncate(99); }) ==
        "longspan: dilated_cache::truncate: the number of tokens is 99, wanted 100..130, because rows of "
        "earlier segments have been dropped");
  CHECK(stream.size() == 130);
  CHECK(stream.can_truncate(0));
  CHECK(refusal([&] {
          attend.stream({1, 2, 1, 4, 4}, {.rollback = -1});
        }) == "longspan: dilated_cache: rollback is -1, wanted at least 0 tokens");
  // Truncated twice: the rollback counts from the largest size.
  stream.truncate(114);
  extend(stream, call, 114, 5);
  CHECK(stream.can_truncate(114));
  CHECK_FALSE(stream.can_truncate(99));
}

TEST_CASE("dilated_cache: rows() counts the rows that may be visible again, and no others are kept",
          "[state]") {
  Random random(2);
  Call<float> call(Shape{1, 2, 2, 500, 500, 4, 4}, Values::normal, random);
  const Branches branches{{64, 1}, {30, 7}};
  for (const Index rollback : {0, 1, 16, 40, 100}) {
    auto stream = dilated_attention{branches}.stream({1, 2, 2, 4, 4}, {.rollback = rollback});
    Index most_rows = 0;
    for (Index n = 0; n < 500; ++n) {
      extend(stream, call, n, 1);
      const Index least = std::max<Index>(0, n + 1 - rollback);
      Index rows = 0;
      for (const Branch& branch : branches) {
        for (Index m = least / branch.segment * branch.segment; m <= n; ++m) {
          for (Index h = 0; h < 2; ++h) rows += m % branch.segment % branch.dilation == h % branch.dilation;
        }
      }
      REQUIRE(stream.rows() == rows);
      most_rows = std::max(most_rows, rows);
    }
    const Index bytes = most_rows * 8 * Index{sizeof(float)};
    CHECK(stream.bytes() >= bytes);
    CHECK(stream.bytes() <= bytes + 8 * Index{sizeof(float)} * 2 * 4);  // a row or two in each strand
  }
}

TEST_CASE("dilated_cache: a file with a smaller rollback is refused, one with a larger rollback is not",
          "[state][errors]") {
  Random random(3);
  Call<float> call(Shape{1, 2, 1, 70, 70, 4, 4}, Values::normal, random), again = call.unrun();
  const dilated_attention attend{Branches{{16, 1}, {24, 2}}};
  auto wide = attend.stream({1, 2, 1, 4, 4}, {.rollback = 40}), narrow = attend.stream({1, 2, 1, 4, 4});
  extend(wide, call, 0, 50);
  extend(narrow, call, 0, 50);
  std::stringstream of_wide, of_narrow;
  wide.save(of_wide);
  narrow.save(of_narrow);
  CHECK(refused(wide, of_narrow.str()) ==
        "longspan: dilated_cache::load: rollback is 16 in the file, wanted at least 40 as in this stream");
  CHECK(wide.size() == 50);
  CHECK(refused(narrow, of_wide.str()) == "");
  CHECK(narrow.can_truncate(10));
  narrow.truncate(40);
  wide.truncate(40);
  extend(narrow, call, 40, 30);
  extend(wide, again, 40, 30);
  CHECK(same_rows(call, again, 40, 70));
}
