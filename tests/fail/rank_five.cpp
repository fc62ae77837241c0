// expect: a tensor must have rank 2 .rows, cols., 3 .heads, rows, cols. or 4
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 5, Eigen::RowMajor>;
void attend(const Tensor& q, Tensor& out) { longspan::softmax_attention{}(q, q, q, out); }
