// expect: log-sum-exps of one head must be an Eigen vector
#include <longspan/longspan.hpp>

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

void attend_one_head(const Matrix& q, const Matrix& k, const Matrix& v, Matrix& out, Matrix& lse) {
  longspan::softmax_attention attend{longspan::causal{}};
  attend(q, k, v, out, lse);
}
