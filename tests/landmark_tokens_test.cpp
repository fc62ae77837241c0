// Inserting landmark tokens into a text and removing them.
#include "longspan/landmark_tokens.hpp"

#include <limits>
#include <numeric>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

namespace {

using namespace longspan;
using test::refusal;
using Tokens = std::vector<int>;

constexpr int mark = 99, ignored = -1;

std::span<const int> span_of(const Tokens& tokens) { return tokens; }
Tokens first_tokens(Index count) {
  Tokens tokens(static_cast<std::size_t>(count));
  std::iota(tokens.begin(), tokens.end(), 1);
  return tokens;
}

}  // namespace

TEST_CASE("landmark_tokens: a landmark after every complete block", "[landmark_tokens]") {
  const auto inserted = [](Index count, LastLandmark last) {
    return with_landmarks(span_of(first_tokens(count)), 4, mark, last);
  };
  CHECK(inserted(7, LastLandmark::stands) == Tokens{1, 2, 3, mark, 4, 5, 6, mark, 7});
  CHECK(inserted(6, LastLandmark::stands) == Tokens{1, 2, 3, mark, 4, 5, 6, mark});
  CHECK(inserted(6, LastLandmark::omitted) == Tokens{1, 2, 3, mark, 4, 5, 6});
  CHECK(inserted(7, LastLandmark::omitted) == inserted(7, LastLandmark::stands));
  CHECK(inserted(2, LastLandmark::stands) == Tokens{1, 2});
  CHECK(inserted(0, LastLandmark::stands).empty());
  CHECK(with_landmarks(span_of({1, 2}), 2, mark) == Tokens{1, mark, 2, mark});
}

TEST_CASE("landmark_tokens: inserted landmarks are found and can be removed", "[landmark_tokens][law]") {
  test::for_each_case(50, [](test::Random& random) {
    const Tokens tokens = first_tokens(random.between(0, 60));
    const Index block = random.between(2, 13);
    const auto last = random.chance(0.5) ? LastLandmark::stands : LastLandmark::omitted;
    const Tokens inserted = with_landmarks(span_of(tokens), block, mark, last);
    CHECK(without_landmarks(span_of(inserted), mark) == tokens);
    const std::vector<unsigned char> mask = landmark_mask(span_of(inserted), mark);
    const std::vector<Index> keys = landmark_keys(span_of(inserted), mark);
    CHECK(landmark_keys(std::span<const unsigned char>(mask)) == keys);
    for (std::size_t m = 0; m < keys.size(); ++m) CHECK(keys[m] == block * (static_cast<Index>(m) + 1) - 1);

    // With both losses every token has a row of logits that predicts the next token.
    for (const auto loss : {LandmarkLoss::skips, LandmarkLoss::includes}) {
      const Tokens labels = landmark_labels(span_of(inserted), mark, loss, ignored);
      const std::vector<Index> rows = logit_rows(span_of(inserted), mark, loss);
      REQUIRE(rows.size() == tokens.size());
      for (std::size_t t = 0; t < tokens.size(); ++t) {
        const int next = t + 1 < tokens.size() ? tokens[t + 1] : ignored;
        CHECK(labels[static_cast<std::size_t>(rows[t])] == next);
      }
    }
  });
}

TEST_CASE("landmark_tokens: labels for both losses", "[landmark_tokens]") {
  const Tokens text{1, 2, mark, 3, 4, mark, 5};
  CHECK(landmark_labels(span_of(text), mark, LandmarkLoss::skips, ignored) ==
        Tokens{2, 3, ignored, 4, 5, ignored, ignored});
  CHECK(landmark_labels(span_of(text), mark, LandmarkLoss::includes, ignored) ==
        Tokens{2, mark, 3, 4, mark, 5, ignored});
}

TEST_CASE("landmark_tokens: positions, and jumps after landmarks", "[landmark_tokens]") {
  const Tokens text{1, 2, mark, 3, mark, 4};
  CHECK(landmark_positions(span_of(text), mark) == std::vector<Index>{0, 1, 2, 3, 4, 5});
  const std::vector<Index> jumps{10, 100};
  CHECK(landmark_positions(span_of(text), mark, jumps) == std::vector<Index>{0, 1, 2, 13, 14, 115});
  const std::vector<Index> one{10};
  CHECK(refusal([&] { landmark_positions(span_of(text), mark, one); }).find("jumps is 1, wanted 2") !=
        std::string::npos);
}

TEST_CASE("landmark_tokens: logits without the rows of landmarks", "[landmark_tokens]") {
  const Tokens text{1, 2, mark, 3, mark};
  const std::vector<float> logits{0, 0, 1, 1, 2, 2, 3, 3, 4, 4};
  std::vector<float> left(6);
  const MatrixView<const float> from{logits.data(), 5, 2, 2};
  const MatrixView<float> to{left.data(), 3, 2, 2};
  remove_landmark_logits(from, span_of(text), mark, LandmarkLoss::skips, to);
  CHECK(left == std::vector<float>{0, 0, 1, 1, 3, 3});
  remove_landmark_logits(from, span_of(text), mark, LandmarkLoss::includes, to);
  CHECK(left == std::vector<float>{0, 0, 2, 2, 4, 4});

  const auto refused = [&](MatrixView<const float> x, MatrixView<float> y) {
    return refusal([&] { remove_landmark_logits(x, span_of(text), mark, LandmarkLoss::skips, y); });
  };
  CHECK(refused({logits.data(), 4, 2, 2}, to).find("logits is [4, 2], wanted [5, 2]") != std::string::npos);
  CHECK(refused(from, {left.data(), 2, 2, 2}).find("result is [2, 2], wanted [3, 2]") != std::string::npos);
}

TEST_CASE("landmark_tokens: chunk lengths for a context of 512 and of 2048", "[landmark_tokens][golden]") {
  CHECK(landmark_chunk_length(512, 51, 5) == 204);
  CHECK(landmark_chunk_length(512, 51, 4) == 255);
  CHECK(landmark_chunk_length(512, 51, 2) == 357);
  CHECK(landmark_chunk_length(2048, 64, 5) == 1664);
  CHECK(landmark_chunk_length(512, 51, 8) == 51);
  CHECK(refusal([] { landmark_chunk_length(512, 51, 9); }).find("top_k is 9, wanted less than 9") !=
        std::string::npos);
  CHECK(refusal([] { landmark_chunk_length(512, 51, std::numeric_limits<Index>::max()); }) != "");
  CHECK(refusal([] { landmark_chunk_length(512, 51, -1); }) ==
        "longspan: landmark_chunk_length: top_k is -1, wanted at least 0");
  CHECK(refusal([] { with_landmarks(span_of({1}), 1, mark); }).find("block_size is 1, wanted at least 2") !=
        std::string::npos);
}
