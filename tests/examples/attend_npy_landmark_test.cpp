// attend_npy landmark: compared with the reference, and errors.
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attend_npy_program.hpp"
#include "longspan/reference/landmark_attention.hpp"
#include "longspan/reference/landmark_cache.hpp"
#include "support/catch.hpp"

namespace {

using longspan::Index;
using longspan::landmarks;

/// Runs a variant that has an lse; a failure shows what it printed.
void run(const TemporaryFolder& folder, const std::string& variant, std::vector<std::string> keys) {
  keys.insert(keys.end(), {"--lse", "lse.npy"});
  const Outcome outcome = run_variant(folder, variant, keys);
  INFO(outcome.err);
  REQUIRE(outcome.exit_code == 0);
}

/// Random values, which are also saved as a file of the folder.
std::vector<float> saved(const TemporaryFolder& folder, const std::string& name,
                         const std::vector<Index>& shape, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(static_cast<std::size_t>(*npy::value_count(shape)));
  for (float& value : values) value = static_cast<float>(random() >> 8) * 0x1p-22f - 2;
  save<float>(folder, name, shape, values);
  return values;
}

}  // namespace

TEST_CASE("attend_npy landmark: agrees with the reference", "[attend_npy][oracle]") {
  const TemporaryFolder folder;
  const auto q = saved(folder, "q.npy", {2, 6, 19, 24}, 1), k = saved(folder, "k.npy", {2, 2, 37, 24}, 2),
             v = saved(folder, "v.npy", {2, 2, 37, 5}, 3);
  const auto check = [&](const std::vector<std::string>& keys, auto attend) {
    run(folder, "landmark", keys);
    std::vector<double> out(2 * 6 * 19 * 5), lse(2 * 6 * 19);
    longspan::reference::exact{attend}(
        longspan::compact_view(q.data(), 2, 6, 19, 24), longspan::compact_view(k.data(), 2, 2, 37, 24),
        longspan::compact_view(v.data(), 2, 2, 37, 5), longspan::compact_view(out.data(), 2, 6, 19, 5),
        longspan::compact_rows_view(lse.data(), 2, 6, 19));
    const auto got = loaded(folder, "out.npy", {2, 6, 19, 5}),
               got_lse = loaded(folder, "lse.npy", {2, 6, 19});
    for (std::size_t n = 0; n < out.size(); ++n) REQUIRE(std::abs(double(got[n]) - out[n]) < 1e-5);
    for (std::size_t n = 0; n < lse.size(); ++n) REQUIRE(std::abs(double(got_lse[n]) - lse[n]) < 1e-5);
  };
  using longspan::everything, longspan::landmark_attention;
  const std::vector<Index> listed{0, 7, 20, 36};
  check({"block=8", "causal=1"}, landmark_attention{landmarks::every(8)});
  check({"block=8"}, landmark_attention{landmarks::every(8), everything{}});
  check({"landmarks=0,7,20,36", "causal=1"}, landmark_attention{landmarks::at(listed)});
  check({"landmarks=", "causal=1"}, landmark_attention{landmarks::none()});
  check({"landmarks="}, landmark_attention{landmarks::none(), everything{}});
  landmark_attention scaled{landmarks::at(listed), everything{}};
  scaled.scale = 0.5;
  check({"landmarks=0,7,20,36", "scale=0.5"}, scaled);
}

TEST_CASE("attend_npy landmark: keys that do not fit are refused", "[attend_npy][errors]") {
  const TemporaryFolder folder;
  for (const char* name : {"q.npy", "k.npy", "v.npy"}) saved(folder, name, {9, 4}, 1);
  const auto says = [&](const std::vector<std::string>& keys, const std::string& words) {
    check_variant_refused(folder, "landmark", keys, words);
  };
  says({}, "the key block is missing, and so is landmarks");
  says({"block=3", "landmarks=2"}, "both given");
  says({"block=3", "landmarks="}, "both given");
  says({"block=0"}, "the key block is '0'");
  for (const char* list : {"2,", ",", "2,2", "3,1", "-1", "a", "1 2"}) {
    says({std::string("landmarks=") + list}, "wanted rising integers like 7,15,23, or nothing");
  }
  says({"landmarks=2,9"}, "a landmark of batch row 0 is 9");
  says({"blocks=3"}, "unknown key 'blocks'");
  says({"block=3", "causal=2"}, "the key causal is '2'");
}

TEST_CASE("attend_npy landmark_stream: agrees with the reference", "[attend_npy][oracle]") {
  const TemporaryFolder folder;
  const auto q = saved(folder, "q.npy", {2, 6, 37, 8}, 1), k = saved(folder, "k.npy", {2, 2, 37, 8}, 2),
             v = saved(folder, "v.npy", {2, 2, 37, 5}, 3);
  const auto check = [&](const std::vector<std::string>& keys, const std::vector<Index>& chunks,
                         auto reference) {
    run(folder, "landmark_stream", keys);
    std::vector<double> out(2 * 6 * 37 * 5), lse(2 * 6 * 37);
    Index first = 0;
    for (const Index length : chunks) {
      auto lses = longspan::compact_rows_view(lse.data() + first, 2, 6, 37);
      lses.rows = length;
      reference.extend(longspan::compact_view(q.data(), 2, 6, 37, 8).slice_rows(first, length),
                       longspan::compact_view(k.data(), 2, 2, 37, 8).slice_rows(first, length),
                       longspan::compact_view(v.data(), 2, 2, 37, 5).slice_rows(first, length),
                       longspan::compact_view(out.data(), 2, 6, 37, 5).slice_rows(first, length), lses);
      first += length;
    }
    const auto got = loaded(folder, "out.npy", {2, 6, 37, 5}),
               got_lse = loaded(folder, "lse.npy", {2, 6, 37});
    for (std::size_t n = 0; n < out.size(); ++n) REQUIRE(std::abs(double(got[n]) - out[n]) < 1e-5);
    for (std::size_t n = 0; n < lse.size(); ++n) REQUIRE(std::abs(double(got_lse[n]) - lse[n]) < 1e-5);
  };
  using namespace longspan;
  const StreamShape shape{2, 6, 2, 8, 5};
  check({"block=4", "chunks=16,1,20", "top_k=2"}, {16, 1, 20},
        reference::landmark_cache<>(shape, {.block_size = 4, .top_k = 2}));
  check({"block=5", "chunks=10,27", "select=max_tokens", "capacity=1"}, {10, 27},
        reference::landmark_cache<>(
            shape, {.block_size = 5, .select = LandmarkSelect::max_over_tokens, .capacity = 1}));
  check({"block=3", "chunks=30,7", "top_k=2", "select=max_heads", "rope_layout=half", "rope_base=50"},
        {30, 7},
        reference::landmark_cache<rotary>(
            shape, {.block_size = 3, .top_k = 2, .select = LandmarkSelect::max_over_heads},
            rotary(Pairing::half_split, 50)));
  check({"block=3", "chunks=30,7", "positions=exact", "rope_layout=interleaved"}, {30, 7},
        reference::landmark_cache<rotary, exact_positions>(shape, {.block_size = 3},
                                                           rotary(Pairing::interleaved)));
  check({"block=3"}, {37}, reference::landmark_cache<>(shape, {.block_size = 3}));
}

TEST_CASE("attend_npy landmark_stream: keys that do not fit are refused", "[attend_npy][errors]") {
  const TemporaryFolder folder;
  for (const char* name : {"q.npy", "k.npy", "v.npy"}) saved(folder, name, {9, 4}, 1);
  const auto says = [&](const std::vector<std::string>& keys, const std::string& words) {
    check_variant_refused(folder, "landmark_stream", keys, words);
  };
  says({}, "the key block is missing");
  says({"block=1"}, "block_size is 1, wanted at least 2");
  says({"block=3", "chunks=4,4"}, "chunks does not add up to the 9 tokens");
  says({"block=3", "chunks=4,9223372036854775807"}, "chunks does not add up");
  says({"block=3", "chunks=4,,5"}, "wanted integers from 1");
  says({"block=3", "select=all"}, "wanted one of token_head, max_heads and max_tokens");
  says({"block=3", "positions=mine"}, "wanted stingy or exact");
  says({"block=3", "rope_base=5"}, "rope_base needs the key rope_layout");
  says({"block=3", "rope_layout=both"}, "wanted one of interleaved and half");
  saved(folder, "q.npy", {8, 4}, 1);
  says({"block=3"}, "q has 8 rows and k has 9");
}
