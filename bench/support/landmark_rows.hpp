// The oracle in double of the benches for landmark attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "longspan/landmark_attention.hpp"
#include "longspan/reference/landmark_attention.hpp"
#include "support/exact_rows.hpp"
#include "support/owned_tensor.hpp"

namespace bench {

/// Sampled rows of causal landmark attention. The error bound of a row needs its weights, which are read off by
/// passing |v|, and the magnitudes in the scores, to the reference instead of v.
inline std::vector<ExactRow> exact_landmark_rows(const Inputs<float>& in, longspan::landmarks at,
                                                 std::span<const RowId> rows, Index threads) {
  const auto q = in.q.view();
  const auto k = in.k.view();
  const auto v = in.v.view();
  const double scale = 1 / std::sqrt(static_cast<double>(q.cols));
  std::vector<ExactRow> exact(rows.size());
  longspan::openmp{threads}.for_each(static_cast<Index>(rows.size()), [&](Index n, Index) {
    const RowId id = rows[static_cast<std::size_t>(n)];
    const Index kv_head = id.h / (q.heads / k.heads), kv_len = k.rows, cols = v.cols;
    const float* query = q.row(id.b, id.h, id.i);
    longspan::landmark_attention attend{at};
    attend.first_query = kv_len - q.rows + id.i;
    const longspan::reference::exact reference{attend};
    const auto row_with = [&](const auto* values, Index value_cols) {
      std::vector<double> out(static_cast<std::size_t>(value_cols));
      reference(longspan::compact_view(query, 1, 1, 1, q.cols),
                longspan::TensorView<const float>{k.row(id.b, kv_head, 0), 1, 1, kv_len, k.cols, 0, 0,
                                                  k.row_stride},
                longspan::compact_view(values, 1, 1, kv_len, value_cols),
                longspan::compact_view(out.data(), 1, 1, 1, value_cols));
      return out;
    };

    std::vector<float> values(static_cast<std::size_t>(kv_len * cols)), magnitudes(values.size());
    std::vector<double> products(static_cast<std::size_t>(kv_len)), blamed(products.size());
    for (Index j = 0; j < kv_len; ++j) {
      for (Index c = 0; c < cols; ++c) {
        const float x = v.row(id.b, kv_head, j)[c];
        values[static_cast<std::size_t>(j * cols + c)] = x;
        magnitudes[static_cast<std::size_t>(j * cols + c)] = std::abs(x);
      }
      double& product = products[static_cast<std::size_t>(j)];
      for (Index c = 0; c < q.cols; ++c)
        product += scale * std::abs(double(query[c]) * double(k.row(id.b, kv_head, j)[c]));
    }
    for (Index j = 0; j < kv_len; ++j) {
      const Index block = at.block_of(0, j, kv_len);
      blamed[static_cast<std::size_t>(j)] = products[static_cast<std::size_t>(j)];
      if (block < at.count(0, kv_len))
        blamed[static_cast<std::size_t>(j)] += products[static_cast<std::size_t>(at.key(0, block))];
    }
    ExactRow& row = exact[static_cast<std::size_t>(n)];
    row.id = id;
    row.out = row_with(std::as_const(values).data(), cols);
    row.weighted = row_with(std::as_const(magnitudes).data(), cols);
    row.condition = row_with(std::as_const(blamed).data(), 1)[0];
  });
  return exact;
}

}  // namespace bench
