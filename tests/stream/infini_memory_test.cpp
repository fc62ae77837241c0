#include "longspan/stream/infini_memory.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "support/catch.hpp"
#include "support/infini_oracle.hpp"
#include "support/refusal.hpp"
#include "support/saved.hpp"
#include "support/stream_calls.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::EmptyMemory;
using longspan::infini_attention;
using longspan::InfiniRule;
using longspan::StreamShape;
using longspan::TensorView;

/// Extends with all rows, in chunks of next() tokens.
template <class Stream, class T, class Next>
void extend_by(Stream& stream, Call<T>& call, const Next& next) {
  for (Index first = 0; first < call.q.rows;) {
    const Index count = std::min(next(), call.q.rows - first);
    extend(stream, call, first, count);
    first += count;
  }
}

template <class Stream>
void load(Stream& stream, const std::string& bytes) {
  std::istringstream from(bytes);
  stream.load(from);
}

infini_attention<> options(Index segment, InfiniRule rule = InfiniRule::linear) {
  infini_attention attend;
  attend.segment = segment;
  attend.rule = rule;
  return attend;
}

/// A saved state with one number of its payload replaced and a recomputed checksum.
template <class Number>
std::string forged(std::string state, std::size_t offset, Number value) {
  std::uint32_t numbers = 0;
  std::memcpy(&numbers, &state[20], 4);
  const std::size_t payload = 32 + 8 * numbers + 4;
  std::memcpy(&state[payload + offset], &value, sizeof(value));
  longspan::detail::Crc32c sum;
  sum.add(&state[payload], state.size() - payload - 4);
  const std::uint32_t summed = sum.value();
  std::memcpy(&state[state.size() - 4], &summed, 4);
  return state;
}

}  // namespace

TEMPLATE_TEST_CASE("infini_memory: any chunks match a single call", "[stream][infini]", float, double) {
  Random random(1);
  for (int n = 0; n < 60; ++n) {
    const Shape shape = draw_infini_shape(random);
    infini_attention attend = options(random.pick(std::vector<Index>{1, 3, 16, 50, 64, 1000}),
                                      random.chance(0.5) ? InfiniRule::linear : InfiniRule::delta);
    if (random.chance(0.3)) attend.empty_memory = EmptyMemory::bypass;
    Call<TestType> call(shape, Values::normal, random), whole = call;
    auto chunks = attend.template stream<TestType>(stream_shape(shape)), tokens = chunks, once = chunks;
    extend_by(chunks, call, [&] { return random.between(1, 70); });
    INFO(shape.text() << " segment=" << attend.segment << " rule=" << int(attend.rule));
    const double allowed = attend.rule == InfiniRule::linear ? 200 : 8000;
    CHECK(worst_in_u<TestType>(call.out, infini_oracle(attend, call), call.v) <= allowed);
    extend_by(tokens, call, [] { return Index{1}; });
    CHECK(worst_in_u<TestType>(call.out, infini_oracle(attend, call), call.v) <= allowed);
    extend(once, whole, 0, whole.q.rows);
    CHECK(saved(once) == saved(chunks));  // M, z and the open segment to the bit
    CHECK(saved(once) == saved(tokens));
    CHECK(once.size() == shape.q_len);
    CHECK(once.open_rows() == shape.q_len % attend.segment);
  }
}

TEST_CASE("infini_memory: M and z match the definition", "[stream][infini]") {
  Random random(2);
  Call<float> call(Shape{1, 2, 1, 90, 90, 20, 12}, Values::normal, random);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    const infini_attention attend = options(30, rule);
    auto stream = attend.stream({1, 2, 1, 20, 12});
    extend(stream, call, 0, 90);
    longspan::reference::InfiniMemory exact(20, 12);
    for (Index first = 0; first < 90; first += 30) {
      longspan::reference::write(
          exact, longspan::MatrixView<const float>{call.k.row(0, 0, first), 30, 20, 20},
          longspan::MatrixView<const float>{call.v.row(0, 0, first), 30, 12, 12}, rule, attend.feature);
    }
    for (Index c = 0; c < 20; ++c) {
      CHECK(std::abs(double(stream.norm(0, 0, c)) / exact.z[static_cast<std::size_t>(c)] - 1) < 1e-6);
      for (Index column = 0; column < 12; ++column)
        CHECK(std::abs(double(stream.memory(0, 0, c, column)) - exact.at(c, column)) < 1e-4);
    }
  }
}

TEST_CASE("infini_memory: flush writes the open segment before it is full", "[stream][infini]") {
  Random random(3);
  Call<float> call(Shape{1, 1, 1, 40, 40, 8, 8}, Values::normal, random);
  auto flushed = options(30).stream({1, 1, 1, 8, 8}), exact = options(20).stream({1, 1, 1, 8, 8});
  extend(flushed, call, 0, 20);
  flushed.flush();
  CHECK(flushed.open_rows() == 0);
  extend(exact, call, 0, 20);
  for (Index c = 0; c < 8; ++c) CHECK(flushed.norm(0, 0, c) == exact.norm(0, 0, c));
  CHECK(flushed.size() == 20);
  flushed.flush();  // has no effect without open rows
  CHECK(flushed.size() == 20);
}

TEST_CASE("infini_memory: peek writes what extend would write, and does not change the stream",
          "[stream][infini]") {
  Random random(4);
  Call<float> call(Shape{1, 2, 1, 100, 100, 16, 16}, Values::normal, random), ahead = call;
  auto stream = options(32).stream({1, 2, 1, 16, 16});
  extend(stream, call, 0, 40);
  for (const Index count : {5, 24, 60}) {  // inside the segment, to its end, far beyond
    const std::string before = saved(stream);
    auto copy = stream;
    stream.peek(std::as_const(call.q).view().slice_rows(40, count),
                std::as_const(call.k).view().slice_rows(40, count),
                std::as_const(call.v).view().slice_rows(40, count), ahead.out.view().slice_rows(40, count),
                longspan::serial{});
    CHECK(saved(stream) == before);
    extend(copy, call, 40, count);
    for (Index i = 40; i < 40 + count; ++i) {
      for (Index c = 0; c < 16; ++c) CHECK(ahead.out.row(0, 1, i)[c] == call.out.row(0, 1, i)[c]);
    }
  }
}

TEST_CASE("infini_memory: reset empties one batch row and does not change the others", "[stream][infini]") {
  Random random(5);
  Call<float> call(Shape{2, 2, 1, 80, 80, 16, 16}, Values::normal, random), other = call;
  const infini_attention attend = options(32);
  auto stream = attend.stream({2, 2, 1, 16, 16}), fresh = stream;
  extend(stream, call, 0, 40);
  stream.reset(1);
  CHECK(stream.size(0) == 40);
  CHECK(stream.size(1) == 0);
  extend(stream, call, 40, 40);
  // Row 1 matches a stream that begins there, row 0 is unaffected.
  extend(fresh, other, 40, 40);
  for (Index i = 40; i < 80; ++i) {
    for (Index c = 0; c < 16; ++c) CHECK(call.out.row(1, 0, i)[c] == other.out.row(1, 0, i)[c]);
  }
  const Tensor<double> exact = infini_oracle(attend, call);
  for (Index i = 40; i < 80; ++i) {
    for (Index c = 0; c < 16; ++c)
      CHECK(std::abs(double(call.out.row(0, 1, i)[c]) - exact.row(0, 1, i)[c]) < 2e-5);
  }
  stream.clear();
  CHECK(stream.size() == 0);
  CHECK(saved(stream) == saved(attend.stream({2, 2, 1, 16, 16})));
  CHECK(refusal([&] { stream.reset(2); }) ==
        "longspan: infini_memory::reset: the batch row is 2, wanted 0..1");
}

TEST_CASE("infini_memory: over 10^6 tokens memory does not grow and z stays exact",
          "[stream][infini][slow]") {
  const Index d = 8;
  auto stream = options(2048).stream({1, 1, 1, d, d});
  Random random(6);
  Call<float> call(Shape{1, 1, 1, 4096, 4096, d, d}, Values::normal, random);
  extend(stream, call, 0, 4096);
  const Index bytes = stream.bytes();
  CHECK(bytes <= 4 * (8 * 16 + 8 + 2048 * 16));  // rows are padded to at most 16 lanes
  for (int n = 1; n < 256; ++n) extend(stream, call, 0, 4096);
  CHECK(stream.size() == Index{1} << 20);
  CHECK(stream.bytes() == bytes);
  for (Index c = 0; c < d; ++c) {
    double exact = 0;
    for (Index j = 0; j < 4096; ++j) exact += longspan::elu_plus_one{}(double(call.k.row(0, 0, j)[c]));
    CHECK(std::abs(double(stream.norm(0, 0, c)) / (256 * exact) - 1) <= 64 * 0x1p-24);
  }
  for (const float x : call.out.values) CHECK(std::isfinite(x));
}

TEST_CASE("infini_memory: a loaded state has the bits of the saved one", "[stream][file][infini]") {
  Random random(7);
  Call<float> call(Shape{2, 4, 2, 100, 100, 20, 12}, Values::normal, random), again = call;
  const infini_attention attend = options(32, InfiniRule::delta);
  auto stream = attend.stream<bfloat16>({2, 4, 2, 20, 12}), loaded = stream;
  extend(stream, call, 0, 45);
  stream.reset(1);
  extend(stream, call, 45, 5);
  load(loaded, saved(stream));
  CHECK(saved(loaded) == saved(stream));
  extend(stream, call, 50, 50);
  extend(loaded, again, 50, 50);
  for (Index b = 0; b < 2; ++b) {
    for (Index i = 50; i < 100; ++i) CHECK(call.out.row(b, 3, i)[11] == again.out.row(b, 3, i)[11]);
  }
}

TEST_CASE("infini_memory: a damaged file changes nothing", "[stream][file][infini]") {
  Random random(8);
  Call<float> call(Shape{1, 1, 1, 10, 10, 3, 2}, Values::normal, random);
  auto stream = options(4).stream({1, 1, 1, 3, 2}), target = stream;
  extend(stream, call, 0, 10);
  extend(target, call, 0, 7);
  const std::string whole = saved(stream), before = saved(target);
  for (std::size_t bytes = 0; bytes < whole.size(); ++bytes)
    CHECK_THROWS_AS(load(target, whole.substr(0, bytes)), longspan::FileError);
  for (std::size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    std::string flipped = whole;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    CHECK_THROWS_AS(load(target, flipped), longspan::FileError);
  }
  CHECK(saved(target) == before);
  auto other = options(5).stream({1, 1, 1, 3, 2});
  CHECK(file_refusal([&] { load(other, whole); }) ==
        "longspan: infini_memory::load: segment is 4 in the file, wanted 5 as in this stream");
}

TEST_CASE("infini_memory: invalid shapes and options are refused", "[stream][errors][infini]") {
  CHECK(refusal([] {
          options(4).stream({1, 3, 2, 8, 8});
        }) ==
        "longspan: infini_memory: the shape [batch, heads, kv_heads, head_dim] is [1, 3, 2, 8], wanted sizes "
        "of "
        "at least 0, with kv_heads a divisor of heads");
  auto stream = options(4).stream({1, 2, 2, 8, 8});
  Random random(9);
  Call<float> call(Shape{1, 2, 1, 4, 4, 8, 8}, Values::normal, random);
  CHECK(refusal([&] { extend(stream, call, 0, 4); }) ==
        "longspan: infini_memory::extend: q is [1, 2, 4, 8] with 1 KV heads and value_dim 8, wanted [1, 2, "
        "4, 8] "
        "with 2 "
        "and 8");
  CHECK(stream.size() == 0);
}

TEST_CASE("infini_memory: rows without queries leave the same state as rows with queries",
          "[stream][infini]") {
  Random random(21);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    const Shape shape{2, 4, 2, 77, 77, 12, 9};
    Call<float> call(shape, Values::normal, random);
    auto extended = options(16, rule).stream(stream_shape(shape)), appended = extended;
    extend_by(extended, call, [&] { return random.between(1, 40); });
    for (Index b = 0; b < shape.batch; ++b) {
      for (Index first = 0, count = 0; first < shape.q_len; first += count) {
        count = std::min(random.between(1, 40), shape.q_len - first);
        appended.append(
            b, longspan::detail::batch_row(std::as_const(call.k).view(), b).slice_rows(first, count),
            longspan::detail::batch_row(std::as_const(call.v).view(), b).slice_rows(first, count));
      }
    }
    CHECK(saved(appended) == saved(extended));
    CHECK(refusal([&] { appended.append(2, call.k.view(), call.v.view()); }) ==
          "longspan: infini_memory::append: the batch row is 2, wanted 0..1");
    CHECK(refusal([&] { appended.append(0, call.k.view(), call.v.view()); }) ==
          "longspan: infini_memory::append: k is [2, 2, 77, 12], wanted [1, 2, 77, 12]");
    CHECK(saved(appended) == saved(extended));
  }
}

TEST_CASE("infini_memory: reorder moves a row's length, its memory and the tokens that can be removed",
          "[stream][infini]") {
  Random random(12);
  const Shape shape{2, 4, 2, 90, 90, 12, 9};
  Call<float> call(shape, Values::normal, random);
  infini_attention<> attend = options(16, InfiniRule::delta);
  auto stream = attend.stream(stream_shape(shape), {.rollback = 20});
  const auto append = [&](auto& to, Index b, Index of, Index first, Index count) {
    const auto row = [&](auto& x) {
      auto part = std::as_const(x).view().slice_rows(first, count);
      part.data = part.row(of, 0, 0);
      part.batch = 1;
      return part;
    };
    to.append(b, row(call.k), row(call.v));
  };
  append(stream, 0, 0, 0, 70);
  append(stream, 1, 1, 0, 37);
  stream.reorder(std::vector<Index>{1, 0});
  CHECK(stream.size(0) == 37);
  CHECK(stream.size(1) == 70);
  CHECK(stream.open_rows(0) == 5);
  auto wanted = attend.stream(stream_shape(shape), {.rollback = 20});
  append(wanted, 0, 1, 0, 37);
  append(wanted, 1, 0, 0, 70);
  CHECK(saved(stream) == saved(wanted));
  append(stream, 0, 1, 37, 28);
  append(wanted, 0, 1, 37, 28);
  REQUIRE(stream.can_truncate(60));
  stream.truncate(60);
  wanted.truncate(60);
  CHECK(saved(stream) == saved(wanted));
}

TEST_CASE("infini_memory: recall applies only the gate and the memory", "[stream][infini]") {
  Random random(22);
  const Shape shape{2, 4, 2, 80, 80, 12, 9};
  Call<float> call(shape, Values::normal, random);
  const std::vector<float> beta{0.5f, -1, 2, 0};
  infini_attention attend = options(16);
  attend.beta = longspan::per_head_gate(beta);
  auto stream = attend.stream(stream_shape(shape));
  extend(stream, call, 0, 80);  // five segments: none is open

  // Local attention to a single key is its value.
  const auto token = [](const auto& x) { return x.view().slice_rows(7, 1); };
  Tensor<float> whole(2, 4, 1, 9), gated(2, 4, 1, 9);
  stream.peek(token(std::as_const(call.q)), token(std::as_const(call.k)), token(std::as_const(call.v)),
              whole.view());
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 4; ++h) std::copy_n(call.v.row(b, h / 2, 7), 9, gated.row(b, h, 0));
  }
  stream.recall(token(std::as_const(call.q)), gated.view());
  CHECK(gated == whole);

  CHECK(refusal([&] { stream.recall(token(std::as_const(call.q)), call.out.view()); }) ==
        "longspan: infini_memory::recall: out is [2, 4, 80, 9], wanted [2, 4, 1, 9]");
  // With an empty memory the gate applies, or the local part is unchanged.
  const Tensor<float> before = gated;
  attend.empty_memory = EmptyMemory::bypass;
  auto empty = attend.stream(stream_shape(shape));
  empty.recall(token(std::as_const(call.q)), gated.view());
  CHECK(gated == before);
}

TEST_CASE("infini_memory: a state with impossible numbers is refused, even with right checksums",
          "[stream][file][errors][infini]") {
  Random random(23);
  Call<float> call(Shape{1, 1, 1, 10, 10, 3, 2}, Values::normal, random);
  auto stream = options(4).stream({1, 1, 1, 3, 2}, {.rollback = 3}), target = stream;
  extend(stream, call, 0, 10);
  extend(target, call, 0, 7);
  const std::string whole = saved(stream), before = saved(target);
  REQUIRE(refused(target, forged(whole, 0, std::int64_t{2})) == "");  // the original number
  load(target, before);

  const auto says = [&](const std::string& state, const std::string& what) {
    const std::string text = refused(target, state);
    CHECK(text.find("longspan: infini_memory::load: " + what) == 0);
    CHECK(saved(target) == before);
  };
  // The payload: filled, written, tokens of the second memory and number of closed segments of the one batch row, then
  // the lengths of these segments.
  for (const std::int64_t x : {std::int64_t{-1}, std::int64_t{4}, INT64_MAX})
    says(forged(whole, 0, x), "the number of open rows is");
  for (const std::int64_t x : {std::int64_t{-1}, (std::int64_t{1} << 53) + 1, INT64_MAX, INT64_MIN})
    says(forged(whole, 8, x), "the number of tokens is");
  for (const std::int64_t x : {-1, 9})
    says(forged(whole, 16, std::int64_t{x}), "the number of tokens in the second memory is");
  for (const std::int64_t x : {std::int64_t{-1}, std::int64_t{0}, std::int64_t{9}, INT64_MAX})
    says(forged(whole, 24, x), "the number of closed segments is");
  says(forged(whole, 8, std::int64_t{1} << 53), "the payload is");
  for (const std::int64_t x : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{5}, INT64_MAX})
    says(forged(whole, 32, x), "the length of a closed segment is");
  says(forged(whole, 32, std::int64_t{3}), "the rows of the last closed segment is 1");

  // The norms of both memories, each after an M of 3 x 2.
  const float bad[] = {-1.0f, std::numeric_limits<float>::infinity(),
                       std::numeric_limits<float>::quiet_NaN()};
  const std::size_t memory = 40, numbers = sizeof(float);
  REQUIRE(stream.can_truncate(7));
  for (const float x : bad) {
    says(forged(whole, memory + 6 * numbers, x), "a norm is");
    says(forged(whole, memory + 8 * numbers, x), "a norm is");
    says(forged(whole, memory + 15 * numbers, x), "a norm is");
    CHECK(refused(target, forged(whole, memory + 3 * numbers, x)) == "");  // M may be negative
    load(target, before);
  }
  auto endless = options(Index{1} << 62).stream({1, 1, 1, 3, 2});
  says(forged(saved(endless), 0, Index{1} << 61), "segment is");
  CHECK(refused(endless, forged(saved(endless), 0, Index{1} << 61)).find("the number of open rows is") !=
        std::string::npos);
  CHECK(refused(endless, forged(saved(endless), 0, Index{1} << 53)).find("the payload is") !=
        std::string::npos);
}

TEST_CASE("infini_memory: a file with other options is refused by the name of the option",
          "[stream][file][errors][infini]") {
  Random random(24);
  Call<float> call(Shape{1, 2, 1, 20, 20, 4, 4}, Values::normal, random);
  const auto said = [](const auto& stream, auto other) {
    const std::string text = refused(other, saved(stream)), begin = "longspan: infini_memory::load: ";
    REQUIRE(text.substr(0, begin.size()) == begin);
    CHECK(other.size() == 0);
    return text.substr(begin.size());
  };
  const StreamShape shape{1, 2, 1, 4, 4};
  auto stream = options(8).stream<bfloat16>(shape);
  extend(stream, call, 0, 20);
  CHECK(said(stream, options(8).stream<Eigen::half>(shape)) ==
        "the element type is bfloat16 in the file, wanted half as in this stream");
  CHECK(said(stream, options(8).stream<bfloat16>({1, 2, 2, 4, 4})) ==
        "kv_heads is 1 in the file, wanted 2 as in this stream");
  CHECK(said(stream, options(8, InfiniRule::delta).stream<bfloat16>(shape)) ==
        "rule is linear in the file, wanted delta as in this stream");
  auto attend = options(8);
  attend.empty_memory = EmptyMemory::bypass;
  CHECK(said(stream, attend.stream<bfloat16>(shape)) ==
        "empty_memory is gate in the file, wanted bypass as in this stream");
  attend = options(8);
  attend.local.scale = 0.25;
  CHECK(said(stream, attend.stream<bfloat16>(shape)) ==
        "scale is 0.5 in the file, wanted 0.25 as in this stream");

  const auto turned = [](double base) {
    infini_attention turning{longspan::softmax_attention{
        longspan::causal{}, longspan::rotary(longspan::Pairing::half_split, base)}};
    turning.segment = 8;
    return turning;
  };
  CHECK(said(stream, turned(1e4).stream<bfloat16>(shape)) ==
        "the position encoding is none in the file, wanted rotary as in this stream");
  auto of_turned = turned(1e4).stream(shape);
  CHECK(said(of_turned, turned(5e5).stream(shape)) ==
        "the base of the positions is 10000 in the file, wanted 500000 as in this stream");
  auto positions = turned(1e4);
  positions.memory_uses_positions = true;
  CHECK(said(of_turned, positions.stream(shape)) ==
        "memory_uses_positions is false in the file, wanted true as in this stream");

  const auto dilated = [](Index segment) {
    infini_attention attend_dilated{longspan::dilated_attention{{{2, 1}, {segment, 2}}, longspan::causal{}}};
    attend_dilated.segment = 8;
    return attend_dilated;
  };
  auto of_dilated = dilated(4).stream(shape);
  CHECK(said(of_dilated, options(8).stream(shape)) ==
        "the local attention is dilated_attention in the file, wanted softmax_attention as in this stream");
  CHECK(said(of_dilated, dilated(8).stream(shape)) ==
        "a segment of the local attention is 4 in the file, wanted 8 as in this stream");
}

TEST_CASE("infini_memory: M and z match the definition for segments longer than a key block",
          "[stream][infini]") {
  Random random(25);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    Call<float> call(Shape{1, 1, 1, 700, 700, 20, 12}, Values::normal, random);
    const infini_attention attend = options(350, rule);
    auto stream = attend.stream({1, 1, 1, 20, 12});
    extend(stream, call, 0, 700);
    longspan::reference::InfiniMemory exact(20, 12);
    for (const Index first : {0, 350}) {
      longspan::reference::write(
          exact, longspan::MatrixView<const float>{call.k.row(0, 0, first), 350, 20, 20},
          longspan::MatrixView<const float>{call.v.row(0, 0, first), 350, 12, 12}, rule, attend.feature);
    }
    for (Index c = 0; c < 20; ++c) {
      CHECK(std::abs(double(stream.norm(0, 0, c)) / exact.z[static_cast<std::size_t>(c)] - 1) < 1e-6);
      for (Index column = 0; column < 12; ++column)
        CHECK(std::abs(double(stream.memory(0, 0, c, column)) - exact.at(c, column)) < 1e-3);
    }
  }
}

TEST_CASE("infini_memory: a norm below the smallest one is replaced by it", "[stream][infini]") {
  // phi is exp(-30) = 9.4e-14: phi(q) z is 4 * 8 * 8.8e-27.
  Tensor<float> x(1, 1, 4, 8, -30.0f), ones(1, 1, 4, 6, 1.0f), out(1, 1, 4, 6, 0.0f);
  infini_attention attend = options(4);
  const float beta = 100;
  attend.beta = longspan::scalar_gate(beta);
  auto stream = attend.stream({1, 1, 1, 8, 6});
  stream.append(0, x.view(), ones.view());
  stream.recall(x.view(), out.view());
  const double phi = std::exp(-30.0), wanted = 4 * 8 * phi * phi / longspan::infini_least_norm;
  for (const float got : out.values) CHECK(std::abs(double(got) / wanted - 1) < 1e-4);
}

TEST_CASE("infini_memory: batch rows of different lengths keep their open rows when the room grows",
          "[stream][infini]") {
  Random random(26);
  Call<float> call(Shape{3, 2, 2, 60, 60, 8, 4}, Values::normal, random);
  auto stream = options(50).stream({3, 2, 2, 8, 4}), wanted = stream;
  const auto append = [&](auto& into, Index b, Index first, Index count) {
    const auto part = [&](const auto& x) {
      return longspan::detail::batch_row(x.view(), b).slice_rows(first, count);
    };
    into.append(b, part(call.k), part(call.v));
  };
  const Index lengths[] = {3, 40, 0};
  for (Index b = 0; b < 3; ++b) append(wanted, b, 0, lengths[b] + 5);
  for (Index first = 0; first < 45; ++first) {  // one row at a time: the room grows
    for (Index b = 0; b < 3; ++b)
      if (first < lengths[b] + 5) append(stream, b, first, 1);
  }
  CHECK(saved(stream) == saved(wanted));
}

TEST_CASE("infini_memory: a stream without batch rows has no tokens", "[stream][infini]") {
  auto stream = options(4).stream({0, 2, 1, 8, 4}, {.rollback = 2});
  Call<float> call(Shape{0, 2, 1, 5, 5, 8, 4});
  extend(stream, call, 0, 5);
  stream.flush();
  CHECK(stream.size() == 0);
  CHECK(stream.open_rows() == 0);
  CHECK(stream.can_truncate(0));
  stream.truncate(0);
  CHECK_FALSE(stream.can_truncate(1));
  load(stream, saved(stream));
  stream.clear();
  CHECK(stream.size(-1) == 0);
  CHECK(refusal([&] { stream.reset(0); }) ==
        "longspan: infini_memory::reset: the batch row is 0, wanted none, because the batch is 0");
}

TEST_CASE("infini_memory: if a score throws the stream has whole tokens, and peek changes nothing",
          "[stream][infini]") {
  Random random(27);
  bool armed = false;
  const auto score = [&armed](float s, Index, Index, Index i, Index) {
    if (armed && i == 5) throw std::runtime_error("score");
    return s;
  };
  infini_attention attend{longspan::softmax_attention{longspan::causal{}, score}};
  attend.segment = 8;
  Call<float> call(Shape{1, 2, 1, 30, 30, 4, 4}, Values::normal, random);
  auto stream = attend.stream({1, 2, 1, 4, 4});
  extend(stream, call, 0, 11);
  const std::string before = saved(stream);
  const auto part = [&](const auto& x) { return std::as_const(x).view().slice_rows(11, 4); };
  armed = true;
  CHECK_THROWS_AS(stream.peek(part(call.q), part(call.k), part(call.v), call.out.view().slice_rows(11, 4)),
                  std::runtime_error);
  CHECK(saved(stream) == before);
  CHECK_THROWS_AS(extend(stream, call, 11, 4), std::runtime_error);
  CHECK(stream.size() == 11);
  CHECK(saved(stream) == before);
  armed = false;
  extend(stream, call, 11, 5);
  auto loaded = attend.stream({1, 2, 1, 4, 4});  // its functor cannot be assigned
  load(loaded, saved(stream));
  CHECK(saved(loaded) == saved(stream));
}

TEST_CASE("infini_memory: a window that shows later keys is refused", "[stream][errors][infini]") {
  const auto said = [](const auto& mask) {
    return refusal([&] {
      infini_attention attend{longspan::softmax_attention{mask}};
      auto stream = attend.stream({1, 1, 1, 4, 4});
    });
  };
  const std::string text =
      "longspan: infini_memory: the mask of the local attention is a mask that shows later keys, wanted "
      "causal{}, causal{} & another mask, or window{.right = 0}, because later keys do not exist yet";
  using longspan::causal;
  using longspan::window;
  CHECK(said(window{.left = 3, .right = 3}) == text);
  CHECK(said(window{.left = 3}) == text);
  CHECK(said(causal{} | window{.left = 3, .right = 1}) == text);
  CHECK(said(window{.left = 3, .right = 0}) == "");
  CHECK(said(causal{} & window{.left = 3}) == "");
  CHECK(said(causal{} & (longspan::sinks{4} | window{.left = 3})) == "");
  CHECK(said(causal{} | window{.left = 3, .right = 0}) == "");
}
