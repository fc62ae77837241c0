#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "longspan/position.hpp"
#include "longspan/stream/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/rollback.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::sinks;
using longspan::softmax_attention;
using longspan::window;

const Shape grouped{2, 6, 2, 1, 1, 8, 6};

/// The law of rollback for streams of `attend` that store rows as T.
template <class T, class Attend>
void check_pages(const Attend& attend, Random& random) {
  const Index rollback = random.pick({0, 1, 5, 16, 40});
  const longspan::kv_cache_options options{.page_size = random.pick({0, 1, 4, 16, 64}), .rollback = rollback};
  INFO("page_size=" << options.page_size << " rollback=" << rollback);
  check_rollback([&] { return attend.template stream<T>(stream_shape(grouped), options); }, grouped, random,
                 {.tokens = 300, .rollback = rollback});
}

/// The smallest size from which on can_truncate is true.
template <class Stream>
Index least_kept(const Stream& stream) {
  Index least = stream.size();
  while (least > 0 && stream.can_truncate(least - 1)) --least;
  return least;
}

}  // namespace

TEST_CASE("kv_cache: removed tokens change no bit of later outputs", "[law]") {
  for_each_case(30, [](Random& random) {
    const Index left = random.pick({0, 1, 7, 31, 90});
    check_pages<float>(softmax_attention{causal{} & window{.left = left}}, random);
    check_pages<float>(softmax_attention{causal{} & (window{.left = left} | sinks{random.pick({1, 4, 20})}),
                                         longspan::rotary(longspan::Pairing::half_split)},
                       random);
  });
}

TEMPLATE_TEST_CASE("kv_cache: removed tokens change no bit, with rows of other types", "[law]", std::int8_t,
                   Eigen::bfloat16) {
  for_each_case(15, [](Random& random) {
    check_pages<TestType>(softmax_attention{causal{} & (window{.left = random.pick({3, 40})} | sinks{4})},
                          random);
  });
}

TEST_CASE("kv_cache: up to `rollback` tokens can always be removed", "[state]") {
  Random random(1);
  const Shape shape{1, 1, 1, 60, 60, 4, 4};
  Call<float> call(shape, Values::normal, random);
  for (const Index page : {1, 4, 16, 64}) {
    for (const Index rollback : {1, 5, 16}) {
      auto stream = softmax_attention{causal{} & window{.left = 31}}.stream(
          stream_shape(shape), {.page_size = page, .rollback = rollback});
      INFO("page_size=" << page << " rollback=" << rollback);
      for (int n = 0; n < 4; ++n) extend(stream, call, 0, 50);
      for (Index n = 0; n < 100; ++n) {
        extend(stream, call, 0, rollback);
        REQUIRE(least_kept(stream) <= stream.size() - rollback);
        stream.truncate(stream.size() - rollback + n % 2);
      }
    }
  }
}

TEST_CASE("kv_cache: keeps the pages that rollback needs and evicts all others", "[state]") {
  Random random(2);
  const Shape shape{2, 2, 1, 2000, 2000, 8, 8};
  Call<float> call(shape, Values::normal, random);
  const Index row_bytes = 2 * 2 * 8 * Index{sizeof(float)};  // for both batch rows
  const auto kept = [&](Index rollback) {
    auto stream = softmax_attention{causal{} & window{.left = 63}}.stream(
        stream_shape(shape), {.page_size = 8, .rollback = rollback});
    extend(stream, call, 0, 2000);
    return stream.bytes() / row_bytes;
  };
  // The 63 keys before the next query begin at 1937, so the first page kept begins at 1936.
  CHECK(kept(0) == 64);
  CHECK(kept(16) == 64 + 16);
  CHECK(kept(100) == 64 + 104);
  CHECK(kept(std::numeric_limits<Index>::max()) == 2000);
}

TEST_CASE("kv_cache: truncating too far is refused, and the text names the smallest size", "[errors]") {
  Random random(3);
  const Shape shape{1, 2, 1, 300, 300, 4, 4};
  Call<float> call(shape, Values::normal, random);
  for (const Index page : {4, 16, 64}) {
    auto stream = softmax_attention{causal{} & window{.left = 20}}.stream(stream_shape(shape),
                                                                          {.page_size = page, .rollback = 9});
    for (Index n = 0; n < 290; n += 10) extend(stream, call, n, 10);
    const Index least = least_kept(stream);
    REQUIRE(least > 0);
    REQUIRE(least <= 281);
    CHECK_FALSE(stream.can_truncate(least - 1));
    CHECK_FALSE(stream.can_truncate(-1));
    CHECK_FALSE(stream.can_truncate(291));
    CHECK(refusal([&] { stream.truncate(least - 1); }) ==
          "longspan: kv_cache::truncate: the number of tokens is " + std::to_string(least - 1) +
              ", wanted at least " + std::to_string(least) +
              ", because earlier keys are evicted (rollback = 9)");
    CHECK(stream.size() == 290);
    // Evicted pages do not come back: the largest size so far counts.
    stream.truncate(least);
    CHECK_FALSE(stream.can_truncate(least - 1));
    CHECK(stream.can_truncate(0));
    stream.truncate(0);
    CHECK(stream.size() == 0);
    CHECK(stream.bytes() == 0);
  }
  CHECK(refusal([] {
          softmax_attention{}.stream({1, 2, 2, 4, 4}, {.rollback = -1});
        }) == "longspan: kv_cache: rollback is -1, wanted at least 0 tokens");
}

TEST_CASE("kv_cache: rows overwritten after truncate do not change copies and other batch rows", "[state]") {
  Random random(4);
  const Shape shape{3, 2, 1, 120, 120, 8, 8};
  Call<float> call(shape, Values::normal, random), other = call.unrun(), again = call.unrun();
  fill_normal(other.k, random);
  fill_normal(other.v, random);
  for (const Index page : {0, 4, 16, 64}) {
    const softmax_attention attend{causal{} & window{.left = 30}};
    auto stream = attend.stream(stream_shape(shape), {.page_size = page});
    extend(stream, call, 0, 100);
    const auto copy = stream;
    stream.truncate(88);
    extend(stream, other, 88, 32);  // overwrites what are the last 12 rows of the copy
    auto goes_on = copy;
    extend(goes_on, call, 100, 20);
    auto straight = attend.stream(stream_shape(shape), {.page_size = page});
    extend(straight, again, 0, 100);
    extend(straight, again, 100, 20);
    CHECK(same_rows(call, again, 100, 120));

    // Batch rows that reorder has made equal are independent after truncate.
    Call<float> moved = call.unrun(), wanted = call.unrun();
    const std::vector<Index> from{1, 1, 0};
    for (Index b = 0; b < 3; ++b) {
      const Index old = from[std::size_t(b)];
      std::copy_n(call.k.row(old, 0, 0), 90 * 8, wanted.k.row(b, 0, 0));
      std::copy_n(call.v.row(old, 0, 0), 90 * 8, wanted.v.row(b, 0, 0));
    }
    auto beams = copy;
    beams.reserve(200);
    beams.reorder(from);
    beams.truncate(90);
    extend(beams, moved, 90, 30);
    auto of_wanted = attend.stream(stream_shape(shape), {.page_size = page});
    extend(of_wanted, wanted, 0, 90);
    extend(of_wanted, wanted, 90, 30);
    CHECK(same_rows(moved, wanted, 90, 120));
    beams.clear();
    CHECK(beams.size() == 0);
    extend(beams, moved, 0, 100);
    extend(beams, moved, 100, 20);
    CHECK(same_rows(moved, again, 0, 120));
  }
}

TEST_CASE("kv_cache: a loaded state can be truncated as far as the saved stream", "[state]") {
  Random random(5);
  const Shape shape{1, 2, 1, 300, 300, 4, 4};
  Call<float> call(shape, Values::normal, random);
  const softmax_attention attend{causal{} & window{.left = 20}};
  auto stream = attend.stream(stream_shape(shape), {.page_size = 4}), loaded = stream;
  extend(stream, call, 0, 290);
  std::stringstream file;
  stream.save(file);
  loaded.load(file);
  CHECK(least_kept(loaded) == least_kept(stream));
  CHECK(least_kept(loaded) <= 274);
  // The state of a stream with rollback 0 can be loaded by others, but then not be truncated.
  auto strict = attend.stream(stream_shape(shape), {.page_size = 4, .rollback = 0});
  extend(strict, call, 0, 290);
  std::stringstream less;
  strict.save(less);
  loaded.load(less);
  CHECK(least_kept(loaded) == least_kept(strict));
  CHECK(least_kept(loaded) > 280);
}
