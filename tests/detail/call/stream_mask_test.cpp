#include "longspan/detail/call/stream_mask.hpp"

#include <algorithm>
#include <array>
#include <type_traits>

#include "support/catch.hpp"
#include "support/drawn_masks.hpp"
#include "support/random.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::KeyRange;
using longspan::KeyRanges;
using longspan::sinks;
using longspan::window;
using longspan::detail::later_keys;
using longspan::detail::stream_mask;

bool holds(const KeyRanges& ranges, Index key) {
  for (const KeyRange& range : ranges) {
    if (range.contains(key)) return true;
  }
  return false;
}

}  // namespace

TEST_CASE("later_keys: contains every key that a later query sees") {
  for_each_case(20, [](Random& random) {
    Shape shape;
    shape.batch = 2;
    shape.kv_len = 60;
    const DrawnMasks masks(shape, random);
    const Index first = random.between(0, 60);
    masks.for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      INFO(name << " first=" << first);
      for (Index b = 0; b < 2; ++b) {
        const KeyRanges later = later_keys(stream_mask(mask), b, first);
        bool all = true;
        for (Index i = first; i < 80; ++i) {
          for (Index j = 0; j < 100; ++j) {
            if (longspan::sees(stream_mask(mask), b, 0, i, j))
              all = all && sees(b, 0, i, j) && holds(later, j);
          }
        }
        CHECK(all);
      }
    });
  });
}

TEST_CASE("later_keys: excludes keys before the windows of later queries") {
  const KeyRanges ring = later_keys(causal{} & (window{.left = 9} | sinks{4}), 0, 1000);
  REQUIRE(ring.size() == 2);
  CHECK(*ring.begin() == KeyRange{0, 4});
  CHECK((ring.begin() + 1)->begin == 991);
  CHECK(holds(later_keys(causal{}, 0, 1000), 0));
  CHECK_FALSE(holds(later_keys(causal{} & longspan::segments{100}, 0, 950), 899));
  CHECK(holds(later_keys(causal{} & longspan::segments{100}, 0, 950), 900));
}

TEST_CASE("stream_mask: a new type only if the mask may leave a query without an upper limit") {
  using longspan::documents;
  using longspan::padding;
  using longspan::segments;
  using longspan::detail::StreamMask;
  CHECK(std::is_same_v<StreamMask<causal>, causal>);
  CHECK(std::is_same_v<StreamMask<longspan::everything>, causal>);
  using Local = decltype(causal{} & window{});
  CHECK(std::is_same_v<StreamMask<Local>, Local>);
  using Prefix = decltype(causal{} | sinks{});
  CHECK(std::is_same_v<StreamMask<Prefix>, Prefix>);
  using Packed = decltype((segments{} | sinks{}) & documents{});
  CHECK(std::is_same_v<StreamMask<Packed>, Packed>);
  CHECK(std::is_same_v<StreamMask<padding>, padding>);
  CHECK(std::is_same_v<StreamMask<every_third>, longspan::both<causal, every_third>>);
  CHECK(longspan::RangeMask<StreamMask<window>>);
  CHECK(longspan::RangeMask<StreamMask<documents>>);
  CHECK(longspan::detail::hides_later_keys<decltype((causal{} & window{}) | (causal{} & sinks{}))>);
  CHECK_FALSE(longspan::detail::hides_later_keys<Prefix>);
}

namespace {

/// A user-defined mask with an upper limit only for queries before position 10.
struct limited_at_first {
  static bool sees(Index i, Index j) { return i < 10 ? j < i + 3 : j % 2 == 0; }
  static KeyRanges key_ranges(const longspan::Tile& tile) {
    return KeyRanges({0, tile.last_query() < 10 ? tile.last_query() + 3 : KeyRange::highest});
  }
};

}  // namespace

TEST_CASE("stream_mask: unchanged for queries with an upper limit, causal for the others") {
  static constexpr std::array<Index, 3> starts{0, 7, 20};
  const auto check = [](const auto& mask, const Predicate& meaning) {
    const auto shown = stream_mask(mask);
    for (Index i = 0; i < 40; ++i) {
      for (Index j = 0; j < 50; ++j) REQUIRE(longspan::sees(shown, 0, 1, i, j) == meaning(0, 1, i, j));
      Index last = i;
      for (Index j = 0; j < 200; ++j) last = meaning(0, 1, i, j) ? std::max(last, j) : last;
      REQUIRE(longspan::detail::reach_of(shown, 0, 2, i) >= last + 1);
      REQUIRE(longspan::detail::reach_of(shown, 0, 2, i) <= last + 2);
    }
    for_each_case(300, [&](Random& random) {
      const longspan::Tile tile{
          0, 0, 2, random.between(0, 30), random.between(1, 9), random.between(0, 45), random.between(1, 9)};
      bool some = false, all = true, held = true;
      const KeyRanges ranges = longspan::key_ranges(shown, tile);
      for (Index i = tile.first_query; i <= tile.last_query(); ++i) {
        for (Index j = 0; j < 60; ++j) {
          const bool seen = meaning(0, 0, i, j);
          held = held && (!seen || holds(ranges, j));
          if (!tile.key_range().contains(j)) continue;
          some = some || seen;
          all = all && seen;
        }
      }
      const longspan::Coverage said = longspan::classify(shown, tile);
      REQUIRE(held);
      REQUIRE((said != longspan::Coverage::none || !some));
      REQUIRE((said != longspan::Coverage::all || all));
      // The ranges end at the last query of the tile or the last key that its queries may see.
      REQUIRE(((ranges.end() - 1)->end <= std::max<Index>(tile.last_query() + 4, 20)));
    });
  };
  const auto document = [](Index x) { return x < 7 ? 0 : x < 20 ? 1 : 2; };
  check(longspan::documents{starts}, [&](Index, Index, Index i, Index j) {
    return document(i) == document(j) && (document(i) < 2 || j <= i);
  });
  check(longspan::documents{starts} | sinks{3}, [&](Index, Index, Index i, Index j) {
    return (document(i) == document(j) && (document(i) < 2 || j <= i)) || j < 3;
  });
  check(causal{} | sinks{6}, [](Index, Index, Index i, Index j) { return j <= i || j < 6; });
  check(window{.left = 5}, [](Index, Index, Index i, Index j) { return j <= i && j >= i - 5; });
  check(window{.left = 5, .right = 2},
        [](Index, Index, Index i, Index j) { return j <= i + 2 && j >= i - 5; });
  check(window{.left = 5} | sinks{2},
        [](Index, Index, Index i, Index j) { return j <= i && (j >= i - 5 || j < 2); });
  check(limited_at_first{},
        [](Index, Index, Index i, Index j) { return i < 10 ? j < i + 3 : j <= i && j % 2 == 0; });
}
