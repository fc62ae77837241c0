// Compiles: everything that the other files of this folder include and call exists, so each of them fails only because
// of its one mistake.
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;
using Rows = Eigen::Tensor<float, 3, Eigen::RowMajor>;
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

longspan::softmax_attention every_part{longspan::causal{} & longspan::window{.left = 4095},
                                       longspan::softcap{50} | longspan::softcap{30},
                                       longspan::rotary(longspan::Pairing::half_split)};

struct Pool {
  longspan::Index workers() const { return 1; }
  template <class Task>
  void for_each(longspan::Index tasks, Task&& task) const {
    for (longspan::Index t = 0; t < tasks; ++t) task(t, longspan::Index{0});
  }
};

void attend_all(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out, Rows& lse) {
  longspan::softmax_attention attend{longspan::causal{}};
  attend(q, k, v, out);
  attend(q, k, v, out, lse);
  attend(q, k, v, out, Pool{});
  attend(q, k, v, out, lse, Pool{});
}

void attend_one_head(const Matrix& q, const Matrix& k, const Matrix& v, Matrix& out, Eigen::VectorXf& lse) {
  longspan::softmax_attention attend{longspan::causal{}};
  attend(q, k, v, out, lse);
}

longspan::TensorView<const float> read_only(longspan::TensorView<float> x) { return x; }

void merge_all(longspan::Partial<const float> a, longspan::Partial<const float> b,
               const longspan::Partial<float>& into) {
  longspan::merge({a, b}, into);
}

longspan::Execution<> moved(longspan::Execution<>&& execution) { return std::move(execution); }
