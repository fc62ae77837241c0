// LongNet's dilated attention: a long prompt in one call, then the same token by token, which keeps a few thousand
// rows.
//
// After copying, change: the sizes; `branches`, pairs of segment length and dilation, to those your model was
// trained with (weights from torchscale also need attend.phase = longspan::Phase::blocked); and `projected`,
// which stands for your model's projections.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;  // [batch, heads, rows, cols]
using Eigen::Index;

static Tensor projected(Index heads, Index length, Index head_dim, double frequency) {
  Tensor x(1, heads, length, head_dim);
  for (Index n = 0; n < x.size(); ++n)
    x.data()[n] = static_cast<float>(std::sin(frequency * static_cast<double>(n % 65521)));
  return x;
}

int main() {
  const Index heads = 8, kv_heads = 2, length = 16384, head_dim = 64, generated = 64;
  // Dense in segments of 1024, every second token in segments of 2048, every fourth of 4096, ... up to the whole
  // length.
  const auto branches = longspan::geometric_branches_to({1024, 1}, 2, length + generated);
  const longspan::dilated_attention attend{branches, longspan::causal{}};

  const Tensor q = projected(heads, length + generated, head_dim, 0.1);
  const Tensor k = projected(kv_heads, length + generated, head_dim, 0.2);
  const Tensor v = projected(kv_heads, length + generated, head_dim, 0.3);
  Tensor out(1, heads, length + generated, head_dim), streamed = out;
  longspan::Execution execution;  // threads and scratch memory: reused, later calls allocate nothing

  attend(q, k, v, out, execution);

  // The same as in an inference engine: the prompt, then one token after the other.
  auto stream =
      attend.stream({.heads = heads, .kv_heads = kv_heads, .head_dim = head_dim, .value_dim = head_dim});
  const auto extend = [&](Index first, Index count) {
    stream.extend(longspan::view(q).slice_rows(first, count), longspan::view(k).slice_rows(first, count),
                  longspan::view(v).slice_rows(first, count),
                  longspan::view(streamed).slice_rows(first, count), execution);
  };
  extend(0, length);
  for (Index n = 0; n < generated; ++n) extend(length + n, 1);

  float difference = 0;
  for (Index n = 0; n < out.size(); ++n)
    difference = std::max(difference, std::abs(out.data()[n] - streamed.data()[n]));
  const double flop = longspan::dilated_flop(branches, heads, length + generated, head_dim, head_dim, true);
  const double exact = 2.0 * heads * std::pow(length + generated, 2) * head_dim;
  std::printf("%zu branches, %.1f %% of the work of exact attention\n", branches.size(), 100 * flop / exact);
  std::printf("rows kept: %td, where exact attention keeps %td\n", stream.rows(),
              kv_heads * (length + generated));
  std::printf("largest difference between one call and the stream %.0e\n", static_cast<double>(difference));
}
