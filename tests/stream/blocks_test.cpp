#include "longspan/stream/blocks.hpp"

#include <utility>
#include <vector>

#include "longspan/stream/dilated_cache.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;

/// A source of the blocks of a call that records which blocks were opened.
struct CallSource {
  Call<float>& call;
  std::vector<std::pair<Index, Index>> opened, closed;

  auto open(Index first, Index count) {
    opened.emplace_back(first, count);
    struct {
      TensorView<const float> q, k, v;
      TensorView<float> out;
    } block{call.q.view().slice_rows(first, count), call.k.view().slice_rows(first, count),
            call.v.view().slice_rows(first, count), call.out.view().slice_rows(first, count)};
    return block;
  }
  void close(Index first, Index count) { closed.emplace_back(first, count); }
};

}  // namespace

TEST_CASE("extend_by_blocks: matches a single call for any blocks, and can be continued") {
  Random random(1);
  Call<float> call(Shape{1, 2, 2, 100, 100, 8, 8}, Values::normal, random), by_blocks = call.unrun();
  const longspan::dilated_attention attend{std::vector<longspan::Branch>{{16, 1}, {64, 2}},
                                           longspan::causal{}};
  const longspan::StreamShape shape{1, 2, 2, 8, 8};
  auto at_once = attend.stream(shape), stream = attend.stream(shape);
  at_once.extend(call.q.view(), call.k.view(), call.v.view(), call.out.view());

  CallSource source{by_blocks, {}, {}};
  longspan::extend_by_blocks(stream, source, 41, 30);
  CHECK(stream.size() == 41);
  longspan::extend_by_blocks(stream, source, 100, 30, longspan::serial{});
  longspan::extend_by_blocks(stream, source, 100, 30);
  CHECK(by_blocks.out == call.out);
  CHECK(source.opened == std::vector<std::pair<Index, Index>>{{0, 30}, {30, 11}, {41, 30}, {71, 29}});
  CHECK(source.closed == source.opened);
  CHECK(refusal([&] { longspan::extend_by_blocks(stream, source, 200, 0); }).find("rows_at_once is 0") !=
        std::string::npos);
}
