// Attention in ten lines of Eigen: per head S = Q K^T, row softmax, S V; heads in parallel.
#pragma once

#include <cmath>
#include <vector>

#include "longspan/eigen.hpp"
#include "support/exact_rows.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace bench {

class EigenNaive {
 public:
  /// The parallel loop is over heads. Eigen would start its own threads if this loop had only one thread.
  explicit EigenNaive(Index threads) : scores_(static_cast<std::size_t>(threads)) { Eigen::setNbThreads(1); }

  void operator()(const Inputs<float>& in, longspan::TensorView<float> out, Visible visible) {
    const Index heads = in.heads(), group = heads / in.kv_heads();
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(scores_.size()))
#endif
    for (Index task = 0; task < in.batch() * heads; ++task) {
#if defined(_OPENMP)
      const auto thread = static_cast<std::size_t>(omp_get_thread_num());
#else
      const std::size_t thread = 0;
#endif
      const Index b = task / heads, h = task % heads;
      attend_head(mapped(in.q.view(), b, h), mapped(in.k.view(), b, h / group),
                  mapped(in.v.view(), b, h / group), {out.row(b, h, 0), out.rows, out.cols}, visible,
                  scores_[thread]);
    }
  }

 private:
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using ConstMap = Eigen::Map<const Matrix>;

  static ConstMap mapped(const longspan::TensorView<const float>& x, Index b, Index h) {
    return {x.row(b, h, 0), x.rows, x.cols};
  }

  static void attend_head(const ConstMap& q, const ConstMap& k, const ConstMap& v, Eigen::Map<Matrix> out,
                          Visible visible, Matrix& scores) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(q.cols()));
    scores.noalias() = q * k.transpose();
    for (Index i = 0; i < scores.rows(); ++i) {
      const Index keys = visible_keys(visible, q.rows(), k.rows(), i);
      auto seen = scores.row(i).head(keys).array();
      seen = ((seen - seen.maxCoeff()) * scale).exp();
      seen /= seen.sum();
      scores.row(i).tail(scores.cols() - keys).setZero();
    }
    out.noalias() = scores * v;
  }

  // One square of scores for each thread, kept from call to call, so that page faults are not part of the measured
  // time.
  std::vector<Matrix> scores_;
};

}  // namespace bench
