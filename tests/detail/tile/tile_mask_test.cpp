#include "longspan/detail/tile/tile_mask.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "longspan/dense_mask.hpp"
#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "support/catch.hpp"
#include "support/masks.hpp"
#include "support/random.hpp"

using longspan::causal;
using longspan::Coverage;
using longspan::documents;
using longspan::everything;
using longspan::Index;
using longspan::KeyRange;
using longspan::KeyRanges;
using longspan::padding;
using longspan::segments;
using longspan::sinks;
using longspan::Tile;
using longspan::window;
using longspan::operator&;
using longspan::operator|;
using longspan::operator!;
namespace detail = longspan::detail;
using detail::lanes;
using detail::QueryLanes;
using detail::Run;
using detail::Runs;
using detail::tile_lanes;
using detail::TileMask;

namespace {

template <class Real>
inline constexpr Index keys_in_block = detail::FloatArithmetic<Real>::keys_in_block;

/// A block of keys as in the kernel.
struct Block {
  Index first_key = 0;
  Index keys = 0;
};

template <class Real>
QueryLanes random_queries(test::Random& random) {
  QueryLanes queries;
  queries.batch = random.between(0, 2);
  queries.first_head = random.between(0, 3);
  queries.heads = random.pick<Index>({1, 1, 1, 2, 3, 8});
  queries.first_row = random.between(0, 40);
  queries.count = random.chance(0.5) ? tile_lanes<Real> : random.between(1, tile_lanes<Real>);
  queries.first_position = random.between(-20, 120);
  return queries;
}

template <class Real>
Block random_block(test::Random& random) {
  const Index first = random.pick<Index>({0, 0, keys_in_block<Real>, 7});
  return {first, random.chance(0.5) ? keys_in_block<Real> : random.between(1, keys_in_block<Real>)};
}

/// For each lane of packet c, whether it sees key j of the block.
template <class Real, class M>
std::vector<bool> visible(const TileMask<Real, M>& mask, int c, Index j) {
  std::vector<Real> shown(static_cast<std::size_t>(lanes<Real>));
  detail::store(shown.data(),
                detail::select(mask.visible(c, j), detail::broadcast(Real(1)), detail::broadcast(Real(0))));
  std::vector<bool> answer;
  for (const Real x : shown) answer.push_back(x == Real(1));
  return answer;
}

bool well_formed(const Runs& runs, int packets, Index keys) {
  if (runs.count < 0 || runs.count > Runs::capacity || runs.empty() != (runs.count == 0)) return false;
  Index behind = 0;
  for (const Run& run : runs) {
    const unsigned own = ((1u << run.packets) - 1) << run.first_packet;
    if (run.begin < behind || run.end <= run.begin || run.end > keys) return false;
    if (run.packets < 1 || run.first_packet < 0 || run.first_packet + run.packets > packets) return false;
    if ((run.partial & ~own) != 0) return false;
    behind = run.end;
  }
  return true;
}

/// Describes what is wrong with the runs into which the mask cuts the block; empty if nothing is wrong.
template <class Real, class M>
std::string fault(const M& mask, const QueryLanes& queries, const Block& block) {
  TileMask<Real, M> tile;
  tile.prepare(mask, queries);
  const int packets = static_cast<int>(detail::divide_up(queries.count, lanes<Real>));
  const Runs runs = detail::cut_into_runs(tile, packets, block.first_key, block.keys);
  if (!well_formed(runs, packets, block.keys)) return "runs that rise, fit and do not overlap";

  const KeyRanges ranges = tile.ranges();
  for (Index at = 0; at < block.keys; ++at) {
    const Index j = block.first_key + at;
    const auto* run =
        std::find_if(runs.begin(), runs.end(), [&](const Run& r) { return at >= r.begin && at < r.end; });
    for (int c = 0; c < packets; ++c) {
      const bool in_run = run != runs.end() && c >= run->first_packet && c < run->first_packet + run->packets;
      const bool partial = in_run && (run->partial >> c & 1u) != 0;
      const std::vector<bool> shown = partial ? visible(tile, c, j) : std::vector<bool>();
      for (int lane = c * lanes<Real>; lane < (c + 1) * lanes<Real>; ++lane) {
        const bool sees = longspan::sees(mask, queries.batch, queries.head(lane), queries.position(lane), j);
        const bool taken = partial ? shown[static_cast<std::size_t>(lane - c * lanes<Real>)] : in_run;
        if (taken != sees) return "key " + std::to_string(j) + " of lane " + std::to_string(lane);
        if (sees && std::none_of(ranges.begin(), ranges.end(), [&](KeyRange r) { return r.contains(j); })) {
          return "key " + std::to_string(j) + " in ranges";
        }
      }
    }
  }
  return {};
}

template <class Real, class M>
void check_mask(const M& mask, std::int64_t cases) {
  test::for_each_case(cases, [&](test::Random& random) {
    const QueryLanes queries = random_queries<Real>(random);
    const Block block = random_block<Real>(random);
    INFO(queries.count << " lanes of rows " << queries.first_row << "+, " << queries.heads
                       << " heads, position " << queries.first_position << "+; keys " << block.first_key
                       << "+" << block.keys);
    CHECK(fault<Real>(mask, queries, block) == "");
  });
}

/// A type-erased range mask, so that one kernel is compiled for all of them.
struct AnyRangeMask {
  template <longspan::RangeMask M>
  explicit AnyRangeMask(const M& mask)
      : of_query([mask](Index b, Index i) { return KeyRange(mask.keys(b, i)); }) {}
  KeyRange keys(Index b, Index i) const { return of_query(b, i); }

  std::function<KeyRange(Index b, Index i)> of_query;
};

const std::vector<Index> document_starts{0, 3, 40, 41, 57, 64, 100, 128, 131};
const std::vector<Index> lengths{200, 0, 77};

/// Stripes of `width` keys that are visible to all queries and to some queries in turn. Its classify is exact, so
/// that a block changes at every strip.
struct alternating {
  Index width;
  constexpr bool sees(Index i, Index j) const { return j / width % 2 == 0 || i % 2 == 0; }
  constexpr Coverage classify(const Tile& tile) const {
    const Index first = tile.first_key / width, last = (tile.first_key + tile.keys - 1) / width;
    return first == last && first % 2 == 0 ? Coverage::all : Coverage::some;
  }
};
/// The same with hidden stripes instead of mixed ones.
struct every_other_stripe {
  Index width;
  constexpr bool sees(Index, Index j) const { return j / width % 2 == 0; }
  constexpr Coverage classify(const Tile& tile) const {
    const Index first = tile.first_key / width, last = (tile.first_key + tile.keys - 1) / width;
    return first != last ? Coverage::some : first % 2 == 0 ? Coverage::all : Coverage::none;
  }
};

/// Stripes of `width` queries that see all keys and no key in turn, so that a packet between two that see something
/// sees nothing.
struct query_stripes {
  Index width;
  constexpr bool sees(Index i, Index) const { return i / width % 2 == 0; }
  constexpr Coverage classify(const Tile& tile) const {
    const Index first = tile.first_query / width, last = tile.last_query() / width;
    return first != last ? Coverage::some : first % 2 == 0 ? Coverage::all : Coverage::none;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("cut_into_runs: runs of range masks cover exactly the visible pairs", "[tile_mask]", float,
                   double) {
  const auto check = [](const auto& mask, std::int64_t cases) {
    check_mask<TestType>(AnyRangeMask(mask), cases);
  };
  check(causal{}, 150);
  check(window{.left = 30}, 60);
  check(window{.left = 3, .right = 9}, 60);
  check(causal{} & window{.left = 50}, 100);
  check(documents{document_starts}, 100);
  check(causal{} & documents{document_starts}, 100);
  check(segments{48}, 60);
  check(sinks{5}, 30);
  check(padding{lengths}, 60);
  check(test::up_to_twice{}, 60);
  check(window{.left = -2, .right = 1}, 30);  // sees nothing
}

TEMPLATE_TEST_CASE("cut_into_runs: runs of other masks cover exactly the visible pairs", "[tile_mask]", float,
                   double) {
  const auto check = [](const auto& mask, std::int64_t cases) {
    check_mask<TestType>(test::AnyMask(mask), cases);
  };
  check(causal{} & (sinks{4} | window{.left = 20}), 100);
  check(causal{} & !padding{lengths}, 60);
  check(!(causal{} | window{.left = 9}), 60);
  check(test::every_third{}, 30);
  check(test::head_stripes{}, 30);
  check(test::key_stripes{}, 30);
}

TEMPLATE_TEST_CASE("cut_into_runs: runs of random combinations cover exactly the visible pairs",
                   "[tile_mask]", float, double) {
  test::for_each_case(150, [](test::Random& random) {
    const test::MaskCase mask = test::random_mask(random, static_cast<int>(random.between(1, 3)));
    const QueryLanes queries = random_queries<TestType>(random);
    INFO(mask.text);
    CHECK(fault<TestType>(mask.mask, queries, random_block<TestType>(random)) == "");
  });
}

TEMPLATE_TEST_CASE("cut_into_runs: runs of mask tensors cover exactly the visible pairs", "[tile_mask]",
                   float, double) {
  using longspan::compact_view;
  constexpr Index batch = 3, heads = 11, rows = 200, words = 5, keys = 64 * words - 9, first = -25;
  test::Random random(3);
  std::vector<std::uint64_t> bits(std::size_t(batch * heads * rows * words));
  std::vector<std::uint8_t> bytes(std::size_t(rows * keys));
  for (auto& word : bits) {
    const auto any = [&] { return static_cast<std::uint64_t>(random.between(0, (Index{1} << 62) - 1)) << 2; };
    word = random.chance(0.3) ? 0 : random.chance(0.4) ? ~std::uint64_t{0} : any() ^ any() >> 2;
  }
  for (Index n = 0; n < rows * keys; ++n) {
    const Index row = n / keys, j = n % keys;  // whole squares, and some mixed ones
    bytes[std::size_t(n)] = (row / 40 + j / 30) % 3 == 0   ? 1
                            : (row / 40 + j / 30) % 3 == 1 ? 0
                                                           : static_cast<std::uint8_t>(random.between(0, 1));
  }
  const longspan::dense_mask dense(compact_view(bytes.data(), 1, 1, rows, keys), first);
  const longspan::dense_mask one_row(compact_view(bytes.data(), 1, 1, 1, keys));
  const longspan::bit_mask packed(compact_view(bits.data(), batch, heads, rows, words), keys, first);
  check_mask<TestType>(dense, 60);
  check_mask<TestType>(one_row, 20);
  check_mask<TestType>(packed, 60);
  check_mask<TestType>(causal{} & !(packed | dense), 60);
  check_mask<TestType>(packed & test::head_stripes{}, 30);
}

namespace {

/// A mask that must not be called for keys after the query.
struct lower_triangle {
  bool* asked_outside;
  bool sees(Index i, Index j) const {
    *asked_outside = *asked_outside || j > i;
    return (i + j) % 3 != 0;
  }
};
/// A mask whose classify knows whole squares; its sees must not be called for their pairs.
struct known_squares {
  bool* asked_outside;
  bool sees(Index i, Index j) const {
    *asked_outside = *asked_outside || (i / 32 + j / 32) % 3 != 0;
    return (i + j) % 2 == 0;
  }
  Coverage classify(const Tile& tile) const {
    const Index i = tile.first_query / 32, j = tile.first_key / 32;
    if (i != tile.last_query() / 32 || j != (tile.first_key + tile.keys - 1) / 32) return Coverage::some;
    return (i + j) % 3 == 0 ? Coverage::some : (i + j) % 3 == 1 ? Coverage::none : Coverage::all;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("TileMask: does not call a mask for pairs that classify has decided", "[tile_mask]", float,
                   double) {
  bool asked_outside = false;
  const auto enter = [](const auto& mask, Index first_query) {
    TileMask<TestType, std::remove_cvref_t<decltype(mask)>> tile;
    tile.prepare(mask, {0, 0, 1, 0, tile_lanes<TestType>, first_query});
    return detail::cut_into_runs(tile, detail::tile_packets, 0, keys_in_block<TestType>).count;
  };
  CHECK(enter(causal{} & lower_triangle{&asked_outside}, 20) > 0);
  CHECK(enter(!(!causal{} | lower_triangle{&asked_outside}), 20) > 0);
  CHECK_FALSE(asked_outside);
  if constexpr (32 % lanes<TestType> == 0) {
    enter(known_squares{&asked_outside}, 0);
    CHECK_FALSE(asked_outside);
  }
}

TEMPLATE_TEST_CASE("cut_into_runs: right for a block that changes at every strip", "[tile_mask]", float,
                   double) {
  for (const Index width : {2, 4, 8, 16, 32}) {
    for (const Index heads : {1, 4}) {
      const QueryLanes queries{0, 0, heads, 0, tile_lanes<TestType>, 0};
      const Block block{keys_in_block<TestType>, keys_in_block<TestType>};
      INFO("stripes of " << width << " keys, " << heads << " heads");
      CHECK(fault<TestType>(alternating{width}, queries, block) == "");
      CHECK(fault<TestType>(every_other_stripe{width}, queries, block) == "");
    }
  }
}

TEMPLATE_TEST_CASE("cut_into_runs: right for a packet that sees nothing between two that do", "[tile_mask]",
                   float, double) {
  for (const Index first : {Index{0}, Index{lanes<TestType>}}) {
    const QueryLanes queries{0, 0, 1, 0, tile_lanes<TestType>, first};
    const Block block{0, keys_in_block<TestType>};
    CHECK(fault<TestType>(query_stripes{lanes<TestType>}, queries, block) == "");
    CHECK(fault<TestType>(query_stripes{lanes<TestType>} & causal{}, queries, block) == "");
  }
}

TEMPLATE_TEST_CASE("cut_into_runs: a visible block is one run, a hidden block has no run", "[tile_mask]",
                   float, double) {
  const QueryLanes queries{0, 0, 1, 0, tile_lanes<TestType>, 1000};
  TileMask<TestType, causal> tile;
  tile.prepare(causal{}, queries);
  const int packets = detail::tile_packets;
  const Runs whole = detail::cut_into_runs(tile, packets, 0, 128);
  REQUIRE(whole.count == 1);
  CHECK(whole.run[0].begin == 0);
  CHECK(whole.run[0].end == 128);
  CHECK(whole.run[0].packets == packets);
  CHECK(whole.run[0].partial == 0);
  CHECK(detail::cut_into_runs(tile, packets, 2048, 128).empty());

  TileMask<TestType, everything> open;
  open.prepare(everything{}, queries);
  REQUIRE(detail::cut_into_runs(open, packets, 0, 5).count == 1);
  STATIC_REQUIRE_FALSE(TileMask<TestType, everything>::may_hide);
  STATIC_REQUIRE(TileMask<TestType, causal>::may_hide);
  STATIC_REQUIRE(TileMask<TestType, test::every_third>::may_hide);
}

TEST_CASE("cut_into_runs: the causal diagonal shrinks packet by packet", "[tile_mask]") {
  constexpr Index w = lanes<float>, strip = std::max<Index>(w, detail::tile_rows);
  const QueryLanes queries{0, 0, 1, 0, tile_lanes<float>, 0};
  TileMask<float, causal> tile;
  tile.prepare(causal{}, queries);
  const Runs runs = detail::cut_into_runs(tile, detail::tile_packets, 0, 128);
  Index pairs = 0;
  for (const Run& run : runs) {
    pairs += (run.end - run.begin) * run.packets * w;
    CHECK(run.first_packet == run.begin / w);
  }
  // The visible pairs of the tile, and the half of each strip's square that is beyond the diagonal.
  const Index queries_in_tile = tile_lanes<float>;
  CHECK(pairs <= (queries_in_tile * (queries_in_tile + 2 * strip)) / 2);
}

TEST_CASE("TileMask: ranges exclude the keys that a tile does not need", "[tile_mask]") {
  constexpr Index count = tile_lanes<float>, behind = 500 + (100 + count - 1) / 2 + 1;
  const QueryLanes queries{0, 0, 2, 100, count, 500};  // two heads: positions 550 .. behind - 1
  TileMask<float, causal> of_causal;
  of_causal.prepare(causal{}, queries);
  REQUIRE(of_causal.ranges().size() == 1);
  CHECK(*of_causal.ranges().begin() == KeyRange{KeyRange::lowest, behind});
  const auto last_ten = causal{} & window{.left = 9};
  TileMask<float, std::remove_const_t<decltype(last_ten)>> of_window;
  of_window.prepare(last_ten, queries);
  CHECK(*of_window.ranges().begin() == KeyRange{541, behind});
  const auto split = sinks{4} | last_ten;
  TileMask<float, std::remove_const_t<decltype(split)>> of_split;
  of_split.prepare(split, queries);
  REQUIRE(of_split.ranges().size() == 2);
  CHECK(*of_split.ranges().begin() == KeyRange{0, 4});
}
