#include "longspan/dilation.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

namespace {

using namespace longspan;
using test::Random;

std::vector<Index> offsets(Phase phase, Index heads, Index dilation) {
  std::vector<Index> all;
  for (Index h = 0; h < heads; ++h) all.push_back(head_offset(phase, h, heads, dilation));
  return all;
}

const std::vector<Branch> paper{{2048, 1}, {4096, 2}, {8192, 4}, {16384, 6}, {32768, 12}};

}  // namespace

TEST_CASE("head_offset: matches the tables of the paper and of torchscale", "[golden]") {
  using Offsets = std::vector<Index>;
  CHECK(offsets(Phase::modulo, 8, 4) == Offsets{0, 1, 2, 3, 0, 1, 2, 3});
  CHECK(offsets(Phase::blocked, 8, 4) == Offsets{0, 0, 1, 1, 2, 2, 3, 3});
  CHECK(offsets(Phase::blocked, 12, 6) == Offsets{0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5});
  CHECK(offsets(Phase::blocked, 5, 4) == Offsets{0, 0, 1, 1, 2});
  CHECK(offsets(Phase::modulo, 3, 4) == Offsets{0, 1, 2});
  CHECK(offsets(Phase::blocked, 3, 4) == Offsets{0, 1, 2});
}

TEST_CASE("geometric_branches: by count, or until a segment contains the sequence") {
  CHECK(geometric_branches({2, 1}, 2, 3) == std::vector<Branch>{{2, 1}, {4, 2}, {8, 4}});
  CHECK(geometric_branches({2, 1}, 2, 0).empty());
  CHECK(geometric_branches_to({2, 1}, 2, 8) == std::vector<Branch>{{2, 1}, {4, 2}, {8, 4}});
  CHECK(geometric_branches_to({2, 1}, 2, 9).back() == Branch{16, 8});
  CHECK(geometric_branches_to({10, 3}, 4, 3) == std::vector<Branch>{{10, 3}});
  // Products are limited to the largest Index.
  CHECK(geometric_branches({Index{1} << 40, 1}, 1 << 20, 3).back().segment ==
        std::numeric_limits<Index>::max());
}

TEST_CASE("geometric_branches: invalid schedules are refused", "[errors]") {
  CHECK(test::refusal([] { geometric_branches({0, 1}, 2, 3); }).find("segment 0") != std::string::npos);
  CHECK(test::refusal([] { geometric_branches({4, 0}, 2, 3); }).find("dilation 0") != std::string::npos);
  CHECK(test::refusal([] {
          geometric_branches_to({4, 1}, 1, 9);
        }).find("ratio is 1, wanted at least 2") != std::string::npos);
}

TEST_CASE("dilated_pairs: equals a count, and the formula if sizes divide", "[law]") {
  test::for_each_case(200, [](Random& random) {
    const Branch branch{random.between(1, 40), random.between(1, 12)};
    const Index length = random.between(0, 100), offset = random.between(0, branch.dilation - 1);
    double full = 0, causal = 0;
    for (Index n = 0; n < length; ++n) {
      if (!covers(branch, offset, n)) continue;
      for (Index m = n / branch.segment * branch.segment;
           m < length && m / branch.segment == n / branch.segment; ++m) {
        full += covers(branch, offset, m);
        causal += covers(branch, offset, m) && m <= n;
      }
    }
    CHECK(dilated_pairs(branch, offset, length, false) == full);
    CHECK(dilated_pairs(branch, offset, length, true) == causal);
  });
  // Equation 17, for both products: 4 N d sum w / r^2.
  const std::vector<Branch> divides{{2048, 1}, {4096, 2}, {8192, 4}};
  CHECK(dilated_flop(divides, 8, 32768, 64, 64, false) == 8 * 4.0 * 32768 * 64 * (2048 + 1024 + 512));
}

TEST_CASE("dilated_coverage: 1 with a dense branch, otherwise equals a count", "[law]") {
  CHECK(dilated_coverage(paper, 8, 40000) == 1);
  CHECK(dilated_coverage(std::vector<Branch>{{4, 2}}, 2, 8) == 0.5);
  CHECK(dilated_coverage(std::vector<Branch>{{4, 2}, {8, 4}}, 1, 16) == 0.5);
  CHECK(dilated_coverage(std::vector<Branch>{{7, 3}}, 1, 7) == 3.0 / 7);
  // With as many heads as offsets every token is kept by some head.
  for (const Phase phase : {Phase::modulo, Phase::blocked}) {
    for (Index n = 0; n < 30; ++n) {
      int heads = 0;
      for (const Index offset : offsets(phase, 4, 4)) heads += covers({12, 4}, offset, n);
      CHECK(heads == 1);
    }
  }
}

TEST_CASE("dilated_rows, dilated_path_length: the values of the paper") {
  CHECK(dilated_rows(paper) == 2048 + 2048 + 2048 + 2731 + 2731);
  CHECK(dilated_path_length(2048, 2, 2048) == 1);
  CHECK(dilated_path_length(2048, 2, Index{2048} << 10) == 10);
}

TEST_CASE("dilation: the cost functions refuse a branch that is not positive", "[dilation][errors]") {
  const std::vector<Branch> odd{{4, 1}, {8, 0}}, none{{0, 1}};
  CHECK(test::refusal([&] { dilated_flop(odd, 1, 8, 4, 4, true); }) ==
        "longspan: dilated_flop: branch 1 is [segment 8, dilation 0], wanted both at least 1");
  CHECK(test::refusal([&] { dilated_flop(none, 1, 8, 4, 4, true); }).find("segment 0") != std::string::npos);
  CHECK(test::refusal([&] { dilated_coverage(none, 1, 8); }).find("dilated_coverage") != std::string::npos);
  CHECK(test::refusal([&] { dilated_rows(odd); }).find("dilated_rows") != std::string::npos);
  CHECK(test::refusal([&] { dilated_pairs(odd[1], 0, 8, true); }).find("dilated_pairs") != std::string::npos);
  CHECK(test::refusal([] { dilated_path_length(4, 1, 8); }) ==
        "longspan: dilated_path_length: the ratio is 1, wanted at least 2");
}
