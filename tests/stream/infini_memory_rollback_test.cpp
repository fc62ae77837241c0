#include <sstream>
#include <string>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "longspan/landmark_attention.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "support/refusal.hpp"
#include "support/rollback.hpp"
#include "support/saved.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::infini_attention;
using longspan::InfiniRule;

template <class Local>
auto draw_attention(Local local, Random& random) {
  infini_attention attend{local};
  attend.segment = random.pick({1, 5, 16, 60});
  attend.rule = random.pick({InfiniRule::linear, InfiniRule::delta});
  attend.empty_memory = random.pick({longspan::EmptyMemory::gate, longspan::EmptyMemory::bypass});
  return attend;
}

template <class T, class Local>
void check_rollback_of(const infini_attention<Local>& attend, Random& random) {
  const Shape shape{random.between(1, 2), 4, random.pick({1, 2, 4}), 0, 0, 8, random.pick({4, 12})};
  const Index rollback = random.pick({0, 1, 16, 40});
  INFO("segment " << attend.segment << ", rollback " << rollback << ", rule " << int(attend.rule));
  check_rollback([&] { return attend.template stream<T>(stream_shape(shape), {.rollback = rollback}); },
                 shape, random, {150, rollback, random.pick({1, 4, 12, 70})});
}

infini_attention<> options(Index segment, InfiniRule rule = InfiniRule::linear) {
  infini_attention attend;
  attend.segment = segment;
  attend.rule = rule;
  return attend;
}

/// True if M, z and sizes of both streams have the same bits.
template <class Stream>
bool same_memory(const Stream& a, const Stream& b) {
  const longspan::StreamShape& s = a.shape();
  for (Index row = 0; row < s.batch; ++row) {
    if (a.size(row) != b.size(row) || a.open_rows(row) != b.open_rows(row)) return false;
    for (Index h = 0; h < s.kv_heads; ++h) {
      for (Index c = 0; c < s.head_dim; ++c) {
        if (a.norm(row, h, c) != b.norm(row, h, c)) return false;
        for (Index column = 0; column < s.value_dim; ++column)
          if (a.memory(row, h, c, column) != b.memory(row, h, c, column)) return false;
      }
    }
  }
  return true;
}

}  // namespace

TEST_CASE("infini_memory: removed tokens change no bit of later outputs", "[law][bits][infini]") {
  for_each_case(30, [](Random& random) {
    check_rollback_of<float>(draw_attention(longspan::softmax_attention{causal{}}, random), random);
    auto turned = draw_attention(
        longspan::softmax_attention{causal{}, longspan::rotary(longspan::Pairing::half_split)}, random);
    turned.memory_uses_positions = random.chance(0.5);
    turned.absolute_positions = random.chance(0.5);
    check_rollback_of<Eigen::bfloat16>(turned, random);
  });
}

TEST_CASE("infini_memory: the same with dilated and landmark attention within segments",
          "[law][bits][infini]") {
  for_each_case(15, [](Random& random) {
    check_rollback_of<float>(draw_attention(longspan::dilated_attention{{{8, 1}, {32, 3}}, causal{}}, random),
                             random);
    check_rollback_of<float>(
        draw_attention(longspan::landmark_attention{longspan::landmarks::every(4)}, random), random);
  });
}

TEST_CASE("infini_memory: batch rows of different sizes are truncated separately", "[state][infini]") {
  for_each_case(40, [](Random& random) {
    const auto attend =
        options(random.pick({3, 8, 20}), random.pick({InfiniRule::linear, InfiniRule::delta}));
    const longspan::StreamShape shape{3, 2, 1, 8, 4};
    const Index rollback = random.pick({1, 10, 40});
    auto stream = attend.stream(shape, {.rollback = rollback}), wanted = stream;
    Call<float> call(Shape{3, 2, 1, 200, 200, 8, 4}, Values::normal, random);
    const auto append = [&](auto& into, Index b, Index first, Index count) {
      const auto row = [&](const auto& x) {
        return longspan::detail::batch_row(std::as_const(x).view(), b).slice_rows(first, count);
      };
      into.append(b, row(call.k), row(call.v));
    };
    // Each batch row first has its own number of tokens; then all have the same number.
    const Index size = random.between(30, 60);
    const bool flushes = random.chance(0.3);
    for (Index b = 0; b < 3; ++b) {
      Index first = 0;
      if (random.chance(0.5)) {
        append(stream, b, 100, random.between(1, 50));
        stream.reset(b);
      }
      for (Index count; first < size; first += count) {
        count = std::min(random.between(1, 25), size - first);
        append(stream, b, first, count);
        if (flushes && random.chance(0.2)) stream.flush();
      }
    }
    const Index kept = size - random.between(0, rollback > size ? size : rollback);
    REQUIRE(stream.can_truncate(kept));
    auto copy = stream;
    stream.truncate(kept);
    for (Index b = 0; b < 3; ++b) {
      CHECK(stream.size(b) == kept);
      append(stream, b, kept, size - kept);
    }
    if (kept == size) CHECK(same_memory(stream, copy));
    auto loaded = attend.stream(shape, {.rollback = rollback});
    std::istringstream file(saved(stream));
    loaded.load(file);
    CHECK(saved(loaded) == saved(stream));
    for (Index b = 0; b < 3; ++b) append(wanted, b, 0, size);
    if (!flushes) REQUIRE(same_memory(wanted, stream));
    for (Index b = 0; b < 3; ++b) CHECK(loaded.size(b) == size);
  });
}

TEST_CASE("infini_memory: after truncate over segment borders M and z have the bits without the tokens",
          "[state][bits][infini]") {
  Random random(5);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    Call<float> call(Shape{2, 2, 1, 300, 300, 20, 12}, Values::normal, random);
    const infini_attention attend = options(8, rule);
    for (Index kept = 60; kept <= 100; ++kept) {
      auto stream = attend.stream({2, 2, 1, 20, 12}, {.rollback = 40}),
           never_saw = attend.stream({2, 2, 1, 20, 12});
      extend(stream, call, 0, 57);
      extend(stream, call, 57, 43);
      stream.truncate(kept);
      extend(never_saw, call, 0, kept);
      REQUIRE(same_memory(stream, never_saw));
      extend(stream, call, kept, 50);
      extend(never_saw, call, kept, 50);
      REQUIRE(same_memory(stream, never_saw));
    }
  }
}

TEST_CASE("infini_memory: how far it can be truncated, the error beyond that, and the memory for it",
          "[errors][infini]") {
  Random random(6);
  Call<float> call(Shape{1, 2, 1, 300, 300, 4, 4}, Values::normal, random);
  for (const Index rollback : {0, 1, 16, 40}) {
    auto stream = options(20).stream({1, 2, 1, 4, 4}, {.rollback = rollback});
    for (Index n = 0; n < 300; n += 7) {
      extend(stream, call, n, std::min<Index>(7, 300 - n));
      for (Index back = 0; back <= std::min(rollback, stream.size()); ++back)
        REQUIRE(stream.can_truncate(stream.size() - back));
      CHECK_FALSE(stream.can_truncate(-1));
      CHECK_FALSE(stream.can_truncate(stream.size() + 1));
    }
    const Index memory = 4 * 16 * Index{sizeof(float)}, rows = 8 * Index{sizeof(float)};
    CHECK(stream.bytes() <=
          (rollback == 0 ? 1 : 2) * 2 * memory + (rollback == 0 ? 20 : 40 + rollback) * rows + 8 * 64);
    CHECK(stream.bytes() >= (rollback == 0 ? 1 : 2) * memory / 4 + rows * 20);
  }
  auto stream = options(20).stream({1, 2, 1, 4, 4}, {.rollback = 16});
  extend(stream, call, 0, 130);
  CHECK(refusal([&] { stream.truncate(79); }) ==
        "longspan: infini_memory::truncate: the number of tokens is 79, wanted 100..130, because earlier "
        "tokens cannot be removed from the memory");
  CHECK(stream.size() == 130);
  CHECK(refusal([&] {
          options(20).stream({1, 2, 1, 4, 4}, {.rollback = -1});
        }) == "longspan: infini_memory: rollback is -1, wanted at least 0 tokens");
}

TEST_CASE("infini_memory: a file with a smaller rollback is refused, one with a larger rollback is not",
          "[state][errors][infini]") {
  Random random(7);
  Call<float> call(Shape{1, 2, 1, 90, 90, 4, 4}, Values::normal, random), again = call.unrun();
  const auto stream_of = [&](Index rollback) {
    return options(8).stream({1, 2, 1, 4, 4}, {.rollback = rollback});
  };
  auto wide = stream_of(40), narrow = stream_of(10), none = stream_of(0);
  for (auto* stream : {&wide, &narrow, &none}) extend(*stream, call, 0, 61);
  CHECK(refused(wide, saved(narrow)) ==
        "longspan: infini_memory::load: rollback is 10 in the file, wanted at least 40 as in this stream");
  CHECK(refused(narrow, saved(none)) ==
        "longspan: infini_memory::load: rollback is 0 in the file, wanted at least 10 as in this stream");
  const std::string without = saved(none);
  REQUIRE(refused(narrow, saved(wide)) == "");
  REQUIRE(refused(none, saved(wide)) == "");
  CHECK(saved(none) == without);
  narrow.truncate(50);
  wide.truncate(50);
  extend(narrow, call, 50, 40);
  extend(wide, again, 50, 40);
  CHECK(same_rows(call, again, 50, 90));
}
