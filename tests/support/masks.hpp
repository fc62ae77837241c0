// Masks for the tests: every mask of the library together with its meaning, and random combinations of them.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "longspan/mask.hpp"
#include "support/random.hpp"

namespace test {

using longspan::Coverage;
using longspan::KeyRange;
using longspan::KeyRanges;
using longspan::Tile;
using longspan::operator&;
using longspan::operator|;
using longspan::operator!;

/// A type-erased mask.
class AnyMask {
 public:
  template <longspan::Mask M>
  explicit AnyMask(M mask) : hidden_(std::make_shared<Hidden<M>>(std::move(mask))) {}

  bool sees(Index b, Index h, Index i, Index j) const { return hidden_->sees(b, h, i, j); }
  Coverage classify(const Tile& tile) const { return hidden_->classify(tile); }
  KeyRanges key_ranges(const Tile& tile) const { return hidden_->key_ranges(tile); }

 private:
  struct Interface {
    virtual ~Interface() = default;
    virtual bool sees(Index b, Index h, Index i, Index j) const = 0;
    virtual Coverage classify(const Tile& tile) const = 0;
    virtual KeyRanges key_ranges(const Tile& tile) const = 0;
  };
  template <class M>
  struct Hidden final : Interface {
    explicit Hidden(M m) : mask(std::move(m)) {}
    bool sees(Index b, Index h, Index i, Index j) const override { return longspan::sees(mask, b, h, i, j); }
    Coverage classify(const Tile& tile) const override { return longspan::classify(mask, tile); }
    KeyRanges key_ranges(const Tile& tile) const override { return longspan::key_ranges(mask, tile); }
    M mask;
  };
  std::shared_ptr<const Interface> hidden_;
};

/// User-defined masks, from the required member only to more.
struct every_third {
  constexpr bool sees(Index i, Index j) const { return (i + 2 * j) % 3 == 0; }
};
struct head_stripes {
  constexpr bool sees(Index b, Index h, Index i, Index j) const { return (b + h + i + j) % 4 != 0; }
};
struct up_to_twice {  // keys 0 .. 2 i
  constexpr KeyRange keys(Index, Index i) const { return {0, 2 * i + 1}; }
};
struct key_stripes {  // whole stripes of 4 keys, with an exact classify
  static constexpr bool shown(Index j) { return (j >= 0 ? j : j - 3) / 4 % 2 == 0; }
  constexpr bool sees(Index, Index j) const { return shown(j); }
  constexpr Coverage classify(const Tile& tile) const {
    Index seen = 0;
    for (Index j = tile.first_key; j < tile.first_key + tile.keys; ++j) seen += shown(j);
    return seen == 0 ? Coverage::none : seen == tile.keys ? Coverage::all : Coverage::some;
  }
};

/// A mask, its meaning as a plain function, and its name.
struct MaskCase {
  AnyMask mask;
  std::function<bool(Index b, Index h, Index i, Index j)> meaning;
  std::string text;
  bool exact = false;  ///< its classify returns `some` only if the tile has visible and hidden pairs
};

inline Index floor_divide(Index x, Index by) { return (x >= 0 ? x : x - by + 1) / by; }

/// Documents of which none, one or several start at or before position 0, and some of which are empty.
inline constexpr std::array<Index, 4> few_starts{0, 5, 6, 14};
inline constexpr std::array<Index, 3> late_starts{3, 3, 9};
inline constexpr std::array<Index, 2> early_starts{-4, 2};
inline constexpr std::array<std::span<const Index>, 4> document_starts{
    std::span<const Index>(few_starts), std::span<const Index>(late_starts),
    std::span<const Index>(early_starts), std::span<const Index>()};
/// The numbers of keys of the batch rows 0, 1, 2.
inline constexpr std::array<Index, 3> padding_lengths{7, 0, 13};

inline MaskCase causal_case() {
  return {AnyMask(longspan::causal{}), [](Index, Index, Index i, Index j) { return j <= i; }, "causal", true};
}
inline MaskCase window_case(Index left, Index right) {
  return {AnyMask(longspan::window{.left = left, .right = right}),
          [=](Index, Index, Index i, Index j) {
            return (left == longspan::window::unlimited || j >= i - left) &&
                   (right == longspan::window::unlimited || j <= i + right);
          },
          "window{" + std::to_string(left) + "," + std::to_string(right) + "}", left + right >= 0};
}
inline MaskCase sinks_case(Index count) {
  return {AnyMask(longspan::sinks{count}), [=](Index, Index, Index, Index j) { return j >= 0 && j < count; },
          "sinks{" + std::to_string(count) + "}", true};
}
inline MaskCase segments_case(Index length) {
  return {AnyMask(longspan::segments{length}),
          [=](Index, Index, Index i, Index j) { return floor_divide(i, length) == floor_divide(j, length); },
          "segments{" + std::to_string(length) + "}", true};
}
inline MaskCase documents_case(std::size_t which) {
  const std::span<const Index> starts = document_starts[which];
  const auto document = [=](Index x) {
    Index started = 0;
    for (const Index start : starts) started += start <= x;
    return started;
  };
  return {AnyMask(longspan::documents{starts}),
          [=](Index, Index, Index i, Index j) { return document(i) == document(j); },
          "documents{" + std::to_string(which) + "}", true};
}
inline MaskCase padding_case() {
  return {AnyMask(longspan::padding{padding_lengths}),
          [](Index b, Index, Index, Index j) {
            return j >= 0 && j < padding_lengths[static_cast<std::size_t>(b)];
          },
          "padding", true};
}

/// Every mask of the library, with ordinary and with unusual options.
inline std::vector<MaskCase> library_masks() {
  constexpr Index unlimited = longspan::window::unlimited;
  std::vector<MaskCase> cases{
      {AnyMask(longspan::everything{}), [](Index, Index, Index, Index) { return true; }, "everything", true},
      causal_case(),
      padding_case()};
  for (const Index left : {Index{0}, Index{1}, Index{4}, Index{-2}, unlimited}) {
    for (const Index right : {Index{0}, Index{3}, Index{-1}, unlimited})
      cases.push_back(window_case(left, right));
  }
  for (const Index count : {0, 1, 4}) cases.push_back(sinks_case(count));
  for (const Index length : {1, 2, 5, 64}) cases.push_back(segments_case(length));
  for (std::size_t which = 0; which < document_starts.size(); ++which) cases.push_back(documents_case(which));
  return cases;
}

inline std::vector<MaskCase> user_masks() {
  return {
      {AnyMask(every_third{}), [](Index, Index, Index i, Index j) { return every_third{}.sees(i, j); },
       "every_third"},
      {AnyMask(head_stripes{}),
       [](Index b, Index h, Index i, Index j) { return head_stripes{}.sees(b, h, i, j); }, "head_stripes"},
      {AnyMask(up_to_twice{}), [](Index, Index, Index i, Index j) { return j >= 0 && j <= 2 * i; },
       "up_to_twice"},
      {AnyMask(key_stripes{}), [](Index, Index, Index, Index j) { return key_stripes::shown(j); },
       "key_stripes", true}};
}

inline MaskCase and_of(const MaskCase& a, const MaskCase& b) {
  return {AnyMask(a.mask & b.mask),
          [x = a.meaning, y = b.meaning](Index n, Index h, Index i, Index j) {
            return x(n, h, i, j) && y(n, h, i, j);
          },
          "(" + a.text + " & " + b.text + ")"};
}
inline MaskCase or_of(const MaskCase& a, const MaskCase& b) {
  return {AnyMask(a.mask | b.mask),
          [x = a.meaning, y = b.meaning](Index n, Index h, Index i, Index j) {
            return x(n, h, i, j) || y(n, h, i, j);
          },
          "(" + a.text + " | " + b.text + ")"};
}
inline MaskCase not_of(const MaskCase& a) {
  return {AnyMask(!a.mask), [x = a.meaning](Index n, Index h, Index i, Index j) { return !x(n, h, i, j); },
          "!" + a.text, a.exact};
}

/// A random combination with at most `depth` nested operators.
inline MaskCase random_mask(Random& random, int depth) {
  static const std::vector<MaskCase> leaves = [] {
    std::vector<MaskCase> all = library_masks();
    for (MaskCase& mask : user_masks()) all.push_back(std::move(mask));
    return all;
  }();
  if (depth == 0 || random.chance(0.15)) return random.pick(leaves);
  switch (random.between(0, 4)) {
    case 0:
      return not_of(random_mask(random, depth - 1));
    case 1:
    case 2:
      return and_of(random_mask(random, depth - 1), random_mask(random, depth - 1));
    default:
      return or_of(random_mask(random, depth - 1), random_mask(random, depth - 1));
  }
}

}  // namespace test
