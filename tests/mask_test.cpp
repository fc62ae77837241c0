#include "longspan/mask.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"
#include "support/masks.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

using longspan::CallSizes;
using longspan::causal;
using longspan::classify;
using longspan::Coverage;
using longspan::documents;
using longspan::everything;
using longspan::Index;
using longspan::key_ranges;
using longspan::KeyRange;
using longspan::KeyRanges;
using longspan::padding;
using longspan::sees;
using longspan::segments;
using longspan::sinks;
using longspan::Tile;
using longspan::window;
using test::MaskCase;
// Argument-dependent lookup finds the operators only for the library's own masks.
using longspan::operator&;
using longspan::operator|;
using longspan::operator!;

namespace {

/// A picture of a mask: one text for each query of [0, queries), with # for a visible key and . for a hidden one.
template <longspan::Mask M>
std::vector<std::string> picture(const M& mask, Index queries, Index keys, Index b = 0, Index h = 0) {
  std::vector<std::string> rows;
  for (Index i = 0; i < queries; ++i) {
    std::string& row = rows.emplace_back();
    for (Index j = 0; j < keys; ++j) row += sees(mask, b, h, i, j) ? '#' : '.';
  }
  return rows;
}
using Picture = std::vector<std::string>;

constexpr Index lowest_key = -6, keys_behind = 30;

std::string text_of(const Tile& tile) {
  return "batch " + std::to_string(tile.batch) + ", heads " + std::to_string(tile.first_head) + "+" +
         std::to_string(tile.heads) + ", queries " + std::to_string(tile.first_query) + "+" +
         std::to_string(tile.queries) + ", keys " + std::to_string(tile.first_key) + "+" +
         std::to_string(tile.keys);
}

template <class Work>
void for_each_row(const Tile& tile, const Work& work) {
  for (Index h = tile.first_head; h < tile.first_head + tile.heads; ++h) {
    for (Index i = tile.first_query; i < tile.first_query + tile.queries; ++i) work(h, i);
  }
}

/// Describes what is wrong with the mask's results for the tile; empty if nothing is wrong.
std::string fault(const MaskCase& mask, const Tile& tile) {
  Index seen = 0;
  bool same = true, in_ranges = true;
  const KeyRanges ranges = key_ranges(mask.mask, tile);
  for_each_row(tile, [&](Index h, Index i) {
    for (Index j = lowest_key; j < keys_behind; ++j) {
      const bool yes = mask.meaning(tile.batch, h, i, j);
      same &= sees(mask.mask, tile.batch, h, i, j) == yes;
      seen += yes && tile.key_range().contains(j);
      in_ranges &= !yes || std::any_of(ranges.begin(), ranges.end(),
                                       [&](KeyRange range) { return range.contains(j); });
    }
  });
  const Index pairs = tile.heads * tile.queries * tile.keys;
  const Coverage answer = classify(mask.mask, tile);
  const char* wrong = !same                                                     ? "sees"
                      : !in_ranges                                              ? "key_ranges"
                      : answer == Coverage::none && seen != 0                   ? "none"
                      : answer == Coverage::all && seen != pairs                ? "all"
                      : mask.exact && answer == Coverage::some && seen == 0     ? "some for none"
                      : mask.exact && answer == Coverage::some && seen == pairs ? "some for all"
                                                                                : nullptr;
  return wrong == nullptr ? std::string() : mask.text + ": " + wrong + " is wrong at " + text_of(tile);
}

Tile random_tile(test::Random& random) {
  Tile tile;
  tile.batch = random.between(0, 2);
  tile.first_head = random.between(0, 3);
  tile.heads = random.pick<Index>({1, 1, 2, 3});
  tile.first_query = random.between(-9, 20);
  tile.queries = random.between(1, 7);
  tile.first_key = random.between(lowest_key, 20);
  tile.keys = random.between(1, 9);
  return tile;
}

}  // namespace

TEST_CASE("mask: classify and key_ranges of every mask are right for every small tile", "[mask][slow]") {
  for (const MaskCase& mask : test::library_masks()) {
    std::string found;
    for (Index batch = 0; batch < (mask.text == "padding" ? 3 : 1); ++batch) {
      for (Index query = -9; query < 12; ++query) {
        for (Index queries = 1; queries < 7; ++queries) {
          for (Index key = lowest_key; key < 18; key += key < 0 ? 3 : 1) {
            for (const Index keys : {1, 2, 3, 5, 8}) {
              if (found.empty()) found = fault(mask, {batch, 0, 1, query, queries, key, keys});
            }
          }
        }
      }
    }
    CHECK(found == "");
  }
}

TEST_CASE("mask: random combinations are right for random tiles", "[mask]") {
  test::for_each_case(600, [](test::Random& random) {
    const MaskCase mask = test::random_mask(random, static_cast<int>(random.between(1, 4)));
    std::string found;
    for (int n = 0; n < 60 && found.empty(); ++n) found = fault(mask, random_tile(random));
    CHECK(found == "");
  });
}

TEST_CASE("mask: combinations of two range masks with their own types", "[mask]") {
  // `both` of two range masks is itself a range mask, which other combinations are not.
  const auto check = [](auto a, const MaskCase& of_a, auto b, const MaskCase& of_b) {
    STATIC_REQUIRE(longspan::RangeMask<decltype(a & b)>);
    STATIC_REQUIRE_FALSE(longspan::RangeMask<decltype(a | b)>);
    MaskCase in_both = test::and_of(of_a, of_b), in_either = test::or_of(of_a, of_b);
    in_both.mask = test::AnyMask(a & b);
    in_either.mask = test::AnyMask(a | b);
    const MaskCase in_neither = test::not_of(in_either);
    test::for_each_case(1500, [&](test::Random& random) {
      const Tile tile = random_tile(random);
      const std::string found = fault(in_both, tile) + fault(in_either, tile) + fault(in_neither, tile);
      if (!found.empty()) CHECK(found == "");
    });
    SUCCEED();
  };
  const std::array<Index, 4> starts = test::few_starts;
  check(causal{}, test::causal_case(), window{.left = 3}, test::window_case(3, window::unlimited));
  check(causal{}, test::causal_case(), sinks{4}, test::sinks_case(4));
  check(causal{}, test::causal_case(), segments{5}, test::segments_case(5));
  check(causal{}, test::causal_case(), documents{starts}, test::documents_case(0));
  check(documents{starts}, test::documents_case(0), padding{test::padding_lengths}, test::padding_case());
  check(window{2, 2}, test::window_case(2, 2), documents{starts}, test::documents_case(0));
  check(window{2, 2}, test::window_case(2, 2), segments{4}, test::segments_case(4));
  check(sinks{4}, test::sinks_case(4), segments{3}, test::segments_case(3));
}

TEST_CASE("mask: classify of causal & window is exact", "[mask]") {
  MaskCase mask = test::and_of(test::causal_case(), test::window_case(4, window::unlimited));
  mask.mask = test::AnyMask(causal{} & window{.left = 4});
  mask.exact = true;
  test::for_each_case(3000, [&](test::Random& random) {
    const std::string found = fault(mask, random_tile(random));
    if (!found.empty()) CHECK(found == "");
  });
  CHECK(fault(mask, {0, 0, 1, 5, 3, 2, 6}) == "");
}

TEST_CASE("mask: seen_bits agrees with sees for 64 keys", "[mask]") {
  using longspan::detail::low_bits;
  using longspan::detail::seen_bits;
  const auto check = [](const auto& mask) {
    test::for_each_case(100, [&](test::Random& random) {
      const Index b = random.between(0, 2), h = random.between(0, 3), i = random.between(-9, 90),
                  first = random.between(-70, 90);
      const auto any = static_cast<std::uint64_t>(random.between(0, Index{1} << 62)) * 4 + 1;
      for (const std::uint64_t asked : {low_bits(64), low_bits(random.between(0, 64)), any, ~any}) {
        std::uint64_t wanted = 0;
        for (int n = 0; n < 64; ++n) wanted |= std::uint64_t{sees(mask, b, h, i, first + n)} << n;
        CHECK(seen_bits(mask, b, h, i, first, asked) == (asked & wanted));
      }
    });
  };
  check(everything{});
  check(causal{} & window{.left = 20});
  check(!(sinks{4} | window{.left = 3, .right = 30}));
  check(test::every_third{});
  check(causal{} & (test::head_stripes{} | sinks{9}));
  check((!test::key_stripes{}) & padding{test::padding_lengths});
}

TEST_CASE("causal: query i sees the keys up to i", "[mask]") {
  CHECK(picture(causal{}, 4, 5) == Picture{"#....", "##...", "###..", "####."});
  CHECK_FALSE(sees(causal{}, 0, 0, -1, 0));
}

TEST_CASE("window: query i sees the keys i - left to i + right", "[mask]") {
  CHECK(picture(window{.left = 1, .right = 2}, 4, 6) == Picture{"###...", "####..", ".####.", "..####"});
  CHECK(picture(window{.left = 1}, 3, 4) == Picture{"####", "####", ".###"});
  CHECK(picture(window{.right = 0}, 3, 4) == Picture{"#...", "##..", "###."});
  CHECK(picture(window{}, 2, 3) == Picture{"###", "###"});
  CHECK(picture(window{0, 0}, 3, 3) == Picture{"#..", ".#.", "..#"});
  CHECK(picture(causal{} & window{.left = 1}, 4, 4) == Picture{"#...", "##..", ".##.", "..##"});
}

TEST_CASE("sinks: every query sees the first keys", "[mask]") {
  CHECK(picture(sinks{2}, 3, 4) == Picture{"##..", "##..", "##.."});
  CHECK(sinks{}.count == 4);
  CHECK(picture(sinks{0}, 1, 2) == Picture{".."});
  CHECK(picture(causal{} & (sinks{1} | window{.left = 1}), 5, 5) ==
        Picture{"#....", "##...", "###..", "#.##.", "#..##"});
}

TEST_CASE("segments: a query sees the keys of its own segment", "[mask]") {
  CHECK(picture(segments{2}, 5, 5) == Picture{"##...", "##...", "..##.", "..##.", "....#"});
  CHECK(sees(segments{4}, 0, 0, -1, -4));
  CHECK_FALSE(sees(segments{4}, 0, 0, -1, 0));
  CHECK(sees(segments{4}, 0, 0, -4, -1));
  CHECK_FALSE(sees(segments{4}, 0, 0, -5, -4));
}

TEST_CASE("documents: a query sees the keys of its own document, and the first and the last are open",
          "[mask]") {
  const std::vector<Index> starts{2, 3, 5};
  CHECK(picture(documents{starts}, 7, 7) ==
        Picture{"##.....", "##.....", "..#....", "...##..", "...##..", ".....##", ".....##"});
  CHECK(picture(documents{}, 2, 3) == Picture{"###", "###"});
  CHECK(picture(causal{} & documents{starts}, 5, 5) == Picture{"#....", "##...", "..#..", "...#.", "...##"});
}

TEST_CASE("padding: hides the keys after the length of the batch row, and !padding hides those before it",
          "[mask]") {
  const std::vector<Index> lengths{2, 0, 4};
  CHECK(picture(padding{lengths}, 2, 4, 0) == Picture{"##..", "##.."});
  CHECK(picture(padding{lengths}, 1, 4, 1) == Picture{"...."});
  CHECK(picture(padding{lengths}, 1, 4, 2) == Picture{"####"});
  CHECK(picture(!padding{lengths}, 1, 4, 0) == Picture{"..##"});
  CHECK(picture(causal{} & !padding{lengths}, 4, 4, 0) == Picture{"....", "....", "..#.", "..##"});
}

TEST_CASE("mask: bounds saturate at every position and with every bound", "[mask][limits]") {
  constexpr Index most = std::numeric_limits<Index>::max(), least = std::numeric_limits<Index>::min();
  constexpr Index highest = KeyRange::highest, lowest = KeyRange::lowest;
  STATIC_REQUIRE(causal{}.keys(0, most) == KeyRange{lowest, highest});
  STATIC_REQUIRE(causal{}.keys(0, most - 3) == KeyRange{lowest, highest});
  STATIC_REQUIRE(causal{}.keys(0, least).empty());
  STATIC_REQUIRE(causal{}.keys(0, 5) == KeyRange{lowest, 6});
  STATIC_REQUIRE(window{8, most}.keys(0, 3) == KeyRange{-5, highest});
  STATIC_REQUIRE(window{8, most}.keys(0, most) == KeyRange{highest, highest});
  STATIC_REQUIRE(window{most, 0}.keys(0, 3) == KeyRange{lowest, 4});
  STATIC_REQUIRE(window{most, most}.keys(0, least) == KeyRange{lowest, highest});
  STATIC_REQUIRE(window{0, highest - 1}.keys(0, most).empty());
  STATIC_REQUIRE(window{highest - 1, 0}.keys(0, -7) == KeyRange{lowest, -6});
  STATIC_REQUIRE(window{}.keys(0, least) == KeyRange::everything());
  STATIC_REQUIRE(sinks{most}.keys(0, 0) == KeyRange{0, highest});
  STATIC_REQUIRE(segments{most}.keys(0, 12) == KeyRange{0, highest});
  STATIC_REQUIRE(segments{most}.keys(0, -12) == KeyRange{lowest, 0});
  STATIC_REQUIRE(segments{most}.keys(0, least).empty());
  STATIC_REQUIRE(segments{4}.keys(0, most).empty());
  STATIC_REQUIRE(segments{1}.keys(0, least) == KeyRange{lowest, lowest});
  const std::vector<Index> far{least, most};
  CHECK(documents{far}.keys(0, 0) == KeyRange{lowest, highest});
  CHECK(padding{far}.keys(0, 0).empty());
  CHECK(padding{far}.keys(1, 0) == KeyRange{0, highest});
  // The two ends of a range never decrease, even outside the bounds.
  for (const Index left : {Index{0}, Index{7}, highest - 1, highest, most}) {
    KeyRange before = window{left, left}.keys(0, least);
    for (const Index i : {least + 1, -highest, Index{-9}, Index{0}, Index{9}, highest, most - 1, most}) {
      const KeyRange keys = window{left, left}.keys(0, i);
      CHECK(keys.begin >= before.begin);
      CHECK(keys.end >= before.end);
      before = keys;
    }
  }
}

TEST_CASE("mask: an option or an array that does not fit a call is refused", "[mask][errors]") {
  const CallSizes sizes{"softmax_attention", 2, 4, 0, 5, 5};
  const auto text = [&](const auto& mask) {
    return test::refusal([&] { longspan::detail::check_part(mask, sizes); });
  };
  CHECK(text(window{.left = -1}) ==
        "longspan: softmax_attention: window.left is -1, wanted at least 0, or window::unlimited");
  CHECK(text(window{.right = -1}) ==
        "longspan: softmax_attention: window.right is -1, wanted at least 0, or window::unlimited");
  CHECK(text(window{.left = std::numeric_limits<Index>::min()}) != "");
  CHECK(text(sinks{-1}) == "longspan: softmax_attention: sinks.count is -1, wanted at least 0");
  CHECK(text(segments{0}) == "longspan: softmax_attention: segments.length is 0, wanted at least 1");
  CHECK(text(segments{-2}) == "longspan: softmax_attention: segments.length is -2, wanted at least 1");
  const std::vector<Index> falling{0, 4, 3, 9}, negative{3, -1}, fitting{3, 0}, repeated{-2, 0, 0, 7};
  CHECK(text(documents{falling}) ==
        "longspan: softmax_attention: documents.starts[2] is 3, wanted at least the entry before, 4");
  CHECK(text(padding{falling}) ==
        "longspan: softmax_attention: the number of padding.lengths is 4, wanted 2, one for each batch row");
  CHECK(text(padding{}) ==
        "longspan: softmax_attention: the number of padding.lengths is 0, wanted 2, one for each batch row");
  CHECK(text(padding{negative}) ==
        "longspan: softmax_attention: one of padding.lengths is -1, wanted at least 0");
  CHECK(text(everything{}) + text(causal{}) + text(window{0, 0}) + text(window{}) + text(sinks{0}) == "");
  CHECK(text(segments{1}) + text(documents{}) + text(documents{repeated}) + text(padding{fitting}) == "");
  // Composed masks check all of their parts, and a mask without `check` accepts every call.
  const window wrong{.left = -1};
  const std::string refused = text(wrong);
  CHECK(text(causal{} & wrong) == refused);
  CHECK(text(wrong & test::every_third{}) == refused);
  CHECK(text(causal{} | wrong) == refused);
  CHECK(text(wrong | sinks{4}) == refused);
  CHECK(text(!(sinks{4} | (causal{} & !wrong))) == refused);
  CHECK(text(!(test::every_third{} | (causal{} & !window{.left = 1}))) == "");
}

TEST_CASE("mask: `& | !` can be nested", "[mask]") {
  CHECK(picture(!causal{}, 3, 3) == Picture{".##", "..#", "..."});
  CHECK(picture(!!causal{}, 3, 3) == picture(causal{}, 3, 3));
  CHECK(picture(!(causal{} | sinks{2}), 2, 4) == picture((!causal{}) & (!sinks{2}), 2, 4));
  CHECK(picture(sinks{1} | (causal{} & window{.left = 0}), 3, 3) == Picture{"#..", "##.", "#.#"});
}

TEST_CASE("mask: classify of `& | !` follows three-valued logic", "[mask]") {
  struct Says {
    Coverage coverage;
    constexpr bool sees(Index, Index) const { return coverage != Coverage::none; }
    constexpr Coverage classify(const Tile&) const { return coverage; }
  };
  constexpr Says none{Coverage::none}, some{Coverage::some}, all{Coverage::all};
  constexpr Tile tile{0, 0, 1, 0, 2, 0, 2};
  const Says values[] = {none, some, all};
  for (const Says a : values) {
    CHECK(classify(!a, tile) == (a.coverage == Coverage::all    ? Coverage::none
                                 : a.coverage == Coverage::none ? Coverage::all
                                                                : Coverage::some));
    for (const Says b : values) {
      const bool one_none = a.coverage == Coverage::none || b.coverage == Coverage::none;
      const bool one_all = a.coverage == Coverage::all || b.coverage == Coverage::all;
      const bool both_none = a.coverage == Coverage::none && b.coverage == Coverage::none;
      const bool both_all = a.coverage == Coverage::all && b.coverage == Coverage::all;
      CHECK(classify(a & b, tile) == (one_none ? Coverage::none : both_all ? Coverage::all : Coverage::some));
      CHECK(classify(a | b, tile) == (one_all ? Coverage::all : both_none ? Coverage::none : Coverage::some));
    }
  }
  STATIC_REQUIRE(classify(none & some, tile) == Coverage::none);
  STATIC_REQUIRE(classify(all | some, tile) == Coverage::all);
}

TEST_CASE("mask: members that a user-defined mask omits have safe defaults", "[mask]") {
  constexpr Tile tile{0, 0, 1, 0, 2, 0, 2};
  STATIC_REQUIRE(classify(test::every_third{}, tile) == Coverage::some);
  STATIC_REQUIRE(*key_ranges(test::every_third{}, tile).begin() == KeyRange::everything());
  STATIC_REQUIRE(classify(test::head_stripes{}, tile) == Coverage::some);
  STATIC_REQUIRE(*key_ranges(test::head_stripes{}, tile).begin() == KeyRange::everything());
  STATIC_REQUIRE(sees(test::head_stripes{}, 1, 2, 0, 2) == true);
  STATIC_REQUIRE(sees(test::head_stripes{}, 1, 2, 0, 1) == false);
  STATIC_REQUIRE(classify(test::up_to_twice{}, {0, 0, 1, 2, 2, 0, 5}) == Coverage::all);
  STATIC_REQUIRE(classify(test::up_to_twice{}, {0, 0, 1, 2, 2, 7, 5}) == Coverage::none);
  STATIC_REQUIRE(classify(test::up_to_twice{}, {0, 0, 1, 2, 2, 6, 5}) == Coverage::some);
  STATIC_REQUIRE(*key_ranges(test::up_to_twice{}, {0, 0, 1, 2, 2, 0, 0}).begin() == KeyRange{0, 7});
  for (const MaskCase& mask : test::user_masks()) {
    test::for_each_case(300, [&](test::Random& random) { CHECK(fault(mask, random_tile(random)) == ""); });
  }
}

TEST_CASE("mask: key_ranges of combinations follow from those of their parts", "[mask]") {
  const Tile tile{0, 0, 1, 100, 10, 0, 0};
  const auto only_range = [&](const auto& mask) {
    const KeyRanges ranges = key_ranges(mask, tile);
    REQUIRE(ranges.size() == 1);
    return *ranges.begin();
  };
  CHECK(only_range(causal{} & window{.left = 4}) == KeyRange{96, 110});
  CHECK(only_range(window{.left = 4} & test::every_third{} & causal{}) == KeyRange{96, 110});
  CHECK(only_range(segments{60}) == KeyRange{60, 120});
  CHECK(key_ranges(sinks{4} & !causal{}, tile).size() == 1);

  const KeyRanges ranges = key_ranges(causal{} & (sinks{4} | window{.left = 2}), tile);
  REQUIRE(ranges.size() == 2);
  CHECK(*ranges.begin() == KeyRange{0, 4});
  CHECK(*(ranges.begin() + 1) == KeyRange{98, 110});
}

TEST_CASE("mask: more ranges than the capacity lose no key", "[mask]") {
  // Twelve islands of keys: more than the capacity of KeyRanges.
  struct island {
    Index begin;
    constexpr KeyRange keys(Index, Index) const { return {begin, begin + 2}; }
  };
  test::AnyMask islands(island{0});
  for (Index n = 1; n < 12; ++n) islands = test::AnyMask(islands | island{7 * n});
  const Tile tile{0, 0, 1, 0, 1, 0, 1};
  const auto hold = [](const KeyRanges& ranges, Index j) {
    return std::any_of(ranges.begin(), ranges.end(), [&](KeyRange range) { return range.contains(j); });
  };
  const KeyRanges ranges = key_ranges(islands, tile), cut = key_ranges(islands & window{0, 50}, tile);
  for (Index j = 0; j < 90; ++j) {
    if (sees(islands, 0, 0, 0, j)) CHECK(hold(ranges, j));
    if (sees(islands, 0, 0, 0, j) && j <= 50) CHECK(hold(cut, j));
  }
  CHECK_FALSE(hold(cut, 60));
}

TEST_CASE("mask: right for positions far from 0", "[mask]") {
  constexpr Index far = Index{1} << 45;
  const Tile tile{0, 0, 1, far, 4, far - 8, 12};
  CHECK(classify(causal{}, tile) == Coverage::some);
  CHECK(classify(causal{}, {0, 0, 1, far, 4, 0, 1000}) == Coverage::all);
  CHECK(classify(window{.left = 4095}, {0, 0, 1, far, 4, 0, 1000}) == Coverage::none);
  CHECK(sees(segments{1000}, 0, 0, far, far / 1000 * 1000));
  CHECK_FALSE(sees(segments{1000}, 0, 0, far, far / 1000 * 1000 - 1));
}

TEST_CASE("mask: can be used in constant expressions", "[mask]") {
  constexpr auto mask = causal{} & (sinks{2} | window{.left = 3});
  STATIC_REQUIRE(sees(mask, 0, 0, 9, 1));
  STATIC_REQUIRE(sees(mask, 0, 0, 9, 6));
  STATIC_REQUIRE_FALSE(sees(mask, 0, 0, 9, 5));
  STATIC_REQUIRE(classify(mask, {0, 0, 1, 9, 1, 6, 4}) == Coverage::all);
  STATIC_REQUIRE(classify(mask, {0, 0, 1, 9, 1, 2, 4}) == Coverage::none);
  STATIC_REQUIRE(classify(!mask, {0, 0, 1, 9, 1, 2, 4}) == Coverage::all);
  STATIC_REQUIRE(key_ranges(mask, {0, 0, 1, 9, 1, 0, 0}).size() == 2);
  STATIC_REQUIRE(classify(documents{test::few_starts}, {0, 0, 1, 6, 3, 5, 1}) == Coverage::none);
  STATIC_REQUIRE(classify(padding{test::padding_lengths}, {2, 0, 1, 0, 3, 0, 13}) == Coverage::all);
  STATIC_REQUIRE(classify(segments{8}, {0, 0, 1, 8, 8, 8, 8}) == Coverage::all);
}

TEST_CASE("Mask, RangeMask: the types that satisfy them", "[mask]") {
  STATIC_REQUIRE(longspan::Mask<causal>);
  STATIC_REQUIRE(longspan::Mask<const causal>);
  STATIC_REQUIRE(longspan::RangeMask<causal>);
  STATIC_REQUIRE(longspan::Mask<test::every_third>);
  STATIC_REQUIRE_FALSE(longspan::RangeMask<test::every_third>);
  STATIC_REQUIRE(longspan::Mask<test::head_stripes>);
  STATIC_REQUIRE(longspan::RangeMask<test::up_to_twice>);
  STATIC_REQUIRE_FALSE(longspan::Mask<int>);
  STATIC_REQUIRE_FALSE(longspan::Mask<causal&>);
  STATIC_REQUIRE_FALSE(longspan::Mask<std::vector<bool>>);
  struct NotConst {
    bool sees(Index, Index) { return true; }
  };
  STATIC_REQUIRE_FALSE(longspan::Mask<NotConst>);
  STATIC_REQUIRE(sizeof(causal) == 1);
  STATIC_REQUIRE(std::is_trivially_copyable_v<decltype(causal{} & window{} & !sinks{})>);
}
