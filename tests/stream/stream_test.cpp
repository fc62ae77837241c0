#include "longspan/stream/stream.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "longspan/stream/dilated_cache.hpp"
#include "longspan/stream/hybrid_stream.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "longspan/stream/kv_cache.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::dilated_attention;
using longspan::hybrid_retrieval;
using longspan::hybrid_stream;
using longspan::infini_attention;
using longspan::landmark_cache;
using longspan::landmark_retrieval;
using longspan::LseStream;
using longspan::openmp;
using longspan::softmax_attention;
using longspan::Stream;
using longspan::StreamShape;

const StreamShape shape{2, 6, 2, 16, 12};

softmax_attention<causal> exact() { return softmax_attention{causal{}}; }
auto ring() { return softmax_attention{causal{} & (longspan::window{.left = 31} | longspan::sinks{4})}; }
auto longnet() { return dilated_attention{std::vector<longspan::Branch>{{16, 1}, {64, 4}}, causal{}}; }
auto infini() {
  infini_attention<> attend;
  attend.segment = 24;
  return attend;
}

static_assert(LseStream<decltype(exact().stream(shape))>);
static_assert(LseStream<decltype(exact().stream<std::int8_t>(shape))>);
static_assert(LseStream<decltype(exact().stream<double>(shape)), double>);
static_assert(LseStream<decltype(longnet().stream(shape))>);
static_assert(LseStream<decltype(longnet().stream<double>(shape)), double>);
static_assert(LseStream<decltype(longnet().stream<std::int8_t>(shape))>);
static_assert(LseStream<landmark_cache<>>);
static_assert(LseStream<landmark_cache<double>, double>);
static_assert(LseStream<landmark_cache<std::int8_t>>);
static_assert(Stream<decltype(infini().stream(shape))>);
static_assert(Stream<decltype(infini().stream<double>(shape)), double>);
static_assert(!LseStream<decltype(infini().stream(shape))>);
static_assert(Stream<hybrid_stream<>> && Stream<hybrid_stream<double>, double>);
static_assert(!LseStream<hybrid_stream<>>);
static_assert(!Stream<softmax_attention<causal>> && !Stream<std::vector<float>>);

/// Calls work(name, stream) for every stream, as a program that exchanges its attention would.
template <class Work>
void for_each_stream(const Work& work) {
  work("kv_cache, one array", exact().stream(shape));
  work("kv_cache, pages", exact().stream(shape, {.page_size = 16}));
  work("kv_cache, ring", ring().stream(shape, {.page_size = 16}));
  work("kv_cache, int8", exact().stream<std::int8_t>(shape, {.page_size = 16}));
  work("dilated_cache", longnet().stream(shape));
  work("dilated_cache, int8", longnet().stream<std::int8_t>(shape));
  work("infini_memory", infini().stream(shape));
  const landmark_retrieval blocks{{.block_size = 8, .top_k = 3}};
  work("landmark_cache", blocks.stream(shape));
  work("landmark_cache, int8", blocks.stream<std::int8_t>(shape));
  const hybrid_retrieval hybrid{
      {.block_size = 8, .top_k = 3, .window_blocks = 2, .capacity = 4, .evicted_at_once = 2}};
  work("hybrid_stream", hybrid.stream(shape));
  work("hybrid_stream, int8", hybrid.stream<std::int8_t>(shape));
}

struct Tokens {
  Tensor<float> q{2, 6, 100, 16}, k{2, 2, 100, 16}, v{2, 2, 100, 12};

  Tokens() {
    Random random(1);
    fill(q, k, v, Values::normal, random);
  }
};

/// A prompt, then one token at a time: the loop of an inference engine.
template <class S>
requires Stream<S>
Tensor<float> decode(S& stream, const Tokens& tokens, Index length) {
  Tensor<float> out(2, 6, 100, 12, NAN);
  const Index prompt = 40;
  longspan::Execution execution(openmp{2});
  while (stream.size() < length) {
    const Index first = stream.size(), count = first < prompt ? prompt - first : 1;
    stream.extend(tokens.q.view().slice_rows(first, count), tokens.k.view().slice_rows(first, count),
                  tokens.v.view().slice_rows(first, count), out.view().slice_rows(first, count), execution);
  }
  return out;
}

bool same_rows(const Tensor<float>& a, const Tensor<float>& b, Index first, Index end) {
  bool same = true;
  for (Index n = 0; n < a.batch * a.heads; ++n)
    same = same && std::equal(a.row(0, n, first), a.row(0, n, end - 1) + a.cols, b.row(0, n, first));
  return same;
}

}  // namespace

TEST_CASE("stream: one loop decodes with every stream", "[law]") {
  const Tokens tokens;
  for_each_stream([&](const char* name, auto stream) {
    INFO(name);
    CHECK(stream.shape() == shape);
    CHECK(stream.size() == 0);
    const Tensor<float> out = decode(stream, tokens, 100);
    CHECK(stream.size() == 100);
    CHECK(stream.bytes() > 0);
    for (const float x : out.values) REQUIRE(std::isfinite(x));

    stream.clear();
    CHECK(stream.size() == 0);
    CHECK(decode(stream, tokens, 100) == out);
  });
}

TEST_CASE("stream: later queries see tokens that were appended without queries", "[law]") {
  const Tokens tokens;
  for_each_stream([&](const char* name, auto stream) {
    INFO(name);
    auto appended = stream;
    appended.append(tokens.k.view().slice_rows(0, 40), tokens.v.view().slice_rows(0, 40));
    CHECK(appended.size() == 40);
    CHECK(same_rows(decode(appended, tokens, 100), decode(stream, tokens, 100), 40, 100));
    CHECK(refusal([&] { appended.append(tokens.v.view(), tokens.k.view()); }).find("::append: k is") !=
          std::string::npos);
    CHECK(appended.size() == 100);
  });
}

TEST_CASE("stream: peek writes the outputs of extend, and does not change the stream", "[law]") {
  const Tokens tokens;
  const auto saved = [](const auto& stream) {
    std::ostringstream to;
    stream.save(to);
    return to.str();
  };
  for_each_stream([&](const char* name, auto stream) {
    INFO(name);
    decode(stream, tokens, 75);
    const std::string before = saved(stream);
    const auto part = [](auto& x) { return x.view().slice_rows(75, 25); };
    Tensor<float> seen(2, 6, 100, 12), out(2, 6, 100, 12);
    stream.peek(part(tokens.q), part(tokens.k), part(tokens.v), part(seen));
    CHECK(stream.size() == 75);
    CHECK(saved(stream) == before);
    stream.extend(part(tokens.q), part(tokens.k), part(tokens.v), part(out));
    CHECK(same_rows(seen, out, 75, 100));
  });
}

TEST_CASE("stream: reorder replaces a batch row by another", "[state]") {
  const Tokens tokens;
  Tokens twins;
  for (auto* x : {&twins.q, &twins.k, &twins.v}) {
    const auto half = static_cast<std::ptrdiff_t>(x->values.size() / 2);
    std::copy_n(x->values.begin() + half, half, x->values.begin());
  }
  for_each_stream([&](const char* name, auto stream) {
    INFO(name);
    decode(stream, tokens, 75);
    auto reordered = stream;
    reordered.reorder(std::vector<Index>{1, 1});
    CHECK(reordered.size() == 75);
    const Tensor<float> out = decode(stream, tokens, 100), of_both = decode(reordered, twins, 100);
    for (Index h = 0; h < 6; ++h) {
      for (Index b = 0; b < 2; ++b)
        REQUIRE(std::equal(of_both.row(b, h, 75), of_both.row(b, h, 99) + 12, out.row(1, h, 75)));
    }
    const auto refused = [&](const std::vector<Index>& rows) {
      return refusal([&] { reordered.reorder(rows); });
    };
    CHECK(refused({0}).find("::reorder: the number of rows is 1, wanted 2") != std::string::npos);
    CHECK(refused({0, 2}).find("::reorder: a row is 2, wanted 0 to 1") != std::string::npos);
    CHECK(refused({-1, 0}).find("::reorder: a row is -1, wanted 0 to 1") != std::string::npos);
  });
}

TEST_CASE("landmark_retrieval: parts in any order", "[stream]") {
  using namespace longspan;
  const landmark_cache_options options{.block_size = 4, .top_k = 1};
  const rotary turned(Pairing::half_split);
  STATIC_REQUIRE(std::is_same_v<decltype(landmark_retrieval{options}), landmark_retrieval<>>);
  STATIC_REQUIRE(std::is_same_v<decltype(landmark_retrieval{options, exact_positions{}, turned}),
                                landmark_retrieval<rotary, exact_positions>>);
  const landmark_retrieval retrieve{options, exact_positions{}, turned};
  const landmark_retrieval copy = retrieve;
  auto stream = copy.stream<double>(shape);
  STATIC_REQUIRE(std::is_same_v<decltype(stream), landmark_cache<double, rotary, exact_positions>>);
  CHECK(stream.tokens_to_landmark() == 3);
}

TEST_CASE("stream: a copy and a loaded file continue a stream", "[state]") {
  const Tokens tokens;
  for_each_stream([&](const char* name, auto stream) {
    INFO(name);
    auto loaded = stream;
    decode(stream, tokens, 75);
    auto copy = stream;
    std::stringstream file;
    stream.save(file);
    loaded.load(file);
    const Tensor<float> out = decode(stream, tokens, 100);
    CHECK(same_rows(decode(copy, tokens, 100), out, 75, 100));
    CHECK(same_rows(decode(loaded, tokens, 100), out, 75, 100));
  });
}

TEST_CASE("stream: truncate removes tokens as far as can_truncate allows, and refuses more", "[state]") {
  const Tokens tokens;
  Tokens guess;
  Random random(2);
  fill(guess.q, guess.k, guess.v, Values::normal, random);
  for_each_stream([&](const char* name, auto stream) {
    INFO(name);
    // Token 97 is inside an open segment of 16, 64 and 24, and inside a block of 8.
    decode(stream, tokens, 97);
    auto straight = stream;
    decode(stream, guess, 100);
    stream.truncate(97);
    CHECK(stream.size() == 97);
    CHECK(same_rows(decode(stream, tokens, 100), decode(straight, tokens, 100), 97, 100));
    CHECK(refusal([&] { stream.truncate(101); }).find("::truncate: the number of tokens is 101") !=
          std::string::npos);
    const bool keeps_all = stream.bytes() > 0 && std::string(name).find("kv_cache") == 0 &&
                           std::string(name) != "kv_cache, ring";
    const std::string sentence = refusal([&] { stream.truncate(45); });
    INFO(sentence);
    CHECK(sentence.empty() == keeps_all);
    CHECK(stream.size() == (keeps_all ? 45 : 100));
  });
}
