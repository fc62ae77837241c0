// Truncating a landmark cache: the law of rollback for every option that affects sealing, dropping or reading.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "examples/temporary_folder.hpp"
#include "longspan/reference/landmark_cache.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/rollback.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using namespace longspan;

using Options = landmark_cache_options;

const Shape sizes{2, 4, 2, 0, 0, 8, 6};
const rotary turned(Pairing::half_split, 100);

Options drawn_options(Random& random, Index rollback) {
  const std::vector<LandmarkSelect> selections{
      LandmarkSelect::per_token_and_head, LandmarkSelect::max_over_heads, LandmarkSelect::max_over_tokens,
      LandmarkSelect::max_over_both, LandmarkSelect::per_kv_group};
  return {.block_size = random.pick({2, 3, 5, 16, 24}),
          .top_k = random.between(0, 3),
          .select = random.pick(selections),
          .window_blocks = random.chance(0.5) ? random.between(1, 3) : 0,
          .exact_window = random.chance(0.5),
          .capacity = random.chance(0.5) ? random.between(1, 4) : 0,
          .rollback = rollback,
          .split_at_blocks = random.chance(0.5)};
}

/// The law for caches made by make(options), for random options and several lengths of rollback.
template <class Make>
void check_law(const Make& make, std::uint32_t seed, bool is_saved = true, int cases = 8) {
  Random random(seed);
  for (const Index rollback : {0, 1, 16, 40}) {
    for (int n = 0; n < cases; ++n) {
      const Options options = drawn_options(random, rollback);
      INFO("block " << options.block_size << " top_k " << options.top_k << " select " << int(options.select)
                    << " local " << options.window_blocks << " exact window " << options.exact_window
                    << " capacity " << options.capacity << " rollback " << rollback << " split "
                    << options.split_at_blocks);
      check_rollback([&] { return make(options); }, sizes, random,
                     {.tokens = 120, .rollback = rollback, .is_saved = is_saved});
    }
  }
}

/// An index that records the calls of a cache and throws if they contradict each other.
struct StrictIndex {
  std::map<std::pair<Index, Index>, std::map<Index, std::vector<float>>> rows{};

  void add(Index b, Index h, Index n, std::span<const float> key) {
    REQUIRE(rows[{b, h}].emplace(n, std::vector<float>(key.begin(), key.end())).second);
  }
  void drop(Index first) {
    for (auto& [head, keys] : rows) keys.erase(keys.begin(), keys.lower_bound(first));
  }
  void clear() { rows.clear(); }
  /// Proposes every second block, so that blocks left in the index by mistake change outputs.
  std::vector<Index> candidates(Index b, Index h, std::span<const float> query) const {
    std::vector<Index> named;
    for (const auto& [n, key] : rows.at({b, h})) {
      if (std::inner_product(query.begin(), query.end(), key.begin(), 0.0f) > 0) named.push_back(n);
    }
    return named;
  }
};

struct TruncatedIndex : StrictIndex {
  void truncate(Index first) {
    for (auto& [head, keys] : rows) keys.erase(keys.lower_bound(first), keys.end());
  }
};

/// The blocks that an index contains, shared with its copies, and those that it contained in the last call.
struct KnownBlocks {
  std::set<Index>* blocks;
  std::shared_ptr<std::set<Index>> of_call = std::make_shared<std::set<Index>>();

  void add(Index, Index, Index n, std::span<const float>) { blocks->insert(n); }
  void drop(Index first) { blocks->erase(blocks->begin(), blocks->lower_bound(first)); }
  void clear() { blocks->clear(); }
  void truncate(Index first) { blocks->erase(blocks->lower_bound(first), blocks->end()); }
  std::vector<Index> candidates(Index b, Index h, std::span<const float>) const {
    if (b == 0 && h == 0) *of_call = *blocks;  // one thread at a time
    return {blocks->begin(), blocks->end()};
  }
};

}  // namespace

TEST_CASE("landmark_cache: removed tokens change no bit of later outputs", "[stream][rollback][bits]") {
  check_law([](const Options& options) { return landmark_cache<float>(stream_shape(sizes), options); }, 1,
            true, 24);
}

TEST_CASE("landmark_cache: removed tokens change no bit of later outputs, with positions",
          "[stream][rollback][bits]") {
  check_law(
      [](const Options& options) {
        return landmark_cache<std::int8_t, rotary>(stream_shape(sizes), options, turned);
      },
      2);
  check_law(
      [](const Options& options) {
        return landmark_cache<Eigen::bfloat16, rotary, exact_positions>(stream_shape(sizes), options, turned);
      },
      3);
}

TEST_CASE("landmark_cache: removed tokens change no bit of later outputs, with a file",
          "[stream][rollback][file][bits]") {
  const TemporaryFolder folder;
  int files = 0;
  check_law(
      [&](Options options) {
        options.path = folder.file("blocks" + std::to_string(++files));
        return landmark_cache<Eigen::bfloat16, rotary, exact_positions>(stream_shape(sizes), options, turned);
      },
      4, false, 4);
}

TEST_CASE("landmark_cache: the index drops unsealed blocks, and gets blocks back that return",
          "[stream][rollback][index][bits]") {
  check_law(
      [](const Options& options) {
        return landmark_cache<float, rotary, stingy_positions, StrictIndex>(stream_shape(sizes), options,
                                                                            turned);
      },
      5);
  check_law(
      [](const Options& options) {
        return landmark_cache<float, rotary, stingy_positions, TruncatedIndex>(stream_shape(sizes), options,
                                                                               turned);
      },
      6);
}

TEST_CASE("landmark_cache: before each call the index contains exactly the blocks that can be retrieved",
          "[stream][rollback][index]") {
  Random random(10);
  Shape shape = sizes;
  shape.q_len = shape.kv_len = 100;
  Call<float> call(shape, Values::normal, random);
  std::set<Index> known;
  KnownBlocks index{&known};
  landmark_cache<float, no_position, stingy_positions, KnownBlocks> cache(
      stream_shape(sizes), {.block_size = 4, .top_k = 1, .capacity = 4}, {}, {}, index);
  for (int step = 0; step < 100; ++step) {
    const Index from = cache.size(), to = random.between(std::max<Index>(0, from - 8), from + 8);
    if (to < from && cache.can_truncate(to)) cache.truncate(to);
    const Index dropped = cache.dropped(), sealed = dropped + cache.blocks();
    index.of_call->clear();
    extend(cache, call, 0, random.between(1, 8), 1);
    if (sealed - dropped < 3) continue;  // so few landmarks are scored without the index
    CAPTURE(step, from, to);
    for (Index n = dropped; n < sealed; ++n) REQUIRE(index.of_call->contains(n));
    REQUIRE(std::ssize(*index.of_call) == sealed - dropped);
  }
}

TEST_CASE("landmark_cache: outputs do not depend on rollback", "[stream][rollback][bits]") {
  Random random(7);
  for (int n = 0; n < 10; ++n) {
    Shape shape = sizes;
    shape.q_len = shape.kv_len = 100;
    Call<float> call(shape, Values::normal, random), own = call.unrun();
    Options options = drawn_options(random, 0);
    landmark_cache<float> none(stream_shape(sizes), options);
    options.rollback = 1000;
    landmark_cache<float> all(stream_shape(sizes), options);
    for (Index i = 0; i < 100; i += 10) {
      extend(none, call, i, 10);
      extend(all, own, i, 10);
      REQUIRE(none.blocks() == all.blocks());
      REQUIRE(none.dropped() == all.dropped());
    }
    CHECK(call.same_outputs(own));
    CHECK(all.bytes() > none.bytes());
    CHECK(all.can_truncate(0));
  }
}

TEST_CASE("landmark_cache: how far it can be truncated, and the error beyond that",
          "[stream][rollback][errors]") {
  Random random(8);
  Shape shape = sizes;
  shape.q_len = shape.kv_len = 100;
  Call<float> call(shape, Values::normal, random);
  landmark_cache<float> cache(stream_shape(sizes), {.block_size = 10, .window_blocks = 1, .rollback = 7});
  extend(cache, call, 0, 63);
  // 56 tokens seal 4 blocks, and so do 50.
  CHECK(cache.can_truncate(63));
  CHECK(cache.can_truncate(50));
  CHECK_FALSE(cache.can_truncate(49));
  CHECK_FALSE(cache.can_truncate(64));
  CHECK_FALSE(cache.can_truncate(-1));
  CHECK(refusal([&] { cache.truncate(49); }) ==
        "longspan: landmark_cache::truncate: the number of tokens is 49, wanted 50..63, because the cache "
        "cannot be truncated further");
  CHECK(cache.size() == 63);
  cache.truncate(50);
  CHECK(cache.blocks() == 4);
  extend(cache, call, 50, 8);
  CHECK(cache.can_truncate(50));
  CHECK(refusal([&] {
          landmark_cache<float>(stream_shape(sizes), {.rollback = -1});
        }).find("rollback is -1, wanted at least 0") != std::string::npos);
}

TEST_CASE("landmark_cache: no truncation unseals a block that was dropped by hand", "[stream][rollback]") {
  Random random(9);
  Shape shape = sizes;
  shape.q_len = shape.kv_len = 60;
  Call<float> call(shape, Values::normal, random);
  landmark_cache<float> cache(stream_shape(sizes), {.block_size = 10, .rollback = 40});
  extend(cache, call, 0, 60);
  CHECK(cache.can_truncate(20));
  cache.drop(4);
  CHECK_FALSE(cache.can_truncate(39));
  cache.truncate(40);
  CHECK(cache.blocks() == 0);
  CHECK(cache.dropped() == 4);
  extend(cache, call, 40, 20);
  CHECK(cache.blocks() == 2);
}

TEST_CASE("landmark_cache: matches the reference after drafts have been removed",
          "[stream][rollback][oracle]") {
  for_each_case(20, [](Random& random) {
    Options options = drawn_options(random, 20);
    Shape shape = sizes;
    shape.q_len = shape.kv_len = 80;
    Call<double> call(shape), draft(shape);
    fill(call.q, call.k, call.v, Values::normal, random);
    fill(draft.q, draft.k, draft.v, Values::normal, random);
    Call<double> exact = call.unrun();
    landmark_cache<double> cache(stream_shape(sizes), options);
    reference::landmark_cache<> reference(stream_shape(sizes), options);
    while (cache.size() < 60) {
      const Index size = cache.size(), accepted = random.between(1, 12), rejected = random.between(0, 20);
      extend(cache, call, size, accepted);
      extend(reference, exact, size, accepted);
      for (Index b = 0; b < shape.batch; ++b) {
        for (Index h = 0; h < shape.heads; ++h) {
          for (Index i = size; i < size + accepted; ++i) {
            for (Index c = 0; c < shape.value_dim; ++c)
              REQUIRE(std::abs(call.out.row(b, h, i)[c] - exact.out.row(b, h, i)[c]) < 1e-10);
          }
        }
      }
      extend(cache, draft, 0, rejected);
      extend(reference, draft, 0, rejected);
      cache.truncate(size + accepted);
      reference.truncate(size + accepted);
    }
  });
}
