// expect: the elements of a tensor must be float, double, Eigen::bfloat16 or Eigen::half
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;
void attend(const Tensor& q, const Eigen::Tensor<int, 4, Eigen::RowMajor>& v, Tensor& out) {
  longspan::softmax_attention{}(q, q, v, out);
}
