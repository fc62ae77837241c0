#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "longspan/stream/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/drawn_masks.hpp"
#include "support/kv_oracle.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/saved.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

TEST_CASE("kv_cache: with a causal mask, any chunking and storage matches a single call", "[law]") {
  using namespace test;
  for_each_case(40, [](Random& random) {
    const Shape shape = draw_self_shape(random);
    const DrawnMasks masks(shape, random);
    masks.for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      INFO(name);
      Call<float> call(shape, random.pick(all_values), random);
      Definition what;
      what.sees = sees;
      check_stream<float>(call, longspan::softmax_attention{longspan::causal{} & mask}, what, random);
    });
  });
}

namespace {

using namespace test;
using longspan::causal;
using longspan::documents;
using longspan::padding;
using longspan::segments;
using longspan::sinks;
using longspan::softmax_attention;
using longspan::window;

/// A mask with upper limits for its queries, and the pairs that it shows.
struct Literal {
  std::vector<Index> starts{0, 9, 30, 31, 80}, lengths{50, 23};

  template <class Visit>
  void for_each(const Visit& visit) const {
    const auto document = [](Index x) { return x < 9 ? 0 : x < 30 ? 1 : x < 31 ? 2 : x < 80 ? 3 : 4; };
    visit("causal | sinks", causal{} | sinks{21},
          Predicate{[](Index, Index, Index i, Index j) { return j <= i || j < 21; }});
    visit("segments", segments{12},
          Predicate{[](Index, Index, Index i, Index j) { return i / 12 == j / 12; }});
    visit("segments | sinks", segments{12} | sinks{5},
          Predicate{[](Index, Index, Index i, Index j) { return i / 12 == j / 12 || j < 5; }});
    visit("documents", documents{starts}, Predicate{[=](Index, Index, Index i, Index j) {
            return document(i) == document(j) && (document(i) < 4 || j <= i);
          }});
    visit("padding", padding{lengths},
          Predicate{[](Index b, Index, Index, Index j) { return j < (b == 0 ? 50 : 23); }});
    visit("window & padding", window{.left = 7, .right = 6} & padding{lengths},
          Predicate{[](Index b, Index, Index i, Index j) {
            return j >= i - 7 && j <= i + 6 && j < (b == 0 ? 50 : 23);
          }});
    visit("window without a right side", window{.left = 30},
          Predicate{[](Index, Index, Index i, Index j) { return j <= i && j >= i - 30; }});
    visit("no ranges", every_third{},
          Predicate{[](Index, Index, Index i, Index j) { return j <= i && every_third{}.sees(i, j); }});
  }
};

/// True if the tokens [first, end) may be one chunk.
bool holds_its_keys(const Predicate& sees, Index first, Index end) {
  for (Index i = first; i < end; ++i) {
    for (Index j = end; j < 160; ++j) {
      if (sees(0, 0, i, j) || sees(1, 0, i, j)) return false;
    }
  }
  return true;
}

}  // namespace

TEST_CASE("kv_cache: a chunk with all keys that its queries may see matches a single call", "[law]") {
  const Literal masks;
  for_each_case(5, [&](Random& random) {
    masks.for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      INFO(name);
      // The longest sequence of at most 150 tokens that contains all keys that its queries see.
      Shape shape{2, 4, 2, 150, 150, 8, 8};
      while (!holds_its_keys(sees, 0, shape.q_len)) --shape.q_len;
      shape.kv_len = shape.q_len;
      Call<float> call(shape, Values::normal, random);
      auto stream = softmax_attention{mask}.stream(stream_shape(shape), draw_options(random));
      while (stream.size() < shape.q_len) {
        const Index first = stream.size();
        Index count = std::min(shape.q_len - first, random.between(1, 40));
        for (; !holds_its_keys(sees, first, first + count); ++count) {
          if (random.chance(0.7)) continue;
          const std::string before = saved(stream);
          REQUIRE(refusal([&] { extend(stream, call, first, count); }).find(" may see keys up to ") !=
                  std::string::npos);
          REQUIRE(saved(stream) == before);
        }
        extend(stream, call, first, count);
      }
      Definition what;
      what.sees = sees;
      check_against(exact_attention(what, call), call);
    });
  });
}

TEST_CASE("kv_cache: a prefix visible in both directions has the bits of a single call", "[bits]") {
  Random random(3);
  const Shape shape{2, 4, 2, 700, 700, 16, 16};
  Call<float> once(shape, Values::normal, random), chunks = once.unrun();
  const softmax_attention attend{causal{} | sinks{300}};
  once.run(attend);
  for (const Index page : {0, 256}) {
    auto stream = attend.stream(stream_shape(shape), {.page_size = page});
    extend(stream, chunks, 0, 310);
    extend(stream, chunks, 310, 390);
    CHECK(chunks.same_outputs(once));
  }
}

TEST_CASE("kv_cache: a chunk that is too short for its mask is refused, and nothing changes", "[errors]") {
  Random random(4);
  const Shape shape{1, 2, 1, 40, 40, 4, 4};
  Call<float> call(shape, Values::normal, random), again = call.unrun();
  const softmax_attention attend{causal{} | sinks{8}};
  auto stream = attend.stream(stream_shape(shape)), other = stream;
  CHECK(refusal([&] { extend(stream, call, 0, 5); }) ==
        "longspan: kv_cache::extend: the chunk is the tokens 0 to 4, but query 0 may see keys up to 7, "
        "wanted a longer chunk that contains these keys, or the mask causal{} & mask");
  CHECK(stream.size() == 0);
  CHECK(stream.bytes() == 0);
  extend(stream, call, 0, 20);
  extend(other, again, 0, 20);
  CHECK(same_rows(call, again, 0, 20));
  // Tokens without queries may have any chunks.
  auto appended = attend.stream(stream_shape(shape));
  appended.append(std::as_const(call.k).view().slice_rows(0, 5),
                  std::as_const(call.v).view().slice_rows(0, 5));
  CHECK(refusal([&] { extend(appended, call, 5, 1); }).find("query 5 may see") != std::string::npos);
  extend(appended, again, 5, 15);
  CHECK(same_rows(call, again, 5, 20));
  // With a window with a right side some query always sees a key after its chunk.
  auto both_ways = softmax_attention{window{.left = 3, .right = 2}}.stream(stream_shape(shape));
  CHECK(refusal([&] { extend(both_ways, call, 0, 40); }).find("query 38 may see keys up to 40") !=
        std::string::npos);
  // A user-defined range mask whose ranges decrease, which is not allowed.
  struct falls {
    longspan::KeyRange keys(Index, Index i) const { return {0, i < 3 ? 12 : longspan::KeyRange::highest}; }
  };
  auto fallen = softmax_attention{falls{}}.stream(stream_shape(shape));
  CHECK(refusal([&] { extend(fallen, call, 0, 20); })
            .find("the end of the keys of query 3 is 4, wanted at least "
                  "12") != std::string::npos);
}

TEST_CASE("kv_cache: a long prompt is cut only where no query sees keys after the cut", "[law]") {
  Random random(5);
  const Shape shape{1, 1, 1, 7500, 7500, 4, 4};
  Call<float> call(shape, Values::normal, random), whole = call.unrun();
  const std::vector<Index> starts{0, 2500, 2600, 5000, 7500};
  const softmax_attention attend{documents{starts}};
  // A cache that evicts pages cuts a long call into pieces; one with a single array does not.
  auto ring = attend.stream(stream_shape(shape), {.page_size = 256}),
       array = attend.stream(stream_shape(shape));
  extend(ring, call, 0, 7500);
  extend(array, whole, 0, 7500);
  CHECK(call.same_outputs(whole));
  CHECK(ring.bytes() < array.bytes() / 2);
}

TEST_CASE("kv_cache: after many evictions a token sees its window and the sinks, and nothing between",
          "[law]") {
  using namespace test;
  Random random(1);
  const Shape shape{2, 3, 1, 9000, 9000, 8, 8};
  Call<float> call(shape, Values::normal, random);
  const Index left = 2500;
  const longspan::softmax_attention attend{longspan::causal{} &
                                           (longspan::window{.left = left} | longspan::sinks{4})};
  auto stream = attend.stream(stream_shape(shape), {.page_size = 256});
  stream.append(std::as_const(call.k).view().slice_rows(0, 8999),
                std::as_const(call.v).view().slice_rows(0, 8999));
  extend(stream, call, 8999, 1);
  // The keys between window and sinks may contain anything.
  for (Index b = 0; b < 2; ++b) std::fill_n(call.v.row(b, 0, 4), (8999 - left - 4) * 8, NAN);
  Call<float> last(Shape{2, 3, 1, 1, 9000, 8, 8});
  last.k = call.k;
  last.v = call.v;
  for (Index n = 0; n < 6; ++n) {
    std::copy_n(call.q.row(0, n, 8999), 8, last.q.row(0, n, 0));
    std::copy_n(call.out.row(0, n, 8999), 8, last.out.row(0, n, 0));
    last.lse.values[std::size_t(n)] = call.lse(0, n, 8999);
  }
  Definition what;
  what.sees = [=](Index, Index, Index i, Index j) { return j < 4 || j >= i - left; };
  check_against(exact_attention(what, last), last);
}
