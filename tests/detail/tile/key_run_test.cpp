#include "longspan/detail/tile/key_run.hpp"

#include <algorithm>
#include <vector>

#include "support/catch.hpp"

using longspan::Index;
using longspan::KeyRange;
using longspan::KeyRanges;
using namespace longspan::detail;

namespace {

std::vector<KeyRange> blocks(const KeyRanges& ranges, KeyRange limits, Index length) {
  std::vector<KeyRange> visited;
  for_each_block(ranges, limits, length, [&](KeyRange keys) { visited.push_back(keys); });
  return visited;
}

/// The same by definition: every block of the grid in turn.
std::vector<KeyRange> wanted_blocks(const KeyRanges& ranges, KeyRange limits, Index length) {
  std::vector<KeyRange> wanted;
  for (Index first = 0; first < limits.end; first += length) {
    const KeyRange block{std::max(first, limits.begin), std::min(first + length, limits.end)};
    const auto meets = [&](const KeyRange& range) {
      return std::max(range.begin, block.begin) < std::min(range.end, block.end);
    };
    const bool in_grid = KeyRange{first, first + length}.overlaps(limits);
    // A range that meets the block only outside of the limits does not count.
    if (in_grid && std::any_of(ranges.begin(), ranges.end(), meets)) wanted.push_back(block);
  }
  return wanted;
}

bool same(const std::vector<KeyRange>& a, const std::vector<KeyRange>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](KeyRange x, KeyRange y) { return x.begin == y.begin && x.end == y.end; });
}

/// Rows in pages of 3, of which those with an even number are kept.
struct Pages {
  KeyRun<float, float> run(Index, Index, KeyRange keys) const {
    const Index page = keys.begin / 3, count = std::min(keys.end, page * 3 + 3) - keys.begin;
    return {{nullptr, count, 0, 0}, {nullptr, count, 0, 0}, page % 2 == 0};
  }
};

}  // namespace

TEST_CASE("for_each_block: visits each block of the grid that a range meets once, within the limits",
          "[tile]") {
  for (const Index length : {1, 2, 4, 8}) {
    for (const KeyRange limits :
         {KeyRange{0, 21}, KeyRange{8, 16}, KeyRange{5, 6}, KeyRange{3, 14}, KeyRange{4, 4}}) {
      bool right = true;
      for (Index begin = -2; begin < 24; ++begin) {
        for (Index end = begin; end < 24; ++end) {
          KeyRanges ranges({begin, end});
          right &= same(blocks(ranges, limits, length), wanted_blocks(ranges, limits, length));
          ranges.add({end + 2, end + 4});
          right &= same(blocks(ranges, limits, length), wanted_blocks(ranges, limits, length));
        }
      }
      INFO("length=" << length << " limits=" << limits.begin << ".." << limits.end);
      CHECK(right);
    }
  }
}

TEST_CASE("for_each_block: of all keys, and of none", "[tile]") {
  CHECK(same(blocks(KeyRanges(KeyRange::everything()), {0, 10}, 4), {{0, 4}, {4, 8}, {8, 10}}));
  CHECK(blocks(KeyRanges(KeyRange::everything()), {0, 0}, 4).empty());
  CHECK(blocks(KeyRanges(), {0, 10}, 4).empty());
}

TEST_CASE("for_each_run: visits the kept rows, cut where their memory is", "[tile]") {
  std::vector<KeyRange> visited;
  bool right = true;
  for_each_run(Pages{}, 0, 0, {2, 14}, [&](const KeyRun<float, float>& run, KeyRange keys) {
    right &= run.k.rows == keys.end - keys.begin;
    visited.push_back(keys);
  });
  CHECK(right);
  CHECK(same(visited, {{2, 3}, {6, 9}, {12, 14}}));
  for_each_run(Pages{}, 0, 0, {5, 5}, [&](const auto&, KeyRange) { right = false; });
  CHECK(right);
}
