#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "longspan/detail/storage/crc32c.hpp"
#include "longspan/position.hpp"
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
using longspan::Pairing;
using longspan::rotary;
using longspan::softmax_attention;
using longspan::StreamShape;
using longspan::xpos;

constexpr StreamShape one{1, 1, 1, 4, 4};

/// A saved state that a test can change; `read` returns it with recomputed checksums.
class Forged {
 public:
  template <class Stream>
  explicit Forged(const Stream& stream) {
    std::ostringstream to;
    stream.save(to);
    bytes_ = to.str();
  }

  template <class T>
  T& at(std::size_t offset) {
    return reinterpret_cast<T&>(bytes_[offset]);
  }
  std::uint32_t& version() { return at<std::uint32_t>(16); }
  /// Sets the payload bytes that the header claims; by default the real number.
  void claim(std::uint64_t bytes) { claimed_ = bytes; }
  /// Sets the number of tokens, which is the last number of the header.
  void set_size(std::int64_t tokens) { std::memcpy(&bytes_[head() - 12], &tokens, 8); }
  std::string payload() const { return bytes_.substr(head(), bytes_.size() - head() - 4); }
  void set_payload(const std::string& payload) {
    bytes_ = bytes_.substr(0, head()) + payload + std::string(4, '\0');
  }
  template <class T>
  static std::string raw(const std::vector<T>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
  }

  std::string read() const {
    std::string file = bytes_;
    const std::size_t payload = file.size() - head() - 4;
    const std::uint64_t claimed = claimed_.value_or(payload);
    std::memcpy(&file[24], &claimed, 8);
    put_sum(file, 0, head() - 4);
    put_sum(file, head(), payload);
    return file;
  }

 private:
  /// The offset of the payload.
  std::size_t head() const {
    std::uint32_t numbers = 0;
    std::memcpy(&numbers, &bytes_[20], 4);
    return 32 + numbers * std::size_t{8} + 4;
  }
  static void put_sum(std::string& file, std::size_t begin, std::size_t length) {
    longspan::detail::Crc32c sum;
    sum.add(&file[begin], length);
    const std::uint32_t value = sum.value();
    std::memcpy(&file[begin + length], &value, 4);
  }

  std::string bytes_;
  std::optional<std::uint64_t> claimed_;
};

template <class Stream>
void append(Stream& stream, Index tokens) {
  const StreamShape s = stream.shape();
  std::vector<float> rows(
      static_cast<std::size_t>(s.batch * s.kv_heads * tokens * std::max(s.head_dim, s.value_dim)), 1.5f);
  stream.append(longspan::compact_view<const float>(rows.data(), s.batch, s.kv_heads, tokens, s.head_dim),
                longspan::compact_view<const float>(rows.data(), s.batch, s.kv_heads, tokens, s.value_dim));
}

bool says(const std::string& text, const std::string& sentence) {
  INFO(text);
  return text.find(sentence) != std::string::npos;
}

}  // namespace

TEST_CASE("kv_cache: a state with other positions or another scale is refused by the name of the difference",
          "[state][errors]") {
  const auto stream = [](const auto& attend) { return attend.stream(one, {}); };
  const softmax_attention turned{causal{}, rotary(Pairing::half_split, 1e4)};
  auto saved = stream(turned);
  append(saved, 3);
  const std::string state = Forged(saved).read();
  const auto of_rotary = [&](Pairing pairing, double base, Index dims) {
    auto other = stream(softmax_attention{causal{}, rotary(pairing, base, dims)});
    return refused(other, state);
  };
  CHECK(of_rotary(Pairing::half_split, 1e4, 0).empty());
  CHECK(of_rotary(Pairing::interleaved, 5e5, 0) ==
        "longspan: kv_cache::load: the pairing of the positions is half_split in the file, wanted "
        "interleaved as in "
        "this stream");
  CHECK(of_rotary(Pairing::half_split, 5e5, 0) ==
        "longspan: kv_cache::load: the base of the positions is 10000 in the file, wanted 500000 as in this "
        "stream");
  CHECK(says(of_rotary(Pairing::half_split, 1e4, 2), "dims of the positions is 0 in the file, wanted 2"));
  auto plain = stream(softmax_attention{causal{}});
  CHECK(
      refused(plain, state) ==
      "longspan: kv_cache::load: the position encoding is rotary in the file, wanted none as in this stream");
  auto decaying = stream(softmax_attention{causal{}, xpos(Pairing::half_split)});
  CHECK(says(refused(decaying, state), "the position encoding is rotary in the file, wanted xpos"));
  auto far = stream(softmax_attention{causal{}, xpos(Pairing::half_split, 512, 90)});
  CHECK(says(refused(far, Forged(decaying).read()), "centre of the positions is 0 in the file, wanted 90"));
  auto scaled = turned;
  scaled.scale = 0.25;
  auto other = stream(scaled);
  CHECK(refused(other, state) ==
        "longspan: kv_cache::load: scale is 0.5 in the file, wanted 0.25 as in this stream");
  scaled.scale = 0.5;  // equal to 1 / sqrt(4)
  auto same = stream(scaled);
  CHECK(refused(same, state).empty());
  CHECK(same.size() == 3);
  auto halves = turned.stream<Eigen::half>(one, {});
  auto bfloats = turned.stream<Eigen::bfloat16>(one, {});
  CHECK(
      says(refused(bfloats, Forged(halves).read()), "the element type is half in the file, wanted bfloat16"));
}

TEST_CASE("kv_cache: a state with another version of the layout is refused by its version",
          "[state][errors]") {
  auto stream = softmax_attention{causal{}}.stream(one);
  append(stream, 3);
  Forged state(stream);
  CHECK(refused(stream, state.read()).empty());
  state.version() = 1;
  CHECK(refused(stream, state.read()) ==
        "longspan: kv_cache::load: the layout is version 1 in the file, wanted 2");
}

TEST_CASE("kv_cache: a payload whose length does not fit the header is refused before it is read",
          "[state][errors]") {
  for (const Index page : {0, 2}) {
    auto stream = softmax_attention{causal{}}.stream(one, {.page_size = page});
    append(stream, 3);
    const Forged whole(stream);
    const std::uint64_t bytes = whole.payload().size();
    for (const std::uint64_t claimed : {bytes + 8, bytes - 8, std::uint64_t{0}, ~std::uint64_t{0}}) {
      Forged state = whole;
      state.claim(claimed);
      CHECK(says(refused(stream, state.read()),
                 "kv_cache::load: the payload is " + std::to_string(claimed) + " bytes"));
    }
    Forged more = whole;
    more.set_payload(whole.payload() + std::string(32, '\1'));
    CHECK(says(refused(stream, more.read()), "the payload is " + std::to_string(bytes + 32) + " bytes"));
    CHECK(stream.size() == 3);
  }
}

TEST_CASE("kv_cache: flags of kept rows must be 0 or 1, and 1 for a single array", "[state][errors]") {
  auto array = softmax_attention{causal{}}.stream(one);
  append(array, 3);
  for (const std::int64_t flag : {0, 2, -1}) {
    Forged state(array);
    state.set_payload(Forged::raw(std::vector{flag}) + state.payload().substr(8));
    CHECK(refused(array, state.read()) ==
          "longspan: kv_cache::load: a flag of kept rows is " + std::to_string(flag) + ", wanted 1");
    state.set_payload(Forged::raw(std::vector{flag}));
    CHECK_FALSE(refused(array, state.read()).empty());
  }
  auto paged = softmax_attention{causal{}}.stream(one, {.page_size = 2});
  append(paged, 3);
  Forged state(paged);
  state.set_payload(Forged::raw(std::vector<std::int64_t>{1, 7}) + state.payload().substr(16));
  CHECK(refused(paged, state.read()) == "longspan: kv_cache::load: a flag of kept rows is 7, wanted 0 or 1");
  state.set_payload(Forged::raw(std::vector<std::int64_t>{0, 0}));
  CHECK(says(refused(paged, state.read()), "a state without some keys that later queries may see"));
  CHECK(array.size() == 3);
  CHECK(paged.size() == 3);
}

TEST_CASE("kv_cache: no number in a file makes load allocate or loop more than the file contains",
          "[state][errors]") {
  const auto load = [](const StreamShape& shape, const kv_cache_options& options, Index tokens,
                       const std::string& payload) {
    auto stream = softmax_attention{causal{}}.stream(shape, options);
    Forged state(stream);
    state.set_size(tokens);
    state.set_payload(payload);
    const std::string file = state.read();
    std::string sentence;
    CHECK(bytes_allocated_by([&] { sentence = refused(stream, file); }) < (1u << 23));
    CHECK(stream.size() == (sentence.empty() ? tokens : 0));
    return sentence;
  };
  const StreamShape wide{1, 8, 8, 128, 128}, many{64, 8, 8, 128, 128};
  const auto flags = [](std::size_t count, std::int64_t flag) {
    return Forged::raw(std::vector<std::int64_t>(count, flag));
  };
  CHECK(says(load(wide, {}, Index{32} * 4096, flags(32, 0)), "a flag of kept rows is 0"));
  CHECK(says(load(wide, {}, Index{32} * 4096, flags(32, 1)), "the payload is 256 bytes"));
  CHECK(says(load(wide, {}, Index{1} << 40, flags(32, 1)), "wanted at least 2147483648 for the sizes"));
  CHECK(says(load(wide, {.page_size = 16}, Index{1} << 40, flags(32, 1)), "for the sizes in the header"));
  CHECK(says(load(one, {}, (Index{1} << 44) + 1, ""), "the number of tokens is 17592186044417, wanted 0.."));
  CHECK(says(load(one, {}, -5, ""), "the number of tokens is -5"));
  CHECK(says(load(one, {.page_size = 1}, Index{1} << 62, ""), "the number of tokens is"));
  // Rows of 0 bytes: the file still contains their flags.
  CHECK(says(load({1, 1, 1, 0, 0}, {.page_size = 1}, Index{1} << 44, ""),
             "wanted at least 140737488355328 for the sizes"));
  CHECK(load({1, 1, 1, 0, 0}, {.page_size = 1}, 1000, flags(1000, 1)).empty());
  // No batch rows: any number of tokens, and nothing to loop over.
  CHECK(load({0, 1, 1, 4, 4}, {.page_size = 1}, Index{1} << 44, "").empty());
  CHECK(load({0, 1, 1, 4, 4}, {}, Index{1} << 44, "").empty());
  // The header claims rows that the file does not contain: nothing is allocated for them.
  for (const kv_cache_options& options : {kv_cache_options{}, kv_cache_options{.page_size = 4096}}) {
    auto stream = softmax_attention{causal{}}.stream(many, options);
    Forged state(stream);
    state.set_size(4096);
    state.set_payload(flags(64, 1));
    state.claim(std::uint64_t{64} * 8 + std::uint64_t{64} * 4096 * 8 * 256 * 4);
    const std::string file = state.read();
    std::string sentence;
    CHECK(bytes_allocated_by([&] { sentence = refused(stream, file); }) < (1u << 23));
    CHECK(says(sentence, "the payload is cut short"));
  }
}

TEST_CASE("kv_cache: a stream without batch rows or elements can be saved and continued", "[state]") {
  for (const StreamShape& shape :
       {StreamShape{0, 2, 1, 4, 4}, StreamShape{2, 2, 1, 0, 0}, StreamShape{2, 0, 0, 4, 4}}) {
    for (const Index page : {0, 4}) {
      auto stream = softmax_attention{causal{}}.stream(shape, {.page_size = page}), loaded = stream;
      append(stream, 30);
      std::stringstream file;
      stream.save(file);
      loaded.load(file);
      CHECK(loaded.size() == 30);
      CHECK(loaded.can_truncate(14));
      loaded.truncate(3);
      append(loaded, 9);
      CHECK(loaded.size() == 12);
    }
  }
}
