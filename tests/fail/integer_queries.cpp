// expect: Element
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;

void attend_all(const Eigen::Tensor<int, 4, Eigen::RowMajor>& q, const Tensor& k, const Tensor& v,
                Tensor& out) {
  longspan::softmax_attention attend{longspan::causal{}};
  attend(q, k, v, out);
}
