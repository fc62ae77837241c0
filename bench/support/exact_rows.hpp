// The oracle in double of the benches: sampled rows of exact attention, and the errors of results.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "longspan/execution.hpp"
#include "longspan/view.hpp"
#include "support/hashed_values.hpp"

namespace bench {

/// The keys that the query in row i sees; positions are as in softmax_attention.
enum class Visible { all, causal };

inline Index visible_keys(Visible visible, Index q_len, Index kv_len, Index i) {
  return visible == Visible::all ? kv_len : std::clamp<Index>(kv_len - q_len + i + 1, 0, kv_len);
}

/// 4 flop for each visible pair of query and key and each column (2 in each of the two products); with
/// d = (head_dim + value_dim) / 2 this is the 4 H N M d of the literature, and half of it for causal.
inline double attention_flop(Visible visible, Index batch, Index heads, Index q_len, Index kv_len,
                             Index head_dim, Index value_dim) {
  const auto n = static_cast<double>(q_len), m = static_cast<double>(kv_len);
  const double pairs = visible == Visible::all ? n * m : n * (m - n / 2);
  return 2.0 * static_cast<double>(batch * heads) * pairs * static_cast<double>(head_dim + value_dim);
}

struct RowId {
  Index b = 0, h = 0, i = 0;
};

/// One output row in double, and the quantities of its error bound.
struct ExactRow {
  RowId id;
  std::vector<double> out;
  std::vector<double> weighted;  ///< sum_j p_j |v_jc| for each column c
  double condition = 0;          ///< a = sum_j p_j scale sum_c |q_c k_jc|
  double keys_in_effect = 0;     ///< exp of the entropy of p: 1 is one-hot, kv_len is flat
};

/// The first row, the last row, and hashed rows between them, for every head.
inline std::vector<RowId> sampled_rows(Index batch, Index heads, Index q_len, Index rows_per_head) {
  std::vector<RowId> rows;
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < heads; ++h) {
      std::vector<Index> picked{0, q_len - 1};
      const auto head = static_cast<std::uint64_t>(b * heads + h);
      for (Index n = 2; n < rows_per_head; ++n) {
        const std::uint64_t bits = hashed(head, static_cast<std::uint64_t>(n)) >> 1;
        picked.push_back(static_cast<Index>(bits) % q_len);
      }
      std::sort(picked.begin(), picked.end());
      picked.erase(std::unique(picked.begin(), picked.end()), picked.end());
      for (const Index i : picked) rows.push_back({b, h, i});
    }
  }
  return rows;
}

/// A score function in double: score(s, head, query row, key).
struct AsItIs {
  double operator()(double s, Index, Index, Index) const { return s; }
};

template <class T, class Score = AsItIs>
ExactRow exact_row(const longspan::TensorView<const T>& q, const longspan::TensorView<const T>& k,
                   const longspan::TensorView<const T>& v, Visible visible, RowId id,
                   const Score& score = {}) {
  const Index kv_head = id.h / (q.heads / k.heads), keys = visible_keys(visible, q.rows, k.rows, id.i);
  const double scale = 1 / std::sqrt(static_cast<double>(q.cols));
  std::vector<double> query(static_cast<std::size_t>(q.cols));
  for (std::size_t c = 0; c < query.size(); ++c) query[c] = static_cast<double>(q.row(id.b, id.h, id.i)[c]);

  std::vector<double> weight(static_cast<std::size_t>(keys)), magnitude(weight.size());
  for (std::size_t j = 0; j < weight.size(); ++j) {
    const T* key = k.row(id.b, kv_head, static_cast<Index>(j));
    double dot = 0, absolute = 0;
    for (std::size_t c = 0; c < query.size(); ++c) {
      const double product = query[c] * static_cast<double>(key[c]);
      dot += product;
      absolute += std::abs(product);
    }
    weight[j] = score(scale * dot, id.h, id.i, static_cast<Index>(j));
    magnitude[j] = scale * absolute + (std::is_same_v<Score, AsItIs> ? 0 : std::abs(weight[j]));
  }
  const double highest = weight.empty() ? 0 : *std::max_element(weight.begin(), weight.end());
  double sum = 0;
  for (double& w : weight) sum += w = std::exp(w - highest);

  const auto cols = static_cast<std::size_t>(v.cols);
  ExactRow row{id, std::vector<double>(cols), std::vector<double>(cols), 0, 0};
  double entropy = 0;
  for (std::size_t j = 0; j < weight.size(); ++j) {
    const double p = weight[j] / sum;
    if (p == 0) continue;
    row.condition += p * magnitude[j];
    entropy -= p * std::log(p);
    const T* value = v.row(id.b, kv_head, static_cast<Index>(j));
    for (std::size_t c = 0; c < cols; ++c) {
      const double term = p * static_cast<double>(value[c]);
      row.out[c] += term;
      row.weighted[c] += std::abs(term);
    }
  }
  row.keys_in_effect = std::exp(entropy);
  return row;
}

template <class T, class Score = AsItIs>
std::vector<ExactRow> exact_rows(const longspan::TensorView<const T>& q,
                                 const longspan::TensorView<const T>& k,
                                 const longspan::TensorView<const T>& v, Visible visible,
                                 std::span<const RowId> rows, Index threads, const Score& score = {}) {
  std::vector<ExactRow> exact(rows.size());
  longspan::openmp{threads}.for_each(static_cast<Index>(rows.size()), [&](Index n, Index) {
    const auto at = static_cast<std::size_t>(n);
    exact[at] = exact_row(q, k, v, visible, rows[at], score);
  });
  return exact;
}

/// Errors that a kernel may have in addition to those of float arithmetic, both relative: of an output that is
/// rounded once more, and of weights that are rounded.
struct Rounding {
  double of_output = 0;
  double of_weights = 0;
};

/// max |out - exact| / (u (1 + a) sum p |v|), u = 2^-24, after subtracting what `rounding` allows: the error in units
/// of the rounding of a float kernel. Infinite if the output is NaN, so that no comparison accepts it.
template <class T>
double worst_ratio(const longspan::TensorView<const T>& out, std::span<const ExactRow> exact,
                   Rounding rounding = {}) {
  double worst = 0;
  for (const ExactRow& row : exact) {
    const T* got = out.row(row.id.b, row.id.h, row.id.i);
    const double unit = std::ldexp(1.0, -24) * (1 + row.condition);
    for (std::size_t c = 0; c < row.out.size(); ++c) {
      const double error = std::abs(static_cast<double>(got[c]) - row.out[c]);
      if (!std::isfinite(error)) return std::numeric_limits<double>::infinity();
      const double allowed =
          rounding.of_output * std::abs(row.out[c]) + rounding.of_weights * row.weighted[c];
      if (error > allowed) worst = std::max(worst, (error - allowed) / (unit * row.weighted[c]));
    }
  }
  return worst;
}

/// |out - exact| / |exact| over all rows, in the Euclidean norm.
inline double relative_distance(const longspan::TensorView<const float>& out,
                                std::span<const ExactRow> exact) {
  double difference = 0, total = 0;
  for (const ExactRow& row : exact) {
    const float* got = out.row(row.id.b, row.id.h, row.id.i);
    for (std::size_t c = 0; c < row.out.size(); ++c) {
      const double error = static_cast<double>(got[c]) - row.out[c];
      difference += error * error;
      total += row.out[c] * row.out[c];
    }
  }
  return total > 0        ? std::sqrt(difference / total)
         : difference > 0 ? std::numeric_limits<double>::infinity()
                          : 0;
}

/// True if some row was not written. A sample of rows could miss such rows, so every element is checked. The caller
/// fills the tensor with NaN before the call.
template <class T>
bool all_finite(std::span<const T> values) {
  return std::all_of(values.begin(), values.end(), [](T x) { return std::isfinite(static_cast<float>(x)); });
}

/// The error bound of the library, which every contender must meet.
inline constexpr double highest_ratio = 16;

}  // namespace bench
