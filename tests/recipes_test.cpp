// The recipes of the README, each compared with its definition, computed naively in double.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "longspan/mask.hpp"
#include "longspan/partial.hpp"
#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace longspan;
using test::Call;
using test::Random;
using test::Rows;
using test::Shape;
using test::Tensor;
using test::Values;

constexpr Shape shape{1, 2, 1, 24, 24, 8, 8};

/// The weights of query i of head h, with scale 1 / sqrt(d), over the keys that `sees` shows.
template <class Sees>
std::vector<double> weights_of(const Call<float>& call, Index h, Index i, const Sees& sees,
                               double added_to_sum = 0) {
  std::vector<double> weights;
  double sum = added_to_sum;
  for (Index j = 0; j < call.k.rows; ++j) {
    double s = 0;
    for (Index c = 0; c < call.q.cols; ++c)
      s += double(call.q.row(0, h, i)[c]) * double(call.k.row(0, 0, j)[c]);
    weights.push_back(sees(i, j) ? std::exp(s / std::sqrt(double(call.q.cols))) : 0.0);
    sum += weights.back();
  }
  for (double& weight : weights) weight /= sum;
  return weights;
}

template <class WeightsOf>
double worst_error(const Call<float>& call, const WeightsOf& weights) {
  double worst = 0;
  for (Index h = 0; h < call.q.heads; ++h) {
    for (Index i = 0; i < call.q.rows; ++i) {
      const std::vector<double> p = weights(h, i);
      for (Index c = 0; c < call.v.cols; ++c) {
        double exact = 0;
        for (Index j = 0; j < call.k.rows; ++j) exact += p[std::size_t(j)] * double(call.v.row(0, 0, j)[c]);
        worst = std::max(worst, std::abs(double(call.out.row(0, h, i)[c]) - exact));
      }
    }
  }
  return worst;
}

bool is_causal(Index i, Index j) { return j <= i; }

TEST_CASE("recipe: a learned sink is a merge with a partial of output 0 and lse of the sink", "[recipe]") {
  Random random(1);
  Call<float> call(shape, Values::normal, random);
  call.run(softmax_attention{causal{}});
  const float sink[] = {0.7f, -1.3f};
  Tensor<float> zeros(1, 2, 24, 8);
  Rows<float> sinks(1, 2, 24);
  for (Index h = 0; h < 2; ++h) {
    for (Index i = 0; i < 24; ++i) sinks.view()(0, h, i) = sink[h];
  }
  merge({partial(call.out.view(), call.lse.view()), partial(zeros.view(), sinks.view())},
        partial(call.out.view(), call.lse.view()));
  CHECK(worst_error(call, [&](Index h, Index i) {
          return weights_of(call, h, i, is_causal, std::exp(double(sink[h])));
        }) < 1e-6);
}

TEST_CASE("recipe: with an identity matrix as v the outputs are the attention weights", "[recipe]") {
  Random random(2);
  Shape square = shape;
  square.value_dim = square.kv_len;
  Call<float> call(square, Values::normal, random);
  for (Index j = 0; j < 24; ++j) {
    for (Index c = 0; c < 24; ++c) call.v.row(0, 0, j)[c] = c == j ? 1.0f : 0.0f;
  }
  call.run(softmax_attention{causal{}});
  double worst = 0;
  for (Index i = 0; i < 24; ++i) {
    const auto p = weights_of(call, 1, i, is_causal);
    for (Index j = 0; j < 24; ++j)
      worst = std::max(worst, std::abs(double(call.out.row(0, 1, i)[j]) - p[std::size_t(j)]));
  }
  CHECK(worst < 1e-6);
}

TEST_CASE("recipe: packed sequences attend only within themselves", "[recipe]") {
  Random random(3);
  Call<float> call(shape, Values::normal, random);
  const std::vector<Index> starts{0, 5, 6, 17};  // cu_seqlens without its last entry
  call.run(softmax_attention{causal{} & documents{starts}});
  const auto sequence = [&](Index j) {
    return std::upper_bound(starts.begin(), starts.end(), j) - starts.begin();
  };
  CHECK(worst_error(call, [&](Index h, Index i) {
          return weights_of(call, h, i,
                            [&](Index a, Index b) { return b <= a && sequence(a) == sequence(b); });
        }) < 1e-6);
}

/// A mask for a tree of drafts, the last rows; parent[n] is the draft before draft n, or -1.
struct draft_tree {
  Index first = 0;
  std::vector<Index> parent;

  bool sees(Index i, Index j) const {
    if (j < first) return true;
    for (Index n = i - first; n >= 0; n = parent[std::size_t(n)]) {
      if (n == j - first) return true;
    }
    return false;
  }
};

TEST_CASE("recipe: a tree of drafted tokens uses a mask of ancestors", "[recipe]") {
  Random random(4);
  Shape drafts = shape;
  drafts.q_len = 6;
  Call<float> call(drafts, Values::normal, random);
  const draft_tree tree{18, {-1, 0, 0, 1, 1, 2}};
  call.run(softmax_attention{tree});
  CHECK(worst_error(call, [&](Index h, Index i) {
          return weights_of(call, h, i, [&](Index a, Index b) { return tree.sees(a + 18, b); });
        }) < 1e-6);
}

TEST_CASE("recipe: dropout is a second call over the kept keys, weighted by the difference of the lse",
          "[recipe]") {
  Random random(5);
  Call<float> call(shape, Values::normal, random), kept = call.unrun();
  const double rate = 0.25;
  const auto is_kept = [](Index i, Index j) { return (i * 31 + j * 17) % 4 != 0; };
  struct kept_keys {
    decltype(is_kept) keeps;
    bool sees(Index i, Index j) const { return keeps(i, j); }
  };
  call.run(softmax_attention{causal{}});
  kept.run(softmax_attention{causal{} & kept_keys{is_kept}});
  double worst = 0;
  for (Index i = 0; i < 24; ++i) {
    const auto p = weights_of(call, 0, i, is_causal);
    const double factor = std::exp(double(kept.lse(0, 0, i)) - double(call.lse(0, 0, i))) / (1 - rate);
    for (Index c = 0; c < 8; ++c) {
      double exact = 0;
      for (Index j = 0; j <= i; ++j)
        exact += is_kept(i, j) ? p[std::size_t(j)] / (1 - rate) * double(call.v.row(0, 0, j)[c]) : 0.0;
      worst = std::max(worst, std::abs(factor * double(kept.out.row(0, 0, i)[c]) - exact));
    }
  }
  CHECK(worst < 1e-6);
}

TEST_CASE("recipe: a shared prefix is attended separately and merged", "[recipe]") {
  Random random(6);
  Call<float> call(shape, Values::normal, random), prefix = call.unrun(), rest = call.unrun();
  call.run(softmax_attention{});
  const auto part = [&](Call<float>& into, Index first, Index count) {
    softmax_attention{}(std::as_const(into.q).view(), std::as_const(into.k).view().slice_rows(first, count),
                        std::as_const(into.v).view().slice_rows(first, count), into.out.view(),
                        into.lse.view());
  };
  part(prefix, 0, 10);
  part(rest, 10, 14);
  merge({partial(prefix.out.view(), prefix.lse.view()), partial(rest.out.view(), rest.lse.view())},
        partial(rest.out.view(), rest.lse.view()));
  double worst = 0;
  for (std::size_t n = 0; n < call.out.values.size(); ++n)
    worst = std::max(worst, std::abs(double(call.out.values[n]) - double(rest.out.values[n])));
  CHECK(worst < 1e-6);
}

}  // namespace
