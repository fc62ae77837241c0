#include "longspan/stream/infini_memory.hpp"

#include <cmath>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/infini_oracle.hpp"
#include "support/refusal.hpp"
#include "support/stream_calls.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::infini_attention;
using longspan::InfiniFirst;
using longspan::InfiniRule;
using longspan::StreamShape;
using longspan::TensorView;

/// All rows, in chunks as `next` draws them.
template <class Stream, class T, class Next>
void extend_by(Stream& stream, Call<T>& call, const Next& next) {
  for (Index first = 0; first < call.q.rows;) {
    const Index count = std::min(next(), call.q.rows - first);
    extend(stream, call, first, count);
    first += count;
  }
}

template <class Stream>
std::string saved(const Stream& stream) {
  std::ostringstream to;
  stream.save(to);
  return to.str();
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

}  // namespace

TEMPLATE_TEST_CASE("infini_memory: any chunks give what one call gives", "[stream][infini]", float, double) {
  Random random(1);
  for (int n = 0; n < 60; ++n) {
    const Shape shape = draw_infini_shape(random);
    infini_attention attend = options(random.pick(std::vector<Index>{1, 3, 16, 50, 64, 1000}),
                                      random.chance(0.5) ? InfiniRule::linear : InfiniRule::delta);
    if (random.chance(0.3)) attend.first = InfiniFirst::bypass;
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

TEST_CASE("infini_memory: M and z are those of the definition", "[stream][infini]") {
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

TEST_CASE("infini_memory: flush writes the open segment as it is", "[stream][infini]") {
  Random random(3);
  Call<float> call(Shape{1, 1, 1, 40, 40, 8, 8}, Values::normal, random);
  auto flushed = options(30).stream({1, 1, 1, 8, 8}), exact = options(20).stream({1, 1, 1, 8, 8});
  extend(flushed, call, 0, 20);
  flushed.flush();
  CHECK(flushed.open_rows() == 0);
  extend(exact, call, 0, 20);
  for (Index c = 0; c < 8; ++c) CHECK(flushed.norm(0, 0, c) == exact.norm(0, 0, c));
  CHECK(flushed.size() == 20);
  flushed.flush();  // of nothing does nothing
  CHECK(flushed.size() == 20);
}

TEST_CASE("infini_memory: peek gives what extend would, and leaves the stream", "[stream][infini]") {
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

TEST_CASE("infini_memory: a row that is reset is new, and the others go on", "[stream][infini]") {
  Random random(5);
  Call<float> call(Shape{2, 2, 1, 80, 80, 16, 16}, Values::normal, random), other = call;
  const infini_attention attend = options(32);
  auto stream = attend.stream({2, 2, 1, 16, 16}), fresh = stream;
  extend(stream, call, 0, 40);
  stream.reset(1);
  CHECK(stream.size(0) == 40);
  CHECK(stream.size(1) == 0);
  extend(stream, call, 40, 40);
  // Row 1 as a stream that begins there, row 0 as if nothing had happened.
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

TEST_CASE("infini_memory: state does not grow, and z stays exact, over 10^6 tokens",
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

TEST_CASE("infini_memory: what was saved is loaded, to the bit", "[stream][file][infini]") {
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
    CHECK_THROWS_AS(load(target, whole.substr(0, bytes)), longspan::Error);
  for (std::size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    std::string flipped = whole;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    CHECK_THROWS_AS(load(target, flipped), longspan::Error);
  }
  CHECK(saved(target) == before);
  auto other = options(5).stream({1, 1, 1, 3, 2});
  CHECK(refusal([&] { load(other, whole); }) ==
        "longspan: infini_memory::load: the file is a state of other shapes or options, wanted one of this "
        "stream's");
}

TEST_CASE("infini_memory: what does not fit is refused", "[stream][errors][infini]") {
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
        "longspan: infini_memory: q is [1, 2, 4, 8] with 1 KV heads and value_dim 8, wanted [1, 2, 4, 8] "
        "with 2 "
        "and 8");
  CHECK(stream.size() == 0);
}

TEST_CASE("infini_memory: absorbed rows leave the state of rows whose outputs nobody read",
          "[stream][infini]") {
  Random random(21);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    const Shape shape{2, 4, 2, 77, 77, 12, 9};
    Call<float> call(shape, Values::normal, random);
    auto extended = options(16, rule).stream(stream_shape(shape)), absorbed = extended;
    extend_by(extended, call, [&] { return random.between(1, 40); });
    for (Index b = 0; b < shape.batch; ++b) {
      for (Index first = 0, count = 0; first < shape.q_len; first += count) {
        count = std::min(random.between(1, 40), shape.q_len - first);
        absorbed.absorb(
            b, longspan::detail::batch_row(std::as_const(call.k).view(), b).slice_rows(first, count),
            longspan::detail::batch_row(std::as_const(call.v).view(), b).slice_rows(first, count));
      }
    }
    CHECK(saved(absorbed) == saved(extended));
    CHECK(refusal([&] { absorbed.absorb(2, call.k.view(), call.v.view()); }) ==
          "longspan: infini_memory::absorb: the batch row is 2, wanted 0..1");
    CHECK(refusal([&] { absorbed.absorb(0, call.k.view(), call.v.view()); }) ==
          "longspan: infini_memory::absorb: k is [2, 2, 77, 12], wanted [1, 2, 77, 12]");
    CHECK(saved(absorbed) == saved(extended));
  }
}

TEST_CASE("infini_memory: recall is the gate alone", "[stream][infini]") {
  Random random(22);
  const Shape shape{2, 4, 2, 80, 80, 12, 9};
  Call<float> call(shape, Values::normal, random);
  const std::vector<float> beta{0.5f, -1, 2, 0};
  infini_attention attend = options(16);
  attend.beta = {beta.data(), 4, 1, 1};
  auto stream = attend.stream(stream_shape(shape));
  extend(stream, call, 0, 80);  // five segments: none is open

  // A local part of one key is its value.
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
  // Nothing is known: the gate holds, or what is local stands.
  const Tensor<float> before = gated;
  attend.first = InfiniFirst::bypass;
  auto empty = attend.stream(stream_shape(shape));
  empty.recall(token(std::as_const(call.q)), gated.view());
  CHECK(gated == before);
}
