// Ranges of key indices, with which masks tell the kernels what to skip.
#pragma once

#include <algorithm>
#include <array>
#include <limits>

#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// The keys begin .. end - 1; empty if end <= begin. A bound outside [lowest, highest] counts as lowest or highest.
struct KeyRange {
  static constexpr Index highest = (std::numeric_limits<Index>::max)() / 4;  // room to add two of them
  static constexpr Index lowest = -highest;

  Index begin = 0;
  Index end = 0;

  LONGSPAN_INLINE static constexpr KeyRange everything() noexcept { return {lowest, highest}; }

  LONGSPAN_INLINE constexpr bool empty() const noexcept { return end <= begin; }
  LONGSPAN_INLINE constexpr bool contains(Index j) const noexcept { return begin <= j && j < end; }
  LONGSPAN_INLINE constexpr bool contains(KeyRange inner) const noexcept {
    return begin <= inner.begin && inner.end <= end;
  }
  LONGSPAN_INLINE constexpr bool overlaps(KeyRange other) const noexcept {
    return (std::max)(begin, other.begin) < (std::min)(end, other.end);
  }
  LONGSPAN_INLINE constexpr bool operator==(const KeyRange&) const = default;
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// x + y, kept between KeyRange::lowest and KeyRange::highest, whatever x and y are.
constexpr Index saturating_sum(Index x, Index y) noexcept {
  if (y > 0) return x > KeyRange::highest - y ? KeyRange::highest : (std::max)(KeyRange::lowest, x + y);
  return x < KeyRange::lowest - y ? KeyRange::lowest : (std::min)(KeyRange::highest, x + y);
}
/// x - y, with the same bounds.
constexpr Index saturating_difference(Index x, Index y) noexcept {
  // The lowest Index has no negative in the type. Beyond these bounds one more or less makes no difference.
  return saturating_sum(x,
                        y < -(std::numeric_limits<Index>::max)() ? (std::numeric_limits<Index>::max)() : -y);
}

constexpr KeyRange within_bounds(KeyRange range) noexcept {
  return {saturating_sum(range.begin, 0), saturating_sum(range.end, 0)};
}

}  // namespace detail

/// At most `capacity` ranges in rising order with gaps between them. When a range would exceed the capacity, the
/// narrowest gap is closed: the set may then contain keys that were never added, but it never misses a key.
class KeyRanges {
 public:
  static constexpr int capacity = 8;

  constexpr KeyRanges() = default;
  constexpr explicit KeyRanges(KeyRange range)
      : ranges_{detail::within_bounds(range)}, count_(ranges_[0].empty() ? 0 : 1) {}

  constexpr const KeyRange* begin() const noexcept { return ranges_.data(); }
  constexpr const KeyRange* end() const noexcept { return ranges_.data() + count_; }
  constexpr int size() const noexcept { return count_; }
  constexpr bool empty() const noexcept { return count_ == 0; }

  constexpr void add(KeyRange range) {
    range = detail::within_bounds(range);
    if (range.empty()) return;
    int first = 0;
    while (first < count_ && ranges_[at(first)].end < range.begin) ++first;
    int last = first;  // ranges [first, last) touch the new one and become part of it
    for (; last < count_ && ranges_[at(last)].begin <= range.end; ++last) {
      range = {(std::min)(range.begin, ranges_[at(last)].begin),
               (std::max)(range.end, ranges_[at(last)].end)};
    }
    if (last == first) {
      std::move_backward(ranges_.begin() + first, ranges_.begin() + count_, ranges_.begin() + count_ + 1);
      ++count_;
    } else {
      std::move(ranges_.begin() + last, ranges_.begin() + count_, ranges_.begin() + first + 1);
      count_ -= last - first - 1;
    }
    ranges_[at(first)] = range;
    if (count_ > capacity) close_narrowest_gap();
  }

 private:
  static constexpr std::size_t at(int i) { return static_cast<std::size_t>(i); }

  constexpr void close_narrowest_gap() {
    int narrowest = 0;
    for (int i = 1; i + 1 < count_; ++i) {
      if (gap_behind(i) < gap_behind(narrowest)) narrowest = i;
    }
    ranges_[at(narrowest)].end = ranges_[at(narrowest + 1)].end;
    std::move(ranges_.begin() + narrowest + 2, ranges_.begin() + count_, ranges_.begin() + narrowest + 1);
    --count_;
  }
  constexpr Index gap_behind(int i) const { return ranges_[at(i + 1)].begin - ranges_[at(i)].end; }

  std::array<KeyRange, capacity + 1> ranges_{};
  int count_ = 0;
};

constexpr KeyRanges united(KeyRanges a, const KeyRanges& b) {
  for (const KeyRange& range : b) a.add(range);
  return a;
}

constexpr KeyRanges intersection(const KeyRanges& a, const KeyRanges& b) {
  KeyRanges common;
  for (const KeyRange& x : a) {
    for (const KeyRange& y : b) common.add({(std::max)(x.begin, y.begin), (std::min)(x.end, y.end)});
  }
  return common;
}

LONGSPAN_NAMESPACE_END
