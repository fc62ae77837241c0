// expect: the elements of lse must be double if those of q are, otherwise float
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;
void attend(const Tensor& q, Tensor& out, Eigen::Tensor<double, 3, Eigen::RowMajor>& lse) {
  longspan::softmax_attention{}(q, q, q, out, lse);
}
