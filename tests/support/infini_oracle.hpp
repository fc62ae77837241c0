// Infini-attention by its definition: the oracle for the functor and its stream.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "longspan/infini_attention.hpp"
#include "longspan/reference/infini_attention.hpp"
#include "longspan/reference/softmax_attention.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace test {

/// beta of head h, one number for each column.
inline std::vector<double> beta_of(longspan::MatrixView<const float> beta, Index h, Index columns) {
  std::vector<double> of_head;
  for (Index c = 0; c < columns; ++c) {
    const bool given = beta.data != nullptr;
    of_head.push_back(given ? beta.row(beta.rows == 1 ? 0 : h)[beta.cols == 1 ? 0 : c] : 0.0);
  }
  return of_head;
}

/// The exact result of `attend`, with the outputs `local` of local attention; without `local`, local attention is
/// causal softmax attention.
template <class Attend, class Call>
Tensor<double> infini_oracle(const Attend& attend, const Call& call, Tensor<double> local) {
  const Index group = call.k.heads == 0 ? 1 : call.q.heads / call.k.heads;
  Tensor<double> out(call.q.batch, call.q.heads, call.q.rows, call.v.cols, 0.0);
  for (Index b = 0; b < call.q.batch; ++b) {
    for (Index h = 0; h < call.q.heads; ++h) {
      longspan::reference::infini_head(
          call.q.view().matrix(b, h), call.k.view().matrix(b, h / group), call.v.view().matrix(b, h / group),
          longspan::MatrixView<const double>(local.view().matrix(b, h)), beta_of(attend.beta, h, call.v.cols),
          attend.segment, attend.rule, attend.empty_memory, attend.feature, out.view().matrix(b, h));
    }
  }
  return out;
}
template <class Attend, class Call>
Tensor<double> infini_oracle(const Attend& attend, const Call& call) {
  Tensor<double> local(call.q.batch, call.q.heads, call.q.rows, call.v.cols, 0.0);
  longspan::reference::exact{
      longspan::softmax_attention{longspan::causal{} & longspan::segments{attend.segment}}}(
      call.q.view(), call.k.view(), call.v.view(), local.view());
  return infini_oracle(attend, call, local);
}

/// The largest error, in units of u times the largest value, which is the size of the errors of averages.
template <class Real, class T, class V>
double worst_in_u(const Tensor<T>& out, const Tensor<double>& exact, const V& values) {
  double largest = 1e-30, worst = 0;
  for (const auto x : values.values) largest = std::max(largest, std::abs(static_cast<double>(x)));
  for (std::size_t n = 0; n < out.values.size(); ++n) {
    const double error = std::abs(static_cast<double>(out.values[n]) - exact.values[n]);
    if (!(error <= worst)) worst = error;  // NaN is the worst
  }
  return worst / (largest * static_cast<double>(std::numeric_limits<Real>::epsilon()) / 2);
}

/// Random sizes of a call with q_len = kv_len.
inline Shape draw_infini_shape(Random& random) {
  Shape shape;
  shape.batch = random.between(1, 2);
  shape.kv_heads = random.between(1, 3);
  shape.heads = shape.kv_heads * random.pick(std::vector<Index>{1, 1, 2, 3, 5});
  shape.q_len = shape.kv_len = random.pick(std::vector<Index>{0, 1, 2, 15, 16, 47, 64, 130, 200});
  shape.head_dim = random.pick(std::vector<Index>{1, 2, 7, 16, 31, 32, 33, 48, 64, 72});
  shape.value_dim = random.pick(std::vector<Index>{1, 3, 8, 16, 17, 40, 64});
  return shape;
}

}  // namespace test
