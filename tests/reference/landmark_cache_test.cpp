#include "longspan/reference/landmark_cache.hpp"

#include <utility>

#include "support/random.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

using test::Call;
using test::Index;
using test::Random;
using test::Shape;

TEST_CASE("reference::landmark_cache: tokens without queries are appended like all others", "[reference]") {
  Random random(1);
  const Shape shape{1, 2, 1, 30, 30, 8, 6};
  for (const bool split : {false, true}) {
    Call<double> call(shape, test::Values::normal, random), last = call.unrun();
    const longspan::landmark_cache_options options{.block_size = 4, .top_k = 2, .split_at_blocks = split};
    longspan::reference::landmark_cache<> with(test::stream_shape(shape), options), without = with;
    test::extend(with, call, 0, 29);
    const auto rows = [&](auto& x, Index first, Index count) {
      return std::as_const(x).view().slice_rows(first, count);
    };
    const longspan::RowsView<double> no_lse{};
    without.extend(rows(last.q, 0, 0), rows(last.k, 0, 29), rows(last.v, 0, 29),
                   last.out.view().slice_rows(0, 0), no_lse);
    test::extend(with, call, 29, 1);
    test::extend(without, last, 29, 1);
    CHECK(test::same_rows(call, last, 29, 30));
  }
}
