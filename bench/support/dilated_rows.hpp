// The oracle in double of dilated attention: sampled rows, each over its gathered keys.
#pragma once

#include <span>
#include <vector>

#include "longspan/dilation.hpp"
#include "support/exact_rows.hpp"

namespace bench {

/// The keys that a causal query sees, branch by branch.
inline std::vector<Index> met_keys(std::span<const longspan::Branch> branches, Index heads, Index h,
                                   Index i) {
  std::vector<Index> keys;
  for (const longspan::Branch& branch : branches) {
    const Index offset = longspan::head_offset(longspan::Phase::modulo, h, heads, branch.dilation);
    if (!longspan::covers(branch, offset, i)) continue;
    const Index first = i / branch.segment * branch.segment + offset;
    for (Index j = first; j <= i; j += branch.dilation) keys.push_back(j);
  }
  return keys;
}

template <class T>
std::vector<ExactRow> exact_dilated_rows(const longspan::TensorView<const T>& q,
                                         const longspan::TensorView<const T>& k,
                                         const longspan::TensorView<const T>& v,
                                         std::span<const longspan::Branch> branches,
                                         std::span<const RowId> rows, Index threads) {
  std::vector<ExactRow> exact(rows.size());
  longspan::openmp{threads}.for_each(static_cast<Index>(rows.size()), [&](Index n, Index) {
    const RowId id = rows[static_cast<std::size_t>(n)];
    const Index kv_head = id.h / (q.heads / k.heads);
    const std::vector<Index> met = met_keys(branches, q.heads, id.h, id.i);
    std::vector<T> keys, values;
    for (const Index j : met) {
      const T *key = k.row(id.b, kv_head, j), *value = v.row(id.b, kv_head, j);
      keys.insert(keys.end(), key, key + k.cols);
      values.insert(values.end(), value, value + v.cols);
    }
    const auto count = static_cast<Index>(met.size());
    ExactRow& row = exact[static_cast<std::size_t>(n)];
    row = exact_row<T>(longspan::compact_view(q.row(id.b, id.h, id.i), 1, 1, 1, q.cols),
                       longspan::compact_view<const T>(keys.data(), 1, 1, count, k.cols),
                       longspan::compact_view<const T>(values.data(), 1, 1, count, v.cols), Visible::all, {});
    row.id = id;
  });
  return exact;
}

}  // namespace bench
