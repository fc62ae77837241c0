#include "longspan/detail/tile/query_lanes.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"

using longspan::Index;
using longspan::Tile;
using longspan::detail::QueryLanes;

TEST_CASE("QueryLanes: heads that share a KV head vary fastest", "[query_lanes]") {
  const QueryLanes lanes{
      .batch = 1, .first_head = 6, .heads = 3, .first_row = 4, .count = 5, .first_position = 100};
  // Flat rows 4 .. 8 are (row, head) (1, 1) (1, 2) (2, 0) (2, 1) (2, 2).
  const std::vector<Index> rows{1, 1, 2, 2, 2}, heads{7, 8, 6, 7, 8};
  for (Index lane = 0; lane < 5; ++lane) {
    CHECK(lanes.row(lane) == rows[static_cast<std::size_t>(lane)]);
    CHECK(lanes.head(lane) == heads[static_cast<std::size_t>(lane)]);
    CHECK(lanes.position(lane) == 100 + lanes.row(lane));
  }
}

TEST_CASE("QueryLanes: lanes after the last query repeat it", "[query_lanes]") {
  const QueryLanes lanes{
      .batch = 0, .first_head = 2, .heads = 2, .first_row = 3, .count = 2, .first_position = 0};
  for (Index lane = 2; lane < 40; ++lane) {
    CHECK(lanes.row(lane) == lanes.row(1));
    CHECK(lanes.head(lane) == lanes.head(1));
    CHECK(lanes.position(lane) == lanes.position(1));
  }
}

TEST_CASE("QueryLanes: with one head each lane is a row", "[query_lanes]") {
  const QueryLanes lanes{
      .batch = 0, .first_head = 5, .heads = 1, .first_row = 10, .count = 16, .first_position = -3};
  for (Index lane = 0; lane < 16; ++lane) {
    CHECK(lanes.row(lane) == 10 + lane);
    CHECK(lanes.head(lane) == 5);
    CHECK(lanes.position(lane) == 7 + lane);
  }
}

TEST_CASE("QueryLanes: a tile contains exactly the queries of its lanes", "[query_lanes]") {
  test::for_each_case(3000, [](test::Random& random) {
    QueryLanes lanes;
    lanes.batch = random.between(0, 3);
    lanes.first_head = random.between(0, 12);
    lanes.heads = random.pick<Index>({1, 2, 3, 5, 7, 8});
    lanes.first_row = random.between(0, 100);
    lanes.count = random.between(1, 48);
    lanes.first_position = random.between(-50, 50);
    const Index first = random.between(0, 47), used = random.between(1, 48 - first);
    const Tile tile = lanes.tile(first, used, {30, 42});

    bool held = true, lowest = false, highest = false;
    for (Index lane = first; lane < first + used; ++lane) {
      const Index i = lanes.position(lane), h = lanes.head(lane);
      held &= i >= tile.first_query && i <= tile.last_query();
      held &= h >= tile.first_head && h < tile.first_head + tile.heads;
      lowest |= i == tile.first_query;
      highest |= i == tile.last_query();
    }
    CHECK(held);
    CHECK(lowest);
    CHECK(highest);
    CHECK(tile.batch == lanes.batch);
    CHECK(tile.first_key == 30);
    CHECK(tile.keys == 12);
  });
}
