// expect: log-sum-exps must have rank 1 .rows., 2 .heads, rows. or 3
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;
void attend(const Tensor& q, Tensor& out, Tensor& lse) { longspan::softmax_attention{}(q, q, q, out, lse); }
