// Streams whose queries are bfloat16, on a machine with matrix tiles: keys that are encoded, and rows of int8.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "longspan/stream/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"
#include "support/has_tiles.hpp"
#include "support/int8_rows.hpp"
#include "support/kv_oracle.hpp"
#include "support/stream_calls.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::causal;
using longspan::kv_cache_options;
using longspan::Pairing;
using longspan::Role;
using longspan::rotary;
using longspan::softmax_attention;
using longspan::window;

/// A call whose keys and values are float, as int8 rows are made of them.
using MixedCall = Call<bfloat16, float, float, float>;

}  // namespace

TEST_CASE("kv_cache: bfloat16 rows with a position have the bits of a single call on matrix tiles",
          "[amx][bits][law]") {
  if (!has_tiles()) return;
  Random random(1);
  const Shape shape{1, 8, 2, 700, 700, 40, 24};
  const softmax_attention attend{causal{} & window{.left = 300}, rotary(Pairing::half_split)};
  for (const Index page : {0, 256}) {
    Call<bfloat16> once(shape, Values::normal, random), chunks = once.unrun();
    once.run(attend);
    auto stream = attend.stream<bfloat16>(stream_shape(shape), {.page_size = page});
    extend_in_chunks(stream, chunks, random, 600, 300, 3);
    extend(stream, chunks, 600, 100);
    CHECK(chunks.same_outputs(once));
  }
}

TEST_CASE("kv_cache: int8 rows with bfloat16 queries, within the bound of bfloat16 products", "[law]") {
  for_each_case(20, [](Random& random) {
    const Shape shape = draw_self_shape(random);
    const kv_cache_options options = draw_options(random);
    INFO(shape.text() << " page_size=" << options.page_size);
    MixedCall call(shape, random.pick({Values::normal, Values::peaked, Values::log_normal}), random);
    for (Index n = 0; n < call.k.batch * call.k.heads * call.k.rows; ++n) {  // scales of all magnitudes
      const float size = std::ldexp(1.0f, static_cast<int>(n % 41) - 20);
      for (Index c = 0; c < shape.value_dim; ++c) call.v.row(0, 0, n)[c] *= size;
    }
    auto stream = softmax_attention{}.stream<std::int8_t>(stream_shape(shape), options);
    extend_in_chunks(stream, call, random, shape.q_len, draw_longest(random));
    const Tensor<double> k = kept_as_int8(call.k), v = kept_as_int8(call.v);
    const Definition what{.sees = [](Index, Index, Index i, Index j) { return j <= i; }};
    const Exact exact = exact_attention<bfloat16, double, double>(
        what, std::as_const(call.q).view(), std::as_const(k).view(), std::as_const(v).view());
    check_against(exact, call, allowance_of<bfloat16, std::int8_t, std::int8_t, float>(true));
  });
}

TEST_CASE("kv_cache: int8 rows with a position are those of encoded rows", "[amx][bits][law]") {
  if (!has_tiles()) return;
  Random random(2);
  const Shape shape{1, 8, 2, 300, 300, 40, 24};
  const rotary position(Pairing::interleaved);
  MixedCall call(shape, Values::normal, random);
  MixedCall encoded = call;
  Tensor<float> q(1, 8, 300, 40);
  std::copy(call.q.values.begin(), call.q.values.end(), q.values.begin());
  longspan::encode_positions(q.view(), position, 0, Role::query);
  longspan::encode_positions(encoded.k.view(), position, 0, Role::key);
  std::transform(q.values.begin(), q.values.end(), encoded.q.values.begin(),
                 [](float x) { return static_cast<bfloat16>(x); });
  auto stream = softmax_attention{causal{}, position}.stream<std::int8_t>(stream_shape(shape));
  auto plain = softmax_attention{causal{}}.stream<std::int8_t>(stream_shape(shape));
  extend(stream, call, 0, 100);
  extend(stream, call, 100, 200);
  extend(plain, encoded, 0, 300);
  CHECK(call.same_outputs(encoded));
}

TEST_CASE("kv_cache: an int8 row with NaN, seen by bfloat16 queries that see it and by no others",
          "[masked]") {
  Random random(3);
  const Shape shape{1, 2, 1, 40, 40, 8, 8};
  MixedCall call(shape, Values::normal, random);
  call.v.row(0, 0, 7)[3] = INFINITY;
  call.k.row(0, 0, 9)[0] = NAN;
  std::fill_n(call.v.row(0, 0, 11), 8, 0.0f);
  auto stream = softmax_attention{causal{} & window{.left = 4}}.stream<std::int8_t>(stream_shape(shape));
  extend(stream, call, 0, 40);
  Index wrong = 0;
  for (Index i = 0; i < 40; ++i) {
    const bool spoiled = (i >= 7 && i <= 11) || (i >= 9 && i <= 13);
    for (Index c = 0; c < 8; ++c) wrong += std::isnan(call.out.row(0, 1, i)[c]) != spoiled;
  }
  CHECK(wrong == 0);
}
