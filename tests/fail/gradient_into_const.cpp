// expect: dq, dk and dv must not be const: the call writes them
#include <longspan/gradient/softmax_attention.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;
using Rows = Eigen::Tensor<float, 3, Eigen::RowMajor>;
void backward(const Tensor& q, const Rows& lse, const Tensor& dq, Tensor& dk) {
  longspan::gradient(longspan::softmax_attention{})(q, q, q, q, lse, q, dq, dk, dk);
}
