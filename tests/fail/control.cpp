// Compiles: everything that the other files of this folder include and call exists, so each of them fails only because
// of its one mistake.
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;

void attend_all(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out) {
  longspan::softmax_attention attend{longspan::causal{}};
  attend(q, k, v, out);
}
