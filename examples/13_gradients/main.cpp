// Fit a causal attention layer by gradient descent: q = X Wq, k = X Wk, v = X Wv, two heads, rotary positions.
// The layer learns to repeat: the target of a token is the embedding of the token before it.
// Copy this file, and replace `Data` by your tokens and the loss by yours.
#include <array>
#include <cmath>
#include <cstdio>
#include <longspan/gradient/softmax_attention.hpp>
#include <random>
#include <type_traits>

using longspan::Index;

namespace {

constexpr Index tokens = 96, heads = 2, head_dim = 16, width = heads * head_dim;
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

Matrix random_matrix(Index rows, Index cols, float size, std::mt19937& random) {
  std::normal_distribution<float> normal(0, size);
  return Matrix::NullaryExpr(rows, cols, [&] { return normal(random); });
}

/// A [tokens, heads * head_dim] matrix as a tensor [1, heads, tokens, head_dim], without a copy.
template <class M>
auto by_heads(M& x) {
  return longspan::TensorView<std::remove_reference_t<decltype(*x.data())>>{
      x.data(), 1, heads, tokens, head_dim, tokens * width, head_dim, width};
}

/// A weight with its gradient, and the steps of Adam (Kingma and Ba 2015, algorithm 1).
struct Weight {
  Matrix value, gradient = Matrix::Zero(width, width), mean = gradient, square = gradient;

  void step(int n, float rate) {
    mean = 0.9f * mean + 0.1f * gradient;
    square = 0.99f * square + 0.01f * gradient.cwiseAbs2();
    const float of_mean = 1 - std::pow(0.9f, static_cast<float>(n)),
                of_square = 1 - std::pow(0.99f, static_cast<float>(n));
    value.array() -= rate * (mean.array() / of_mean) / ((square.array() / of_square).sqrt() + 1e-8f);
  }
};

struct Layer {
  Weight q, k, v;
  longspan::softmax_attention<longspan::causal, longspan::unchanged, longspan::rotary> attend{
      longspan::causal{}, longspan::rotary(longspan::Pairing::half_split)};
  longspan::Execution<> execution;  // its scratch memory serves all calls

  /// The mean squared difference from the target; writes the gradients of the three weights.
  float learn(const Matrix& x, const Matrix& target) {
    const Matrix queries = x * q.value, keys = x * k.value, values = x * v.value;
    Matrix out(tokens, width), dq(tokens, width), dk(tokens, width), dv(tokens, width);
    std::array<float, heads * tokens> log_sums;
    const auto lse = longspan::compact_rows_view(log_sums.data(), 1, heads, tokens);
    attend(by_heads(queries), by_heads(keys), by_heads(values), by_heads(out), lse, execution);

    const Matrix difference = out - target;
    const Matrix dout = 2.0f / static_cast<float>(difference.size()) * difference;
    gradient(attend)(by_heads(queries), by_heads(keys), by_heads(values), by_heads(out), lse, by_heads(dout),
                     by_heads(dq), by_heads(dk), by_heads(dv), execution);
    q.gradient.noalias() = x.transpose() * dq;
    k.gradient.noalias() = x.transpose() * dk;
    v.gradient.noalias() = x.transpose() * dv;
    return difference.squaredNorm() / static_cast<float>(difference.size());
  }
};

/// Random embeddings, with a column of ones for scores that depend on positions alone. The target of each token is the
/// embedding of the token before it.
struct Data {
  Matrix x, target;
  explicit Data(std::mt19937& random) : x(random_matrix(tokens, width, 1, random)) {
    x.col(0).setOnes();
    target = x;
    target.bottomRows(tokens - 1) = x.topRows(tokens - 1);
  }
};

}  // namespace

int main() {
  std::mt19937 random(1);
  Layer layer;
  for (Weight* weight : {&layer.q, &layer.k, &layer.v})
    weight->value = random_matrix(width, width, 0.2f, random);
  float first = 0, loss = 0;
  constexpr int steps = 600;
  for (int n = 1; n <= steps; ++n) {
    const Data data(random);  // new tokens in every step: what is learned is the rule
    loss = layer.learn(data.x, data.target);
    if (n == 1) first = loss;
    if (n == 1 || n % 100 == 0) std::printf("step %3d  loss %.4f\n", n, static_cast<double>(loss));
    for (Weight* weight : {&layer.q, &layer.k, &layer.v}) weight->step(n, 0.02f);
  }
  std::printf("the loss fell by a factor of %.0f\n", static_cast<double>(first / loss));
  return loss < 0.5f * first ? 0 : 1;
}
