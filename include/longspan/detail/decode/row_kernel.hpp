// The inner loops of attention for a few queries: the lanes of a packet hold consecutive columns of a row.
//
// With one to eight queries per KV head a call takes as long as reading K and V once. These loops read whole rows, in
// the order and in the type in which memory holds them.
#pragma once

#include <algorithm>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/decode/prefetch.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// sum[j * queries + g] += k[j] * q[g] over two packets of columns. The smaller operand (keys or queries) stays in
/// registers while the other one is streamed; both fit in 32 registers.
template <int queries, int keys, class Real, class Tk>
LONGSPAN_INLINE void add_pairs(const Tk* const (&k)[std::size_t(keys)], Index column, const Real* q,
                               Index q_stride, Packet<Real> (&sum)[std::size_t(queries * keys)]) {
  constexpr int w = lanes<Real>;
  if constexpr (keys <= queries) {
    Packet<Real> of_key[2][std::size_t(keys)];
    LONGSPAN_UNROLL
    for (int j = 0; j < keys; ++j) load_pairs(k[j] + column, of_key[0][j], of_key[1][j]);
    LONGSPAN_UNROLL
    for (int half = 0; half < 2; ++half) {
      LONGSPAN_UNROLL
      for (int g = 0; g < queries; ++g) {
        const Packet<Real> of_query = in_register(load(q + g * q_stride + half * w));
        LONGSPAN_UNROLL
        for (int j = 0; j < keys; ++j)
          sum[j * queries + g] = fma(of_key[half][j], of_query, sum[j * queries + g]);
      }
    }
  } else {
    Packet<Real> of_query[2][std::size_t(queries)];
    LONGSPAN_UNROLL
    for (int g = 0; g < queries; ++g) {
      of_query[0][g] = in_register(load(q + g * q_stride));
      of_query[1][g] = in_register(load(q + g * q_stride + w));
    }
    LONGSPAN_UNROLL
    for (int j = 0; j < keys; ++j) {
      Packet<Real> even, odd;
      load_pairs(k[j] + column, even, odd);
      LONGSPAN_UNROLL
      for (int g = 0; g < queries; ++g) {
        Packet<Real>& to = sum[j * queries + g];
        to = fma(odd, of_query[1][g], fma(even, of_query[0][g], to));
      }
    }
  }
}

/// sum[j * queries + g] += k[j] * q[g], lane by lane; the caller adds the lanes.
template <int queries, int keys, PrefetchHint hint, class Real, class Tk>
LONGSPAN_INLINE void add_rows(const Tk* const (&k)[std::size_t(keys)], const Real* q, Index q_stride,
                              Index head_dim, Prefetcher lines,
                              Packet<Real> (&sum)[std::size_t(queries * keys)]) {
  const auto add_packet = [&](const auto& load_key, Index column) {
    Packet<Real> of_query[std::size_t(queries)];
    LONGSPAN_UNROLL
    for (int g = 0; g < queries; ++g) of_query[g] = in_register(load(q + g * q_stride + column));
    LONGSPAN_UNROLL
    for (int j = 0; j < keys; ++j) {
      const Packet<Real> loaded = load_key(k[j] + column);
      const Packet<Real> of_key = queries > 1 ? in_register(loaded) : loaded;
      LONGSPAN_UNROLL
      for (int g = 0; g < queries; ++g) sum[j * queries + g] = fma(of_key, of_query[g], sum[j * queries + g]);
    }
  };
  const auto add_whole = [&](Index column) {
    if constexpr (loads_in_pairs<Real, Tk>) {
      add_pairs<queries, keys>(k, column, q + column, q_stride, sum);
    } else {
      add_packet([](const Tk* from) { return load_as<Real>(from); }, column);
    }
  };
  for_each_column<Real, Tk, keys, hint>(head_dim, lines, add_whole, add_packet);
}

/// score_keys for fewer keys than a packet holds, one by one, with the same bits. Not inlined: inlining takes registers
/// from the loop over many keys, which is then 8-15 % slower.
template <int queries, class Real, class Tk>
LONGSPAN_NOINLINE void score_few_keys(const Tk* k, Index k_stride, Index keys, const Real* q, Index q_stride,
                                      Index head_dim, Real* s) {
  constexpr int keys_at_once = lanes<Real> / queries;
  Real of_key[std::size_t(queries)] = {};
  for (Index j = 0; j < keys_at_once; ++j) {
    if (j < keys) {
      const Tk* const row[1] = {k + j * k_stride};
      Packet<Real> sum[std::size_t(queries)];
      for (int g = 0; g < queries; ++g) sum[g] = broadcast(Real(0));
      add_rows<queries, 1, PrefetchHint::none>(row, q, q_stride, head_dim, {row[0], 0, 0, 1, 0, nullptr},
                                               sum);
      for (int g = 0; g < queries; ++g) of_key[g] = sum_in_pairs(sum[g]);
    }
    std::copy_n(of_key, queries, s + j * queries);
  }
}

/// s[j * queries + g] = k[j].q[g] for `keys` keys. The number of queries is a power of two of at most `lanes`.
///
/// q is [queries][q_stride]; columns are at their `interleaved_index`, and zeros follow head_dim up to a whole packet.
/// Whole packets of s are written: entries past the last key repeat its score. `next` is the address of what is read
/// afterwards, if that does not follow the keys in memory.
template <int queries, PrefetchHint wanted_hint = PrefetchHint::reused, class Real, class Tk>
void score_keys(const Tk* k, Index k_stride, Index keys, const Real* q, Index q_stride, Index head_dim,
                Real* s, const void* next = nullptr) {
  constexpr int w = lanes<Real>, keys_at_once = w / queries;
  // Pointers to 16 rows leave no register for anything else: 8 rows at a time take a fifth less time with clang++.
  constexpr int together = (std::min)(keys_at_once, 8);
  // For one query and 8 rows of float the processor prefetches well by itself: 5-10 % faster without our prefetches.
  constexpr bool prefetches = queries > 1 || together < 8 || sizeof(Tk) < sizeof(float);
  constexpr PrefetchHint hint = prefetches ? wanted_hint : PrefetchHint::none;
  Prefetcher lines(k, head_dim, k_stride, together, keys, next);
  for (Index first = 0; first < keys; first += keys_at_once, s += w) {
    // With one key left of 16, repeating it to fill the packet would take half the time.
    if ((keys - first) * queries <= w / 4) {
      return score_few_keys<queries>(k + first * k_stride, k_stride, keys - first, q, q_stride, head_dim, s);
    }
    Packet<Real> sum[std::size_t(w)];
    LONGSPAN_UNROLL
    for (int part = 0; part < keys_at_once; part += together) {
      const Tk* row[std::size_t(together)];
      LONGSPAN_UNROLL
      for (int j = 0; j < together; ++j) row[j] = k + (std::min)(first + part + j, keys - 1) * k_stride;
      Packet<Real> of_rows[std::size_t(together * queries)];
      LONGSPAN_UNROLL
      for (int i = 0; i < together * queries; ++i) of_rows[i] = broadcast(Real(0));
      lines.go_to(first + part);
      add_rows<queries, together, hint>(row, q, q_stride, head_dim, lines, of_rows);
      LONGSPAN_UNROLL
      for (int i = 0; i < together * queries; ++i) sum[part * queries + i] = of_rows[i];
    }
    store(s, sums_of_rows(sum));
  }
}

/// scores[j * queries + g] *= scale[j]: the scale of an int8 row is applied to its sums.
template <class Real>
void scale_scores(Real* scores, const float* scale, Index keys, Index queries) {
  for (Index j = 0; j < keys; ++j) {
    for (Index g = 0; g < queries; ++g) scores[j * queries + g] *= static_cast<Real>(scale[j]);
  }
}

template <int packets, class Real, class T>
LONGSPAN_INLINE void load_whole(const T* from, Packet<Real> (&to)[std::size_t(packets)]) {
  constexpr int w = lanes<Real>;
  if constexpr (loads_in_pairs<Real, T> && packets % 2 == 0) {
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; c += 2) load_pairs(from + c * w, to[c], to[c + 1]);
  } else {
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) to[c] = load_as<Real>(from + c * w);
  }
}

/// o[g][c] = scale[g] * o[g][c] + sum_j p[j * p_stride + g] * v[j][c], for `queries` rows of o and `packets`
/// packets of columns. Several packets are whole, a single one has at most `columns`. If `packets` is even, columns of
/// o are at their `interleaved_index`.
///
/// Not inlined: g++ then keeps the sums in memory, and a step with four heads per KV head takes 14 % longer.
template <int queries, int packets, PrefetchHint hint, class Real, class Tv>
LONGSPAN_NOINLINE void add_values(const Tv* v, Index v_stride, [[maybe_unused]] Index columns, Index keys,
                                  const Real* p, Index p_stride, Real* o, Index o_stride, const Real* scale) {
  constexpr int w = lanes<Real>;
  Packet<Real> sum[std::size_t(queries)][std::size_t(packets)];
  LONGSPAN_UNROLL
  for (int g = 0; g < queries; ++g) {
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) sum[g][c] = broadcast(Real(0));
  }
  const auto add = [&](const Tv* row, const Real* weights, const auto& load_row) {
    Packet<Real> of_value[std::size_t(packets)];
    load_row(row, of_value);
    LONGSPAN_UNROLL
    for (int g = 0; g < queries; ++g) {
      const Packet<Real> weight_of_query = broadcast(weights + g);
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) sum[g][c] = fma(weight_of_query, of_value[c], sum[g][c]);
    }
  };
  const auto add_whole_rows = [&] {
    LONGSPAN_UNROLL_BY_2
    for (Index j = 0; j < keys; ++j) {
      const Tv* row = v + j * v_stride;
      if constexpr (hint != PrefetchHint::none) {
        prefetch<hint == PrefetchHint::streaming>(row, packets * w * static_cast<Index>(sizeof(Tv)),
                                                  prefetch_distance);
      }
      add(row, p + j * p_stride, [](const Tv* from, Packet<Real>(&to)[std::size_t(packets)]) {
        load_whole<packets, Real>(from, to);
      });
    }
  };
  if constexpr (packets > 1) {
    add_whole_rows();
  } else if (columns >= w) {
    add_whole_rows();
  } else {
    for (Index j = 0; j < keys; ++j) {
      add(v + j * v_stride, p + j * p_stride,
          [&](const Tv* from, Packet<Real>(&to)[1]) { to[0] = load_part<Real>(from, columns); });
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

/// sum[c][g] += p[j][g] * v[j][c] for `keys` rows v[j] together and `queries` of `all` queries, where sum[c][g] is a
/// packet of columns. The sums are in the L1 cache, the weights in registers.
template <int all, int queries, int keys, PrefetchHint hint, class Real, class Tv>
LONGSPAN_INLINE void add_value_rows(const Tv* v, Index v_stride, Index columns, const Real* p, Real* sum,
                                    const Prefetcher& lines) {
  constexpr int w = lanes<Real>;
  Packet<Real> weight_of[std::size_t(keys * queries)];
  LONGSPAN_UNROLL
  for (int j = 0; j < keys; ++j) {
    LONGSPAN_UNROLL
    for (int g = 0; g < queries; ++g) weight_of[j * queries + g] = broadcast(p + j * all + g);
  }
  const auto add = [&](const Packet<Real>(&of_value)[std::size_t(keys)], Index column) {
    Real* to = sum + column * all;
    LONGSPAN_UNROLL
    for (int g = 0; g < queries; ++g, to += w) {
      Packet<Real> x = load(static_cast<const Real*>(to));
      LONGSPAN_UNROLL
      for (int j = 0; j < keys; ++j) x = fma(weight_of[j * queries + g], of_value[j], x);
      store(to, x);
    }
  };
  const auto add_packet = [&](const auto& load_value, Index column) {
    Packet<Real> of_value[std::size_t(keys)];
    LONGSPAN_UNROLL
    for (int j = 0; j < keys; ++j) of_value[j] = load_value(v + j * v_stride + column);
    add(of_value, column);
  };
  const auto add_whole = [&](Index column) {
    if constexpr (loads_in_pairs<Real, Tv>) {
      Packet<Real> even[std::size_t(keys)], odd[std::size_t(keys)];
      LONGSPAN_UNROLL
      for (int j = 0; j < keys; ++j) load_pairs(v + j * v_stride + column, even[j], odd[j]);
      add(even, column);
      add(odd, column + w);
    } else {
      add_packet([](const Tv* from) { return in_register(load_as<Real>(from)); }, column);
    }
  };
  for_each_column<Real, Tv, keys, hint>(columns, lines, add_whole, add_packet);
}

/// add_value_rows for all queries, four at a time: the weights of 4 rows x 8 queries would spill, and clang++ then
/// takes 60 % longer.
template <int all, int keys, PrefetchHint hint, class Real, class Tv>
LONGSPAN_INLINE void add_value_rows_of_all(const Tv* v, Index v_stride, Index columns, const Real* p,
                                           Real* sum, const Prefetcher& lines) {
  constexpr int some = (std::min)(all, 4);
  add_value_rows<all, some, keys, hint>(v, v_stride, columns, p, sum, lines);
  if constexpr (some < all) {
    add_value_rows<all, all - some, keys, PrefetchHint::none>(v, v_stride, columns, p + some,
                                                              sum + some * lanes<Real>, lines);
  }
}

/// o[g][c] = scale[g] * o[g][c] + sum_j p[j * queries + g] * v[j][c], like add_values, for rows of any length: each row
/// is read once for all queries. `sum` has room for `queries` rows of o_stride. The sums have the bits of add_values;
/// columns of o are at their `interleaved_index`.
///
/// For rows whose sums do not fit in registers (8 packets, 4 queries). Compared with reading each row twice, for two
/// queries each: from the L1 and L2 caches this: 110 GB/s, twice: 84 GB/s; from DRAM this: 87 % of the stream rate,
/// twice: 79 %.
template <int queries, PrefetchHint hint, class Real, class Tv>
LONGSPAN_NOINLINE void add_long_values(const Tv* v, Index v_stride, Index columns, Index keys, const Real* p,
                                       Real* sum, Real* o, Index o_stride, const Real* scale,
                                       const void* next = nullptr) {
  constexpr int w = lanes<Real>, keys_together = vector_registers == 32 ? 4 : 2;
  std::fill_n(sum, queries * round_up(columns, w), Real(0));
  Prefetcher lines(v, columns, v_stride, keys_together, keys, next);
  Index j = 0;
  for (; j + keys_together <= keys; j += keys_together) {
    lines.go_to(j);
    add_value_rows_of_all<queries, keys_together, hint>(v + j * v_stride, v_stride, columns, p + j * queries,
                                                        sum, lines);
  }
  for (; j < keys; ++j) {
    add_value_rows_of_all<queries, 1, PrefetchHint::none>(v + j * v_stride, v_stride, columns,
                                                          p + j * queries, sum, lines);
  }
  for (Index c = 0; c < columns; c += w) {
    for (int g = 0; g < queries; ++g, sum += w) {
      Real* to = o + g * o_stride + c;
      store(to, fma(broadcast(scale[g]), load(static_cast<const Real*>(to)),
                    load(static_cast<const Real*>(sum))));
    }
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
