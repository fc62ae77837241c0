// The oracle in double for streams that retrieve blocks by their landmarks, token by token.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "longspan/reference/landmark_cache.hpp"
#include "support/exact_rows.hpp"
#include "support/infini_rows.hpp"
#include "support/owned_tensor.hpp"

namespace bench {

/// Every block_size-th token is a landmark. The last window_blocks full blocks are exact; of the blocks before, the
/// oldest are evicted, `evicted_at_once` together, when they exceed the capacity by this number.
struct RetrievalStream {
  Index block_size = 64;
  Index top_k = 4;
  Index window_blocks = 0;
  Index capacity = std::numeric_limits<Index>::max() / 2;
  Index evicted_at_once = 1;

  /// The number of blocks before the window of token i, including evicted ones.
  Index outside(Index i) const { return std::max<Index>(0, i / block_size - window_blocks); }
  Index evicted(Index i) const {
    return outside(i) < capacity + evicted_at_once
               ? 0
               : (outside(i) - capacity) / evicted_at_once * evicted_at_once;
  }
};

class RetrievalOracle {
 public:
  RetrievalOracle(const Inputs<float>& in, const RetrievalStream& stream) : in_(in), stream_(stream) {}

  /// The exact row without the memory of evicted blocks.
  ExactRow row(RowId id) const {
    ExactRow row{id, {}, {}, 0, 0};
    std::vector<Index> tokens;
    bool decided = true;
    for (const Index n : retrieved(id, decided)) {
      for (Index j = n * stream_.block_size; j < (n + 1) * stream_.block_size; ++j) tokens.push_back(j);
    }
    const auto blocks = static_cast<Index>(tokens.size()) / stream_.block_size;
    for (Index j = stream_.outside(id.i) * stream_.block_size; j <= id.i; ++j) tokens.push_back(j);
    const auto v = in_.v.view();
    const Index kv_head = this->kv_head(id);
    row.out = attended(id, tokens, blocks, v.cols,
                       [&](Index j, Index c) { return double(v.row(id.b, kv_head, j)[c]); });
    row.weighted = attended(id, tokens, blocks, v.cols,
                            [&](Index j, Index c) { return std::abs(double(v.row(id.b, kv_head, j)[c])); });
    row.condition = attended(id, tokens, blocks, 1, [&](Index j, Index) {
                      return magnitude(id, j) + of_landmark(id, j);
                    }).front();
    // If rounding decides which block is retrieved, the row cannot be checked.
    if (!decided)
      std::fill(row.weighted.begin(), row.weighted.end(), std::numeric_limits<double>::infinity());
    return row;
  }

 private:
  Index kv_head(RowId id) const { return id.h / (in_.heads() / in_.kv_heads()); }
  double scale() const { return 1 / std::sqrt(static_cast<double>(in_.head_dim())); }
  double product(RowId id, Index j, bool of_magnitudes) const {
    const float *q = in_.q.view().row(id.b, id.h, id.i), *k = in_.k.view().row(id.b, kv_head(id), j);
    double sum = 0;
    for (Index c = 0; c < in_.head_dim(); ++c) {
      const double term = double(q[c]) * double(k[c]);
      sum += of_magnitudes ? std::abs(term) : term;
    }
    return scale() * sum;
  }
  double magnitude(RowId id, Index j) const { return product(id, j, true); }
  double of_landmark(RowId id, Index j) const {
    const Index landmark = (j / stream_.block_size + 1) * stream_.block_size - 1;
    return landmark <= id.i ? magnitude(id, landmark) : 0;
  }

  /// The top_k blocks with the highest landmark scores, in rising order.
  std::vector<Index> retrieved(RowId id, bool& decided) const {
    const Index first = stream_.evicted(id.i), end = stream_.outside(id.i);
    std::vector<double> scores;
    for (Index n = first; n < end; ++n)
      scores.push_back(product(id, (n + 1) * stream_.block_size - 1, false));
    std::vector<Index> order(scores.size());
    std::iota(order.begin(), order.end(), Index{0});
    const auto score = [&](Index n) { return scores[static_cast<std::size_t>(n)]; };
    std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return score(a) > score(b); });
    const auto taken = std::min(order.size(), static_cast<std::size_t>(stream_.top_k));
    if (taken > 0 && taken < order.size()) decided = score(order[taken - 1]) - score(order[taken]) > 1e-4;
    order.resize(taken);
    std::sort(order.begin(), order.end());
    for (Index& n : order) n += first;
    return order;
  }

  /// The reference over only these tokens, of which the first `blocks` blocks are retrieved and the last
  /// token is the query.
  template <class Value>
  std::vector<double> attended(RowId id, const std::vector<Index>& tokens, Index blocks, Index cols,
                               const Value& value) const {
    const auto count = static_cast<Index>(tokens.size());
    std::vector<double> keys, values, out(static_cast<std::size_t>(cols)), lse(1);
    for (const Index j : tokens) {
      const float* key = in_.k.view().row(id.b, kv_head(id), j);
      keys.insert(keys.end(), key, key + in_.head_dim());
      for (Index c = 0; c < cols; ++c) values.push_back(value(j, c));
    }
    longspan::reference::landmark_cache<> stream({1, 1, 1, in_.head_dim(), cols},
                                                 {.block_size = stream_.block_size,
                                                  .top_k = std::max<Index>(1, blocks),
                                                  .window_blocks = stream_.window_blocks,
                                                  .exact_window = stream_.window_blocks > 0});
    const std::vector<double> query(in_.q.view().row(id.b, id.h, id.i),
                                    in_.q.view().row(id.b, id.h, id.i) + in_.head_dim());
    const auto k = longspan::compact_view(std::as_const(keys).data(), 1, 1, count, in_.head_dim());
    const auto v = longspan::compact_view(std::as_const(values).data(), 1, 1, count, cols);
    const auto q = longspan::compact_view(query.data(), 1, 1, 1, in_.head_dim());
    const auto to = longspan::compact_view(out.data(), 1, 1, 1, cols);
    const auto lses = longspan::compact_rows_view(lse.data(), 1, 1, 1);
    auto none = lses;
    none.rows = 0;
    stream.extend(q.slice_rows(0, 0), k.slice_rows(0, count - 1), v.slice_rows(0, count - 1),
                  to.slice_rows(0, 0), none);
    stream.extend(q, k.slice_rows(count - 1, 1), v.slice_rows(count - 1, 1), to, lses);
    return out;
  }

  const Inputs<float>& in_;
  RetrievalStream stream_;
};

inline std::vector<ExactRow> exact_retrieval_rows(const Inputs<float>& in, const RetrievalStream& stream,
                                                  std::span<const RowId> rows, Index threads) {
  const RetrievalOracle oracle(in, stream);
  std::vector<ExactRow> exact(rows.size());
  longspan::openmp{threads}.for_each(static_cast<Index>(rows.size()), [&](Index n, Index) {
    exact[static_cast<std::size_t>(n)] = oracle.row(rows[static_cast<std::size_t>(n)]);
  });
  return exact;
}

/// The same with a memory of all evicted blocks without their landmarks, and with gate 1/2 from the first
/// eviction on.
inline std::vector<ExactRow> exact_hybrid_rows(const Inputs<float>& in, const RetrievalStream& stream,
                                               std::span<const RowId> rows, Index threads) {
  std::vector<ExactRow> exact = exact_retrieval_rows(in, stream, rows, threads);
  const auto q = in.q.view(), k = in.k.view(), v = in.v.view();
  longspan::openmp{threads}.for_each(k.batch * k.heads, [&](Index head, Index) {
    const Index b = head / k.heads, kv_head = head % k.heads;
    std::vector<ExactRow*> mine;
    for (ExactRow& row : exact) {
      if (row.id.b == b && row.id.h / (q.heads / k.heads) == kv_head) mine.push_back(&row);
    }
    std::stable_sort(mine.begin(), mine.end(), [](auto* x, auto* y) { return x->id.i < y->id.i; });
    ExactMemory memory(k.cols, v.cols);
    Index added = 0;
    for (ExactRow* row : mine) {
      const Index evicted = stream.evicted(row->id.i) * stream.block_size;
      for (; added < evicted; ++added) {
        if (added % stream.block_size < stream.block_size - 1)
          memory.add(k.row(b, kv_head, added), v.row(b, kv_head, added), v.cols);
      }
      if (evicted > 0) memory.blend(q.row(b, row->id.h, row->id.i), *row);
    }
  });
  return exact;
}

}  // namespace bench
