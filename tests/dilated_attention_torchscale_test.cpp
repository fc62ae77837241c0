// The same result computed as torchscale does: gather into dense segments and scatter back,
// buffer by buffer in double. (microsoft/torchscale, torchscale/component/dilated_attention.py, version of
// 2023-12.)
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::Branch;
using longspan::causal;
using longspan::dilated_attention;
using longspan::Phase;

using Row = std::vector<double>;

Index up_to_multiple(Index x, Index of) { return (x + of - 1) / of * of; }

/// The rows of one head in one segment after zero padding and the selection of every r-th row: torchscale's
/// `gathering` and `dense_to_sparse`.
std::vector<Row> sparse_rows(const Tensor<double>& x, Index h, Index begin, Index length, Index dilation,
                             Index offset) {
  std::vector<Row> rows;
  for (Index place = offset; place < up_to_multiple(length, dilation); place += dilation) {
    Row row(static_cast<std::size_t>(x.cols), 0.0);
    const bool is_padding = place >= length || begin + place >= x.rows;
    if (!is_padding) std::copy_n(x.row(0, h, begin + place), x.cols, row.begin());
    rows.push_back(std::move(row));
  }
  return rows;
}

/// Outputs and log-sum-exps of one branch; -1e8 marks rows without a result, as in torchscale.
struct Scattered {
  Tensor<double> out;
  std::vector<double> lse;  ///< [heads][rows]
};

/// Rows of zeros are not masked: they count as keys.
void attend_sparse(const std::vector<Row>& q, const std::vector<Row>& k, const std::vector<Row>& v,
                   bool is_causal, std::size_t i, Row& out, double& lse) {
  const std::size_t keys = is_causal ? i + 1 : k.size();
  const double scale = 1 / std::sqrt(static_cast<double>(q[i].size()));
  Row weights(keys);
  double sum = 0;
  for (std::size_t j = 0; j < keys; ++j) {
    double s = 0;
    for (std::size_t c = 0; c < q[i].size(); ++c) s += q[i][c] * k[j][c];
    sum += weights[j] = std::exp(scale * s);
  }
  out.assign(v[0].size(), 0.0);
  for (std::size_t j = 0; j < keys; ++j)
    for (std::size_t c = 0; c < out.size(); ++c) out[c] += weights[j] / sum * v[j][c];
  lse = std::log(sum);
}

Scattered one_branch(const Call<double>& call, Branch branch, bool is_causal) {
  const Index tokens = call.q.rows, heads = call.q.heads, length = std::min(branch.segment, tokens);
  const Index heads_of_an_offset = up_to_multiple(heads, branch.dilation) / branch.dilation;
  Scattered result{call.out, std::vector<double>(static_cast<std::size_t>(heads * tokens), -1e8)};
  std::fill(result.out.values.begin(), result.out.values.end(), 0.0);
  for (Index h = 0; h < heads; ++h) {
    const Index offset = h / heads_of_an_offset;
    for (Index begin = 0; begin < tokens; begin += length) {
      const auto rows_of = [&](const Tensor<double>& x) {
        return sparse_rows(x, h, begin, length, branch.dilation, offset);
      };
      const auto q = rows_of(call.q), k = rows_of(call.k), v = rows_of(call.v);
      for (std::size_t i = 0; i < q.size(); ++i) {
        const Index place = offset + static_cast<Index>(i) * branch.dilation, token = begin + place;
        if (place >= length || token >= tokens) continue;
        Row out;
        attend_sparse(q, k, v, is_causal, i, out, result.lse[static_cast<std::size_t>(h * tokens + token)]);
        std::copy(out.begin(), out.end(), result.out.row(0, h, token));
      }
    }
  }
  return result;
}

/// torchscale's `scattering`: weights exp(lse - max) over their sum.
Tensor<double> torchscale(const Call<double>& call, const std::vector<Branch>& branches, bool is_causal) {
  std::vector<Scattered> parts;
  for (const Branch& branch : branches) parts.push_back(one_branch(call, branch, is_causal));
  Tensor<double> out = call.out;
  std::fill(out.values.begin(), out.values.end(), 0.0);
  for (Index h = 0; h < out.heads; ++h) {
    for (Index i = 0; i < out.rows; ++i) {
      const auto at = static_cast<std::size_t>(h * out.rows + i);
      double top = -std::numeric_limits<double>::infinity(), sum = 0;
      for (const Scattered& part : parts) top = std::max(top, part.lse[at]);
      for (const Scattered& part : parts) sum += std::exp(part.lse[at] - top);
      for (const Scattered& part : parts) {
        const double share = std::exp(part.lse[at] - top) / sum;
        for (Index c = 0; c < out.cols; ++c) out.row(0, h, i)[c] += share * part.out.row(0, h, i)[c];
      }
    }
  }
  return out;
}

/// Dilations divide segments; otherwise torchscale shifts later segments, even in the paper's configuration.
std::vector<Branch> drawn_branches(Random& random) {
  std::vector<Branch> branches;
  for (Index n = random.between(1, 3); n > 0; --n) {
    const Index dilation = random.pick({1, 2, 3, 4, 6});
    branches.push_back({dilation * random.between(1, 12), dilation});
  }
  return branches;
}

double worst_difference(const Tensor<double>& a, const Tensor<double>& b) {
  double worst = 0;
  for (std::size_t n = 0; n < a.values.size(); ++n)
    worst = std::max(worst, std::abs(a.values[n] - b.values[n]));
  return worst;
}

Call<double> drawn_call(Random& random, Index tokens) {
  const Index heads = random.between(1, 9);
  return Call<double>({1, heads, heads, tokens, tokens, 8, 5}, Values::normal, random);
}

}  // namespace

TEST_CASE("dilated_attention: matches torchscale's gather and scatter, causal", "[law]") {
  for_each_case(60, [](Random& random) {
    Call<double> call = drawn_call(random, random.between(1, 100));
    dilated_attention attend{drawn_branches(random), causal{}};
    attend.phase = Phase::blocked;
    call.run(attend);
    CHECK(worst_difference(call.out, torchscale(call, attend.branches, true)) < 1e-13);
  });
}

TEST_CASE("dilated_attention: with zero_pad_compat matches torchscale's gather and scatter", "[law]") {
  for_each_case(60, [](Random& random) {
    Call<double> call = drawn_call(random, random.between(1, 100));
    dilated_attention attend{drawn_branches(random)};
    attend.phase = Phase::blocked;
    attend.zero_pad_compat = true;
    call.run(attend);
    CHECK(worst_difference(call.out, torchscale(call, attend.branches, false)) < 1e-13);
  });
}

TEST_CASE("dilated_attention: matches torchscale if segments divide the sequence", "[law]") {
  for_each_case(30, [](Random& random) {
    const Index dilation = random.pick({1, 2, 3, 4}), segment = dilation * random.between(1, 8);
    Call<double> call = drawn_call(random, segment * random.between(1, 4));
    dilated_attention attend{std::vector<Branch>{{segment, dilation}, {segment, 1}}};
    attend.phase = Phase::blocked;
    call.run(attend);
    CHECK(worst_difference(call.out, torchscale(call, attend.branches, false)) < 1e-13);
  });
}
