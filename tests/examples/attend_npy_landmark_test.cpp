// attend_npy landmark: the reference's results, and what it refuses.
#include <array>
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "examples/attend_npy/landmark.hpp"
#include "longspan/reference/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/refusal.hpp"
#include "temporary_folder.hpp"

namespace {

using longspan::Index;
using longspan::landmarks;

/// Runs `landmark <keys>` on the files of the folder.
void run(const TemporaryFolder& folder, const std::vector<std::string>& keys) {
  const std::vector<std::string> files{folder.file("q.npy"), folder.file("k.npy"), folder.file("v.npy"),
                                       folder.file("out.npy"), folder.file("lse.npy")};
  std::vector<std::string_view> words{"--q",    files[0], "--k",    files[1], "--v",
                                      files[2], "--out",  files[3], "--lse",  files[4]};
  for (const std::string& key : keys) words.push_back(key);
  attend_npy::landmark(attend_npy::parse_arguments(words));
}

std::vector<float> saved(const TemporaryFolder& folder, const std::string& name,
                         const std::vector<Index>& shape, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(static_cast<std::size_t>(*npy::value_count(shape)));
  for (float& value : values) value = static_cast<float>(random() >> 8) * 0x1p-22f - 2;
  struct {
    std::string bytes;
    void write(const void* from, std::size_t count) { bytes.append(static_cast<const char*>(from), count); }
  } file;
  npy::write(file, shape, std::span<const float>(values));
  folder.write(name, file.bytes);
  return values;
}

}  // namespace

TEST_CASE("attend_npy landmark: agrees with the reference", "[attend_npy][oracle]") {
  const TemporaryFolder folder;
  const auto q = saved(folder, "q.npy", {2, 6, 19, 24}, 1), k = saved(folder, "k.npy", {2, 2, 37, 24}, 2),
             v = saved(folder, "v.npy", {2, 2, 37, 5}, 3);
  const auto check = [&](const std::vector<std::string>& keys, auto attend) {
    run(folder, keys);
    std::vector<double> out(2 * 6 * 19 * 5), lse(2 * 6 * 19);
    longspan::reference::landmark_attention{attend}(
        longspan::compact_view(q.data(), 2, 6, 19, 24), longspan::compact_view(k.data(), 2, 2, 37, 24),
        longspan::compact_view(v.data(), 2, 2, 37, 5), longspan::compact_view(out.data(), 2, 6, 19, 5),
        longspan::compact_rows_view(lse.data(), 2, 6, 19));
    const auto got = std::get<std::vector<float>>(npy::read(folder.file("out.npy")).values);
    const auto got_lse = std::get<std::vector<float>>(npy::read(folder.file("lse.npy")).values);
    REQUIRE(got.size() == out.size());
    for (std::size_t n = 0; n < out.size(); ++n) REQUIRE(std::abs(double(got[n]) - out[n]) < 1e-5);
    for (std::size_t n = 0; n < lse.size(); ++n) REQUIRE(std::abs(double(got_lse[n]) - lse[n]) < 1e-5);
  };
  using longspan::everything, longspan::landmark_attention;
  const std::vector<Index> listed{0, 7, 20, 36};
  check({"block=8", "causal=1"}, landmark_attention{landmarks::every(8)});
  check({"block=8"}, landmark_attention{landmarks::every(8), everything{}});
  check({"landmarks=0,7,20,36", "causal=1"}, landmark_attention{landmarks::at(listed)});
  landmark_attention scaled{landmarks::at(listed), everything{}};
  scaled.scale = 0.5;
  check({"landmarks=0,7,20,36", "scale=0.5"}, scaled);
}

TEST_CASE("attend_npy landmark: keys that do not fit are refused", "[attend_npy][errors]") {
  const TemporaryFolder folder;
  for (const char* name : {"q.npy", "k.npy", "v.npy"}) saved(folder, name, {9, 4}, 1);
  const auto says = [&](const std::vector<std::string>& keys, const std::string& words) {
    const std::string text = test::refusal([&] { run(folder, keys); });
    CAPTURE(text);
    CHECK(text.find(words) != std::string::npos);
  };
  says({}, "the key block is missing, and so is landmarks");
  says({"block=3", "landmarks=2"}, "both given");
  says({"block=0"}, "the key block is '0'");
  for (const char* list : {"", "2,", "2,2", "3,1", "-1", "a", "1 2"}) {
    says({std::string("landmarks=") + list}, "wanted rising integers like 7,15,23");
  }
  says({"landmarks=2,9"}, "a landmark of batch row 0 is 9");
  says({"blocks=3"}, "unknown key 'blocks'");
  says({"block=3", "causal=2"}, "the key causal is '2'");
}
