// Dilated attention by matrix tiles, which keep the transposed values of a run of keys from task to task.
#include "longspan/detail/dilated/row_tiles.hpp"

#include "longspan/detail/dilated/forward.hpp"
#include "longspan/dilated_attention.hpp"
#include "support/catch.hpp"
#include "support/tile_calls.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using namespace test;
using namespace longspan;
using Eigen::bfloat16;

const std::vector<Branch> branches{{256, 1}, {512, 2}, {1024, 4}};

template <class Unit, class E = serial>
void attend(Bf16Call<float>& call, const E& executor = {}) {
  const causal mask;
  const unchanged score;
  const no_position position;
  const detail::TensorRows<bfloat16, bfloat16> source{
      std::as_const(call.k).view(), std::as_const(call.v).view(), call.q.heads / call.k.heads};
  const detail::Dilation dilation{branches};
  run_on_tiles<Unit>(call, scale_of(call), executor, [&](const auto& problem, Index workers) {
    using Source = std::remove_cvref_t<decltype(source)>;
    return detail::Dilated<detail::AmxArithmetic<Unit>, Source, bfloat16, float, causal, unchanged,
                           no_position, false>(problem, source, dilation, mask, score, position, workers);
  });
}

}  // namespace

TEST_CASE("dilated by tiles: as in float, and with the same bits for fewer queries and more threads",
          "[amx][bits]") {
  for_each_unit([]<class Unit>() {
    Random random(1);
    const Shape shape{2, 4, 2, 700, 700, 32, 48};
    Bf16Call<float> call(shape, Values::normal, random), in_float = call.unrun(), threads = call.unrun();
    attend<Unit>(call);
    dilated_attention exact{branches, causal{}};
    exact.bf16_products = false;
    in_float.run(exact);
    attend<Unit>(threads, openmp{3});
    CHECK(call.same_outputs(threads));

    Shape few = shape;
    few.q_len = 90;  // keeps no values
    Bf16Call<float> last(few, Values::normal, random);
    last.k = call.k;
    last.v = call.v;
    const Index skipped = shape.q_len - few.q_len;
    for (Index row = 0; row < shape.batch * shape.heads; ++row) {
      const Index b = row / shape.heads, h = row % shape.heads;
      for (Index i = 0; i < few.q_len; ++i)
        std::copy_n(call.q.row(b, h, skipped + i), shape.head_dim, last.q.row(b, h, i));
    }
    attend<Unit>(last);
    Index different = 0;
    float worst = 0;
    for (Index row = 0; row < shape.batch * shape.heads; ++row) {
      const Index b = row / shape.heads, h = row % shape.heads;
      for (Index i = 0; i < shape.q_len; ++i) {
        const float *out = call.out.row(b, h, i), *wanted = in_float.out.row(b, h, i);
        for (Index c = 0; c < shape.value_dim; ++c) worst = std::max(worst, std::abs(out[c] - wanted[c]));
        if (i < skipped) continue;
        different += !std::equal(out, out + shape.value_dim, last.out.row(b, h, i - skipped));
      }
    }
    CHECK(worst < 0.02f);  // 2^-8 of the mean of |v|, and more for a row of few keys
    CHECK(different == 0);
  });
}

#else

TEST_CASE("dilated by tiles: not for a target without AVX-512", "[amx]") {
  SUCCEED("matrix tiles and their emulation are used with AVX-512 only");
}

#endif
