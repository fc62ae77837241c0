// landmark_cache: compared with its reference, laws, and errors.
#include "longspan/stream/landmark_cache.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <sstream>
#include <utility>
#include <vector>

#include "longspan/landmark_attention.hpp"
#include "longspan/reference/landmark_cache.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using namespace longspan;

using Options = landmark_cache_options;

const std::vector<LandmarkSelect> all_selections{
    LandmarkSelect::per_token_and_head, LandmarkSelect::max_over_heads, LandmarkSelect::max_over_tokens,
    LandmarkSelect::max_over_both, LandmarkSelect::per_kv_group};

template <class T>
StreamShape shape_of(const Call<T>& call) {
  return {call.q.batch, call.q.heads, call.k.heads, call.q.cols, call.v.cols};
}

/// Extends with all tokens in chunks of `length`.
template <class T, class Cache>
void stream(Cache& cache, Call<T>& call, Index length) {
  for (Index i = 0; i < call.q.rows; i += length) extend(cache, call, i, std::min(length, call.q.rows - i));
}

template <class T>
void check_near(const Call<T>& got, const Call<T>& wanted, double most) {
  for (std::size_t n = 0; n < got.out.values.size(); ++n)
    REQUIRE(std::abs(double(got.out.values[n]) - double(wanted.out.values[n])) <= most);
  for (std::size_t n = 0; n < got.lse.values.size(); ++n) {
    if (got.lse.values[n] == wanted.lse.values[n]) continue;
    REQUIRE(std::abs(double(got.lse.values[n]) - double(wanted.lse.values[n])) <= most);
  }
}

}  // namespace

TEST_CASE("landmark_cache: matches the reference, including the retrieved blocks, for every option",
          "[stream][oracle]") {
  for_each_case(60, [](Random& random) {
    const Options options{.block_size = random.between(2, 9),
                          .top_k = random.between(0, 4),
                          .select = random.pick(all_selections),
                          .window_blocks = random.chance(0.3) ? random.between(1, 3) : 0,
                          .exact_window = random.chance(0.3),
                          .capacity = random.chance(0.3) ? random.between(1, 5) : 0};
    const Index kv_heads = random.between(1, 2);
    Call<double> call(Shape{random.between(1, 2), kv_heads * random.pick({1, 2, 3}), kv_heads,
                            random.between(30, 70), 0, 6, 5});
    call.k = Tensor<double>(call.q.batch, kv_heads, call.q.rows, 6);
    call.v = Tensor<double>(call.q.batch, kv_heads, call.q.rows, 5);
    fill(call.q, call.k, call.v, random.pick({Values::normal, Values::peaked}), random);
    Call<double> exact = call.unrun();
    INFO("block " << options.block_size << " top_k " << options.top_k << " select " << int(options.select)
                  << " local " << options.window_blocks << " exact window " << options.exact_window
                  << " capacity " << options.capacity);
    const auto check = [&](auto cache, auto reference) {
      for (Index first = 0; first < call.q.rows;) {
        const Index count = std::min(call.q.rows - first, random.chance(0.5) ? 1 : random.between(1, 25));
        extend(cache, call, first, count, random.between(1, 3));
        extend(reference, exact, first, count);
        for (Index b = 0; b < call.q.batch; ++b) {
          for (Index h = 0; h < call.q.heads; ++h) {
            for (Index i = 0; i < count; ++i) {
              const auto chosen = cache.retrieved(b, h, i);
              std::vector<Index> numbers(chosen.begin(), chosen.end());
              for (Index& n : numbers) n += cache.retrieved_from();
              REQUIRE(numbers == reference.retrieved(b, h, i));
            }
          }
        }
        first += count;
      }
      check_near(call, exact, 1e-10);
    };
    const auto shape = shape_of(call);
    const rotary turned(Pairing::interleaved, 100);
    switch (random.between(0, 2)) {
      case 0:
        return check(landmark_cache<double>(shape, options), reference::landmark_cache<>(shape, options));
      case 1:
        return check(landmark_cache<double, rotary>(shape, options, turned),
                     reference::landmark_cache<rotary>(shape, options, turned));
      default:
        return check(landmark_cache<double, rotary, exact_positions>(shape, options, turned),
                     reference::landmark_cache<rotary, exact_positions>(shape, options, turned));
    }
  });
}

TEST_CASE("landmark_cache: if all blocks are retrieved, any chunks match landmark attention",
          "[stream][law][slow]") {
  Random random(2);
  Call<float> whole(Shape{2, 6, 2, 300, 300, 20, 13}, Values::normal, random), call = whole.unrun();
  const rotary turned(Pairing::half_split);
  whole.run(landmark_attention{landmarks::every(8), turned});
  for (const Index length : {1, 5, 8, 50, 300}) {
    for (const Index local : {0, 3}) {
      landmark_cache<float, rotary> stingy(shape_of(call),
                                           {.block_size = 8, .top_k = 100, .window_blocks = local}, turned);
      stream(stingy, call, length);
      check_near(call, whole, 4e-6);
      landmark_cache<float, rotary, exact_positions> exact(shape_of(call), {.block_size = 8, .top_k = 100},
                                                           turned);
      stream(exact, call, length);
      check_near(call, whole, 4e-6);
    }
  }
}

TEST_CASE("landmark_cache: a block that a query does not retrieve has no effect", "[stream][golden]") {
  // Scores log c; c of the blocks: {1, 3, landmark 2}, {1, 1, landmark 4}, {2}. The best block is the second.
  const std::vector<double> c{1, 3, 2, 1, 1, 4, 2}, values{1, 2, 0, 3, 4, 0, 5};
  Call<float> call(Shape{1, 1, 1, 7, 7, 1, 1});
  for (Index j = 0; j < 7; ++j) {
    call.q.values[static_cast<std::size_t>(j)] = 1;
    call.k.values[static_cast<std::size_t>(j)] = static_cast<float>(std::log(c[static_cast<std::size_t>(j)]));
    call.v.values[static_cast<std::size_t>(j)] = static_cast<float>(values[static_cast<std::size_t>(j)]);
  }
  landmark_cache<float> cache(shape_of(call), {.block_size = 3, .top_k = 1});
  stream(cache, call, 1);
  CHECK(std::abs(call.out.values[6] - 4.0f) < 1e-6f);
  CHECK(cache.retrieved(0, 0, 0)[0] == 1);
}

TEST_CASE("landmark_cache: positions of blocks with stingy_positions", "[stream][golden]") {
  const stingy_positions map;
  const Retrieval five{5, 0, 2, 2, 3};
  CHECK(map.local(five) == 9);
  std::vector<Index> scored;
  for (Index n = 0; n < 5; ++n) scored.push_back(map.scored(five, n) + 2);
  CHECK(scored == std::vector<Index>{2, 2, 2, 5, 8});
  const auto places = [&](Index first, Index second) {
    return std::vector<Index>{map.attended(five, first, 0), map.attended(five, second, 1)};
  };
  CHECK(places(1, 4) == std::vector<Index>{0, 6});
  CHECK(places(0, 2) == std::vector<Index>{0, 3});
  CHECK(places(3, 4) == std::vector<Index>{3, 6});
  CHECK(places(1, 3) == std::vector<Index>{0, 6});
  const Retrieval two{2, 0, 2, 2, 3};
  CHECK(map.local(two) == 6);
  CHECK(map.attended(two, 0, 0) == 0);
  CHECK(map.attended(two, 1, 1) == 3);
}

TEST_CASE("landmark_cache: of equal landmarks the oldest are retrieved, in rising order", "[stream][law]") {
  for (const auto select : all_selections) {
    Call<float> call(Shape{1, 4, 2, 40, 40, 4, 4});
    landmark_cache<float> cache(shape_of(call), {.block_size = 4, .top_k = 3, .select = select});
    stream(cache, call, 4);
    const auto chosen = cache.retrieved(0, 3, 2);
    CHECK(std::vector<Index>(chosen.begin(), chosen.end()) == std::vector<Index>{0, 1, 2});
  }
}

TEST_CASE("landmark_cache: a cache of limited capacity drops the oldest blocks", "[stream][law]") {
  Random random(3);
  Call<float> call(Shape{2, 2, 1, 100, 100, 8, 8}, Values::normal, random);
  landmark_cache<float> cache(shape_of(call), {.block_size = 5, .top_k = 50, .capacity = 7});
  stream(cache, call, 3);
  CHECK(cache.blocks() == 7);
  CHECK(cache.dropped() == 13);
  CHECK(cache.size() == 100);
  CHECK(cache.retrieved(1, 1, 0).size() == 7);
  CHECK(cache.retrieved_from() == 12);  // the last token has sealed another block
  const Index bytes = cache.bytes();
  Call<float> again = call.unrun();
  stream(cache, again, 3);
  CHECK(cache.bytes() == bytes);
}

TEST_CASE("landmark_cache: with split_at_blocks any chunks match single tokens", "[stream][law]") {
  Random random(12);
  const rotary turned(Pairing::half_split, 100);
  for (const auto select :
       {LandmarkSelect::per_token_and_head, LandmarkSelect::max_over_heads, LandmarkSelect::per_kv_group}) {
    for (const Index local : {0, 2}) {
      Call<double> call(Shape{2, 4, 2, 120, 120, 8, 6});
      fill(call.q, call.k, call.v, Values::normal, random);
      Call<double> steps = call.unrun(), whole = call.unrun();
      Options options{.block_size = 7, .top_k = 2, .select = select, .window_blocks = local, .capacity = 6};
      landmark_cache<double, rotary> by_steps(shape_of(call), options, turned), cut_nowhere = by_steps;
      stream(by_steps, steps, 1);
      stream(cut_nowhere, whole, 5);
      CHECK_FALSE(std::equal(whole.out.values.begin(), whole.out.values.end(), steps.out.values.begin(),
                             [](double x, double y) { return std::abs(x - y) < 1e-3; }));
      options.split_at_blocks = true;
      for (const Index length : {5, 7, 50, 120}) {
        landmark_cache<double, rotary> cache(shape_of(call), options, turned);
        stream(cache, call, length);
        check_near(call, steps, 1e-12);
        CHECK(cache.blocks() == by_steps.blocks());
      }
    }
  }
}

TEST_CASE("landmark_cache: bits do not depend on threads", "[stream][bits]") {
  Random random(4);
  for (const auto select : all_selections) {
    Call<float> call(Shape{1, 6, 2, 200, 200, 24, 16}, Values::normal, random), own = call.unrun();
    const Options options{.block_size = 7, .top_k = 3, .select = select};
    landmark_cache<float> cache(shape_of(call), options), other(shape_of(call), options);
    for (Index i = 0; i < 200; i += 40) {
      extend(cache, call, i, 40, 1);
      extend(other, own, i, 40, 3);
    }
    CHECK(call.same_outputs(own));
  }
}

TEST_CASE("landmark_cache: a copy and the original are independent", "[stream][law]") {
  Random random(5);
  Call<float> call(Shape{1, 2, 1, 60, 60, 8, 8}, Values::normal, random), wanted = call.unrun(),
                                                                          elsewhere = call.unrun();
  const Options options{.block_size = 6, .top_k = 2};
  landmark_cache<float> whole(shape_of(call), options), cache = whole;
  stream(whole, wanted, 10);
  extend(cache, call, 0, 10);
  for (Index i = 10; i < 60; i += 10) {
    auto copy = cache;
    fill_normal(elsewhere.k, random);
    extend(copy, elsewhere, 0, 23);
    extend(cache, call, i, 10);
  }
  CHECK(call.same_outputs(wanted));
  cache.clear();
  Call<float> again = call.unrun();
  stream(cache, again, 10);
  CHECK(again.same_outputs(wanted));
}

TEST_CASE("landmark_cache: reordered batch rows continue as the rows that they copy", "[stream][law]") {
  Random random(6);
  Call<float> call(Shape{3, 2, 1, 50, 50, 8, 8}, Values::normal, random);
  const Options options{.block_size = 6, .top_k = 2};
  const std::vector<Index> rows{2, 0, 2};
  landmark_cache<float> cache(shape_of(call), options);
  extend(cache, call, 0, 33);
  cache.reorder(rows);
  // The result is the same as if the rows had had this order from the start.
  Call<float> moved = call.unrun();
  for (Index b = 0; b < 3; ++b) {
    const Index from = rows[static_cast<std::size_t>(b)];
    std::copy_n(call.q.row(from, 0, 0), 2 * 50 * 8, moved.q.row(b, 0, 0));
    std::copy_n(call.k.row(from, 0, 0), 50 * 8, moved.k.row(b, 0, 0));
    std::copy_n(call.v.row(from, 0, 0), 50 * 8, moved.v.row(b, 0, 0));
  }
  landmark_cache<float> straight(shape_of(call), options);
  Call<float> wanted = moved.unrun();
  extend(straight, wanted, 0, 33);
  extend(straight, wanted, 33, 17);
  extend(cache, moved, 33, 17);
  for (Index b = 0; b < 3; ++b) {
    for (Index h = 0; h < 2; ++h)
      REQUIRE(
          std::equal(moved.out.row(b, h, 33), moved.out.row(b, h, 33) + 17 * 8, wanted.out.row(b, h, 33)));
  }
  const std::vector<Index> short_list{0}, outside{0, 1, 3};
  CHECK(refusal([&] { cache.reorder(short_list); }).find("number of rows is 1") != std::string::npos);
  CHECK(refusal([&] { cache.reorder(outside); }).find("a row is 3") != std::string::npos);
}

TEST_CASE("landmark_cache: tokens without queries leave the same state as tokens with queries",
          "[stream][law]") {
  Random random(7);
  Call<float> call(Shape{1, 4, 2, 80, 80, 8, 8}, Values::normal, random), own = call.unrun();
  const Options options{.block_size = 6, .top_k = 2};
  landmark_cache<float> cache(shape_of(call), options), other(shape_of(call), options);
  extend(cache, call, 0, 70);
  extend(cache, call, 70, 10);
  other.append(std::as_const(own.k).view().slice_rows(0, 70), std::as_const(own.v).view().slice_rows(0, 70));
  extend(other, own, 70, 10);
  for (Index h = 0; h < 4; ++h)
    CHECK(std::equal(own.out.row(0, h, 70), own.out.row(0, h, 70) + 10 * 8, call.out.row(0, h, 70)));
}

TEST_CASE("landmark_cache: a loaded state continues the stream", "[stream][state]") {
  Random random(8);
  Call<float> call(Shape{2, 4, 2, 60, 60, 8, 6}, Values::normal, random), own = call.unrun();
  const Options options{.block_size = 5, .top_k = 2, .capacity = 6};
  const rotary turned(Pairing::half_split);
  landmark_cache<float, rotary> cache(shape_of(call), options, turned),
      loaded(shape_of(call), options, turned);
  extend(cache, call, 0, 43);
  std::stringstream file;
  cache.save(file);
  const std::string bytes = file.str();
  loaded.load(file);
  CHECK(loaded.size() == 43);
  extend(cache, call, 43, 17);
  extend(loaded, own, 43, 17);
  for (Index h = 0; h < 4; ++h)
    REQUIRE(std::equal(own.out.row(1, h, 43), own.out.row(1, h, 43) + 17 * 6, call.out.row(1, h, 43)));

  // A file that cannot be loaded does not change the cache.
  const Index before = loaded.size();
  for (std::size_t length = 0; length < bytes.size(); length += 1 + length / 9) {
    std::istringstream cut(bytes.substr(0, length));
    CHECK_THROWS_AS(loaded.load(cut), longspan::FileError);
  }
  for (std::size_t byte = 0; byte < 160; ++byte) {
    std::string flipped = bytes;
    flipped[byte] = static_cast<char>(flipped[byte] ^ 4);
    std::istringstream broken(flipped);
    CHECK_THROWS_AS(loaded.load(broken), longspan::FileError);
  }
  CHECK(loaded.size() == before);
  landmark_cache<float, rotary> other(shape_of(call), {.block_size = 6, .top_k = 2, .capacity = 6}, turned);
  std::istringstream again(bytes);
  CHECK(file_refusal([&] {
          other.load(again);
        }).find("block_size is 5 in the file, wanted 6 as in this stream") != std::string::npos);
}

namespace {

/// An index that scores every landmark and proposes the `most` best ones, the worst first.
struct RowIndex {
  std::size_t most;
  std::map<std::pair<Index, Index>, std::map<Index, std::vector<float>>> rows{};

  void add(Index b, Index h, Index n, std::span<const float> key) {
    rows[{b, h}].emplace(n, std::vector<float>(key.begin(), key.end()));
  }
  void drop(Index first) {
    for (auto& [lane, keys] : rows) keys.erase(keys.begin(), keys.lower_bound(first));
  }
  void clear() { rows.clear(); }
  std::vector<Index> candidates(Index b, Index h, std::span<const float> query) const {
    std::vector<std::pair<double, Index>> scored;
    for (const auto& [n, key] : rows.at({b, h}))
      scored.emplace_back(std::inner_product(query.begin(), query.end(), key.begin(), 0.0), n);
    std::sort(scored.begin(), scored.end());
    std::vector<Index> named;
    for (std::size_t n = scored.size() - std::min(most, scored.size()); n < scored.size(); ++n)
      named.push_back(scored[n].second);
    return named;
  }
};

}  // namespace

TEST_CASE("landmark_cache: an index that proposes the best blocks changes no result", "[stream][index]") {
  Random random(9);
  const rotary turned(Pairing::half_split);
  const Options options{.block_size = 5, .top_k = 3, .capacity = 20};
  Call<float> call(Shape{2, 4, 2, 150, 150, 16, 8}, Values::normal, random), own = call.unrun();
  landmark_cache<float, rotary> cache(shape_of(call), options, turned);
  landmark_cache<float, rotary, stingy_positions, RowIndex> indexed(shape_of(call), options, turned, {},
                                                                    RowIndex{6});
  const std::vector<Index> rows{1, 1};
  std::stringstream file;
  for (Index i = 0; i < 150; i += 10) {
    extend(cache, call, i, 10);
    extend(indexed, own, i, 10, 2);
    if (i == 70) {
      cache.reorder(rows);
      indexed.reorder(rows);
    }
    if (i == 110) {
      indexed.save(file);
      indexed.clear();
      indexed.load(file);
    }
  }
  CHECK(call.same_outputs(own));
  landmark_cache<float, rotary, stingy_positions, RowIndex> blind(shape_of(call), options, turned, {},
                                                                  RowIndex{0});
  Call<float> unseen = call.unrun();
  stream(blind, unseen, 10);
  CHECK(blind.retrieved(0, 0, 0)[0] == 17);  // the last three of 20 are always scored
  CHECK_FALSE(call.same_outputs(unseen));
}

TEST_CASE("landmark_cache: invalid shapes and options are refused", "[stream][errors]") {
  Call<float> call(Shape{1, 4, 2, 5, 5, 8, 6});
  const auto shape = shape_of(call);
  const auto refuses = [&](const StreamShape& s, const Options& options, const char* words) {
    const std::string text = refusal([&] { landmark_cache<float>(s, options); });
    CAPTURE(text);
    CHECK(text.find(words) != std::string::npos);
  };
  refuses(shape, {.block_size = 1}, "block_size is 1, wanted at least 2");
  refuses(shape, {.top_k = -1}, "top_k is -1");
  refuses(shape, {.window_blocks = -1}, "window_blocks is -1");
  refuses(shape, {.capacity = -1}, "capacity is -1");
  refuses({1, 4, 3, 8, 6}, {}, "with kv_heads a divisor of heads");

  landmark_cache<float> cache({1, 4, 2, 8, 5}, {});
  const std::string text = refusal([&] { extend(cache, call, 0, 5); });
  CHECK(text.find("landmark_cache::extend: q is [1, 4, 5, 8] with 2 KV heads and value_dim 6") !=
        std::string::npos);
  CHECK(cache.size() == 0);
  CHECK(refusal([&] {
          cache.append(std::as_const(call.k).view(), std::as_const(call.v).view());
        }).find("v is [1, 2, 5, 6], wanted [1, 2, 5, 5]") != std::string::npos);
}
