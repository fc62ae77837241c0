// expect: TensorLike
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

void attend(const std::vector<float>& q, std::vector<float>& out) {
  longspan::softmax_attention{}(q, q, q, out);
}
