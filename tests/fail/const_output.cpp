// expect: out must not be const: the call writes it
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;
void attend(const Tensor& q, const Tensor& out) { longspan::softmax_attention{}(q, q, q, out); }
