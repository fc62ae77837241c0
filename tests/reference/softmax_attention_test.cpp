#include "longspan/reference/softmax_attention.hpp"

#include <cmath>
#include <cstddef>
#include <limits>
#include <unsupported/Eigen/CXX11/Tensor>
#include <vector>

#include "support/catch.hpp"
#include "support/tensor.hpp"

using longspan::causal;
using longspan::Index;
using longspan::window;
namespace reference = longspan::reference;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// One head of dimension 1 in which exp(score of key j) is counts[j] for every query, so that weights are counts
/// over their sum.
struct Counts {
  test::Tensor<double> q, k, v, out;
  test::Rows<double> lse;

  Counts(Index queries, const std::vector<double>& counts, const std::vector<double>& values)
      : q(1, 1, queries, 1, 1.0),
        k(1, 1, static_cast<Index>(counts.size()), 1),
        v(1, 1, static_cast<Index>(values.size()), 1),
        out(1, 1, queries, 1, not_a_number),
        lse(1, 1, queries, not_a_number) {
    for (std::size_t j = 0; j < counts.size(); ++j) k.values[j] = std::log(counts[j]);
    v.values = values;
  }
  template <class Attend>
  void run(Attend attend) {
    attend(q.view(), k.view(), v.view(), out.view(), lse.view());
  }
};

bool near(const std::vector<double>& x, const std::vector<double>& y) {
  if (x.size() != y.size()) return false;
  for (std::size_t n = 0; n < x.size(); ++n) {
    if (!(x[n] == y[n] || std::abs(x[n] - y[n]) <= 1e-14 * (1 + std::abs(y[n])))) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("reference of softmax_attention: weights are exponentials over their sum", "[reference]") {
  Counts call(2, {1, 2, 3, 4}, {1, 2, 3, 4});
  call.run(reference::exact{longspan::softmax_attention<>{}});
  CHECK(near(call.out.values, {3, 3}));
  CHECK(near(call.lse.values, {std::log(10.0), std::log(10.0)}));
}

TEST_CASE("reference of softmax_attention: masks, and positions of queries", "[reference]") {
  Counts all(4, {1, 2, 3, 4}, {1, 2, 3, 4});
  all.run(reference::exact{longspan::softmax_attention(causal{})});
  CHECK(near(all.out.values, {1, 5.0 / 3, 14.0 / 6, 3}));
  CHECK(near(all.lse.values, {0, std::log(3.0), std::log(6.0), std::log(10.0)}));

  Counts last_two(2, {1, 2, 3, 4}, {1, 2, 3, 4});
  last_two.run(reference::exact{longspan::softmax_attention(causal{})});
  CHECK(near(last_two.out.values, {14.0 / 6, 3}));

  longspan::softmax_attention at_front(causal{} & window{.left = 0});
  at_front.first_query = 1;
  last_two.run(reference::exact{at_front});
  CHECK(near(last_two.out.values, {2, 3}));
  CHECK(near(last_two.lse.values, {std::log(2.0), std::log(3.0)}));
}

TEST_CASE("reference of softmax_attention: a row that sees no key has output 0 and lse -infinity",
          "[reference]") {
  Counts call(3, {1, 2}, {5, 6});
  call.run(reference::exact{longspan::softmax_attention(causal{})});  // the first query is at position -1
  CHECK(near(call.out.values, {0, 5, 17.0 / 3}));
  CHECK(near(call.lse.values, {-infinity, 0, std::log(3.0)}));
  Counts no_keys(2, {}, {});
  no_keys.run(reference::exact{longspan::softmax_attention<>{}});
  CHECK(near(no_keys.out.values, {0, 0}));
  CHECK(near(no_keys.lse.values, {-infinity, -infinity}));
}

TEST_CASE("reference of softmax_attention: the scale, 1 / sqrt(head_dim) unless set", "[reference]") {
  test::Tensor<double> q(1, 1, 1, 4, 1.0), k(1, 1, 2, 4), v(1, 1, 2, 1), out(1, 1, 1, 1);
  v.values = {0, 1};
  for (std::size_t c = 4; c < 8; ++c) k.values[c] = std::log(3.0) / 4;  // q.k = ln 3
  longspan::softmax_attention<> attend;
  reference::exact{attend}(q.view(), k.view(), v.view(), out.view());
  CHECK(std::abs(out.values[0] - std::sqrt(3.0) / (1 + std::sqrt(3.0))) < 1e-15);
  attend.scale = 1;
  reference::exact{attend}(q.view(), k.view(), v.view(), out.view());
  CHECK(std::abs(out.values[0] - 0.75) < 1e-15);
}

TEST_CASE("reference of softmax_attention: with head_dim 0 all keys have the same weight", "[reference]") {
  test::Tensor<double> q(1, 1, 1, 0), k(1, 1, 2, 0), v(1, 1, 2, 1), out(1, 1, 1, 1);
  v.values = {2, 4};
  reference::exact{longspan::softmax_attention<>{}}(q.view(), k.view(), v.view(), out.view());
  CHECK(out.values[0] == 3);
}

TEST_CASE("reference of softmax_attention: scores", "[reference]") {
  const auto plus_key = [](float s, Index, Index, Index, Index j) {
    return j == 1 ? s : -std::numeric_limits<float>::infinity();
  };
  Counts call(1, {1, 2, 3}, {1, not_a_number, not_a_number});
  call.v.values = {not_a_number, 2, not_a_number};
  // A score of -infinity hides the key, even if its value is NaN.
  call.run(reference::exact{longspan::softmax_attention(plus_key)});
  CHECK(call.out.values[0] == 2);

  const std::vector<float> slopes{1.0f};
  Counts sloped(2, {1, 1}, {0, 1});
  sloped.run(reference::exact{longspan::softmax_attention(longspan::alibi{slopes})});
  const double e = std::exp(1.0);
  CHECK(near(sloped.out.values, {1 / (1 + e), e / (1 + e)}));

  Counts capped(1, {1, 1e9}, {0, 1});
  capped.run(reference::exact{longspan::softmax_attention(longspan::softcap{1})});
  const double top = std::exp(std::tanh(std::log(1e9)));
  CHECK(near(capped.out.values, {top / (1 + top)}));
}

TEST_CASE("reference of softmax_attention: a score receives batch row, head, position and key",
          "[reference]") {
  test::Tensor<double> q(2, 2, 2, 1), k(2, 1, 3, 1), v(2, 1, 3, 1), out(2, 2, 2, 1);
  for (std::size_t n = 0; n < v.values.size(); ++n) v.values[n] = static_cast<double>(n % 3);
  // Only key (b + h + i) % 3 stays visible.
  const auto one_key = [](double s, Index b, Index h, Index i, Index j) {
    return (b + h + i) % 3 == j ? s : -infinity;
  };
  reference::exact{longspan::softmax_attention{one_key}}(q.view(), k.view(), v.view(), out.view());
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 2; ++h) {
      for (Index i = 0; i < 2; ++i) CHECK(out.row(b, h, i)[0] == static_cast<double>((b + h + i + 1) % 3));
    }
  }
}

TEST_CASE("reference of softmax_attention: query head h reads KV head h / (heads / kv_heads)",
          "[reference]") {
  test::Tensor<double> q(2, 6, 1, 1), k(2, 2, 1, 1), v(2, 2, 1, 1), out(2, 6, 1, 1);
  v.values = {10, 20, 30, 40};
  reference::exact{longspan::softmax_attention<>{}}(q.view(), k.view(), v.view(), out.view());
  CHECK(out.values == std::vector<double>{10, 10, 10, 20, 20, 20, 30, 30, 30, 40, 40, 40});
}

TEST_CASE("reference of softmax_attention: positions rotate queries and keys", "[reference]") {
  test::Tensor<double> q(1, 1, 1, 2), k(1, 1, 3, 2), v(1, 1, 3, 1), out(1, 1, 1, 1);
  test::Rows<double> lse(1, 1, 1);
  q.values = {1, 0};
  k.values = {1, 0, 1, 0, 1, 0};
  v.values = {1, 0, 0};
  longspan::softmax_attention attend{longspan::rotary(longspan::Pairing::interleaved)};
  attend.scale = 1;
  // The scores are cos 2, cos 1, cos 0.
  reference::exact{attend}(q.view(), k.view(), v.view(), out.view(), lse.view());
  const double sum = std::exp(std::cos(2.0)) + std::exp(std::cos(1.0)) + std::exp(1.0);
  CHECK(std::abs(out.values[0] - std::exp(std::cos(2.0)) / sum) < 1e-15);
  CHECK(std::abs(lse.values[0] - std::log(sum)) < 1e-15);
}

TEST_CASE("reference of softmax_attention: NaN reaches exactly the rows that see it", "[reference]") {
  for (const bool in_key : {true, false}) {
    Counts call(3, {1, 1, 1}, {1, 2, 3});
    (in_key ? call.k : call.v).values[1] = not_a_number;
    call.run(reference::exact{longspan::softmax_attention(causal{})});
    CHECK(call.out.values[0] == 1);
    CHECK(std::isnan(call.out.values[1]));
    CHECK(std::isnan(call.out.values[2]));
    CHECK(std::isnan(call.lse.values[2]) == in_key);
  }
  Counts call(2, {1, 1}, {1, 2});
  call.q.values[0] = not_a_number;
  call.run(reference::exact{longspan::softmax_attention<>{}});
  CHECK(std::isnan(call.out.values[0]));
  CHECK(call.out.values[1] == 1.5);
}

TEST_CASE("reference of softmax_attention: large scores do not overflow", "[reference]") {
  for (const double shift : {1e4, -1e4}) {
    Counts call(1, {1, 1}, {1, 2});
    call.k.values = {shift, shift + std::log(3.0)};
    call.run(reference::exact{longspan::softmax_attention<>{}});
    CHECK(std::abs(call.out.values[0] - 1.75) < 1e-11);
    CHECK(std::abs(call.lse.values[0] - shift - std::log(4.0)) < 1e-11);
  }
}

TEST_CASE("reference of softmax_attention: Eigen tensors of other types", "[reference]") {
  Eigen::Tensor<float, 4, Eigen::RowMajor> q(1, 1, 1, 2), out(1, 1, 1, 3);
  Eigen::Tensor<Eigen::bfloat16, 4, Eigen::RowMajor> k(1, 1, 2, 2);
  Eigen::Tensor<Eigen::half, 4, Eigen::RowMajor> v(1, 1, 2, 3);
  Eigen::Tensor<float, 3, Eigen::RowMajor> lse(1, 1, 1);
  q.setZero();
  k.setConstant(Eigen::bfloat16(1));
  v.setConstant(Eigen::half(2));
  v(0, 0, 1, 2) = Eigen::half(4);
  reference::exact{longspan::softmax_attention<>{}}(q, k, v, out, lse);
  CHECK(out(0, 0, 0, 0) == 2);
  CHECK(out(0, 0, 0, 2) == 3);
  CHECK(lse(0, 0, 0) == static_cast<float>(std::log(2.0)));
}
