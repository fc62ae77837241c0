// expect: this matrix is column-major, which is Eigen's default
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

void attend(const Eigen::MatrixXf& q, Eigen::MatrixXf& out) { longspan::softmax_attention{}(q, q, q, out); }
