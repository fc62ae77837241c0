// Truncating a hybrid stream restores the window, the blocks outside it and the memory.
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "longspan/stream/hybrid_stream.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/rollback.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::EmptyMemory;
using longspan::hybrid_options;
using longspan::hybrid_stream;
using longspan::InfiniRule;

const Shape sizes{2, 4, 2, 0, 0, 8, 6};

template <class T>
void check_law(std::uint32_t seed) {
  Random random(seed);
  const std::vector<float> logits{-1, 0.5f, 2, 0};
  for (const Index rollback : {0, 1, 16, 40}) {
    for (int n = 0; n < 5; ++n) {
      hybrid_options options{.block_size = random.pick({2, 3, 5, 16, 24}),
                             .top_k = random.between(0, 3),
                             .window_blocks = random.between(0, 2),
                             .capacity = random.between(0, 3),
                             .evicted_at_once = random.between(1, 3),
                             .rollback = rollback,
                             .rule = random.pick({InfiniRule::linear, InfiniRule::delta}),
                             .empty_memory = random.pick({EmptyMemory::bypass, EmptyMemory::gate})};
      options.beta = longspan::per_head_gate(logits);
      INFO("block " << options.block_size << " top_k " << options.top_k << " window " << options.window_blocks
                    << " capacity " << options.capacity << " evicted at once " << options.evicted_at_once
                    << " rollback " << rollback);
      check_rollback([&] { return hybrid_stream<T>(stream_shape(sizes), options); }, sizes, random,
                     {.tokens = 160, .rollback = rollback});
    }
  }
}

Call<float> drawn_call(Index length, Random& random) {
  Shape shape = sizes;
  shape.q_len = shape.kv_len = length;
  return Call<float>(shape, Values::normal, random);
}

}  // namespace

TEST_CASE("hybrid_stream: removed tokens change no bit of later outputs", "[stream][rollback][bits]") {
  check_law<float>(1);
}

TEST_CASE("hybrid_stream: removed tokens change no bit of later outputs with int8",
          "[stream][rollback][bits]") {
  check_law<std::int8_t>(2);
}

TEST_CASE("hybrid_stream: an eviction can be undone while it is at most `rollback` tokens old",
          "[stream][rollback]") {
  Random random(3);
  Call<float> call = drawn_call(60, random);
  // 2 blocks in the window, 2 outside of it; the first eviction is at 50 tokens.
  hybrid_stream<float> stream(
      stream_shape(sizes),
      {.block_size = 10, .top_k = 1, .window_blocks = 2, .capacity = 2, .evicted_at_once = 1, .rollback = 8});
  extend(stream, call, 0, 49);
  CHECK(stream.memory().size() == 0);
  extend(stream, call, 49, 1);
  CHECK(stream.memory().size() == 9);
  const Index bytes = stream.bytes();
  extend(stream, call, 50, 7);
  CHECK(stream.bytes() == bytes);  // there was room for the rows
  CHECK(stream.can_truncate(49));
  hybrid_stream<float> copy = stream;
  copy.truncate(49);
  CHECK(copy.memory().size() == 0);
  CHECK(copy.size() == 49);
  extend(stream, call, 57, 1);
  CHECK(stream.bytes() < bytes);  // the earlier memory and the evicted block are gone
  CHECK_FALSE(stream.can_truncate(49));
  CHECK(stream.can_truncate(50));
  CHECK(refusal([&] { stream.truncate(49); }) ==
        "longspan: hybrid_stream::truncate: the number of tokens is 49, wanted 50..58, because the stream "
        "cannot be truncated further");
  CHECK(stream.size() == 58);
  CHECK(refusal([&] {
          hybrid_stream<float>(stream_shape(sizes), {.rollback = -1});
        }).find("rollback is -1, wanted at least 0") != std::string::npos);
}
