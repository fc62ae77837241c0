// attend_npy softmax_stream, dilated_stream and hybrid_stream: any chunks match a single call over all tokens, and
// errors.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "attend_npy_program.hpp"
#include "longspan/stream/hybrid_stream.hpp"
#include "support/catch.hpp"

namespace {

using longspan::Index;
using Words = std::vector<std::string>;

std::vector<double> saved(const TemporaryFolder& folder, const std::string& name,
                          const std::vector<Index>& shape, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<double> values(static_cast<std::size_t>(*npy::value_count(shape)));
  for (double& value : values) value = static_cast<double>(random() >> 8) * 0x1p-22 - 2;
  save<float>(folder, name, shape, values);
  return values;
}

/// 61 tokens, 2 batch rows, 6 heads, 2 KV heads.
struct Inputs {
  TemporaryFolder folder;
  std::vector<double> q = saved(folder, "q.npy", {2, 6, 61, 24}, 1),
                      k = saved(folder, "k.npy", {2, 2, 61, 24}, 2),
                      v = saved(folder, "v.npy", {2, 2, 61, 5}, 3);
};

std::vector<double> values_of(const TemporaryFolder& folder, const std::string& name) {
  const npy::Array file = npy::read(folder.file(name));
  return std::visit([](const auto& values) { return std::vector<double>(values.begin(), values.end()); },
                    file.values);
}

/// The values that the variant writes to the file `name`.
std::vector<double> outcome(const TemporaryFolder& folder, const std::string& variant, const Words& words,
                            const std::string& name = "out.npy") {
  CAPTURE(variant, words);
  const Outcome outcome = run_variant(folder, variant, words);
  REQUIRE(outcome.err == "");
  REQUIRE(outcome.exit_code == 0);
  return values_of(folder, name);
}

Words with(Words words, const Words& more) {
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double largest = 0;
  for (std::size_t n = 0; n < a.size(); ++n) {
    const double difference = a[n] == b[n] ? 0 : std::abs(a[n] - b[n]);
    if (!(difference <= largest)) largest = difference;  // NaN counts as the largest
  }
  return largest;
}

/// Compares out and lse of the stream and of the call, in float and in double.
void check_agree(const TemporaryFolder& folder, const std::string& stream, const Words& stream_words,
                 const std::string& call, const Words& call_words) {
  for (const auto& [dtype, bound] : {std::pair("f32", 1e-5), {"f64", 1e-13}, {"bf16", 1e-5}, {"f16", 1e-5}}) {
    CAPTURE(stream_words, dtype);
    const Words options{"--lse", "lse.npy", "--dtype", dtype};
    const auto out = outcome(folder, call, with(call_words, options)), lse = values_of(folder, "lse.npy");
    CHECK(largest_difference(outcome(folder, stream, with(stream_words, options)), out) < bound);
    CHECK(largest_difference(values_of(folder, "lse.npy"), lse) < bound);
  }
}

}  // namespace

TEST_CASE("attend_npy softmax_stream: agrees with softmax causal=1", "[attend_npy][oracle]") {
  const Inputs in;
  const auto check = [&](const Words& keys, const Words& of_stream) {
    check_agree(in.folder, "softmax_stream", with(keys, of_stream), "softmax", with(keys, {"causal=1"}));
  };
  check({}, {});
  check({}, {"chunks=40,1,20", "page=16"});
  check({"window=9", "scale=0.5"}, {"chunks=1,1,58,1", "page=4"});
  check({"softcap=1.5", "window=30"}, {"chunks=30,31", "page=1"});
}

TEST_CASE("attend_npy softmax_stream: rows= is the type in which the cache stores k and v",
          "[attend_npy][oracle]") {
  const Inputs in;
  const auto exact = outcome(in.folder, "softmax", {"causal=1"});
  for (const Words& more : {Words{"chunks=60,1"}, Words{"chunks=60,1", "page=16"}}) {
    const auto difference = [&](const std::string& rows) {
      return largest_difference(outcome(in.folder, "softmax_stream", with(more, {"rows=" + rows})), exact);
    };
    const double f32 = difference("f32"), f16 = difference("f16"), bf16 = difference("bf16"),
                 int8 = difference("int8");
    CHECK(f32 < 1e-5);
    CHECK((1e-4 < f16 && f16 < 5e-3));
    CHECK((1e-3 < bf16 && bf16 < 0.05));
    CHECK((1e-3 < int8 && int8 < 0.1));
  }
  // The same rows, but the queries are rounded as well.
  const Words halves{"--dtype", "f16"};
  CHECK(outcome(in.folder, "softmax_stream", halves) ==
        outcome(in.folder, "softmax_stream", with(halves, {"rows=f16"})));
  const Words capped{"softcap=2", "rows=int8"};
  CHECK(largest_difference(outcome(in.folder, "softmax_stream", capped),
                           outcome(in.folder, "softmax", {"softcap=2", "causal=1"})) < 0.1);
}

TEST_CASE("attend_npy dilated_stream: agrees with dilated causal=1", "[attend_npy][oracle]") {
  const Inputs in;
  const auto check = [&](const Words& keys, const Words& of_stream) {
    check_agree(in.folder, "dilated_stream", with(keys, of_stream), "dilated", with(keys, {"causal=1"}));
  };
  const Words branches{"segments=8,16,64", "dilations=1,2,4"};
  check(branches, {});
  check(with(branches, {"phase=blocked", "overlap=set"}), {"chunks=20,1,40"});
  check({"segments=16", "scale=0.5"}, {"chunks=1,1,1,58"});
}

TEST_CASE("attend_npy hybrid_stream: agrees with the library's stream, in any chunks",
          "[attend_npy][oracle]") {
  const Inputs in;
  const std::vector<float> beta{-1, 0, 0.5, 2, 1, -2};
  save<float>(in.folder, "beta.npy", {6}, beta);
  const auto check = [&](const Words& keys, const longspan::hybrid_options& options) {
    longspan::hybrid_stream<double> stream({2, 6, 2, 24, 5}, options);
    std::vector<double> exact(2 * 6 * 61 * 5);
    stream.extend(
        longspan::compact_view(in.q.data(), 2, 6, 61, 24), longspan::compact_view(in.k.data(), 2, 2, 61, 24),
        longspan::compact_view(in.v.data(), 2, 2, 61, 5), longspan::compact_view(exact.data(), 2, 6, 61, 5));
    for (const char* chunks : {"chunks=61", "chunks=20,1,40"}) {
      for (const auto& [dtype, bound] : {std::pair("f32", 1e-4), {"f64", 1e-12}}) {
        const Words words = with(keys, {chunks, "--dtype", dtype});
        CHECK(largest_difference(outcome(in.folder, "hybrid_stream", words), exact) < bound);
      }
    }
  };
  check({}, {});
  longspan::hybrid_options options{
      .block_size = 4, .top_k = 2, .window_blocks = 1, .capacity = 3, .evicted_at_once = 2};
  const Words keys{"block=4", "top_k=2", "window_blocks=1", "capacity=3", "evicted_at_once=2"};
  check(keys, options);
  options.beta = longspan::per_head_gate(beta);
  options.rule = longspan::InfiniRule::delta;
  options.empty_memory = longspan::EmptyMemory::gate;
  check(with(keys, {"rule=delta", "first=gate", "--beta", "beta.npy"}), options);
  options = {.block_size = 4, .top_k = 0, .window_blocks = 0, .capacity = 0, .evicted_at_once = 1};
  check({"block=4", "top_k=0", "window_blocks=0", "capacity=0", "evicted_at_once=1"}, options);
}

TEST_CASE("attend_npy streams: invalid arguments are refused, and nothing is written",
          "[attend_npy][errors]") {
  const TemporaryFolder folder;
  for (const char* name : {"q.npy", "k.npy", "v.npy"}) saved(folder, name, {9, 4}, 1);
  save<float>(folder, "beta.npy", {3}, {1, 2, 3});
  const auto says = [&](const std::string& variant, const Words& words, const std::string& part) {
    check_variant_refused(folder, variant, words, part);
  };
  says("softmax_stream", {"causal=1"},
       "the keys of softmax_stream are window, scale, softcap, chunks, page and rows");
  says("softmax_stream", {"page=-1"}, "the key page is '-1', wanted an integer from 0 to 2^63 - 1");
  says("softmax_stream", {"rows=i8"}, "wanted one of f32, f64, bf16, f16 and int8");
  says("softmax_stream", {"rows=f64"},
       "the key rows is 'f64', wanted f32, bf16, f16 or int8 as the kernel computes in float");
  says("softmax_stream", {"rows=int8", "--dtype", "f64"},
       "the key rows is 'int8', wanted f64 as the kernel computes in double");
  says("softmax_stream", {"--beta", "beta.npy"}, "the option --beta is for infini and hybrid_stream");
  says("dilated_stream", {}, "the key segments is missing");
  says("dilated_stream", {"segments=4", "zero_pad=1"}, "unknown key 'zero_pad', the keys of dilated_stream");
  says("hybrid_stream", {"block=1"}, "block_size is 1, wanted at least 2");
  says("hybrid_stream", {"evicted_at_once=0"}, "the key evicted_at_once is '0'");
  says("hybrid_stream", {"top_k=x"}, "the key top_k is 'x', wanted an integer from 0");
  says("hybrid_stream", {"first=none"}, "the key first is 'none', wanted bypass or gate");
  says("hybrid_stream", {"scale=2"}, "unknown key 'scale', the keys of hybrid_stream are");
  says("hybrid_stream", {"--lse", "lse.npy"}, "hybrid_stream has no lse");
  says("hybrid_stream", {"--beta", "beta.npy"}, "beta is [3, 1], wanted [1 or 1, 1 or 4]");
  says("hybrid_stream", {"--norm-out", "z.npy"}, "the options --memory-out and --norm-out are for infini");
  for (const auto& [variant, key] : {std::pair("softmax_stream", "window=4"),
                                     {"dilated_stream", "segments=4"},
                                     {"hybrid_stream", "block=3"}}) {
    says(variant, {key, "chunks=4,4"}, "the key chunks does not add up to the 9 tokens");
    says(variant, {key, "chunks=9,9223372036854775807"}, "the key chunks does not add up to the 9 tokens");
    says(variant, {key, "chunks=4,,5"}, "wanted integers from 1");
  }
  saved(folder, "q.npy", {8, 4}, 1);
  says("softmax_stream", {}, "softmax_stream: q has 8 rows and k has 9, wanted one query for each key");
  says("dilated_stream", {"segments=4"}, "dilated_stream: q has 8 rows and k has 9");
  says("hybrid_stream", {}, "hybrid_stream: q has 8 rows and k has 9");
}
