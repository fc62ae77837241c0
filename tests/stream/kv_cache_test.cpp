#include "longspan/stream/kv_cache.hpp"

#include <cmath>
#include <complex>
#include <string>
#include <vector>

#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "support/catch.hpp"
#include "support/int8_rows.hpp"
#include "support/kv_oracle.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using Eigen::half;
using longspan::causal;
using longspan::kv_cache_options;
using longspan::sinks;
using longspan::softmax_attention;
using longspan::window;

}  // namespace

TEMPLATE_TEST_CASE("kv_cache: rows of every type with queries of every type", "[law]", float, double,
                   bfloat16, half) {
  for_each_case(25, [](Random& random) {
    const Shape shape = draw_self_shape(random);
    const softmax_attention attend{window{.left = random.between(0, 200)}};
    Definition what;
    what.sees = [&](Index, Index, Index i, Index j) { return j >= i - attend.mask.left; };
    Call<float, TestType, TestType, float> of_float(shape, Values::normal, random);
    check_stream<TestType>(of_float, attend, what, random);
  });
}

TEST_CASE("kv_cache: positions in encodings and scores count from the first token of the stream",
          "[law][slow]") {
  for_each_case(40, [](Random& random) {
    Shape shape = draw_self_shape(random);
    shape.head_dim = random.pick({2, 8, 34});
    softmax_attention attend{longspan::rotary(longspan::Pairing::interleaved), longspan::softcap{3}};
    attend.scale = 0.7;
    Definition what;
    what.scale = 0.7;
    what.encode = [](double* row, Index cols, Index position, bool) {
      for (Index c = 0; c < cols; c += 2) {
        const double angle = double(position) * std::pow(10000.0, -double(c) / double(cols));
        const auto turned = std::complex<double>(row[c], row[c + 1]) * std::polar(1.0, angle);
        row[c] = turned.real();
        row[c + 1] = turned.imag();
      }
    };
    what.encode_error = 4;
    what.score = [](double s, Index, Index, Index, Index) { return 3 * std::tanh(s / 3); };
    Call<float> call(shape, Values::normal, random);
    check_stream<float>(call, attend, what, random);

    const std::vector<float> slopes = longspan::alibi_slopes(shape.heads);
    const softmax_attention sloped{longspan::alibi{slopes}};
    Definition alibi;
    alibi.score = [&](double s, Index, Index h, Index i, Index j) {
      return s - double(slopes[std::size_t(h)]) * double(i - j);
    };
    Call<double> again(shape, Values::normal, random);
    check_stream<double>(again, sloped, alibi, random);
  });
}

TEST_CASE("kv_cache: matches the definition over the rows as int8 stores them", "[law]") {
  for_each_case(40, [](Random& random) {
    const Shape shape = draw_self_shape(random);
    const Index longest = draw_longest(random);
    const kv_cache_options options = draw_options(random);
    INFO(shape.text() << " page_size=" << options.page_size);
    Call<float> call(shape, random.pick({Values::normal, Values::peaked, Values::log_normal}), random);
    auto stream = softmax_attention{}.stream<std::int8_t>(stream_shape(shape), options);
    extend_in_chunks(stream, call, random, shape.q_len, longest);

    // The result from the stored rows, within the common bound.
    const Tensor<double> k = kept_as_int8(call.k), v = kept_as_int8(call.v);
    Definition what;
    what.sees = [](Index, Index, Index i, Index j) { return j <= i; };
    check_against(
        exact_attention<float, double, double>(what, std::as_const(call.q).view(), k.view(), v.view()), call);
  });
}

TEST_CASE("kv_cache: an int8 row with NaN or infinity is NaN, and without effect if hidden", "[masked]") {
  Random random(1);
  const Shape shape{1, 2, 1, 40, 40, 8, 8};
  Call<float> call(shape, Values::normal, random);
  call.v.row(0, 0, 7)[3] = INFINITY;
  call.k.row(0, 0, 9)[0] = NAN;
  std::fill_n(call.v.row(0, 0, 11), 8, 0.0f);
  Call<float> tokens = call;
  const softmax_attention attend{causal{} & window{.left = 4}};
  auto stream = attend.stream<std::int8_t>(stream_shape(shape)), one_by_one = stream;
  extend(stream, call, 0, 40);
  for (Index n = 0; n < 40; ++n) extend(one_by_one, tokens, n, 1);
  for (const auto* each : {&call, &tokens}) {
    for (Index i = 0; i < 40; ++i) {
      const bool spoiled = (i >= 7 && i <= 11) || (i >= 9 && i <= 13);
      for (Index c = 0; c < 8; ++c) REQUIRE(std::isnan(each->out.row(0, 1, i)[c]) == spoiled);
    }
  }
}

TEST_CASE("kv_cache: has the bits of a single call", "[bits][slow]") {
  Random random(2);
  const Shape shape{2, 8, 2, 2500, 2500, 40, 24};
  const auto check = [&](auto once, const auto& attend, const kv_cache_options& options) {
    using C = decltype(once);
    C chunks = once.unrun(), serial = once.unrun();
    once.run(attend);
    using T = typename decltype(once.k.view())::Element;
    auto stream = attend.template stream<T>(stream_shape(shape), options);
    // More than 8 queries per KV head: fewer use the decode kernel.
    extend_in_chunks(stream, chunks, random, 2400, 300, 3);
    extend(stream, chunks, 2400, 100);
    CHECK(chunks.same_outputs(once));
    auto of_one_thread = attend.template stream<T>(stream_shape(shape), options);
    for (Index n = 0; n < 2500; n += 100) extend(of_one_thread, serial, n, 100, 1);
    CHECK(serial.same_outputs(once));
  };
  const Call<float> call(shape, Values::normal, random);
  const softmax_attention ring{causal{} & (window{.left = 500} | sinks{4})};
  const softmax_attention turned{causal{}, longspan::rotary(longspan::Pairing::half_split)};
  for (const Index page : {0, 256, 512}) {
    check(call, softmax_attention{causal{}}, {.page_size = page});
    check(call, ring, {.page_size = page});
    check(call, turned, {.page_size = page});
    check(Call<bfloat16>(shape, Values::normal, random), ring, {.page_size = page});
  }
}

TEST_CASE("kv_cache: a single token has the bits of decoding with all tokens so far", "[bits][slow]") {
  Random random(3);
  const Shape shape{1, 8, 2, 2100, 2100, 32, 32};
  Call<float> once(shape, Values::normal, random), tokens = once.unrun(), paged = once.unrun(),
                                                   pairs = once.unrun();
  const softmax_attention attend{causal{}};
  auto array = attend.stream(stream_shape(shape)),
       pages = attend.stream(stream_shape(shape), {.page_size = 256});
  extend(array, tokens, 0, 2000);
  extend(pages, paged, 0, 2000);
  auto by_two = array;
  pairs.out = tokens.out;
  pairs.lse = tokens.lse;
  for (Index n = 2000; n < 2100; n += 2) extend(by_two, pairs, n, 2);
  for (Index n = 2000; n < 2100; ++n) {
    extend(array, tokens, n, 1, 1);
    extend(pages, paged, n, 1, 2);
    attend(std::as_const(once.q).view().slice_rows(n, 1), std::as_const(once.k).view().slice_rows(0, n + 1),
           std::as_const(once.v).view().slice_rows(0, n + 1), once.out.view().slice_rows(n, 1),
           longspan::serial{});
  }
  CHECK(paged.same_outputs(tokens));
  CHECK(pairs.same_outputs(tokens));
  for (Index h = 0; h < 8; ++h)
    CHECK(std::equal(once.out.row(0, h, 2000), once.out.row(0, h, 2099) + 32, tokens.out.row(0, h, 2000)));
}

TEST_CASE("kv_cache: invalid options, shapes and calls are refused", "[errors]") {
  const softmax_attention attend{causal{}};
  const auto says = [](const std::string& text, const auto& call) {
    INFO(refusal(call));
    return refusal(call).find(text) != std::string::npos;
  };
  CHECK(says("the shape [batch, heads, kv_heads, head_dim] is [1, 3, 2, 4]", [&] {
    attend.stream({1, 3, 2, 4, 4});
  }));
  CHECK(says("kv_cache: page_size is -1, wanted at least 0", [&] {
    attend.stream({1, 2, 2, 4, 4}, {.page_size = -1});
  }));
  softmax_attention placed = attend;
  placed.first_query = 7;
  // Sizes whose products overflow.
  constexpr Index huge = Index{1} << 60;
  CHECK(
      says("kv_cache: the shape [batch, heads, head_dim, value_dim] is [1, 2, 1152921504606846976, 4]", [&] {
        attend.stream({1, 2, 2, huge, 4});
      }));
  CHECK(says("kv_cache: the shape", [&] { attend.stream({1, huge, huge, 4, 4}); }));
  CHECK(says("wanted a shape whose tokens fit into memory", [&] { attend.stream({huge, 1, 1, 0, 0}); }));
  CHECK(says("kv_cache: the shape", [&] { attend.stream({1, 1, 1, 2 * huge, 6 * huge}); }));
  CHECK(says("kv_cache: page_size is 1152921504606846976, wanted at least 0 and at most", [&] {
    attend.stream({1, 2, 2, 4, 4}, {.page_size = huge});
  }));
  for (const Index page : {0, 8}) {
    auto stream = attend.stream({1, 2, 2, 4, 4}, {.page_size = page});
    CHECK(says("kv_cache::reserve: the number of tokens is 1152921504606846976, wanted 0..",
               [&] { stream.reserve(huge); }));
    CHECK(says("kv_cache::reserve: the number of tokens is -1, wanted 0..", [&] { stream.reserve(-1); }));
    // One row repeated as more tokens than fit into any memory.
    const float row[4] = {};
    const longspan::TensorView<const float> rows{row, 1, 2, huge, 4, 0, 0, 0};
    CHECK(says("kv_cache::append: k is [1, 2, 1152921504606846976, 4], wanted",
               [&] { stream.append(rows, rows); }));
    CHECK(stream.size() == 0);
    CHECK(stream.bytes() == 0);
  }
  softmax_attention unscaled = attend;
  unscaled.scale = NAN;
  CHECK(says("kv_cache: scale is nan, wanted a finite number", [&] { unscaled.stream({1, 2, 2, 4, 4}); }));
  CHECK(says("first_query is 7, wanted no value", [&] { placed.stream({1, 2, 2, 4, 4}); }));
  auto stream = attend.stream({1, 2, 2, 4, 4}, {.page_size = 8});
  Call<float> call(Shape{1, 2, 1, 5, 5, 4, 4}), right(Shape{1, 2, 2, 40, 40, 4, 4});
  CHECK(says("1 KV heads", [&] { extend(stream, call, 0, 5); }));
  CHECK(stream.size() == 0);
  extend(stream, right, 0, 40);
  CHECK(says("kv_cache::truncate: the number of tokens is 41, wanted 0..40", [&] { stream.truncate(41); }));
  CHECK(says("kv_cache::truncate: the number of tokens is -1", [&] { stream.truncate(-1); }));
  CHECK(says("kv_cache::reorder: a row is 1, wanted 0 to 0", [&] { stream.reorder(std::vector<Index>{1}); }));
  CHECK(says("kv_cache::reorder: the number of rows is 2", [&] {
    stream.reorder(std::vector<Index>{0, 0});
  }));
  auto ring = softmax_attention{window{.left = 10}}.stream({1, 2, 2, 4, 4}, {.page_size = 8, .rollback = 0});
  extend(ring, right, 0, 40);
  CHECK(says(
      "kv_cache::truncate: the number of tokens is 30, wanted at least 34, because earlier keys are evicted",
      [&] { ring.truncate(30); }));
  ring.truncate(39);
  CHECK(ring.size() == 39);
}
