// The inner loops of attention for a few queries: head dimensions in the lanes.
//
// With one to eight queries to a KV head the time of a call is that of reading K and V once. These loops read
// whole rows, in the order and the type in which they lie in memory.
#pragma once

#include <algorithm>

#include "longspan/detail/simd.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN
namespace detail {

/// Rows are asked for this far ahead. Measured with 2 threads over DRAM: 8 KB brings float rows from 26 to
/// 29-33 GB/s, four heads sharing rows from 17 to 24; 16 KB is equal or worse, 32 KB costs 10-15 %.
inline constexpr Index prefetch_bytes = 8192;

/// s[j * queries + g] = k[j].q[g] for `keys` keys and a power of two of queries, at most `lanes`.
///
/// q [queries][q_stride], zero behind head_dim up to whole packets. Whole packets of s are written: sums
/// behind the last key are those of the last key again.
template <int queries, class Real, class Tk>
void score_keys(const Tk* k, Index k_stride, Index keys, const Real* q, Index q_stride, Index head_dim,
                Real* s) {
  constexpr int w = lanes<Real>, keys_at_once = w / queries;
  const Index whole = head_dim / w * w;
  for (Index first = 0; first < keys; first += keys_at_once, s += w) {
    const Tk* row[std::size_t(keys_at_once)];
    LONGSPAN_UNROLL
    for (int j = 0; j < keys_at_once; ++j) row[j] = k + std::min(first + j, keys - 1) * k_stride;
    Packet<Real> sum[std::size_t(w)];
    LONGSPAN_UNROLL
    for (int i = 0; i < w; ++i) sum[i] = broadcast(Real(0));
    const auto add = [&](const auto& load_key, Index column) {
      Packet<Real> of_query[std::size_t(queries)];
      LONGSPAN_UNROLL
      for (int g = 0; g < queries; ++g) of_query[g] = load(q + g * q_stride + column);
      LONGSPAN_UNROLL
      for (int j = 0; j < keys_at_once; ++j) {
        const Packet<Real> of_key = load_key(row[j] + column);
        LONGSPAN_UNROLL
        for (int g = 0; g < queries; ++g)
          sum[j * queries + g] = fma(of_key, of_query[g], sum[j * queries + g]);
      }
    };
    LONGSPAN_UNROLL
    for (int j = 0; j < keys_at_once; ++j) {
      prefetch(reinterpret_cast<const char*>(row[j]) + prefetch_bytes,
               head_dim * static_cast<Index>(sizeof(Tk)));
    }
    LONGSPAN_NO_UNROLL
    for (Index column = 0; column < whole; column += w) {
      add([](const Tk* from) { return load_as<Real>(from); }, column);
    }
    if (whole < head_dim) add([&](const Tk* from) { return load_part<Real>(from, head_dim - whole); }, whole);
    store(s, sums_of_rows(sum));
  }
}

/// o[g][c] = scale[g] * o[g][c] + sum_j p[j * p_stride + g] * v[j][c], for `queries` rows of o and `packets`
/// packets of columns; of the last packet, `last_columns` columns exist. The first to read a row asks for
/// those ahead.
template <int queries, int packets, class Real, class Tv>
void add_values(const Tv* v, Index v_stride, Index last_columns, Index keys, const Real* p, Index p_stride,
                Real* o, Index o_stride, const Real* scale, bool reads_first) {
  constexpr int w = lanes<Real>;
  Packet<Real> sum[std::size_t(queries)][std::size_t(packets)];
  LONGSPAN_UNROLL
  for (int g = 0; g < queries; ++g) {
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) sum[g][c] = broadcast(Real(0));
  }
  const auto add = [&](const Tv* row, const Real* weights, const auto& load_last) {
    Packet<Real> of_value[std::size_t(packets)];
    LONGSPAN_UNROLL
    for (int c = 0; c + 1 < packets; ++c) of_value[c] = load_as<Real>(row + c * w);
    of_value[packets - 1] = load_last(row + (packets - 1) * w);
    LONGSPAN_UNROLL
    for (int g = 0; g < queries; ++g) {
      const Packet<Real> weight_of_query = broadcast(weights + g);
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) sum[g][c] = fma(weight_of_query, of_value[c], sum[g][c]);
    }
  };
  if (last_columns == w) {
    LONGSPAN_UNROLL_BY_2
    for (Index j = 0; j < keys; ++j) {
      const Tv* row = v + j * v_stride;
      if (reads_first) {
        prefetch(reinterpret_cast<const char*>(row) + prefetch_bytes,
                 packets * w * static_cast<Index>(sizeof(Tv)));
      }
      add(row, p + j * p_stride, [](const Tv* from) { return load_as<Real>(from); });
    }
  } else {
    for (Index j = 0; j < keys; ++j) {
      add(v + j * v_stride, p + j * p_stride,
          [&](const Tv* from) { return load_part<Real>(from, last_columns); });
    }
  }
  LONGSPAN_UNROLL
  for (int g = 0; g < queries; ++g) {
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) {
      Real* to = o + g * o_stride + c * w;
      store(to, fma(broadcast(scale[g]), load(static_cast<const Real*>(to)), sum[g][c]));
    }
  }
}

}  // namespace detail
LONGSPAN_END
