// Exact causal attention: Eigen tensors in, an Eigen tensor out, four query heads per KV head.
//
// After copying, change: the lengths; `projected`, which stands for your model's projections; and the parts
// in the braces of `attend`, say {longspan::causal{}, longspan::softcap{50}}. Tensors must be row-major.

#include <cmath>
#include <cstdio>
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;  // [batch, heads, rows, cols]

static Tensor projected(Eigen::Index heads, Eigen::Index length, Eigen::Index head_dim, double frequency) {
  Tensor x(1, heads, length, head_dim);
  for (Eigen::Index n = 0; n < x.size(); ++n) {
    x.data()[n] = static_cast<float>(std::sin(frequency * static_cast<double>(n % 65521)));
  }
  return x;
}

int main() {
  longspan::request_amx();  // bfloat16 on Intel processors with matrix tiles; elsewhere it does nothing
  const Eigen::Index heads = 8, kv_heads = 2, length = 1024, head_dim = 64;
  const longspan::softmax_attention attend{longspan::causal{}};
  longspan::Execution execution;  // threads and scratch memory: reused, later calls allocate nothing

  double checksum = 0;
  for (int layer = 1; layer <= 4; ++layer) {
    const Tensor q = projected(heads, length, head_dim, 0.1 * layer);
    const Tensor k = projected(kv_heads, length, head_dim, 0.2 * layer);
    const Tensor v = projected(kv_heads, length, head_dim, 0.3 * layer);
    Tensor out(1, heads, length, head_dim);
    attend(q, k, v, out, execution);
    for (Eigen::Index n = 0; n < out.size(); ++n) checksum += std::abs(out.data()[n]);
  }
  std::printf("checksum %.1f\n", checksum);
}
