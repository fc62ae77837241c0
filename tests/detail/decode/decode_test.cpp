// Calls of a few queries through the public functor: sizes around blocks and chunks, and the merge of chunks.
#include "longspan/detail/decode/decode.hpp"

#include <cmath>
#include <vector>

#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"

namespace {

using namespace test;
using longspan::detail::keys_in_chunk;
using longspan::detail::most_decode_queries;

/// An executor that counts the rounds of tasks of a call.
struct CountRounds {
  int* rounds;
  Index workers() const { return 1; }
  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    ++*rounds;
    for (Index t = 0; t < tasks; ++t) task(t, 0);
  }
};

}  // namespace

TEST_CASE("decode: within the bound for every number of queries and sizes around blocks and chunks",
          "[decode]") {
  const auto past = [](Index, Index, Index i, Index j) { return j <= i; };
  for_each_case(2, [&](Random& random) {
    for (Index queries = 1; queries <= most_decode_queries + 1; ++queries) {
      for (Index q_len = 1; q_len <= queries; ++q_len) {
        if (queries % q_len != 0) continue;
        const Index kv_len =
            random.pick<Index>({1, 7, 127, 128, 129, 256, 257, keys_in_chunk, keys_in_chunk + 1});
        const Shape shape{1,
                          2 * queries / q_len,
                          2,
                          q_len,
                          kv_len,
                          random.pick<Index>({1, 16, 33}),
                          random.pick<Index>({1, 16, 70, 129})};
        check_call<float>(shape, random.pick(all_values), random, longspan::softmax_attention{}, {});
        check_call<float>(shape, random.pick(all_values), random,
                          longspan::softmax_attention{longspan::causal{}}, {.sees = past});
      }
    }
  });
}

TEST_CASE("decode: runs calls with up to 8 queries per KV head", "[decode]") {
  Random random(1);
  // With one worker tiles never split keys, so two rounds are the decode kernel's chunks and their merge.
  for (const Index heads : {1, 2, 4}) {
    for (Index q_len = 1; q_len <= 10; ++q_len) {
      Call<float> call(Shape{1, heads, 1, q_len, 2 * keys_in_chunk, 32, 32}, Values::normal, random);
      int rounds = 0;
      call.run(longspan::softmax_attention{}, CountRounds{&rounds});
      INFO("heads=" << heads << " q_len=" << q_len);
      CHECK(rounds == (heads * q_len <= most_decode_queries ? 2 : 1));
    }
  }
}

TEST_CASE("decode: merging states adds their sums of exponentials", "[decode]") {
  using State = longspan::detail::RowAccumulator<float>;
  std::vector<std::byte> bytes(8192);
  longspan::detail::Arena arena(bytes.data() +
                                (64 - reinterpret_cast<std::uintptr_t>(bytes.data()) % 64) % 64);
  State states[3];
  for (State& state : states) {
    state = State::take(arena, 3, 5);
    state.clear();
  }
  REQUIRE(arena.used() < bytes.size() - 64);
  Random random(2);
  const auto randomise = [&](const State& state) {
    for (Index g = 0; g < 3; ++g) {
      state.row_max[g] = static_cast<float>(4 * random.normal());
      state.sum[g] = static_cast<float>(1 + random.uniform());
      for (Index c = 0; c < 5; ++c) state.o[g * state.stride + c] = static_cast<float>(random.normal());
    }
  };
  const auto scaled = [](float x, float row_max) { return double(x) * std::exp2(double(row_max)); };
  const auto share = [&](const State& state, Index g, float x) {
    return scaled(x, state.row_max[g] * (1.44269504088896340736f / longspan::detail::score_unit<float>));
  };
  randomise(states[0]);
  randomise(states[1]);
  states[2].merge(states[0]);  // merging into the empty state is exact
  for (Index g = 0; g < 3; ++g) {
    CHECK(states[2].row_max[g] == states[0].row_max[g]);
    CHECK(states[2].sum[g] == states[0].sum[g]);
    for (Index c = 0; c < 5; ++c)
      CHECK(states[2].o[g * states[2].stride + c] == states[0].o[g * states[0].stride + c]);
  }
  states[2].merge(states[1]);
  for (Index g = 0; g < 3; ++g) {
    const double sum = share(states[0], g, states[0].sum[g]) + share(states[1], g, states[1].sum[g]);
    CHECK(std::abs(share(states[2], g, states[2].sum[g]) / sum - 1) < 2e-6);
    for (Index c = 0; c < 5; ++c) {
      const Index at = g * states[2].stride + c;
      const double x = share(states[0], g, states[0].o[at]), y = share(states[1], g, states[1].o[at]);
      CHECK(std::abs(share(states[2], g, states[2].o[at]) - x - y) <= 2e-6 * (std::abs(x) + std::abs(y)));
    }
  }
}
