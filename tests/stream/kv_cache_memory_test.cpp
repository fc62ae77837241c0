#include <algorithm>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/stream/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/random.hpp"
#include "support/saved.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::sinks;
using longspan::softmax_attention;
using longspan::window;

const Shape shape{2, 4, 2, 4000, 4000, 8, 8};

/// Extends with the rows [first, first + count) of the call on this thread, with an executor that allocates nothing.
template <class Stream>
void append(Stream& stream, Call<float>& call, Index first, Index count) {
  stream.extend(std::as_const(call.q).view().slice_rows(first, count),
                std::as_const(call.k).view().slice_rows(first, count),
                std::as_const(call.v).view().slice_rows(first, count),
                call.out.view().slice_rows(first, count), longspan::serial{});
}

/// Runs `work` on copies of `stream` with memory for 0, 1, 2 ... allocations: each failure must change nothing.
template <class Stream, class Work>
void check_strong_guarantee(const Stream& stream, const Work& work) {
  const std::string before = saved(stream);
  for (long count = 0;; ++count) {
    INFO("memory for " << count << " allocations");
    REQUIRE(count < 1000);
    Stream copy = stream;
    const Index size = copy.size();
    const bool failed = runs_out_of_memory(count, [&] { work(copy); });
    if (!failed) {
      CHECK(count > 0);
      return;
    }
    REQUIRE(copy.size() == size);
    REQUIRE(saved(copy) == before);
    REQUIRE(copy.can_truncate(std::max<Index>(0, size - 16)));
    work(copy);  // now with enough memory
  }
}

}  // namespace

TEST_CASE("kv_cache: a call that runs out of memory changes nothing, at whichever allocation", "[state]") {
  Random random(1);
  Call<float> call(shape, Values::normal, random);
  const softmax_attention attend{causal{} & (window{.left = 60} | sinks{4}),
                                 longspan::rotary(longspan::Pairing::half_split)};
  for (const Index page : {0, 16}) {
    INFO("page_size=" << page);
    auto stream = attend.stream(stream_shape(shape), {.page_size = page});
    check_strong_guarantee(stream, [&](auto& copy) { append(copy, call, 0, 40); });
    append(stream, call, 0, 90);
    check_strong_guarantee(stream, [&](auto& copy) { append(copy, call, 90, 1); });
    check_strong_guarantee(stream, [&](auto& copy) { append(copy, call, 90, 100); });
    check_strong_guarantee(stream, [&](auto& copy) { copy.reserve(500); });
    check_strong_guarantee(stream, [&](auto& copy) {
      copy.append(std::as_const(call.k).view().slice_rows(90, 40),
                  std::as_const(call.v).view().slice_rows(90, 40), longspan::serial{});
    });
    const std::vector<Index> rows{1, 0};
    check_strong_guarantee(stream, [&](auto& copy) { copy.reorder(rows); });
    const std::string file = saved(stream);
    auto empty = attend.stream(stream_shape(shape), {.page_size = page});
    std::istringstream from(file);
    check_strong_guarantee(empty, [&](auto& copy) {
      from.clear();
      from.seekg(0);
      copy.load(from);
    });
    auto longer = stream;
    append(longer, call, 90, 40);
    check_strong_guarantee(stream, [&](auto& copy) { copy = longer; });
  }
}

TEST_CASE("kv_cache: destruction, clear and truncate need no memory", "[state]") {
  Random random(2);
  Call<float> call(shape, Values::normal, random);
  using Cache = decltype(softmax_attention{causal{}}.stream(stream_shape(shape)));
  for (const Index page : {0, 2, 64}) {
    std::vector<Cache> streams(3,
                               softmax_attention{causal{}}.stream(stream_shape(shape), {.page_size = page}));
    for (Cache& stream : streams) append(stream, call, 0, 100);
    CHECK_FALSE(runs_out_of_memory(0, [&] {
      streams[0].truncate(3);
      streams[1].clear();
      streams.pop_back();
      streams.clear();
    }));
  }
}

TEST_CASE("kv_cache: if a score throws the stream is unchanged, after any number of pieces", "[state]") {
  Random random(3);
  Call<float> call(shape, Values::normal, random), again = call.unrun();
  Index fails_from = 1 << 20;
  const auto score = [&fails_from](float s, Index, Index, Index i, Index) {
    if (i >= fails_from) throw std::runtime_error("a score");
    return s;
  };
  const softmax_attention attend{causal{} & window{.left = 60}, score};
  for (const Index page : {0, 16}) {
    auto stream = attend.stream(stream_shape(shape), {.page_size = page});
    append(stream, call, 0, 100);
    const std::string before = saved(stream);
    for (const Index from : {100, 1000, 3000}) {
      fails_from = from;
      CHECK_THROWS_AS(append(stream, call, 100, 3700), std::runtime_error);
      fails_from = 1 << 20;
      CHECK(stream.size() == 100);
      CHECK(saved(stream) == before);
      CHECK(stream.can_truncate(84));
    }
    append(stream, call, 100, 200);
    auto never_failed = attend.stream(stream_shape(shape), {.page_size = page});
    append(never_failed, again, 0, 100);
    append(never_failed, again, 100, 200);
    CHECK(call.out.row(0, 0, 299)[0] == again.out.row(0, 0, 299)[0]);
    CHECK(saved(stream) == saved(never_failed));
  }
}
