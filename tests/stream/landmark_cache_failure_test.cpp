// Landmark caches and hybrid streams that run out of memory at each possible allocation: nothing changes.
#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "examples/temporary_folder.hpp"
#include "longspan/stream/hybrid_stream.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/random.hpp"
#include "support/saved.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using namespace longspan;

const Shape sizes{2, 2, 1, 80, 80, 4, 4};
const rotary turned(Pairing::half_split);

template <class S>
void append(S& stream, Call<float>& call, Index first, Index count) {
  const auto rows = [&](const Tensor<float>& x) { return x.view().slice_rows(first, count); };
  stream.extend(rows(call.q), rows(call.k), rows(call.v), call.out.view().slice_rows(first, count), serial{});
}

/// Lets each allocation of work(stream) fail in turn, on a stream from fresh(). The stream is then unchanged and
/// continues with the outputs of one that never ran out of memory.
template <class Fresh, class Work>
void check_every_failure(const Fresh& fresh, const Work& work, int least) {
  Random random(1);
  Call<float> call(sizes, Values::normal, random), own = call.unrun();
  auto untouched = fresh();
  append(untouched, call, 0, 33);
  const std::string before = saved(untouched);
  work(untouched);
  append(untouched, call, 50, 30);

  for (long n = 0;; ++n) {
    INFO("after " << n << " allocations");
    auto stream = fresh();
    append(stream, own, 0, 33);
    REQUIRE(saved(stream) == before);
    const bool failed = runs_out_of_memory(n, [&] { work(stream); });
    if (failed) {
      REQUIRE(saved(stream) == before);
      work(stream);
    }
    append(stream, own, 50, 30);
    REQUIRE(same_rows(call, own, 50, 80));
    if (failed) continue;
    CHECK(n >= least);
    break;
  }
}

/// Checks all operations that may fail, with `extend` as one step of the stream.
template <class Fresh>
void check_every_call(const Fresh& fresh, Index chunk) {
  Random random(2);
  Call<float> call(sizes, Values::normal, random);
  check_every_failure(
      fresh, [&](auto& stream) { append(stream, call, 10, chunk); }, 3);
  auto other = fresh();
  append(other, call, 0, 47);
  check_every_failure(
      fresh, [&](auto& stream) { stream = std::as_const(other); }, 5);
  const std::string state = saved(other);
  check_every_failure(
      fresh,
      [&](auto& stream) {
        std::istringstream from(state);
        stream.load(from);
      },
      5);
  check_every_failure(
      fresh, [](auto& stream) { stream.truncate(32); }, 0);
  check_every_failure(
      fresh, [](auto& stream) { stream.clear(); }, 1);
}

struct MapIndex {
  std::map<Index, std::vector<float>> rows{};

  void add(Index b, Index, Index n, std::span<const float> key) {
    rows[2 * n + b] = std::vector<float>(key.begin(), key.end());
  }
  void drop(Index first) { rows.erase(rows.begin(), rows.lower_bound(2 * first)); }
  void clear() { rows.clear(); }
  std::vector<Index> candidates(Index b, Index, std::span<const float> query) const {
    std::vector<Index> named;
    for (const auto& [n, key] : rows) {
      if (n % 2 == b && key[0] * query[0] > 0) named.push_back(n / 2);
    }
    return named;
  }
};

}  // namespace

TEST_CASE("landmark_cache: a call that runs out of memory changes nothing", "[stream][memory]") {
  const landmark_cache_options options{.block_size = 4, .top_k = 2, .window_blocks = 1, .capacity = 5};
  check_every_call([&] { return landmark_cache<float, rotary>(stream_shape(sizes), options, turned); }, 17);
  check_every_call(
      [&] {
        return landmark_cache<std::int8_t, rotary, stingy_positions, MapIndex>(stream_shape(sizes), options,
                                                                               turned);
      },
      17);
}

TEST_CASE("landmark_cache: a call that runs out of memory changes nothing in a file",
          "[stream][memory][file]") {
  const TemporaryFolder folder;
  Random random(3);
  Call<float> call(sizes, Values::normal, random);
  int files = 0;
  for (const Index rollback : {0, 6}) {
    const auto fresh = [&] {
      return landmark_cache<float>(stream_shape(sizes),
                                   {.block_size = 4,
                                    .top_k = 2,
                                    .capacity = 5,
                                    .rollback = rollback,
                                    .path = folder.file("blocks" + std::to_string(++files))});
    };
    check_every_failure(
        fresh, [&](auto& stream) { append(stream, call, 10, 17); }, 3);
    check_every_failure(
        fresh,
        [&](auto& stream) {
          stream.append(std::as_const(call.k).view().slice_rows(3, 17),
                        std::as_const(call.v).view().slice_rows(3, 17), serial{});
        },
        3);
    check_every_failure(
        fresh, [](auto& stream) { stream.drop(3); }, 0);
  }
}

TEST_CASE("hybrid_stream: a call that runs out of memory changes nothing", "[stream][memory]") {
  for (const Index rollback : {0, 16}) {
    check_every_call(
        [&] {
          return hybrid_stream<float>(stream_shape(sizes), {.block_size = 4,
                                                            .top_k = 2,
                                                            .window_blocks = 1,
                                                            .capacity = 2,
                                                            .evicted_at_once = 2,
                                                            .rollback = rollback});
        },
        3);  // the ninth block ends with the third token, and two are evicted
  }
}
