// attend_npy infini: the reference's results and memory, and what it refuses.
#include <array>
#include <cmath>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "examples/attend_npy/infini.hpp"
#include "longspan/infini_attention.hpp"
#include "support/catch.hpp"
#include "support/infini_oracle.hpp"
#include "support/refusal.hpp"
#include "temporary_folder.hpp"

namespace {

using longspan::Index;
using longspan::InfiniRule;

/// Runs the variant on the files of the folder; words are keys and options.
void run(const TemporaryFolder& folder, const std::vector<std::string>& further) {
  const std::vector<std::string> files{folder.file("q.npy"), folder.file("k.npy"), folder.file("v.npy"),
                                       folder.file("out.npy")};
  std::vector<std::string_view> words{"--q", files[0], "--k", files[1], "--v", files[2], "--out", files[3]};
  words.insert(words.end(), further.begin(), further.end());
  attend_npy::infini(attend_npy::parse_arguments(words));
}

void save(const TemporaryFolder& folder, const std::string& name, const std::vector<Index>& shape,
          const std::vector<float>& values) {
  struct {
    std::string bytes;
    void write(const void* from, std::size_t count) { bytes.append(static_cast<const char*>(from), count); }
  } file;
  npy::write(file, shape, std::span<const float>(values));
  folder.write(name, file.bytes);
}

std::vector<float> loaded(const TemporaryFolder& folder, const std::string& name,
                          const std::vector<Index>& shape) {
  const npy::Array file = npy::read(folder.file(name));
  CHECK(file.shape == shape);
  return std::get<std::vector<float>>(file.values);
}

}  // namespace

TEST_CASE("attend_npy infini: agrees with the reference, in any chunks, and so does its memory",
          "[attend_npy][oracle]") {
  const TemporaryFolder folder;
  test::Random random(1);
  test::Call<float> call(test::Shape{2, 4, 2, 50, 50, 12, 5}, test::Values::normal, random);
  save(folder, "q.npy", {2, 4, 50, 12}, call.q.values);
  save(folder, "k.npy", {2, 2, 50, 12}, call.k.values);
  save(folder, "v.npy", {2, 2, 50, 5}, call.v.values);
  const std::vector<float> beta{-1, 0, 0.5, 2};
  save(folder, "beta.npy", {4}, beta);
  for (const bool delta : {false, true}) {
    for (const char* chunks : {"chunks=50", "chunks=1,20,29", "chunks=16,16,16,2"}) {
      run(folder,
          {"segment=16", delta ? "rule=delta" : "rule=linear", chunks, "--beta", folder.file("beta.npy"),
           "--memory-out", folder.file("m.npy"), "--norm-out", folder.file("z.npy")});
      longspan::infini_attention attend;
      attend.segment = 16;
      attend.rule = delta ? InfiniRule::delta : InfiniRule::linear;
      attend.beta = {beta.data(), 4, 1, 1};
      const auto exact = test::infini_oracle(attend, call);
      const auto out = loaded(folder, "out.npy", {2, 4, 50, 5});
      for (std::size_t n = 0; n < out.size(); ++n) REQUIRE(std::abs(double(out[n]) - exact.values[n]) < 3e-5);

      const auto m = loaded(folder, "m.npy", {2, 2, 12, 5}), z = loaded(folder, "z.npy", {2, 2, 12});
      longspan::reference::InfiniMemory memory(12, 5);
      for (Index first = 0; first < 48; first += 16) {
        longspan::reference::write(memory,
                                   longspan::MatrixView<const float>{call.k.row(1, 1, first), 16, 12, 12},
                                   longspan::MatrixView<const float>{call.v.row(1, 1, first), 16, 5, 5},
                                   attend.rule, attend.feature);
      }
      for (std::size_t n = 0; n < 60; ++n) CHECK(std::abs(double(m[180 + n]) - memory.m[n]) < 1e-3);
      for (std::size_t c = 0; c < 12; ++c) CHECK(std::abs(double(z[36 + c]) - memory.z[c]) < 1e-3);
    }
  }
}

TEST_CASE("attend_npy infini: what does not fit is refused, and nothing is written", "[attend_npy][errors]") {
  const TemporaryFolder folder;
  for (const char* name : {"q.npy", "k.npy", "v.npy"})
    save(folder, name, {9, 4}, std::vector<float>(36, 1.0f));
  save(folder, "beta.npy", {3}, {1, 2, 3});
  const auto says = [&](const std::vector<std::string>& words, const std::string& wanted) {
    const std::string text = test::refusal([&] { run(folder, words); });
    INFO(text);
    CHECK(text.find(wanted) != std::string::npos);
    CHECK_FALSE(std::filesystem::exists(folder.file("out.npy")));
  };
  says({}, "the key segment is missing");
  says({"segment=0"}, "the key segment is '0'");
  says({"segment=4", "rule=other"}, "the key rule is 'other', wanted linear or delta");
  says({"segment=4", "block=3"}, "unknown key 'block', the keys of infini are");
  says({"segment=4", "chunks=4,4"}, "the key chunks does not add up to the 9 tokens");
  says({"segment=4", "chunks=9,9223372036854775807"}, "the key chunks does not add up to the 9 tokens");
  says({"segment=4", "--lse", folder.file("lse.npy")}, "infini has no lse");
  says({"segment=4", "--beta", folder.file("beta.npy")}, "beta is [3, 1], wanted [1 or 1, 1 or 4]");
  says({"segment=4", "--memory-out", folder.file("out.npy")},
       "the options --out and --memory-out name the same file");
}
