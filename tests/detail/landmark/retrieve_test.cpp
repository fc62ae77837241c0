// The steps of retrieval from a landmark cache, compared with a sort and with scalar sums.
#include "longspan/detail/landmark/retrieve.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "support/catch.hpp"
#include "support/guarded_memory.hpp"
#include "support/random.hpp"

namespace {

using namespace longspan::detail;
using Eigen::bfloat16;
using longspan::Index;
using longspan::MatrixView;
using test::Random;

/// The indices of the `k` highest scores, of equal scores the lower index, in rising order.
template <class Real>
std::vector<Index> highest_by_sorting(const std::vector<Real>& scores, Index k) {
  std::vector<Index> order(scores.size());
  std::iota(order.begin(), order.end(), Index{0});
  const auto score = [&](Index n) { return scores[static_cast<std::size_t>(n)]; };
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return score(a) > score(b); });
  order.resize(static_cast<std::size_t>(k));
  std::sort(order.begin(), order.end());
  return order;
}

template <class Real>
std::vector<Index> highest(const std::vector<Real>& scores, Index k) {
  std::vector<Index> chosen(static_cast<std::size_t>(k));
  std::vector<Real> best(chosen.size());
  choose_highest(scores.data(), static_cast<Index>(scores.size()), k, chosen.data(), best.data());
  return chosen;
}

}  // namespace

TEMPLATE_TEST_CASE("choose_highest: the highest scores, of equal scores the first", "[landmark]", float,
                   double) {
  Random random(1);
  for (const Index count : {1, 2, 3, 15, 16, 63, 64, 65, 128, 200, 1000}) {
    for (const Index k : {1, 2, 4, 17}) {
      if (k > count) continue;
      for (const Index values : {1, 3, 1000000}) {  // many ties, or none
        std::vector<TestType> scores(static_cast<std::size_t>(count));
        for (TestType& s : scores) s = static_cast<TestType>(random.between(0, values - 1)) - 5;
        INFO("count=" << count << " k=" << k << " values=" << values);
        CHECK(highest(scores, k) == highest_by_sorting(scores, k));
        std::sort(scores.begin(), scores.end());
        CHECK(highest(scores, k) == highest_by_sorting(scores, k));
      }
    }
  }
}

TEMPLATE_TEST_CASE("choose_highest: NaN is never chosen before a score and hides no other score",
                   "[landmark]", float, double) {
  constexpr TestType nan = std::numeric_limits<TestType>::quiet_NaN();
  for (const Index at : {20, 70, 299}) {
    std::vector<TestType> scores(300, TestType(-1));
    for (std::size_t n = 4; n < scores.size(); n += 3) scores[n] = nan;
    scores[static_cast<std::size_t>(at)] = TestType(2);
    INFO(at);
    CHECK(highest(scores, 1) == std::vector<Index>{at});
    CHECK(highest(scores, 2) == std::vector<Index>{0, at});
  }
}

TEMPLATE_TEST_CASE("score_landmarks: bits do not depend on which queries are scored together",
                   "[landmark][bits]", float, double, bfloat16) {
  using Real = ArithmeticOf<TestType>;
  Random random(2);
  for (const Index cols : {1, 16, 33, 64}) {
    for (const Index rows : {1, 5, 16, 300}) {
      constexpr Index queries = 13;
      const Index stride = round_up(cols, lanes<Real>);
      std::vector<TestType> k(static_cast<std::size_t>(rows * cols));
      for (TestType& x : k) x = static_cast<TestType>(static_cast<float>(random.normal()));
      std::vector<Real> q(static_cast<std::size_t>(queries * stride), Real(0));
      for (Index g = 0; g < queries; ++g) {
        for (Index c = 0; c < cols; ++c)
          q[static_cast<std::size_t>(g * stride + c)] = static_cast<Real>(random.normal());
      }
      const MatrixView<const TestType> keys{k.data(), rows, cols, cols};
      std::vector<Real> together(static_cast<std::size_t>(queries * rows)), alone(together.size());
      score_landmarks<Real>(keys, MatrixView<const Real>{q.data(), queries, cols, stride},
                            [&](Index g) { return together.data() + g * rows; });
      for (Index g = 0; g < queries; ++g)
        score_landmarks<Real>(keys, MatrixView<const Real>{q.data() + g * stride, 1, cols, stride},
                              [&](Index) { return alone.data() + g * rows; });
      INFO("cols=" << cols << " rows=" << rows);
      CHECK(std::memcmp(together.data(), alone.data(), together.size() * sizeof(Real)) == 0);
      double worst = 0;
      for (Index g = 0; g < queries; ++g) {
        for (Index j = 0; j < rows; ++j) {
          double wanted = 0, size = 0;
          for (Index c = 0; c < cols; ++c) {
            const double x =
                double(q[static_cast<std::size_t>(g * stride + interleaved_index<Real, TestType>(c, cols))]) *
                static_cast<double>(k[static_cast<std::size_t>(j * cols + c)]);
            wanted += x;
            size += std::abs(x);
          }
          const double error = std::abs(double(together[static_cast<std::size_t>(g * rows + j)]) - wanted);
          worst = std::max(worst, error / (size * double(cols + 4)));
        }
      }
      CHECK(worst <= double(std::numeric_limits<Real>::epsilon()) / 2);
    }
  }
}

TEMPLATE_TEST_CASE(
    "retrieve: the mean of a block's values, of any number of columns, without reading past them", "[memory]",
    float, double, bfloat16, Eigen::half) {
  using Real = longspan::Arithmetic<TestType>;
  constexpr Index tokens = 5, keys = tokens + 1;  // the last key is the landmark, whose value is not read
  Random random(6);
  for (Index cols = 1; cols <= 140; ++cols) {
    const test::GuardedArray<TestType> v(tokens * cols, test::Guard::behind);
    for (Index n = 0; n < tokens * cols; ++n)
      v.data()[n] = static_cast<TestType>(static_cast<float>(random.normal()));
    const std::vector<TestType> k(static_cast<std::size_t>(keys), TestType(0));  // equal scores
    const std::vector<Real> q(static_cast<std::size_t>(lanes<Real>), Real(0));
    std::vector<Real> o(static_cast<std::size_t>(cols + 8 * lanes<Real>), Real(0)),
        scores(static_cast<std::size_t>(keys + lanes<Real>));
    RetrievedRow<Real> row{o.data(), scores.data()};
    row.absorb(q.data(), Index{lanes<Real>},
               KeyRun<TestType, TestType>{{k.data(), keys, 1, 1}, {v.data(), keys, cols, cols}});
    CHECK(row.sum == Real(1));
    double worst = 0;
    for (Index c = 0; c < cols; ++c) {
      double mean = 0;
      for (Index j = 0; j < tokens; ++j) mean += static_cast<double>(v.data()[j * cols + c]) / double(tokens);
      worst = std::max(worst, std::abs(double(o[static_cast<std::size_t>(c)]) - mean));
    }
    CHECK(worst <= 1e-6);
  }
}
