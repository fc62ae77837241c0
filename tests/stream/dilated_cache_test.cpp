#include "longspan/stream/dilated_cache.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "longspan/reference/dilated_attention.hpp"
#include "support/catch.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/saved.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::Branch;
using longspan::causal;
using longspan::dilated_attention;
using longspan::StreamShape;
using Branches = std::vector<Branch>;

Shape draw_self_shape(Random& random) {
  Shape shape{random.between(1, 2),       0, random.between(1, 2), 0, 0, random.pick({2, 8, 16, 34}),
              random.pick({1, 8, 20, 32})};
  shape.heads = shape.kv_heads * random.between(1, 3);
  shape.q_len = shape.kv_len = random.pick({0, 1, 5, 17, 64, 130, 300});
  return shape;
}

Branches draw_branches(Random& random) {
  Branches branches(static_cast<std::size_t>(random.between(1, 4)));
  for (Branch& branch : branches) {
    branch.segment =
        random.pick({Index{1}, Index{3}, Index{8}, Index{50}, Index{128}, Index{1000}, Index{1} << 62});
    branch.dilation =
        random.pick({Index{1}, Index{1}, Index{2}, Index{3}, Index{7}, Index{40}, Index{1} << 61});
  }
  return branches;
}

/// The stream of `attend` against the reference of `whole`, one call over all rows.
template <class Attend, class Whole>
void check_stream(Random& random, Attend attend, Whole whole) {
  const Shape shape = draw_self_shape(random);
  whole.branches = attend.branches = draw_branches(random);
  attend.phase = whole.phase = random.pick({longspan::Phase::modulo, longspan::Phase::blocked});
  attend.overlap = whole.overlap = random.pick({longspan::Overlap::multiset, longspan::Overlap::set});
  INFO(shape.text());
  Call<double> exact(shape, Values::normal, random);
  longspan::reference::exact{whole}(exact.q.view(), exact.k.view(), exact.v.view(), exact.out.view(),
                                    exact.lse.view());

  Call<double> chunks = exact.unrun(), tokens = exact.unrun();
  auto stream = attend.template stream<double>(stream_shape(shape));
  extend_in_chunks(stream, chunks, random, chunks.q.rows, random.pick({3, 20, 400}));
  CHECK(stream.size() == shape.q_len);
  auto one_by_one = attend.template stream<double>(stream_shape(shape));
  for (Index n = 0; n < shape.q_len; ++n) extend(one_by_one, tokens, n, 1);
  for (const auto* run : {&chunks, &tokens}) {
    for (std::size_t n = 0; n < exact.out.values.size(); ++n)
      REQUIRE(std::abs(run->out.values[n] - exact.out.values[n]) < 1e-12);
    for (std::size_t n = 0; n < exact.lse.values.size(); ++n) {
      const double got = run->lse.values[n], wanted = exact.lse.values[n];
      REQUIRE((got == wanted || std::abs(got - wanted) < 1e-12));
    }
  }
}

const Branches three{{16, 1}, {50, 3}, {64, 4}};

}  // namespace

TEST_CASE("dilated_cache: chunks and single tokens match a single call at every position", "[law]") {
  for_each_case(60, [](Random& random) {
    const longspan::rotary turn(longspan::Pairing::interleaved);
    const dilated_attention plain{three, causal{}};
    check_stream(random, plain, plain);
    const longspan::softcap cap{2};
    const dilated_attention with_parts{three, causal{}, turn, cap};
    check_stream(random, with_parts, with_parts);
    const auto near_heads = [](double s, Index b, Index h, Index i, Index j) {
      return j % 5 == b ? -INFINITY : s + 0.1 * double(b + 1) * double(h + 1) / double(i - j + 1);
    };
    const dilated_attention with_lambda{three, causal{}, near_heads};
    check_stream(random, with_lambda, with_lambda);
    const dilated_attention with_both{three, causal{}, cap | near_heads};
    check_stream(random, with_both, with_both);
    const longspan::window near{.left = 20};
    check_stream(random, dilated_attention{three, near}, dilated_attention{three, causal{} & near});
  });
}

namespace {

/// Does a branch or the mask show a query of tokens [first, end) a key after them?
template <class M>
bool shows_later_keys(const M& mask, const Branches& branches, Index first, Index end) {
  for (Index i = first; i < end; ++i) {
    for (Index j = end; j < 400; ++j) {
      for (const Branch& branch : branches) {
        if (i / branch.segment != j / branch.segment) continue;
        if (longspan::sees(mask, 0, 0, i, j) || longspan::sees(mask, 1, 0, i, j)) return true;
      }
    }
  }
  return false;
}

/// Compares a stream with `mask` to a single call, in chunks that contain the keys of their queries; other chunks are
/// refused.
template <class M>
void check_literal(const M& mask, Random& random) {
  using longspan::Overlap;
  dilated_attention attend{three, mask};
  attend.overlap = random.pick({Overlap::multiset, Overlap::set});
  // The longest sequence of at most 150 tokens that ends with all that is seen.
  Shape shape{2, 4, 2, 150, 150, 8, 8};
  while (shows_later_keys(mask, three, 0, shape.q_len)) --shape.q_len;
  shape.kv_len = shape.q_len;
  Call<double> exact(shape, Values::normal, random), call = exact.unrun();
  longspan::reference::exact{attend}(exact.q.view(), exact.k.view(), exact.v.view(), exact.out.view(),
                                     exact.lse.view());
  auto stream = attend.template stream<double>(stream_shape(shape));
  while (stream.size() < shape.q_len) {
    const Index first = stream.size();
    Index count = std::min(shape.q_len - first, random.between(1, 40));
    for (; shows_later_keys(mask, three, first, first + count); ++count) {
      if (random.chance(0.7)) continue;
      const std::string before = saved(stream);
      REQUIRE(refusal([&] { extend(stream, call, first, count); }).find(" may see keys up to ") !=
              std::string::npos);
      REQUIRE(saved(stream) == before);
    }
    extend(stream, call, first, count);
  }
  for (std::size_t n = 0; n < exact.out.values.size(); ++n)
    REQUIRE(std::abs(call.out.values[n] - exact.out.values[n]) < 1e-12);
  for (std::size_t n = 0; n < exact.lse.values.size(); ++n) {
    const double got = call.lse.values[n], wanted = exact.lse.values[n];
    REQUIRE((got == wanted || std::abs(got - wanted) < 1e-12));
  }
}

}  // namespace

TEST_CASE("dilated_cache: one token and alibi, whose slopes differ from head to head", "[law]") {
  Random random(11);
  const Shape shape{2, 6, 2, 200, 200, 16, 16};
  const std::vector<float> slopes{0.5f, 0.25f, 0.125f, 1, 2, 0.75f};
  const longspan::alibi bias{slopes};
  Call<double> exact(shape, Values::normal, random), tokens = exact.unrun();
  const dilated_attention attend{three, causal{}, bias};
  longspan::reference::exact{attend}(exact.q.view(), exact.k.view(), exact.v.view(), exact.out.view(),
                                     exact.lse.view());
  auto stream = attend.stream<double>(stream_shape(shape));
  for (Index n = 0; n < shape.q_len; ++n) extend(stream, tokens, n, 1);
  for (std::size_t n = 0; n < exact.out.values.size(); ++n)
    REQUIRE(std::abs(tokens.out.values[n] - exact.out.values[n]) < 1e-12);
  for (std::size_t n = 0; n < exact.lse.values.size(); ++n)
    REQUIRE(std::abs(tokens.lse.values[n] - exact.lse.values[n]) < 1e-12);
}

TEST_CASE("dilated_cache: a chunk with all keys that its queries may see gives the outputs of a single call",
          "[law]") {
  using namespace longspan;
  const std::vector<Index> lengths{50, 23}, starts{0, 9, 30, 31, 80, 200};
  for_each_case(8, [&](Random& random) {
    check_literal(causal{} | sinks{21}, random);
    check_literal(causal{} | sinks{90}, random);  // the prefix ends after two branches' first segments
    check_literal(segments{12} | sinks{5}, random);
    check_literal(padding{lengths}, random);
    check_literal(window{.left = 7, .right = 6}, random);
    check_literal(documents{starts}, random);
  });
}

TEST_CASE("dilated_cache: a call copies no mask, which may own a large array", "[state]") {
  static int copies;
  struct owner {
    std::vector<Index> ends = std::vector<Index>(200, 40);
    owner() = default;
    owner(const owner& other) : ends(other.ends) { ++copies; }
    owner& operator=(const owner&) = default;
    longspan::KeyRange keys(Index, Index i) const {
      return {0, std::max(i + 1, ends[static_cast<std::size_t>(i)])};
    }
  };
  Random random(13);
  const Shape shape{1, 2, 1, 100, 100, 8, 8};
  Call<float> call(shape, Values::normal, random);
  auto stream = dilated_attention{three, owner{}}.stream(stream_shape(shape));
  copies = 0;
  extend(stream, call, 0, 60);
  extend(stream, call, 60, 1);
  CHECK(copies == 0);
}

TEST_CASE("dilated_cache: a long chunk is cut only where no query sees beyond the cut", "[bits]") {
  Random random(12);
  const Shape shape{2, 8, 2, 3000, 3000, 8, 8};
  Call<float> once(shape, Values::normal, random), chunk = once.unrun();
  const dilated_attention attend{Branches{{2500, 1}, {4100, 3}}, causal{} | longspan::sinks{1500}};
  once.run(attend);
  auto stream = attend.stream(stream_shape(shape));
  extend(stream, chunk, 0, 3000);
  CHECK(chunk.same_outputs(once));
}

TEST_CASE("dilated_cache: has the bits of a single call if segments do not share tiles", "[bits]") {
  Random random(1);
  const Shape shape{1, 4, 2, 5000, 5000, 8, 8};
  Call<float> once(shape, Values::normal, random), chunks = once.unrun();
  const dilated_attention attend{Branches{{1000, 1}, {3000, 2}, {4100, 3}}, causal{}};
  once.run(attend);
  auto stream = attend.stream(stream_shape(shape));
  extend_in_chunks(stream, chunks, random, chunks.q.rows, 2500);
  CHECK(chunks.same_outputs(once));
}

TEST_CASE("dilated_cache: single tokens have the same bits with any number of threads", "[bits][slow]") {
  Random random(4);
  const Shape shape{2, 6, 2, 3000, 3000, 24, 20};
  Call<float> call(shape, Values::normal, random);
  const dilated_attention attend{Branches{{1000, 1}, {2600, 2}, {4100, 3}}, causal{}};
  auto filled = attend.stream(stream_shape(shape));
  extend(filled, call, 0, 2500);
  const auto decoded = [&](Index threads) {
    Call<float> tokens = call.unrun();
    auto stream = filled;
    for (Index n = 2500; n < 2620; ++n) {
      stream.extend(std::as_const(tokens.q).view().slice_rows(n, 1),
                    std::as_const(tokens.k).view().slice_rows(n, 1),
                    std::as_const(tokens.v).view().slice_rows(n, 1), tokens.out.view().slice_rows(n, 1),
                    longspan::openmp{threads});
    }
    return tokens.out;
  };
  const Tensor<float> alone = decoded(1);
  for (const Index threads : {2, 3, 7}) CHECK(decoded(threads) == alone);
}

TEST_CASE("dilated_cache: keeps exactly the rows of open segments that its offsets keep", "[state]") {
  Random random(2);
  const Shape shape{1, 2, 1, 1500, 1500, 4, 4};
  Call<float> call(shape, Values::normal, random);
  const Branches branches{{64, 1}, {256, 4}, {90, 7}};
  auto stream = dilated_attention{branches, causal{}}.stream(stream_shape(shape), {.rollback = 0});
  CHECK(stream.bytes() == 0);
  Index most_bytes = 0;
  for (Index n = 0; n < shape.q_len; ++n) {
    extend(stream, call, n, 1);
    Index rows = 0;
    for (Index m = 0; m <= n; ++m) {
      // Both heads share the rows of a dense branch.
      rows += m / 64 == (n + 1) / 64;
      for (Index h = 0; h < 2; ++h) {
        rows += m / 256 == (n + 1) / 256 && m % 256 % 4 == h;
        rows += m / 90 == (n + 1) / 90 && m % 90 % 7 == h;
      }
    }
    REQUIRE(stream.rows() == rows);
    most_bytes = std::max(most_bytes, stream.bytes());
  }
  CHECK(most_bytes == (64 + 2 * 64 + 2 * 13) * 8 * Index{sizeof(float)});
}

TEST_CASE("dilated_cache: closed segments have no effect", "[state]") {
  Random random(3);
  const Shape shape{1, 2, 2, 300, 300, 4, 4};
  Call<float> call(shape, Values::normal, random), spoiled = call;
  const dilated_attention attend{Branches{{50, 1}, {100, 2}}, causal{}};
  for (float& x : spoiled.v.values) x = NAN;  // the values of the first 200 tokens, in both heads
  for (Index h = 0; h < 2; ++h) std::copy_n(call.v.row(0, h, 200), 100 * 4, spoiled.v.row(0, h, 200));
  auto stream = attend.stream(stream_shape(shape)), of_spoiled = attend.stream(stream_shape(shape));
  extend(stream, call, 0, 300);
  extend_in_chunks(of_spoiled, spoiled, random, spoiled.q.rows, 70);
  for (Index h = 0; h < 2; ++h)
    CHECK(std::equal(call.out.row(0, h, 200), call.out.row(0, h, 200) + 400, spoiled.out.row(0, h, 200)));
}

TEST_CASE("dilated_cache: copies are independent, and clear starts again", "[state]") {
  Random random(4);
  const Shape shape{2, 3, 1, 200, 200, 8, 8};
  Call<float> call(shape, Values::normal, random), beam = call.unrun(), again = call.unrun();
  for (Index h = 0; h < 3; ++h) std::fill_n(beam.q.row(0, h, 90), 8, 7.0f);
  const dilated_attention attend{three, causal{}};
  auto stream = attend.stream(stream_shape(shape));
  extend(stream, call, 0, 90);
  auto copy = stream;
  extend(copy, beam, 90, 110);
  extend(stream, call, 90, 110);
  CHECK_FALSE(std::equal(call.out.row(0, 0, 90), call.out.row(0, 0, 91), beam.out.row(0, 0, 90)));
  CHECK(std::equal(call.out.row(0, 0, 91), call.out.row(0, 0, 199), beam.out.row(0, 0, 91)));
  stream.clear();
  CHECK(stream.size() == 0);
  CHECK(stream.rows() == 0);
  extend(stream, again, 0, 200);
  CHECK(again.same_outputs(call));
}

TEMPLATE_TEST_CASE("dilated_cache: a loaded state continues the stream", "[state]", float, double, bfloat16) {
  Random random(5);
  const Shape shape{2, 4, 2, 160, 160, 8, 6};
  Call<TestType> call(shape, Values::normal, random), later = call.unrun();
  const dilated_attention attend{three, causal{}};
  auto stream = attend.template stream<TestType>(stream_shape(shape));
  extend(stream, call, 0, 77);
  std::stringstream file;
  stream.save(file);
  extend(stream, call, 77, 83);
  auto loaded = attend.template stream<TestType>(stream_shape(shape));
  extend(loaded, later, 0, 11);
  loaded.load(file);
  CHECK(loaded.size() == 77);
  extend(loaded, later, 77, 83);
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 4; ++h)
      CHECK(std::equal(call.out.row(b, h, 77), call.out.row(b, h, 77) + 83 * 6, later.out.row(b, h, 77)));
  }
}

TEST_CASE("dilated_cache: a damaged file or one of another stream is refused, and nothing changes",
          "[state][errors]") {
  Random random(6);
  const Shape shape{1, 2, 1, 100, 100, 4, 4};
  Call<float> call(shape, Values::normal, random), after = call.unrun();
  const dilated_attention attend{three, causal{}};
  auto stream = attend.stream(stream_shape(shape));
  extend(stream, call, 0, 60);
  std::stringstream file;
  stream.save(file);
  const std::string bytes = file.str();
  check_damage_is_refused(stream, bytes, 1, "dilated_cache::load");
  for (const std::size_t length : {std::size_t{0}, std::size_t{40}, bytes.size() / 2, bytes.size() - 1})
    CHECK_FALSE(refused(stream, bytes.substr(0, length)).empty());

  // A complete file with right checksums whose header has impossible numbers.
  const auto forged = [&](std::size_t number, std::int64_t value) {
    std::string state = bytes;
    std::memcpy(&state[32 + 8 * number], &value, 8);
    longspan::detail::Crc32c sum;
    const std::size_t header = 32 + 8 * 19;
    sum.add(state.data(), header);
    const std::uint32_t summed = sum.value();
    std::memcpy(&state[header], &summed, 4);
    return refused(stream, state);
  };
  for (const std::int64_t size : {std::int64_t{-1}, INT64_MAX, INT64_MAX - 3, (std::int64_t{1} << 53) + 1})
    CHECK(forged(18, size).find("dilated_cache::load: the number of tokens is") != std::string::npos);
  CHECK(forged(17, 61) == "longspan: dilated_cache::load: the least number of tokens is 61, wanted 0..60");
  CHECK(forged(17, -1).find("the least number of tokens is -1") != std::string::npos);
  CHECK(forged(18, std::int64_t{1} << 53).find("the payload is") != std::string::npos);
  const dilated_attention endless{Branches{{Index{1} << 62, 1}, {1, 1}, {1, 1}}, causal{}};
  auto long_stream = endless.stream(stream_shape(shape), {.rollback = 0});
  std::ostringstream of_long;
  long_stream.save(of_long);
  std::string claims = of_long.str();
  const Index tokens = Index{1} << 53;
  std::memcpy(&claims[32 + 8 * 18], &tokens, 8);
  longspan::detail::Crc32c sum;
  sum.add(claims.data(), 32 + 8 * 19);
  const std::uint32_t summed = sum.value();
  std::memcpy(&claims[32 + 8 * 19], &summed, 4);
  CHECK(refused(long_stream, claims).find("dilated_cache::load: the payload is") != std::string::npos);

  extend(stream, call, 60, 40);
  auto whole = attend.stream(stream_shape(shape));
  extend(whole, after, 0, 100);
  CHECK(after.same_outputs(call));
}

TEST_CASE("dilated_cache: a file with other options is refused by the name of the option",
          "[state][errors]") {
  Random random(7);
  Call<float> call(Shape{1, 2, 1, 60, 60, 4, 4}, Values::normal, random);
  const longspan::rotary turn(longspan::Pairing::half_split, 1e4);
  const auto attend = [&](const Branches& branches, const longspan::rotary& positions) {
    return dilated_attention{branches, causal{}, positions};
  };
  auto stream = attend(three, turn).stream<bfloat16>({1, 2, 1, 4, 4});
  extend(stream, call, 0, 60);
  std::ostringstream file;
  stream.save(file);
  const auto said = [&](auto other) {
    const std::string text = refused(other, file.str()), begin = "longspan: dilated_cache::load: ";
    REQUIRE(text.substr(0, begin.size()) == begin);
    CHECK(other.size() == 0);
    return text.substr(begin.size());
  };
  const StreamShape shape{1, 2, 1, 4, 4};
  CHECK(said(attend(three, turn).stream<Eigen::half>(shape)) ==
        "the element type is bfloat16 in the file, wanted half as in this stream");
  CHECK(said(attend(three, turn).stream<bfloat16>({1, 2, 2, 4, 4})) ==
        "kv_heads is 1 in the file, wanted 2 as in this stream");
  CHECK(said(attend({{16, 1}, {50, 3}, {64, 8}}, turn).stream<bfloat16>(shape)) ==
        "the dilation of branch 2 is 4 in the file, wanted 8 as in this stream");
  CHECK(said(attend({{16, 1}}, turn).stream<bfloat16>(shape)) ==
        "the number of branches is 3 in the file, wanted 1 as in this stream");
  CHECK(said(attend(three, longspan::rotary(longspan::Pairing::half_split, 5e5)).stream<bfloat16>(shape)) ==
        "the base of the positions is 10000 in the file, wanted 500000 as in this stream");
  CHECK(said(attend(three, longspan::rotary(longspan::Pairing::interleaved, 1e4)).stream<bfloat16>(shape)) ==
        "the pairing of the positions is half_split in the file, wanted interleaved as in this stream");
  CHECK(said(dilated_attention{three, causal{}}.stream<bfloat16>(shape)) ==
        "the position encoding is rotary in the file, wanted none as in this stream");
  auto options = attend(three, turn);
  options.phase = longspan::Phase::blocked;
  CHECK(said(options.stream<bfloat16>(shape)) ==
        "phase is modulo in the file, wanted blocked as in this stream");
  options.phase = longspan::Phase::modulo;
  options.overlap = longspan::Overlap::set;
  CHECK(said(options.stream<bfloat16>(shape)) ==
        "overlap is multiset in the file, wanted set as in this stream");
  options.overlap = longspan::Overlap::multiset;
  options.scale = 0.25;
  CHECK(said(options.stream<bfloat16>(shape)) == "scale is 0.5 in the file, wanted 0.25 as in this stream");
}

TEST_CASE("dilated_cache: with value_dim 0 it writes the lse of a single call", "[state]") {
  Random random(8);
  for (const Index head_dim : {0, 8}) {
    const Shape shape{2, 4, 2, 70, 70, head_dim, 0};
    Call<float> once(shape, Values::normal, random), chunks = once.unrun(), tokens = once.unrun();
    const dilated_attention attend{three, causal{}};
    once.run(attend);
    auto in_chunks = attend.stream(stream_shape(shape)), one_by_one = in_chunks;
    extend_in_chunks(in_chunks, chunks, random, 70, 30);
    for (Index n = 0; n < 70; ++n) extend(one_by_one, tokens, n, 1);
    for (std::size_t n = 0; n < once.lse.values.size(); ++n) {
      const float wanted = once.lse.values[n];
      REQUIRE((chunks.lse.values[n] == wanted || std::abs(chunks.lse.values[n] - wanted) < 1e-5f));
      REQUIRE((tokens.lse.values[n] == wanted || std::abs(tokens.lse.values[n] - wanted) < 1e-5f));
    }
  }
}

TEST_CASE("dilated_cache: without a mask it runs the same kernels as with causal", "[bits]") {
  Random random(9);
  const Shape shape{1, 4, 2, 200, 200, 16, 16};
  Call<float> with(shape, Values::normal, random), without = with.unrun();
  auto masked = dilated_attention{three, causal{}}.stream(stream_shape(shape));
  auto plain = dilated_attention{three}.stream(stream_shape(shape));
  for (Index n = 0; n < 200; ++n) {
    extend(masked, with, n, 1);
    extend(plain, without, n, 1);
  }
  CHECK(without.same_outputs(with));
}

TEST_CASE("dilated_cache: invalid options and shapes are refused", "[errors]") {
  const dilated_attention attend{three, causal{}};
  CHECK(refusal([&] {
          attend.stream({1, 3, 2, 4, 4});
        }).find("dilated_cache: the shape [batch, heads, kv_heads, head_dim] is [1, 3, 2, 4]") !=
        std::string::npos);
  CHECK(refusal([&] { attend.stream({1, 2, 2, -4, 4}); }).find("the shape") != std::string::npos);
  CHECK(refusal([] {
          dilated_attention{Branches{}, causal{}}.stream({1, 2, 2, 4, 4});
        }).find("number of branches is 0") != std::string::npos);
  auto stream = attend.stream({1, 2, 2, 4, 4});
  Call<float> call(Shape{1, 2, 1, 5, 5, 4, 4});
  CHECK(refusal([&] { extend(stream, call, 0, 5); }).find("1 KV heads") != std::string::npos);
  Call<float> uneven(Shape{1, 2, 2, 5, 6, 4, 4});
  CHECK(refusal([&] {
          stream.extend(uneven.q.view(), uneven.k.view(), uneven.v.view(), uneven.out.view());
        }).find("rows of k is 6, wanted 5") != std::string::npos);
  CHECK(stream.size() == 0);
  auto prefix = dilated_attention{three, causal{} | longspan::sinks{8}}.stream({1, 2, 1, 4, 4});
  CHECK(refusal([&] { extend(prefix, call, 0, 5); }) ==
        "longspan: dilated_cache::extend: the chunk is the tokens 0 to 4, but query 0 may see keys up to "
        "7, "
        "wanted a "
        "longer chunk that contains these keys, or the mask causal{} & mask");
  CHECK(prefix.size() == 0);
  dilated_attention padded{three, causal{} | longspan::sinks{8}};
  padded.zero_pad_compat = true;
  CHECK(refusal([&] {
          padded.stream({1, 2, 1, 4, 4});
        }).find("dilated_cache: zero_pad_compat is true") != std::string::npos);
  dilated_attention shifted = attend;
  shifted.first_query = 3;
  CHECK(refusal([&] {
          shifted.stream({1, 2, 2, 4, 4});
        }) ==
        "longspan: dilated_cache: first_query is 3, wanted no value, because queries are at the positions of "
        "their tokens");
}
