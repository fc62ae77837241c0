// The state of a landmark cache and of a hybrid stream: the properties in a file, and claims that are refused.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "longspan/detail/storage/crc32c.hpp"
#include "longspan/stream/hybrid_stream.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/saved.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using namespace longspan;

using Options = landmark_cache_options;
using Cache = landmark_cache<float, rotary>;

const StreamShape shape{1, 2, 1, 4, 4};
const rotary turned(Pairing::half_split);
constexpr std::size_t header_bytes = 32, fields = 22;  // before the numbers of tokens and blocks

/// A state with other numbers from number `first` of the header on, and a recomputed checksum of the header.
std::string with_numbers(std::string state, std::size_t first, const std::vector<std::int64_t>& numbers) {
  std::memcpy(&state[header_bytes + 8 * first], numbers.data(), 8 * numbers.size());
  std::uint32_t count = 0;
  std::memcpy(&count, &state[20], 4);
  const std::size_t summed = header_bytes + 8 * count;
  longspan::detail::Crc32c sum;
  sum.add(state.data(), summed);
  const std::uint32_t value = sum.value();
  std::memcpy(&state[summed], &value, 4);
  return state;
}

Cache filled_cache(const Options& options) {
  Random random(1);
  Call<float> call(Shape{1, 2, 1, 40, 40, 4, 4}, Values::normal, random);
  Cache cache(shape, options, turned);
  extend(cache, call, 0, 37);
  return cache;
}

}  // namespace

TEST_CASE("landmark_cache: a state contains all properties that determine its rows or how they are read",
          "[stream][state][errors]") {
  const Options options{.block_size = 4, .top_k = 2, .window_blocks = 1, .capacity = 3};
  const std::string state = saved(filled_cache(options));
  const auto differs = [&](auto stream, const std::string& words) {
    const std::string text = refused(stream, state);
    CAPTURE(text);
    CHECK(text == "longspan: landmark_cache::load: " + words + " as in this stream");
    CHECK(stream.size() == 0);
  };
  const auto with = [&](const auto& change) {
    Options changed = options;
    change(changed);
    return Cache(shape, changed, turned);
  };
  differs(with([](Options& o) { o.block_size = 5; }), "block_size is 4 in the file, wanted 5");
  differs(with([](Options& o) { o.top_k = 1; }), "top_k is 2 in the file, wanted 1");
  differs(with([](Options& o) { o.select = LandmarkSelect::per_kv_group; }),
          "select is per_token_and_head in the file, wanted per_kv_group");
  differs(with([](Options& o) { o.window_blocks = 0; }), "window_blocks is 1 in the file, wanted 0");
  differs(with([](Options& o) { o.exact_window = true; }), "exact_window is no in the file, wanted yes");
  differs(with([](Options& o) { o.split_at_blocks = true; }),
          "split_at_blocks is no in the file, wanted yes");
  differs(with([](Options& o) { o.capacity = 4; }), "capacity is 3 in the file, wanted 4");
  differs(with([](Options& o) { o.scale = 0.25; }), "scale is 0.5 in the file, wanted 0.25");
  differs(Cache({2, 2, 1, 4, 4}, options, turned), "batch is 1 in the file, wanted 2");
  differs(Cache({1, 1, 1, 4, 4}, options, turned), "heads is 2 in the file, wanted 1");
  differs(Cache({1, 2, 2, 4, 4}, options, turned), "kv_heads is 1 in the file, wanted 2");
  differs(Cache({1, 2, 1, 6, 4}, options, turned), "head_dim is 4 in the file, wanted 6");
  differs(Cache({1, 2, 1, 4, 6}, options, turned), "value_dim is 4 in the file, wanted 6");
  differs(Cache(shape, options, rotary(Pairing::interleaved)),
          "the pairing of the positions is half_split in the file, wanted interleaved");
  differs(Cache(shape, options, rotary(Pairing::half_split, 500000)),
          "the base of the positions is 10000 in the file, wanted 500000");
  differs(landmark_cache<float>(shape, options), "the position encoding is rotary in the file, wanted none");
  differs(landmark_cache<float, rotary, exact_positions>(shape, options, turned),
          "whether landmarks have their positions in the text is no in the file, wanted yes");
  differs(landmark_cache<Eigen::bfloat16, rotary>(shape, options, turned),
          "the element type is float in the file, wanted bfloat16");

  Cache same = with([](Options& o) {
    o.scale = 0.5;  // the default
    o.rollback = 3;
    o.mass_sample = 1;
  });
  CHECK(refused(same, state) == "");
  CHECK(same.size() == 37);
}

TEST_CASE("landmark_cache: impossible numbers in a state are refused before memory is allocated",
          "[stream][state][errors]") {
  const Options options{.block_size = 4, .top_k = 2, .window_blocks = 1, .capacity = 3};
  const std::string state = saved(filled_cache(options));
  Cache cache(shape, options, turned);
  const auto refuses = [&](const std::vector<std::int64_t>& numbers, const std::string& words) {
    const std::string text = refused(cache, with_numbers(state, fields, numbers));
    CAPTURE(text);
    CHECK(text.find(words) != std::string::npos);
    CHECK(cache.size() == 0);
  };
  // 37 tokens: 8 sealed blocks, 4 of them 16 tokens before the end, none from a file, none dropped by hand.
  CHECK(refused(cache, with_numbers(state, fields, {37, 8, 4, 0, 0})) == "");
  cache.clear();
  refuses({-1, 8, 4, 0, 0}, "the number of tokens is -1 in the file");
  refuses({INT64_MAX, 8, 4, 0, 0}, "the number of tokens is 9223372036854775807 in the file");
  refuses({37, 9, 4, 0, 0}, "the number of sealed blocks is 9 in the file, wanted 8");
  refuses({37, 7, 4, 0, 0}, "the number of sealed blocks is 7 in the file, wanted 8");  // too many open rows
  refuses({41, 8, 4, 0, 0}, "the number of sealed blocks is 8 in the file, wanted 9");
  refuses({37, 8, 9, 0, 0}, "the number of final blocks is 9 in the file, wanted 0..8");
  refuses({37, 8, -1, 0, 0}, "the number of final blocks is -1 in the file, wanted 0..8");
  refuses({37, 8, 4, 10, 0}, "the number of blocks from a file is 10 in the file, wanted 0..9");
  refuses({37, 8, 4, -1, 0}, "the number of blocks from a file is -1");
  refuses({37, 8, 4, 0, 5}, "the number of blocks dropped by hand is 5 in the file, wanted 0..4");
  refuses({37, 8, 4, 0, -1}, "the number of blocks dropped by hand is -1");
  refuses({37, 8, 5, 0, 0},
          "the payload is");  // the capacity drops two: fewer blocks and rows than in the payload
  refuses({Index{1} << 47, (Index{1} << 45) - 1, 4, 0, 0}, "the payload is");
}

TEST_CASE("landmark_cache: with rows of 0 bytes a file still cannot claim any number of blocks",
          "[stream][state][errors]") {
  for (const StreamShape& empty :
       {StreamShape{1, 1, 1, 0, 0}, StreamShape{0, 1, 1, 4, 4}, StreamShape{1, 0, 0, 4, 4}}) {
    landmark_cache<float> cache(empty, {.block_size = 2});
    const std::string state = saved(cache);
    const Index blocks = Index{1} << 40;
    CHECK(refused(cache, with_numbers(state, fields, {2 * blocks, blocks, 0, 0, 0})).find("the payload is") !=
          std::string::npos);
    // A real state of such rows can be saved and loaded.
    Call<float> call(
        Shape{empty.batch, empty.heads, empty.kv_heads, 21, 21, empty.head_dim, empty.value_dim});
    extend(cache, call, 0, 11);
    extend(cache, call, 11, 10);
    landmark_cache<float> loaded(empty, {.block_size = 2});
    CHECK(refused(loaded, saved(cache)) == "");
    CHECK(loaded.size() == 21);
    CHECK(loaded.blocks() == 10);
    loaded.truncate(8);
    CHECK(loaded.blocks() == 4);
  }
}

TEST_CASE("hybrid_stream: a state contains its options, and the memory of the evicted blocks",
          "[stream][state][errors]") {
  hybrid_options options{
      .block_size = 4, .top_k = 1, .window_blocks = 1, .capacity = 2, .evicted_at_once = 1};
  Random random(2);
  Call<float> call(Shape{1, 2, 1, 40, 40, 4, 4}, Values::normal, random);
  hybrid_stream<float> stream(shape, options), shorter(shape, options);
  extend(stream, call, 0, 37);
  extend(shorter, call, 0, 21);
  const std::string state = saved(stream);
  const auto differs = [&](const auto& change, const std::string& words) {
    hybrid_options changed = options;
    change(changed);
    hybrid_stream<float> other(shape, changed);
    const std::string text = refused(other, state);
    CAPTURE(text);
    CHECK(text.find(words) != std::string::npos);
    CHECK(other.size() == 0);
  };
  differs([](hybrid_options& o) { o.capacity = 3; }, "capacity is 2 in the file, wanted 3");
  differs([](hybrid_options& o) { o.evicted_at_once = 2; },
          "the number of blocks that are dropped together is 1 in the file, wanted 2");
  differs([](hybrid_options& o) { o.window_blocks = 2; }, "window_blocks is 1 in the file, wanted 2");
  differs([](hybrid_options& o) { o.scale = 2; }, "scale is 0.5 in the file, wanted 2");
  differs([](hybrid_options& o) { o.empty_memory = EmptyMemory::gate; },
          "hybrid_stream::load: empty_memory is bypass in the file, wanted gate as in this stream");

  // The state must contain the memory before the evictions that can be undone; this is the current memory.
  const auto part = [](const auto& x) { return saved(x); };
  const std::string of_hybrid = state.substr(0, header_bytes + 8 + 4 + 4);
  CHECK(refused(shorter, of_hybrid + part(stream.cache()) + part(stream.memory()))
            .find("the number of tokens in the memory") != std::string::npos);
  CHECK(shorter.size() == 21);
}

TEST_CASE("hybrid_stream: scale multiplies scores and does not change the memory", "[law]") {
  Random random(3);
  Call<float> call(Shape{1, 2, 1, 60, 60, 4, 4}, Values::normal, random), scaled = call.unrun();
  const hybrid_options options{
      .block_size = 4, .top_k = 1, .window_blocks = 1, .capacity = 1, .evicted_at_once = 1};
  hybrid_options doubled = options;
  doubled.scale = 1;  // twice 1 / sqrt(4)
  hybrid_stream<float> stream(shape, options), other(shape, doubled);
  landmark_cache<float> cache(
      shape, {.block_size = 4, .top_k = 1, .window_blocks = 1, .exact_window = true, .scale = 1});
  Call<float> before_eviction = call.unrun();
  extend(stream, call, 0, 11);
  extend(other, scaled, 0, 11);
  for (Index i = 0; i < 11; ++i) extend(cache, before_eviction, i, 1);
  for (Index i = 0; i < 11; ++i) {
    for (Index c = 0; c < 4; ++c)
      CHECK(std::abs(scaled.out.row(0, 1, i)[c] - before_eviction.out.row(0, 1, i)[c]) < 1e-5f);
  }
  extend(stream, call, 11, 49);
  extend(other, scaled, 11, 49);
  CHECK(stream.memory().memory(0, 0, 1, 2) == other.memory().memory(0, 0, 1, 2));
  CHECK_FALSE(same_rows(call, scaled, 11, 60));
}
