// A sequence of any length that is not stored: q, k and v of a token are hashes of its position, so any
// output row can be computed again in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "longspan/dilation.hpp"
#include "longspan/view.hpp"
#include "support/dilated_rows.hpp"
#include "support/hashed_values.hpp"

namespace bench {

enum class Stream : std::uint64_t { q = 1, k = 2, v = 3 };

/// The row of `cols` numbers of the token at position n: uniform, mean 0, variance 1, four numbers from each hash.
inline void hash_row(Stream stream, Index n, Index cols, float* row) {
  const std::uint64_t of_token = hashed(static_cast<std::uint64_t>(stream), static_cast<std::uint64_t>(n));
  for (Index c = 0; c < cols; c += 4) {
    const std::uint64_t bits = hashed(of_token + static_cast<std::uint64_t>(c));
    for (Index i = c; i < std::min(cols, c + 4); ++i) {
      const auto part = static_cast<float>(bits >> 16 * (i - c) & 0xFFFF);
      row[i] = (part - 32767.5f) * (1.0f / 18918.6f);  // 18918.6 = 65536 / sqrt(12)
    }
  }
}

inline void hash_rows(Stream stream, Index first, const longspan::TensorView<float>& rows, Index threads) {
  constexpr Index chunk = 4096;
  longspan::openmp{threads}.for_each((rows.rows + chunk - 1) / chunk, [&](Index task, Index) {
    for (Index i = task * chunk; i < std::min(rows.rows, (task + 1) * chunk); ++i)
      hash_row(stream, first + i, rows.cols, rows.row(0, 0, i));
  });
}

/// The exact output of causal dilated attention of one head for the token at position n.
inline ExactRow hashed_exact_row(std::span<const longspan::Branch> branches, Index head_dim, Index n) {
  const std::vector<Index> met = met_keys(branches, 1, 0, n);
  const auto count = static_cast<Index>(met.size());
  const auto row_of = [&](std::vector<float>& rows, Index i) { return rows.data() + i * head_dim; };
  std::vector<float> q(static_cast<std::size_t>(head_dim)), k(q.size() * met.size()), v(k.size());
  hash_row(Stream::q, n, head_dim, q.data());
  for (Index i = 0; i < count; ++i) {
    hash_row(Stream::k, met[static_cast<std::size_t>(i)], head_dim, row_of(k, i));
    hash_row(Stream::v, met[static_cast<std::size_t>(i)], head_dim, row_of(v, i));
  }
  return exact_row<float>(longspan::compact_view<const float>(q.data(), 1, 1, 1, head_dim),
                          longspan::compact_view<const float>(k.data(), 1, 1, count, head_dim),
                          longspan::compact_view<const float>(v.data(), 1, 1, count, head_dim), Visible::all,
                          {});
}

/// The rows to check: the first, the last, and hashed ones, of which every second is a multiple of a high power
/// of two, which more branches keep.
inline std::vector<Index> checked_rows(Index length, Index count) {
  std::vector<Index> rows{0, length - 1};
  for (std::uint64_t n = 2; static_cast<Index>(rows.size()) < count; ++n) {
    const std::uint64_t bits = hashed(7, n);
    const Index row = static_cast<Index>(bits >> 1) % length;
    const auto drop = static_cast<int>(hashed(8, n) % 30);
    rows.push_back(n % 2 == 0 ? row : row >> drop << drop);
  }
  std::sort(rows.begin(), rows.end());
  return rows;
}

}  // namespace bench
