#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include "longspan/stream/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::kv_cache_options;
using longspan::sinks;
using longspan::softmax_attention;
using longspan::window;

const softmax_attention ring{causal{} & (window{.left = 99} | sinks{4})};

/// The bytes of one page in a cache of float with value_dim = head_dim.
Index page_bytes(const Shape& shape, Index page) {
  return 2 * shape.kv_heads * shape.head_dim * page * Index{sizeof(float)};
}

}  // namespace

TEST_CASE("kv_cache: pages that the mask will not show again are evicted", "[state]") {
  Random random(1);
  const Shape shape{1, 4, 2, 6000, 6000, 8, 8};
  Call<float> call(shape, Values::normal, random);
  auto stream = ring.stream(stream_shape(shape), {.page_size = 32});
  CHECK(stream.bytes() == 0);
  for (Index n = 0; n < 1000; ++n) {
    extend(stream, call, n, 1);
    // The page of the sinks, every page with one of the last 99 keys of a query at most 16 tokens back, and that of
    // the next token.
    const Index first = std::max<Index>(1, (n + 1 - 16 - 99) / 32), last = n / 32;
    const Index pages = std::max<Index>(0, last - first + 1) + 1;
    REQUIRE(stream.bytes() <= (pages + 1) * page_bytes(shape, 32));
  }
  // After a long prompt only the pages of the window and the sinks remain.
  auto prompt = ring.stream(stream_shape(shape), {.page_size = 32});
  extend(prompt, call, 0, 6000);
  CHECK(prompt.bytes() <= 6 * page_bytes(shape, 32));
  auto kept = ring.stream(stream_shape(shape), {.page_size = 32, .evict = false});
  extend(kept, call, 0, 6000);
  CHECK(kept.bytes() == 188 * page_bytes(shape, 32));
}

TEST_CASE("kv_cache: an array grows by doubling, and after reserve tokens allocate nothing", "[state]") {
  Random random(2);
  const Shape shape{2, 4, 2, 1500, 1500, 16, 16};
  Call<float> call(shape, Values::normal, random);
  const auto q = std::as_const(call.q).view(), k = std::as_const(call.k).view(),
             v = std::as_const(call.v).view();
  for (const Index page : {0, 64}) {
    auto stream = softmax_attention{causal{}}.stream(stream_shape(shape), {.page_size = page});
    extend(stream, call, 0, 10);
    CHECK(stream.bytes() == 2 * page_bytes(shape, page == 0 ? 10 : 64));
    extend(stream, call, 10, 1);
    CHECK(stream.bytes() == 2 * page_bytes(shape, page == 0 ? 20 : 64));
    stream.reserve(1500);
    longspan::Execution execution(longspan::serial{});
    const auto step = [&](Index n) {
      stream.extend(q.slice_rows(n, 1), k.slice_rows(n, 1), v.slice_rows(n, 1),
                    call.out.view().slice_rows(n, 1), execution);
    };
    step(11);
    CHECK(allocations_of([&] {
            for (Index n = 12; n < 1500; ++n) step(n);
          }) == 0);
  }
}

TEST_CASE("kv_cache: copies share pages and are independent", "[state]") {
  Random random(3);
  const Shape shape{2, 3, 1, 200, 200, 8, 8};
  Call<float> call(shape, Values::normal, random), beam = call.unrun(), again = call.unrun();
  for (Index h = 0; h < 3; ++h) std::fill_n(beam.q.row(0, h, 90), 8, 7.0f);
  std::fill_n(beam.k.row(0, 0, 95), 8, 2.0f);
  for (const Index page : {0, 16, 64}) {
    auto stream = softmax_attention{causal{}}.stream(stream_shape(shape), {.page_size = page});
    extend(stream, call, 0, 90);
    {
      auto copy = stream;
      // Whole pages are not copied: the copy only allocates two lists of pages.
      CHECK(allocations_of([&] { const auto another = stream; }) <= 4);
      extend(copy, beam, 90, 110);
    }
    extend(stream, call, 90, 110);
    CHECK_FALSE(same_rows(call, beam, 96, 97));
    CHECK(call.lse(1, 0, 150) == beam.lse(1, 0, 150));
    auto fresh = softmax_attention{causal{}}.stream(stream_shape(shape), {.page_size = page});
    auto of_beam = fresh;
    Call<float> alone = beam.unrun();
    extend(fresh, again, 0, 90);
    extend(fresh, again, 90, 110);
    extend(of_beam, alone, 0, 90);
    extend(of_beam, alone, 90, 110);
    CHECK(same_rows(call, again, 0, 200));
    CHECK(same_rows(beam, alone, 90, 200));
    stream.clear();
    CHECK(stream.size() == 0);
    extend(stream, call, 0, 90);
    extend(stream, call, 90, 110);
    CHECK(same_rows(call, again, 0, 200));
  }
}

TEST_CASE("kv_cache: a copy costs only its open page", "[state]") {
  Random random(4);
  const Shape shape{1, 2, 2, 300, 300, 8, 8};
  Call<float> call(shape, Values::normal, random);
  auto stream = softmax_attention{causal{}}.stream(stream_shape(shape), {.page_size = 32});
  extend(stream, call, 0, 290);
  auto copy = stream;
  longspan::Execution execution(longspan::serial{});
  const auto step = [&](auto& of, Index n) {
    of.extend(std::as_const(call.q).view().slice_rows(n, 1), std::as_const(call.k).view().slice_rows(n, 1),
              std::as_const(call.v).view().slice_rows(n, 1), call.out.view().slice_rows(n, 1), execution);
  };
  execution.workspace.reserve(1 << 20);
  CHECK(allocations_of([&] { step(copy, 290); }) == 1);
  CHECK(allocations_of([&] { step(stream, 290); }) == 0);
}

TEST_CASE("kv_cache: later queries see tokens that were appended without queries", "[state]") {
  Random random(9);
  const Shape shape{2, 4, 2, 400, 400, 8, 6};
  Call<float> call(shape, Values::normal, random), again = call.unrun();
  for (const Index page : {0, 16}) {
    auto stream = ring.stream(stream_shape(shape), {.page_size = page}), other = stream;
    extend(stream, call, 0, 300);
    extend(stream, call, 300, 100);
    other.append(std::as_const(call.k).view().slice_rows(0, 300),
                 std::as_const(call.v).view().slice_rows(0, 300));
    CHECK(other.size() == 300);
    extend(other, again, 300, 100);
    CHECK(same_rows(call, again, 300, 400));
    CHECK(other.bytes() <= stream.bytes());
    CHECK(refusal([&] {
            other.append(call.v.view(), call.k.view());
          }).find("kv_cache::append: k is [2, 2, 400, 6], wanted [2, 2, 400, 8]") != std::string::npos);
  }
}

TEST_CASE("kv_cache: truncate removes tokens", "[state]") {
  Random random(5);
  const Shape shape{2, 4, 2, 220, 220, 8, 8};
  Call<float> call(shape, Values::normal, random), guess = call.unrun(), again = call.unrun();
  fill_normal(guess.k, random);
  for (const Index page : {0, 16, 64}) {
    const softmax_attention attend{causal{} & window{.left = 60}};
    auto stream = attend.stream(stream_shape(shape), {.page_size = page});
    extend(stream, again, 0, 150);
    const auto before = stream;
    extend(stream, guess, 150, 3);
    stream.truncate(150);
    CHECK(stream.size() == 150);
    extend(stream, again, 150, 70);
    auto straight = attend.stream(stream_shape(shape), {.page_size = page});
    extend(straight, call, 0, 150);
    extend(straight, call, 150, 70);
    CHECK(again.same_outputs(call));
    auto unmoved = before;
    extend(unmoved, again, 150, 70);
    CHECK(again.same_outputs(call));
  }
}

TEST_CASE("kv_cache: reorder copies batch rows", "[state]") {
  Random random(6);
  const Shape shape{3, 2, 1, 120, 120, 8, 8};
  Call<float> call(shape, Values::normal, random), moved = call, wanted = call;
  const std::vector<Index> from{2, 0, 2};
  for (Index b = 0; b < 3; ++b) {
    const Index old = from[std::size_t(b)];
    std::copy_n(call.k.row(old, 0, 0), 70 * 8, wanted.k.row(b, 0, 0));
    std::copy_n(call.v.row(old, 0, 0), 70 * 8, wanted.v.row(b, 0, 0));
  }
  for (const Index page : {0, 16, 64}) {
    auto stream = softmax_attention{causal{}}.stream(stream_shape(shape), {.page_size = page}),
         straight = stream;
    extend(stream, moved, 0, 70);
    stream.reorder(from);
    extend(stream, moved, 70, 50);
    extend(straight, wanted, 0, 70);
    extend(straight, wanted, 70, 50);
    CHECK(same_rows(moved, wanted, 70, 120));
  }
}

TEMPLATE_TEST_CASE("kv_cache: a loaded state continues the stream", "[state]", float, double, Eigen::half,
                   std::int8_t) {
  Random random(7);
  const Shape shape{2, 4, 2, 700, 700, 8, 6};
  Call<float> call(shape, Values::normal, random), later = call.unrun();
  for (const Index page : {0, 32}) {
    auto stream = ring.template stream<TestType>(stream_shape(shape), {.page_size = page});
    extend(stream, call, 0, 611);
    std::stringstream file;
    stream.save(file);
    extend(stream, call, 611, 89);
    auto loaded = ring.template stream<TestType>(stream_shape(shape), {.page_size = page});
    extend(loaded, later, 0, 11);
    loaded.load(file);
    CHECK(loaded.size() == 611);
    extend(loaded, later, 611, 89);
    for (Index n = 0; n < 8; ++n)
      CHECK(std::equal(call.out.row(0, n, 611), call.out.row(0, n, 611) + 89 * 6, later.out.row(0, n, 611)));
  }
}

TEST_CASE("kv_cache: a damaged file or one of another stream is refused, and nothing changes",
          "[state][errors]") {
  Random random(8);
  const Shape shape{1, 2, 1, 100, 100, 4, 4};
  Call<float> call(shape, Values::normal, random), after = call.unrun();
  const kv_cache_options paged{.page_size = 16};
  const softmax_attention attend{causal{}};
  auto stream = attend.stream(stream_shape(shape), paged);
  extend(stream, call, 0, 60);
  std::stringstream file;
  stream.save(file);
  const std::string bytes = file.str();
  check_damage_is_refused(stream, bytes, 1, "kv_cache::load");
  for (const std::size_t length : {std::size_t{0}, std::size_t{40}, bytes.size() / 2, bytes.size() - 1})
    CHECK_FALSE(refused(stream, bytes.substr(0, length)).empty());
  auto other_page = attend.stream(stream_shape(shape));
  CHECK(refused(other_page, bytes) ==
        "longspan: kv_cache::load: page_size is 16 in the file, wanted 0 as in this stream");
  auto other_type = attend.stream<double>(stream_shape(shape), paged);
  CHECK(refused(other_type, bytes) ==
        "longspan: kv_cache::load: the element type is float in the file, wanted double as in this stream");
  auto other_heads = attend.stream({1, 2, 2, 4, 4}, paged);
  CHECK(refused(other_heads, bytes) ==
        "longspan: kv_cache::load: kv_heads is 1 in the file, wanted 2 as in this stream");

  // The pages of a window are too few for a mask that shows everything.
  auto narrow = softmax_attention{window{.left = 10}}.stream(stream_shape(shape), paged);
  extend(narrow, after, 0, 60);
  std::stringstream few;
  narrow.save(few);
  CHECK(refused(stream, few.str()).find("without some keys that later queries may see") != std::string::npos);

  extend(stream, call, 60, 40);
  auto whole = attend.stream(stream_shape(shape), paged);
  extend(whole, after, 0, 60);
  extend(whole, after, 60, 40);
  CHECK(same_rows(after, call, 0, 100));
}
