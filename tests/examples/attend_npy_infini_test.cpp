// attend_npy infini: results and memory compared with the reference, and errors.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attend_npy_program.hpp"
#include "longspan/infini_attention.hpp"
#include "support/catch.hpp"
#include "support/infini_oracle.hpp"

using longspan::InfiniRule;

TEST_CASE("attend_npy infini: results and memory agree with the reference, in any chunks",
          "[attend_npy][oracle]") {
  const TemporaryFolder folder;
  test::Random random(1);
  test::Call<float> call(test::Shape{2, 4, 2, 50, 50, 12, 5}, test::Values::normal, random);
  save<float>(folder, "q.npy", {2, 4, 50, 12}, call.q.values);
  save<float>(folder, "k.npy", {2, 2, 50, 12}, call.k.values);
  save<float>(folder, "v.npy", {2, 2, 50, 5}, call.v.values);
  const std::vector<float> beta{-1, 0, 0.5, 2};
  save<float>(folder, "beta.npy", {4}, beta);
  for (const bool delta : {false, true}) {
    for (const char* chunks : {"chunks=50", "chunks=1,20,29", "chunks=16,16,16,2"}) {
      const Outcome outcome =
          run_variant(folder, "infini",
                      {"segment=16", delta ? "rule=delta" : "rule=linear", chunks, "--beta", "beta.npy",
                       "--memory-out", "m.npy", "--norm-out", "z.npy"});
      INFO(outcome.err);
      REQUIRE(outcome.exit_code == 0);
      longspan::infini_attention attend;
      attend.segment = 16;
      attend.rule = delta ? InfiniRule::delta : InfiniRule::linear;
      attend.beta = longspan::per_head_gate(beta);
      const auto exact = test::infini_oracle(attend, call);
      const auto out = loaded(folder, "out.npy", {2, 4, 50, 5});
      for (std::size_t n = 0; n < out.size(); ++n) REQUIRE(std::abs(double(out[n]) - exact.values[n]) < 3e-5);

      const auto m = loaded(folder, "m.npy", {2, 2, 12, 5}), z = loaded(folder, "z.npy", {2, 2, 12});
      longspan::reference::InfiniMemory memory(12, 5);
      for (longspan::Index first = 0; first < 48; first += 16) {
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

TEST_CASE("attend_npy infini: invalid arguments are refused, and nothing is written",
          "[attend_npy][errors]") {
  const TemporaryFolder folder;
  for (const char* name : {"q.npy", "k.npy", "v.npy"})
    save<float>(folder, name, {9, 4}, std::vector<float>(36, 1.0f));
  save<float>(folder, "beta.npy", {3}, {1, 2, 3});
  const auto says = [&](const std::vector<std::string>& words, const std::string& wanted) {
    check_variant_refused(folder, "infini", words, wanted);
  };
  says({}, "the key segment is missing");
  says({"segment=0"}, "the key segment is '0'");
  says({"segment=4", "rule=other"}, "the key rule is 'other', wanted linear or delta");
  says({"segment=4", "block=3"}, "unknown key 'block', the keys of infini are");
  says({"segment=4", "chunks=4,4"}, "the key chunks does not add up to the 9 tokens");
  says({"segment=4", "chunks=9,9223372036854775807"}, "the key chunks does not add up to the 9 tokens");
  says({"segment=4", "--lse", "lse.npy"}, "infini has no lse");
  says({"segment=4", "--beta", "beta.npy"}, "beta is [3, 1], wanted [1 or 1, 1 or 4]");
  says({"segment=4", "--memory-out", "out.npy"}, "the options --out and --memory-out name the same file");
}
