// landmark_attention: known results, laws, options, and errors.
#include "longspan/landmark_attention.hpp"

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "longspan/partial.hpp"
#include "longspan/reference/landmark_attention.hpp"
#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/landmark_oracle.hpp"
#include "support/refusal.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::everything;
using longspan::landmark_attention;
using longspan::LandmarkSoftmax;

/// head_dim 1, q = 1 and k = log c, so that the exponential of key j's score is c[j]; values [kv_len, cols].
Call<float> call_of(const std::vector<double>& c, Index q_len) {
  const auto kv_len = static_cast<Index>(c.size());
  Call<float> call(Shape{1, 1, 1, q_len, kv_len, 1, kv_len});
  for (float& q : call.q.values) q = 1;
  for (Index j = 0; j < kv_len; ++j) {
    call.k.row(0, 0, j)[0] = static_cast<float>(std::log(c[static_cast<std::size_t>(j)]));
    call.v.row(0, 0, j)[j] = 1;  // one-hot: row i of out is row i of the weights
  }
  return call;
}

/// Checks row i of the weights, of the kernel and of the reference.
template <class Attend>
void check_weights(const Attend& attend, Call<float> call, Index i, const std::vector<double>& wanted) {
  const auto check = [&](const char* who) {
    for (std::size_t j = 0; j < wanted.size(); ++j) {
      INFO(who << ", query " << i << ", key " << j);
      CHECK(std::abs(static_cast<double>(call.out.row(0, 0, i)[j]) - wanted[j]) < 1e-6);
    }
  };
  call.run(attend);
  check("kernel");
  const longspan::reference::exact exact{attend};
  exact(std::as_const(call.q).view(), std::as_const(call.k).view(), std::as_const(call.v).view(),
        call.out.view(), call.lse.view());
  check("reference");
}

const std::vector<double> equal_scores(9, 1.0);
const std::vector<double> drawn_scores{1, 3, 2, 1, 1, 4, 2};

}  // namespace

// ----------------------------------------------------------------------------------------------------------
// Golden examples

TEST_CASE("landmark_attention: the example of figure 4 of the paper", "[golden]") {
  const landmark_attention attend{landmarks::every(3)};
  const Call<float> call = call_of(equal_scores, 9);
  check_weights(attend, call, 6, {1 / 6.0, 1 / 6.0, 0, 1 / 6.0, 1 / 6.0, 0, 1 / 3.0, 0, 0});
}

TEST_CASE("landmark_attention: a landmark sees its block and earlier landmarks, but not itself", "[golden]") {
  const landmark_attention attend{landmarks::every(3)};
  const Call<float> call = call_of(equal_scores, 9);
  check_weights(attend, call, 5, {1 / 6.0, 1 / 6.0, 0, 1 / 3.0, 1 / 3.0, 0, 0, 0, 0});
  check_weights(attend, call, 8, {1 / 8.0, 1 / 8.0, 0, 1 / 8.0, 1 / 8.0, 0, 1 / 4.0, 1 / 4.0, 0});
}

TEST_CASE("landmark_attention: the score of a landmark determines the weight of its block", "[golden]") {
  const std::vector<Index> keys{2, 5};
  const landmark_attention attend{landmarks::at(keys)};
  Call<float> call = call_of(drawn_scores, 7);
  check_weights(attend, call, 6, {1 / 16.0, 3 / 16.0, 0, 1 / 4.0, 1 / 4.0, 0, 1 / 4.0});
  call.run(attend);
  CHECK(std::abs(call.lse(0, 0, 6) - std::log(8.0f)) < 1e-6f);
}

TEST_CASE("landmark_attention: a landmark without visible tokens is dropped, or leaks its weight",
          "[golden]") {
  const std::vector<Index> keys{1, 2};
  landmark_attention attend{landmarks::at(keys)};
  const Call<float> call = call_of({1, 1, 1, 1}, 4);
  check_weights(attend, call, 3, {1 / 2.0, 0, 0, 1 / 2.0});
  attend.leak = true;
  check_weights(attend, call, 3, {1 / 3.0, 0, 0, 1 / 3.0});
}

TEST_CASE("landmark_attention: the weight of the CMT goes to the controlled blocks", "[golden][control]") {
  // A free block {0} with landmark 1 of weight 4, a controlled block {2} with landmark 3, own token 4 of weight 2.
  const std::vector<Index> keys{1, 3};
  const std::vector<unsigned char> kinds{0, 1};
  const std::vector<float> cmt(5, std::log(2.0f));
  landmark_attention attend{landmarks::at(keys)};
  attend.control.cmt = longspan::compact_rows_view(cmt.data(), 1, 1, 5);
  attend.control.blocks = {kinds.data(), 1, 2, 2};
  const Call<float> call = call_of({1, 4, 1, 7, 2}, 5);
  check_weights(attend, call, 4, {0.5, 0, 0.25, 0, 0.25});
  attend.control.cutoff = 0.3;
  check_weights(attend, call, 4, {0.5, 0, 0, 0, 0.25});
}

TEST_CASE("landmark_attention: gate_keep multiplies the weight of a block", "[golden]") {
  const std::vector<Index> keys{2, 5};
  std::vector<float> keep(7 * 2, 1.0f);
  keep[6 * 2] = 0;
  keep[6 * 2 + 1] = 2;
  landmark_attention attend{landmarks::at(keys)};
  attend.gate_keep = longspan::compact_view(std::as_const(keep).data(), 1, 1, 7, 2);
  check_weights(attend, call_of(drawn_scores, 7), 6, {0, 0, 0, 1 / 2.0, 1 / 2.0, 0, 1 / 4.0});
}

TEST_CASE("landmark_attention: LandmarkSoftmax::plain and LandmarkSoftmax::ignored", "[golden]") {
  landmark_attention attend{landmarks::every(3)};
  const Call<float> call = call_of(drawn_scores, 7);
  attend.softmax = LandmarkSoftmax::plain;
  check_weights(attend, call, 6, {1 / 14.0, 3 / 14.0, 2 / 14.0, 1 / 14.0, 1 / 14.0, 4 / 14.0, 2 / 14.0});
  attend.softmax = LandmarkSoftmax::ignored;
  check_weights(attend, call, 6, {1 / 8.0, 3 / 8.0, 0, 1 / 8.0, 1 / 8.0, 0, 2 / 8.0});
}

TEST_CASE("landmark_attention: a query with an empty own block that sees no other block has output 0",
          "[golden]") {
  const std::vector<Index> keys{0, 1};
  Call<float> call = call_of({1, 1, 1}, 3);
  call.run(landmark_attention{landmarks::at(keys)});
  for (const Index i : {0, 1}) {
    for (Index j = 0; j < 3; ++j) CHECK(call.out.row(0, 0, i)[j] == 0);
    CHECK(call.lse(0, 0, i) == -std::numeric_limits<float>::infinity());
  }
  CHECK(call.out.row(0, 0, 2)[2] == 1);
}

// ----------------------------------------------------------------------------------------------------------
// Laws

TEST_CASE("landmark_attention: without landmarks it is softmax attention", "[law]") {
  Random random(1);
  for (const Index kv_len : {60, 128, 300}) {
    Call<float> call(Shape{1, 4, 2, 50, kv_len, 16, 8}, Values::peaked, random);
    call.run(landmark_attention{landmarks::none()});
    check_against(exact_attention({.sees = [](Index, Index, Index i, Index j) { return j <= i; }}, call),
                  call);
  }
}

TEST_CASE("landmark_attention: within the first block it is causal softmax attention", "[law]") {
  Random random(2);
  Call<float> call(Shape{1, 4, 2, 90, 90, 16, 8}, Values::peaked, random), own = call.unrun();
  call.run(landmark_attention{landmarks::every(100)});
  own.run(longspan::softmax_attention{causal{}});
  check_against(exact_attention({.sees = [](Index, Index, Index i, Index j) { return j <= i; }}, own), call);
}

TEST_CASE("landmark_attention: equals the merge of the local part and of blocks with their landmarks' scores",
          "[law][merge]") {
  for_each_case(20, [](Random& random) {
    const Index length = random.pick({5, 16, 64, 150}), blocks = random.between(1, 5),
                rest = random.between(1, length - 1), kv_len = length * blocks + rest, q_len = rest;
    Call<float> call(Shape{1, 2, 1, q_len, kv_len, 24, 16}, Values::normal, random);
    INFO("length " << length << " blocks " << blocks << " rest " << rest);

    // The queries are in the open block, which is the local part.
    std::vector<Tensor<float>> outs;
    std::vector<Rows<float>> lses;
    const auto q = std::as_const(call.q).view();
    const auto k = std::as_const(call.k).view(), v = std::as_const(call.v).view();
    const auto part_of = [&](Index first, Index count, auto mask) {
      outs.emplace_back(1, 2, q_len, 16);
      lses.emplace_back(1, 2, q_len);
      longspan::softmax_attention{mask}(q, k.slice_rows(first, count), v.slice_rows(first, count),
                                        outs.back().view(), lses.back().view());
    };
    outs.reserve(8);
    lses.reserve(16);
    part_of(length * blocks, rest, causal{});
    for (Index m = 0; m < blocks; ++m) part_of(m * length, length - 1, everything{});
    std::vector<longspan::Partial<const float>> parts{longspan::partial(outs[0].view(), lses[0].view())};
    for (Index m = 0; m < blocks; ++m) {
      const auto part = longspan::partial(outs[static_cast<std::size_t>(m + 1)].view(), lses[1].view());
      auto& logits = lses.emplace_back(1, 2, q_len);
      for (Index h = 0; h < 2; ++h) {
        for (Index i = 0; i < q_len; ++i) {
          double logit = 0;
          for (Index c = 0; c < 24; ++c)
            logit += double(call.q.row(0, h, i)[c]) * double(call.k.row(0, 0, (m + 1) * length - 1)[c]);
          logits.view()(0, h, i) = static_cast<float>(logit / std::sqrt(24.0));
        }
      }
      parts.push_back(longspan::with_lse(longspan::Partial<const float>(part), logits.view()));
    }
    Tensor<float> merged(1, 2, q_len, 16);
    Rows<float> merged_lse(1, 2, q_len);
    longspan::merge(std::span<const longspan::Partial<const float>>(parts),
                    longspan::partial(merged.view(), merged_lse.view()));
    call.run(landmark_attention{landmarks::every(length)});
    for (std::size_t n = 0; n < merged.values.size(); ++n)
      REQUIRE(std::abs(merged.values[n] - call.out.values[n]) < 4e-6f);
    for (std::size_t n = 0; n < merged_lse.values.size(); ++n)
      REQUIRE(std::abs(merged_lse.values[n] - call.lse.values[n]) < 4e-6f);
  });
}

TEST_CASE("landmark_attention: matches the reference in double for all options", "[law][reference]") {
  for_each_case(60, [](Random& random) {
    const Index kv_len = random.between(1, 300), q_len = random.between(1, std::min<Index>(60, kv_len));
    Call<double> call(Shape{2, 6, 2, q_len, kv_len, 5, 9}, random.pick(all_values), random),
        exact = call.unrun();
    const Landmarks at = drawn_landmarks(random.pick({1, 4, 30, 90}), 2, kv_len, random);
    const LandmarkLists lists(at);
    const auto blocks = static_cast<Index>(std::max(at.of_row[0].size(), at.of_row[1].size()));
    std::vector<float> keep(static_cast<std::size_t>(2 * 6 * q_len * std::max<Index>(1, blocks)));
    for (float& x : keep) x = random.chance(0.3) ? 0.0f : 1.5f;
    std::vector<float> cmt(static_cast<std::size_t>(2 * 6 * q_len));
    for (float& x : cmt) x = static_cast<float>(3 * random.normal());
    if (random.chance(0.5)) cmt[0] = -std::numeric_limits<float>::infinity();
    std::vector<unsigned char> kinds(static_cast<std::size_t>(2 * std::max<Index>(1, blocks)));
    for (auto& kind : kinds) kind = random.chance(0.5);

    const auto check = [&](auto attend) {
      attend.leak = random.chance(0.3);
      if (random.chance(0.5))
        attend.gate_keep = longspan::compact_view(std::as_const(keep).data(), 2, 6, q_len, blocks);
      if (random.chance(0.5)) {
        attend.control.cmt = longspan::compact_rows_view(std::as_const(cmt).data(), 2, 6, q_len);
        attend.control.blocks = {kinds.data(), 2, blocks, blocks};
        attend.control.cutoff = random.pick({0.0, 0.2});
      }
      call.run(attend);
      longspan::reference::exact{attend}(std::as_const(exact.q).view(), std::as_const(exact.k).view(),
                                         std::as_const(exact.v).view(), exact.out.view(), exact.lse.view());
    };
    if (random.chance(0.5)) {
      check(landmark_attention{lists.at()});
    } else {
      check(landmark_attention{lists.at(), everything{},
                               longspan::rotary(longspan::Pairing::half_split, 100, 4)});
    }
    for (std::size_t n = 0; n < exact.out.values.size(); ++n)
      REQUIRE(std::abs(exact.out.values[n] - call.out.values[n]) <
              1e-10 * (1 + std::abs(exact.out.values[n])));
    for (std::size_t n = 0; n < exact.lse.values.size(); ++n)
      REQUIRE(
          (exact.lse.values[n] == call.lse.values[n] ||
           std::abs(exact.lse.values[n] - call.lse.values[n]) < 1e-10 * (1 + std::abs(exact.lse.values[n]))));
  });
}

TEST_CASE("landmark_attention: landmarks::every gives the bits of the same landmarks as a list",
          "[law][bits]") {
  for (const Index length : {1, 7, 64, 129, 200}) {
    Random random(static_cast<std::uint64_t>(length));
    const Landmarks at = every(length, 1, 500);
    Call<float> call(Shape{2, 4, 2, 100, 500, 16, 8}, Values::normal, random), own = call.unrun(),
                                                                               per_row = call.unrun();
    call.run(landmark_attention{landmarks::every(length)});
    own.run(landmark_attention{landmarks::at(at.of_row[0])});
    const std::vector<std::span<const Index>> lists{at.of_row[0], at.of_row[0]};
    per_row.run(landmark_attention{landmarks::at(lists)});
    CHECK(call.same_outputs(own));
    CHECK(call.same_outputs(per_row));
  }
}

TEST_CASE("landmark_attention: bits do not depend on threads or on other queries", "[law][bits][slow]") {
  for (const Index length : {3, 50, 64, 300}) {
    Random random(static_cast<std::uint64_t>(length));
    Call<float> call(Shape{2, 6, 2, 330, 700, 24, 16}, Values::normal, random);
    const landmark_attention attend{landmarks::every(length)};
    call.run(attend, longspan::serial{});
    for (const Index threads : {2, 3, 7}) {
      Call<float> own = call.unrun();
      own.run(attend, longspan::openmp{threads});
      CHECK(own.same_outputs(call));
    }
    // The rows of one call as separate calls.
    for (Index first = 0; first < 330; first += 110) {
      auto part_attend = attend;
      part_attend.first_query = 370 + first;
      Call<float> part(Shape{2, 6, 2, 110, 700, 24, 16});
      part_attend(std::as_const(call.q).view().slice_rows(first, 110), std::as_const(call.k).view(),
                  std::as_const(call.v).view(), part.out.view(), part.lse.view());
      for (Index h = 0; h < 6; ++h) {
        for (Index i = 0; i < 110; ++i) {
          REQUIRE(
              std::equal(part.out.row(1, h, i), part.out.row(1, h, i) + 16, call.out.row(1, h, first + i)));
          REQUIRE(part.lse(1, h, i) == call.lse(1, h, first + i));
        }
      }
    }
  }
}

TEST_CASE("landmark_attention: values of landmarks and hidden keys have no effect", "[law][masked]") {
  for (const Index length : {5, 64, 200}) {
    Random random(static_cast<std::uint64_t>(length));
    Call<float> call(Shape{1, 4, 2, 300, 500, 16, 24}, Values::normal, random);
    const landmark_attention attend{landmarks::every(length)};
    call.run(attend);
    Call<float> own = call.unrun();
    for (Index h = 0; h < 2; ++h) {
      for (Index j = length - 1; j < 500; j += length) std::fill_n(own.v.row(0, h, j), 24, NAN);
      // Only the last query sees the last key.
      std::fill_n(own.v.row(0, h, 499), 24, std::numeric_limits<float>::infinity());
      std::fill_n(own.k.row(0, h, 499), 16, NAN);
    }
    own.run(attend);
    for (Index h = 0; h < 4; ++h) {
      for (Index i = 0; i < 299; ++i) {
        REQUIRE(std::equal(own.out.row(0, h, i), own.out.row(0, h, i) + 24, call.out.row(0, h, i)));
      }
    }
  }
}

TEST_CASE("landmark_attention: queries of other blocks do not see the open block at the end",
          "[law][masked]") {
  Random random(3);
  for (const Index length : {50, 150}) {
    Call<float> call(Shape{1, 2, 1, 320, 320, 16, 8}, Values::normal, random);
    const landmark_attention attend{landmarks::every(length), everything{}};
    call.run(attend);
    Call<float> own = call.unrun();
    const Index open = 320 / length * length;
    REQUIRE(open < 320);
    for (Index j = open; j < 320; ++j) {
      std::fill_n(own.v.row(0, 0, j), 8, NAN);
      std::fill_n(own.k.row(0, 0, j), 16, NAN);
    }
    own.run(attend);
    for (Index i = 0; i < 320; ++i) {
      const bool same = std::equal(own.out.row(0, 1, i), own.out.row(0, 1, i) + 8, call.out.row(0, 1, i));
      REQUIRE(same == (i < open));
    }
  }
}

TEST_CASE("landmark_attention: padding equals a shorter sequence", "[law][masked]") {
  Random random(4);
  const std::vector<Index> lengths{130, 200};
  Call<float> call(Shape{2, 2, 1, 60, 200, 16, 8}, Values::normal, random);
  landmark_attention attend{landmarks::every(16), longspan::padding{lengths}};
  attend.first_query = 70;
  call.run(attend);
  Call<float> shorter(Shape{1, 2, 1, 60, 130, 16, 8});
  landmark_attention shorter_attend{landmarks::every(16), everything{}};
  shorter_attend.first_query = 70;
  const auto first_row = [](auto x, Index rows) {
    x.batch = 1;
    x.rows = rows;
    return x;
  };
  shorter_attend(first_row(std::as_const(call.q).view(), 60), first_row(std::as_const(call.k).view(), 130),
                 first_row(std::as_const(call.v).view(), 130), shorter.out.view());
  for (Index i = 0; i < 60; ++i) {
    for (Index c = 0; c < 8; ++c)
      REQUIRE(std::abs(shorter.out.row(0, 1, i)[c] - call.out.row(0, 1, i)[c]) < 1e-6f);
  }
}

TEST_CASE("landmark_attention: a higher score of a landmark raises the weight of its block", "[law]") {
  const std::vector<Index> keys{2, 5};
  double last = 0;
  for (const double c : {0.01, 0.5, 2.0, 50.0}) {
    std::vector<double> scores = drawn_scores;
    scores[2] = c;
    Call<float> call = call_of(scores, 7);
    call.run(landmark_attention{landmarks::at(keys)});
    const double weight = double(call.out.row(0, 0, 6)[0]) + double(call.out.row(0, 0, 6)[1]);
    CHECK(weight > last);
    last = weight;
  }
}

TEST_CASE("landmark_attention: scores of 1e4 give finite results", "[law]") {
  Random random(5);
  for (const Index length : {8, 64, 150}) {
    Call<float> call(Shape{1, 2, 1, 200, 400, 16, 8}, Values::normal, random);
    for (float& q : call.q.values) q *= 1e4f;
    call.run(landmark_attention{landmarks::every(length)});
    for (const float x : call.out.values) REQUIRE(std::isfinite(x));
  }
}

// ----------------------------------------------------------------------------------------------------------
// Errors

TEST_CASE("landmark_attention: invalid landmarks and options are refused, and nothing is written",
          "[errors]") {
  Call<float> call(Shape{2, 2, 1, 5, 9, 4, 4});
  const Call<float> before = call;
  const auto refused = [&](const auto& attend, const char* words) {
    const std::string text = refusal([&] { call.run(attend); });
    CAPTURE(text);
    CHECK(text.find(words) != std::string::npos);
    CHECK(text.find("landmark_attention") != std::string::npos);
    CHECK(before.same_outputs(call));
  };
  const std::vector<Index> falling{4, 2}, twice{4, 4}, outside{9}, negative{-1}, fine{3, 8};
  for (const auto* keys : {&falling, &twice, &outside, &negative})
    refused(landmark_attention{landmarks::at(*keys)}, "a landmark of batch row 0 is");
  refused(landmark_attention{landmarks::every(-2)}, "the length of a block is -2");
  refused(landmark_attention{landmarks::every(0)}, "the length of a block is 0");
  const std::vector<std::span<const Index>> one_list{fine};
  refused(landmark_attention{landmarks::at(one_list)}, "the number of lists of landmarks is 1");

  landmark_attention attend{landmarks::at(fine)};
  const std::vector<float> floats(100);
  const std::vector<unsigned char> kinds(4);
  attend.gate_keep = longspan::compact_view(floats.data(), 2, 2, 5, 1);
  refused(attend, "gate_keep is [2, 2, 5, 1], wanted [2, 2, 5, 2]");
  attend.gate_keep = {};
  attend.control.cmt = longspan::compact_rows_view(floats.data(), 2, 2, 4);
  refused(attend, "control.cmt is [2, 2, 4], wanted [2, 2, 5]");
  attend.control.cmt = longspan::compact_rows_view(floats.data(), 2, 2, 5);
  attend.control.blocks = {kinds.data(), 2, 1, 1};
  refused(attend, "control.blocks is [2, 1], wanted [2, 2]");
  attend.control.blocks = {kinds.data(), 2, 2, 2};
  attend.softmax = LandmarkSoftmax::ignored;
  refused(attend, "softmax is not grouped");
  attend.softmax = LandmarkSoftmax::grouped;
  CHECK(refusal([&] { call.run(attend); }).empty());
}

TEST_CASE("landmark_attention: sizes of 0 are allowed", "[errors]") {
  for (const Shape& shape :
       {Shape{0, 2, 1, 3, 4, 2, 2}, Shape{1, 2, 1, 0, 4, 2, 2}, Shape{1, 2, 1, 3, 0, 2, 2},
        Shape{1, 2, 1, 3, 4, 0, 2}, Shape{1, 2, 1, 3, 4, 2, 0}}) {
    Call<float> call(shape);
    INFO(shape.text());
    call.run(landmark_attention{landmarks::every(2)});
    for (const float x : call.out.values) CHECK(x == 0);
    for (const float x : call.lse.values) CHECK(!std::isnan(x));
  }
}
