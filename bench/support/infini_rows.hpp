// The oracle in double of Infini-attention with the linear rule: sampled rows, with one pass over each head's memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "longspan/infini_options.hpp"
#include "support/exact_rows.hpp"

namespace bench {

/// The memory of one KV head, for values and for their magnitudes.
struct ExactMemory {
  std::vector<double> m, size, z;

  ExactMemory(Index head_dim, Index value_dim)
      : m(static_cast<std::size_t>(head_dim * value_dim)),
        size(m.size()),
        z(static_cast<std::size_t>(head_dim)) {}

  void add(const float* key, const float* value, Index value_dim) {
    for (std::size_t c = 0; c < z.size(); ++c) {
      const double phi = longspan::elu_plus_one{}(static_cast<double>(key[c]));
      z[c] += phi;
      for (Index column = 0; column < value_dim; ++column) {
        const std::size_t at = c * static_cast<std::size_t>(value_dim) + static_cast<std::size_t>(column);
        m[at] += phi * static_cast<double>(value[column]);
        size[at] += phi * std::abs(static_cast<double>(value[column]));
      }
    }
  }

  /// Half of the memory's output plus half of the local row: the gate with beta = 0.
  void blend(const float* query, ExactRow& row) const {
    double norm = 0;
    std::vector<double> read(row.out.size()), weighted(row.out.size());
    for (std::size_t c = 0; c < z.size(); ++c) {
      const double phi = longspan::elu_plus_one{}(static_cast<double>(query[c]));
      norm += phi * z[c];
      for (std::size_t column = 0; column < read.size(); ++column) {
        read[column] += phi * m[c * read.size() + column];
        weighted[column] += phi * size[c * read.size() + column];
      }
    }
    for (std::size_t column = 0; column < read.size(); ++column) {
      row.out[column] = (row.out[column] + (norm > 0 ? read[column] / norm : 0)) / 2;
      row.weighted[column] = (row.weighted[column] + (norm > 0 ? weighted[column] / norm : 0)) / 2;
    }
  }
};

inline std::vector<ExactRow> exact_infini_rows(const Inputs<float>& in, Index segment,
                                               std::span<const RowId> rows, Index threads) {
  std::vector<ExactRow> exact(rows.size());
  const auto q = in.q.view(), k = in.k.view(), v = in.v.view();
  longspan::openmp{threads}.for_each(k.batch * k.heads, [&](Index head, Index) {
    const Index b = head / k.heads, kv_head = head % k.heads, group = q.heads / k.heads;
    std::vector<std::size_t> mine;
    for (std::size_t n = 0; n < rows.size(); ++n) {
      if (rows[n].b == b && rows[n].h / group == kv_head) mine.push_back(n);
    }
    ExactMemory memory(k.cols, v.cols);
    for (Index begin = 0; begin < q.rows; begin += segment) {
      const Index count = std::min(segment, q.rows - begin);
      for (const std::size_t n : mine) {
        const RowId id = rows[n];
        if (id.i < begin || id.i >= begin + count) continue;
        exact[n] = exact_row<float>(q.slice_rows(begin, count), k.slice_rows(begin, count),
                                    v.slice_rows(begin, count), Visible::causal, {id.b, id.h, id.i - begin});
        exact[n].id = id;
        memory.blend(q.row(id.b, id.h, id.i), exact[n]);
      }
      if (begin + count == q.rows) break;
      for (Index j = begin; j < begin + count; ++j)
        memory.add(k.row(b, kv_head, j), v.row(b, kv_head, j), v.cols);
    }
  });
  return exact;
}

/// The flop of local attention, of reads, and of writes of all segments except the last.
inline double infini_flop(Index batch, Index heads, Index kv_heads, Index length, Index segment,
                          Index head_dim, Index value_dim) {
  double flop = 0;
  for (Index begin = 0; begin < length; begin += segment) {
    const Index count = std::min(segment, length - begin);
    const double product = 2.0 * static_cast<double>(count * head_dim * value_dim);
    flop += attention_flop(Visible::causal, batch, heads, count, count, head_dim, value_dim) +
            static_cast<double>(batch * heads) * product;
    if (begin + count < length) flop += static_cast<double>(batch * kv_heads) * product;
  }
  return flop;
}

}  // namespace bench
