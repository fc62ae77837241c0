#include "longspan/key_ranges.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"

using longspan::Index;
using longspan::KeyRange;
using longspan::KeyRanges;

namespace {

constexpr Index keys = 120;

/// A subset of the keys 0 .. keys - 1.
using Set = std::vector<bool>;

Set set_of(const std::vector<KeyRange>& ranges) {
  Set set(static_cast<std::size_t>(keys));
  for (const KeyRange& range : ranges) {
    for (Index j = range.begin; j < range.end; ++j) set[static_cast<std::size_t>(j)] = true;
  }
  return set;
}
Set set_of(const KeyRanges& ranges) { return set_of(std::vector<KeyRange>(ranges.begin(), ranges.end())); }

int stretches(const Set& set) {
  int count = 0;
  for (std::size_t j = 0; j < set.size(); ++j) count += set[j] && (j == 0 || !set[j - 1]);
  return count;
}

bool holds(const Set& outer, const Set& inner) {
  for (std::size_t j = 0; j < inner.size(); ++j) {
    if (inner[j] && !outer[j]) return false;
  }
  return true;
}

/// True if ranges rise, are not empty, have gaps between them, and are at most `capacity`.
bool well_formed(const KeyRanges& ranges) {
  if (ranges.size() > KeyRanges::capacity || ranges.end() - ranges.begin() != ranges.size()) return false;
  for (const KeyRange* range = ranges.begin(); range != ranges.end(); ++range) {
    if (range->empty() || (range != ranges.begin() && range->begin <= (range - 1)->end)) return false;
  }
  return ranges.empty() == (ranges.size() == 0);
}

/// True if the ranges are well formed, contain all wanted keys, and are exact if the capacity suffices.
bool is(const KeyRanges& ranges, const Set& wanted) {
  if (!well_formed(ranges)) return false;
  return stretches(wanted) <= KeyRanges::capacity ? set_of(ranges) == wanted : holds(set_of(ranges), wanted);
}

std::vector<KeyRange> random_ranges(test::Random& random, Index most, Index longest) {
  std::vector<KeyRange> ranges(static_cast<std::size_t>(random.between(0, most)));
  for (KeyRange& range : ranges) {
    range.begin = random.between(0, keys - 1);
    range.end = std::min(keys, range.begin + random.between(-2, longest));
  }
  return ranges;
}

KeyRanges sum_of(const std::vector<KeyRange>& ranges) {
  KeyRanges sum;
  for (const KeyRange& range : ranges) sum.add(range);
  return sum;
}

}  // namespace

TEST_CASE("KeyRange: empty, contains, overlaps", "[key_ranges]") {
  constexpr KeyRange x{3, 7};
  STATIC_REQUIRE_FALSE(x.empty());
  STATIC_REQUIRE(KeyRange{3, 3}.empty());
  STATIC_REQUIRE(KeyRange{5, 3}.empty());
  STATIC_REQUIRE(x.contains(3));
  STATIC_REQUIRE(x.contains(6));
  STATIC_REQUIRE_FALSE(x.contains(2));
  STATIC_REQUIRE_FALSE(x.contains(7));
  STATIC_REQUIRE(x.contains(KeyRange{3, 7}));
  STATIC_REQUIRE_FALSE(x.contains(KeyRange{2, 7}));
  STATIC_REQUIRE_FALSE(x.contains(KeyRange{3, 8}));
  STATIC_REQUIRE(x.overlaps({6, 9}));
  STATIC_REQUIRE(x.overlaps({0, 4}));
  STATIC_REQUIRE_FALSE(x.overlaps({7, 9}));
  STATIC_REQUIRE_FALSE(x.overlaps({0, 3}));
  STATIC_REQUIRE_FALSE(x.overlaps({5, 5}));
}

TEST_CASE("KeyRange: everything leaves room to add", "[key_ranges]") {
  constexpr KeyRange all = KeyRange::everything();
  STATIC_REQUIRE(all.contains(Index{0}));
  STATIC_REQUIRE(all.contains(Index{1} << 40));
  STATIC_REQUIRE(all.contains(-(Index{1} << 40)));
  STATIC_REQUIRE(KeyRange::highest + KeyRange::highest > KeyRange::highest);
  STATIC_REQUIRE(KeyRange::lowest - KeyRange::highest < KeyRange::lowest);
}

TEST_CASE("KeyRanges: adjacent ranges become one", "[key_ranges]") {
  CHECK(KeyRanges().empty());
  CHECK(KeyRanges().size() == 0);
  CHECK(KeyRanges({4, 4}).empty());
  KeyRanges x({10, 20});
  x.add({30, 40});
  CHECK(x.size() == 2);
  x.add({20, 22});
  CHECK(x.size() == 2);
  CHECK(*x.begin() == KeyRange{10, 22});
  x.add({5, 5});
  CHECK(x.size() == 2);
  x.add({0, 3});
  CHECK(x.size() == 3);
  CHECK(*x.begin() == KeyRange{0, 3});
  x.add({2, 31});
  CHECK(x.size() == 1);
  CHECK(*x.begin() == KeyRange{0, 40});
}

TEST_CASE("KeyRanges: one range too many closes the narrowest gap", "[key_ranges]") {
  STATIC_REQUIRE(KeyRanges::capacity == 8);
  KeyRanges x;
  for (Index n = 0; n < 8; ++n) x.add({100 * n, 100 * n + 10 + n});  // the gaps are 90, 89, ... 84 keys wide
  CHECK(x.size() == 8);
  x.add({1000, 1010});
  CHECK(x.size() == 8);
  CHECK((x.end() - 2)->begin == 600);
  CHECK((x.end() - 2)->end == 717);
  CHECK((x.end() - 1)->begin == 1000);
  x.add({55, 60});  // its gaps are 45 and 40 wide
  CHECK(x.size() == 8);
  CHECK(x.begin()->end == 10);
  CHECK((x.begin() + 1)->begin == 55);
  CHECK((x.begin() + 1)->end == 111);
}

TEST_CASE("KeyRanges: adding never loses a key", "[key_ranges]") {
  test::for_each_case(2000, [](test::Random& random) {
    const auto ranges = random_ranges(random, 30, random.pick<Index>({3, 10, 60}));
    KeyRanges sum;
    std::vector<KeyRange> so_far;
    bool right = true;
    int most_stretches = 0;
    for (const KeyRange& range : ranges) {
      sum.add(range);
      so_far.push_back(range);
      most_stretches = std::max(most_stretches, stretches(set_of(so_far)));
      right &= well_formed(sum) && holds(set_of(sum), set_of(so_far));
      if (most_stretches <= KeyRanges::capacity) right &= set_of(sum) == set_of(so_far);
    }
    CHECK(right);
  });
}

TEST_CASE("united, intersection: match sets of keys", "[key_ranges]") {
  test::for_each_case(2000, [](test::Random& random) {
    // Up to 8 ranges each: both are exact, but their combination may exceed the capacity.
    const auto a = random_ranges(random, 8, 20), b = random_ranges(random, 8, 20);
    const Set set_a = set_of(a), set_b = set_of(b);
    Set in_either = set_a, in_both = set_a;
    for (std::size_t j = 0; j < set_a.size(); ++j) {
      in_either[j] = set_a[j] || set_b[j];
      in_both[j] = set_a[j] && set_b[j];
    }
    const KeyRanges sum = united(sum_of(a), sum_of(b)), common = intersection(sum_of(a), sum_of(b));
    CHECK(well_formed(sum));
    CHECK(holds(set_of(sum), in_either));
    CHECK(is(common, in_both));
    if (stretches(set_a) + stretches(set_b) <= KeyRanges::capacity) CHECK(set_of(sum) == in_either);
  });
}

TEST_CASE("united, intersection: with everything and with nothing", "[key_ranges]") {
  const KeyRanges all(KeyRange::everything()), none;
  KeyRanges x({3, 5});
  x.add({8, 9});
  const KeyRanges same = intersection(all, x);
  CHECK(std::equal(x.begin(), x.end(), same.begin(), same.end()));
  CHECK(intersection(x, none).empty());
  CHECK(united(none, none).empty());
  CHECK(united(x, none).size() == 2);
  CHECK(united(x, all).size() == 1);
  CHECK(*united(all, x).begin() == KeyRange::everything());
}

TEST_CASE("KeyRanges: can be used in constant expressions", "[key_ranges]") {
  constexpr KeyRanges x = [] {
    KeyRanges ranges;
    for (Index n = 0; n < 20; ++n) ranges.add({10 * n, 10 * n + 3});
    return ranges;
  }();
  STATIC_REQUIRE(x.size() == 8);
  STATIC_REQUIRE(x.begin()->begin == 0);
  STATIC_REQUIRE((x.end() - 1)->end == 193);
  STATIC_REQUIRE(intersection(x, KeyRanges({0, 2})).size() == 1);
}
