// One tile, without the forward pass around it.
#include "longspan/detail/tile/query_tile.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "support/catch.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
namespace detail = longspan::detail;

struct Memory {
  std::vector<std::byte> bytes = std::vector<std::byte>(std::size_t{1} << 21);
  detail::Arena arena{bytes.data() + (64 - reinterpret_cast<std::uintptr_t>(bytes.data()) % 64) % 64};
};

/// Runs one tile of a call, whose heads all share one KV head, over all keys.
template <class Real, class M, class S, class P>
void run_tile(Call<Real>& call, const detail::QueryLanes& queries, const M& mask, const S& score,
              const P& position) {
  using Policy = detail::FloatArithmetic<Real>;
  const Index head_dim = call.q.cols, value_dim = call.v.cols;
  const Index padded = detail::round_up(value_dim, detail::tile_rows);
  Memory memory;
  const auto scratch = detail::TileScratch<Policy>::take(memory.arena, head_dim, padded, true);
  const auto blocks = detail::KeyBlocks<Policy, Real, Real, P>::take(memory.arena, head_dim, value_dim);
  auto tile = detail::QueryTile<Policy, M, S>::take(memory.arena, head_dim, padded, call.k.rows);
  REQUIRE(memory.arena.used() < memory.bytes.size() - 64);
  tile.start(queries, mask, score, std::as_const(call.q).view(), 1 / std::sqrt(double(head_dim)), position,
             scratch);
  const detail::KeyRun<Real, Real> all{std::as_const(call.k).view().matrix(0, 0),
                                       std::as_const(call.v).view().matrix(0, 0)};
  for (Index first = 0; first < call.k.rows; first += Policy::keys_in_block) {
    const Index keys = std::min(Policy::keys_in_block, call.k.rows - first);
    tile.absorb(blocks.block(slice_rows(all, first, keys), position, first), scratch);
  }
  tile.finish(call.out.view(), call.lse.view());
}

/// Checks that the rows of a tile are right and that no other row is written.
template <class Real>
void check_tile(const Call<Real>& call, const detail::QueryLanes& queries, Definition what) {
  what.first_query = queries.first_position;
  Exact exact = exact_attention(what, call);
  Index untouched = 0, rows = call.q.heads * call.q.rows;
  for (Index n = 0; n < rows; ++n) {
    const Index h = n / call.q.rows, i = n % call.q.rows, flat = i * queries.heads + h - queries.first_head;
    const bool mine = h >= queries.first_head && h < queries.first_head + queries.heads &&
                      flat >= queries.first_row && flat < queries.first_row + queries.count;
    if (mine) continue;
    ++untouched;
    // The other rows must still be NaN, so NaN is expected for them.
    const auto at = static_cast<std::size_t>(n), cols = static_cast<std::size_t>(call.v.cols);
    exact.lse[at] = NAN;
    for (std::size_t c = 0; c < cols; ++c) exact.out[at * cols + c] = NAN;
  }
  CHECK(untouched == rows - queries.count);
  check_against(exact, call);
}

}  // namespace

TEMPLATE_TEST_CASE("tile: right for any number of lanes, first row, and number of heads", "[tile]", float,
                   double) {
  Random random(1);
  constexpr Index most = detail::tile_lanes<TestType>;
  for (const Index heads : {1, 2, 3}) {
    for (Index count = 1; count <= most; count += random.between(1, 3)) {
      const Index q_len = most + 7, first_row = random.between(0, heads * q_len - count);
      const Shape shape{1, heads, 1, q_len, random.pick<Index>({1, 5, 127, 128, 129, 300}), 9, 10};
      const detail::QueryLanes queries{0, 0, heads, first_row, count, shape.kv_len - q_len};
      INFO(shape.text() << " first_row=" << first_row << " count=" << count);
      Call<TestType> call(shape, random.pick(all_values), random);
      run_tile(call, queries, longspan::everything{}, longspan::unchanged{}, longspan::no_position{});
      check_tile(call, queries, {});

      call = call.unrun();
      run_tile(call, queries, longspan::causal{}, longspan::unchanged{}, longspan::no_position{});
      check_tile(call, queries, {.sees = [](Index, Index, Index i, Index j) { return j <= i; }});
    }
  }
}

TEST_CASE("tile: right with a mask that only has `sees`, a score, and more keys than a key chunk", "[tile]") {
  struct Odd {
    bool sees(Index, Index h, Index i, Index j) const { return (i + j + h) % 3 != 0; }
  };
  Random random(2);
  const Shape shape{1, 2, 1, 40, 2300, 8, 8};
  const detail::QueryLanes queries{0, 1, 1, 3, std::min(11, detail::tile_lanes<float>), 2260};
  Call<float> call(shape, Values::normal, random);
  run_tile(call, queries, Odd{}, longspan::softcap{4}, longspan::no_position{});
  check_tile(call, queries,
             {.sees = [](Index, Index h, Index i, Index j) { return (i + j + h) % 3 != 0; },
              .score = [](double s, Index, Index, Index, Index) { return 4 * std::tanh(s / 4); }});
}

TEST_CASE("tile: key blocks may be absorbed in pieces", "[tile]") {
  // As when keys are split among tasks: cuts that are not multiples of a key block.
  using Policy = detail::FloatArithmetic<float>;
  using Tile = detail::QueryTile<Policy, longspan::everything, longspan::unchanged>;
  Random random(3);
  Call<float> call(Shape{1, 1, 1, 20, 200, 8, 8}, Values::normal, random);
  const detail::QueryLanes queries{0, 0, 1, 0, std::min(20, detail::tile_lanes<float>), 180};
  Memory memory;
  const auto scratch = detail::TileScratch<Policy>::take(memory.arena, 8, 8, false);
  const auto blocks =
      detail::KeyBlocks<Policy, float, float, longspan::no_position>::take(memory.arena, 8, 8);
  Tile tile = Tile::take(memory.arena, 8, 8, 200);
  const longspan::everything mask;
  const longspan::unchanged score;
  tile.start(queries, mask, score, std::as_const(call.q).view(), 1 / std::sqrt(8.0), longspan::no_position{},
             scratch);
  const detail::KeyRun<float, float> all{std::as_const(call.k).view().matrix(0, 0),
                                         std::as_const(call.v).view().matrix(0, 0)};
  const Index cuts[] = {0, 1, 2, 40, 128, 199, 200};
  for (int n = 0; n < 6; ++n) {
    tile.absorb(
        blocks.block(slice_rows(all, cuts[n], cuts[n + 1] - cuts[n]), longspan::no_position{}, cuts[n]),
        scratch);
  }
  tile.finish(call.out.view(), call.lse.view());
  check_tile(call, queries, {});
}
