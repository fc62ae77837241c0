// Rows of int8 in a dilated_cache.
#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "longspan/position.hpp"
#include "longspan/reference/dilated_attention.hpp"
#include "longspan/stream/dilated_cache.hpp"
#include "support/catch.hpp"
#include "support/int8_rows.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::Branch;
using longspan::causal;
using longspan::dilated_attention;
using longspan::Role;
using Branches = std::vector<Branch>;

const Branches three{{16, 1}, {50, 3}, {64, 4}};

/// Compares the results of a stream with the definition over the stored rows.
void check_kept(const Call<float>& call, const Tensor<float>& encoded_q, const Tensor<float>& encoded_k,
                const dilated_attention<causal>& attend) {
  const Tensor<double> k = kept_as_int8(encoded_k), v = kept_as_int8(call.v);
  const longspan::reference::exact wanted{attend};
  Tensor<double> out(call.out.batch, call.out.heads, call.out.rows, call.out.cols);
  Rows<double> lse(out.batch, out.heads, out.rows);
  wanted(encoded_q.view(), k.view(), v.view(), out.view(), lse.view());
  for (std::size_t n = 0; n < out.values.size(); ++n)
    REQUIRE(std::abs(double(call.out.values[n]) - out.values[n]) < 4e-6);
  for (std::size_t n = 0; n < lse.values.size(); ++n) {
    const double got = double(call.lse.values[n]);
    REQUIRE((got == lse.values[n] || std::abs(got - lse.values[n]) < 4e-6));
  }
}

}  // namespace

TEST_CASE("dilated_cache: matches the definition over the rows as int8 stores them, in any chunks", "[law]") {
  for_each_case(25, [](Random& random) {
    Shape shape{random.between(1, 2),       0, random.between(1, 2), 0, 0, random.pick({2, 8, 34, 64}),
                random.pick({1, 8, 20, 33})};
    shape.heads = shape.kv_heads * random.between(1, 3);
    shape.q_len = shape.kv_len = random.pick({0, 1, 17, 130, 300});
    INFO(shape.text());
    dilated_attention attend{three, causal{}};
    attend.overlap = random.pick({longspan::Overlap::multiset, longspan::Overlap::set});
    Call<float> call(shape, Values::normal, random), tokens = call.unrun();
    auto stream = attend.stream<std::int8_t>(stream_shape(shape)), one_by_one = stream;
    extend_in_chunks(stream, call, random, shape.q_len, random.pick({3, 20, 400}));
    for (Index n = 0; n < shape.q_len; ++n) extend(one_by_one, tokens, n, 1, random.between(1, 3));
    for (const auto* each : {&call, &tokens}) check_kept(*each, call.q, call.k, attend);
  });
}

TEST_CASE("dilated_cache: keys are encoded before they become int8", "[law][bits]") {
  Random random(1);
  const Shape shape{2, 4, 2, 3000, 3000, 16, 12};
  const longspan::rotary turn(longspan::Pairing::half_split);
  const dilated_attention attend{Branches{{100, 1}, {1000, 7}}, causal{}, turn};
  Call<float> call(shape, Values::normal, random), serial = call.unrun();
  auto stream = attend.stream<std::int8_t>(stream_shape(shape)), of_one_thread = stream;
  extend(stream, call, 0, 2900, 3);
  extend(stream, call, 2900, 100, 3);
  extend(of_one_thread, serial, 0, 3000, 1);
  CHECK(serial.same_outputs(call));
  Tensor<float> q = call.q, k = call.k;
  longspan::encode_positions(q.view(), turn, 0, Role::query);
  longspan::encode_positions(k.view(), turn, 0, Role::key);
  check_kept(call, q, k, dilated_attention{attend.branches, causal{}});
}

TEST_CASE("dilated_cache: an int8 row with NaN or infinity is NaN, and without effect if hidden",
          "[masked]") {
  Random random(2);
  const Shape shape{1, 2, 1, 40, 40, 8, 8};
  Call<float> call(shape, Values::normal, random);
  call.v.row(0, 0, 7)[3] = INFINITY;
  call.k.row(0, 0, 25)[0] = NAN;
  std::fill_n(call.v.row(0, 0, 11), 8, 0.0f);
  Call<float> tokens = call;
  const dilated_attention attend{Branches{{10, 1}, {20, 2}}, causal{}};
  auto stream = attend.stream<std::int8_t>(stream_shape(shape)), one_by_one = stream;
  extend(stream, call, 0, 40);
  for (Index n = 0; n < 40; ++n) extend(one_by_one, tokens, n, 1);
  for (const auto* each : {&call, &tokens}) {
    for (Index h = 0; h < 2; ++h) {
      for (Index i = 0; i < 40; ++i) {
        // In the second branch head 1 keeps odd rows, including 7 and 25, and head 0 even ones.
        const bool spoiled = (i >= 7 && i < 10) || (i >= 25 && i < 30) ||
                             (h == 1 && i % 2 == 1 && ((i >= 7 && i < 20) || (i >= 25 && i < 40)));
        for (Index c = 0; c < 8; ++c) REQUIRE(std::isnan(each->out.row(0, h, i)[c]) == spoiled);
      }
    }
  }
}

TEST_CASE("dilated_cache: an int8 row takes a byte for each element, and a float", "[state]") {
  Random random(3);
  const Shape shape{1, 2, 1, 1500, 1500, 24, 8};
  Call<float> call(shape, Values::normal, random);
  auto stream = dilated_attention{Branches{{64, 1}, {256, 4}}, causal{}}.stream<std::int8_t>(
      stream_shape(shape), {.rollback = 0});
  Index most_bytes = 0;
  for (Index n = 0; n < shape.q_len; ++n) {
    extend(stream, call, n, 1);
    most_bytes = std::max(most_bytes, stream.bytes());
  }
  CHECK(most_bytes == (64 + 2 * 64) * (24 + 8 + 2 * Index{sizeof(float)}));
}

TEST_CASE("dilated_cache: a loaded int8 state continues the stream, and other types refuse it",
          "[state][errors]") {
  Random random(4);
  const Shape shape{2, 4, 2, 160, 160, 8, 6};
  Call<float> call(shape, Values::normal, random), later = call.unrun();
  const dilated_attention attend{three, causal{}};
  auto stream = attend.stream<std::int8_t>(stream_shape(shape)), loaded = stream;
  extend(stream, call, 0, 77);
  std::stringstream file;
  stream.save(file);
  const std::string bytes = file.str();
  extend(stream, call, 77, 83);
  extend(loaded, later, 0, 11);
  check_damage_is_refused(loaded, bytes, 7, "dilated_cache::load");
  for (std::size_t n = 0; n < bytes.size(); n += 7)
    REQUIRE_FALSE(refused(loaded, bytes.substr(0, n)).empty());
  CHECK(loaded.size() == 11);
  auto of_float = attend.stream(stream_shape(shape));
  CHECK(
      refused(of_float, bytes) ==
      "longspan: dilated_cache::load: the element type is int8 in the file, wanted float as in this stream");
  loaded.load(file);
  CHECK(loaded.size() == 77);
  extend(loaded, later, 77, 83);
  CHECK(same_rows(call, later, 77, 160));
}
