// The three inner loops of attention, on tiles that stay in registers.
//
// Queries are in the lanes. Scores S[key][lane], weights P[key][lane] and outputs O[column][lane] are rows of
// packets, so max, exp and sum are all vertical. K and V are read by broadcast, in their own layout, at any row stride:
// there is no packing and no horizontal sum. The same tile with keys in the lanes is 7-8 % slower if K is packed once
// per head, and 22 % slower if K is packed once per tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <type_traits>

#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/simd/prefetch_line.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Register tile, rows x packets.
inline constexpr int tile_rows = tuning::tile_rows;
inline constexpr int tile_packets = tuning::tile_packets;

// The loops over columns and keys are unrolled by 4, so that the branch predictor learns their trip counts: a call is
// 2-4 % faster at head_dim 128 and 1-2 % at 64. Unrolling by 8 gains no more.

/// Calls work.template operator()<packets>() with the run-time number of packets, 1 to tile_packets.
template <class Work>
LONGSPAN_INLINE void with_packets(int packets, const Work& work) {
  if (packets == 1) return work.template operator()<1>();
  if constexpr (tile_packets == 3) {
    if (packets == 3) return work.template operator()<3>();
  }
  work.template operator()<2>();
}

/// The factors that score_rows and value_rows multiply: single numbers.
template <class RealType>
struct SingleFactors {
  using Real = RealType;
  using Key = Real;      ///< element of key rows
  using Element = Real;  ///< element of packed queries, values and weights
  using Factor = Packet<Real>;
  static constexpr Index columns = 1;  ///< of a key row in one element of a packed query

  static LONGSPAN_INLINE Factor load(const Element* from) { return detail::load(from); }
  static LONGSPAN_INLINE Factor broadcast(const Element* from) { return detail::broadcast(from); }
  static LONGSPAN_INLINE Factor broadcast_key(const Key* from) { return detail::broadcast(from); }
  static LONGSPAN_INLINE Packet<Real> add_product(Factor a, Factor b, Packet<Real> sum) {
    return fma(a, b, sum);
  }
};

// A `stride` is the distance of rows of packets in lanes: an Index, or an integral_constant if all packets of a tile
// take part. Then the addresses of 24 stores take no registers, and a call is 1 % faster at head_dim 64.

/// The stride of the rows of a tile: tile_lanes if the tile is full.
template <class Real, int packets>
LONGSPAN_INLINE auto tile_stride(Index stride) {
  if constexpr (packets == tile_packets) {
    return std::integral_constant<Index, tile_packets * lanes<Real>>();
  } else {
    return stride;
  }
}

/// What score_rows and value_rows prefetch while they compute: nothing.
struct NothingAhead {
  void step() const {}
};

/// The memory from an address on, half a cache line for each step. It must be spread over the loop, since a prefetch
/// that waits for a free buffer stops what follows. 16 and 32 float queries of a KV head, 32768 keys in memory: spread
/// 0.52 to 0.57 of the time without, in groups of 64 lines 0.70 to 0.76 (Intel AMX); 4096 keys, spread: 0.77 to 0.79.
class LinesAhead {
 public:
  explicit LinesAhead(const void* first) : next_(reinterpret_cast<std::uintptr_t>(first)) {}
  LONGSPAN_INLINE void step() {
    prefetch_line_to_l2(next_);
    next_ += cache_line / 2;
  }

 private:
  std::uintptr_t next_;
};

/// highest[lane] = the maximum of highest[lane] and S[j][lane] over the keys j.
template <int packets, class Real>
void highest_rows(const Real* s, Index stride, Index keys, Real* highest) {
  constexpr int w = lanes<Real>;
  Packet<Real> even[std::size_t(packets)], odd[std::size_t(packets)];
  LONGSPAN_UNROLL
  for (int c = 0; c < packets; ++c) even[c] = odd[c] = load(static_cast<const Real*>(highest) + c * w);
  Index j = 0;
  for (; j + 2 <= keys; j += 2, s += 2 * stride) {
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) {
      even[c] = lane_max(even[c], load(s + c * w));
      odd[c] = lane_max(odd[c], load(s + stride + c * w));
    }
  }
  LONGSPAN_UNROLL
  for (int c = 0; c < packets; ++c) {
    if (j < keys) even[c] = lane_max(even[c], load(s + c * w));
    store(highest + c * w, lane_max(even[c], odd[c]));
  }
}

/// S[j][lane] = sum_c K[j][c] * Q[c][lane] for `keys` keys j, and highest[lane] = max over them. Rows of Q and S
/// are `stride` lanes apart.
///
/// Rows of S are written up to a multiple of tile_rows: rows past the last key repeat its scores, which changes no
/// maximum.
template <int packets, class Real, class Factors = SingleFactors<Real>, class Stride,
          class Ahead = NothingAhead>
void score_rows(const typename Factors::Key* k, Index k_stride, Index keys,
                const typename Factors::Element* q, Index head_dim, Real* s, Real* highest, Stride stride,
                Ahead ahead = {}) {
  constexpr int w = lanes<Real>;
  Packet<Real> row_max[std::size_t(packets)];
  LONGSPAN_UNROLL
  for (int c = 0; c < packets; ++c) row_max[c] = load(static_cast<const Real*>(highest) + c * w);
  for (Index first = 0; first < keys; first += tile_rows, s += tile_rows * stride) {
    const typename Factors::Key* row[std::size_t(tile_rows)];
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r)
      row[r] = r == 0 ? k + first * k_stride : row[r - 1] + (first + r < keys ? k_stride : 0);

    Packet<Real> sum[std::size_t(tile_rows)][std::size_t(packets)];
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) sum[r][c] = broadcast(Real(0));
    }
    const typename Factors::Element* of_column = q;
    LONGSPAN_UNROLL_BY_4
    for (Index i = 0; i < head_dim; i += Factors::columns, of_column += stride) {
      ahead.step();
      typename Factors::Factor of_query[std::size_t(packets)];
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) of_query[c] = Factors::load(of_column + c * w);
      LONGSPAN_UNROLL
      for (int r = 0; r < tile_rows; ++r) {
        const auto of_key = Factors::broadcast_key(row[r] + i);
        LONGSPAN_UNROLL
        for (int c = 0; c < packets; ++c) sum[r][c] = Factors::add_product(of_key, of_query[c], sum[r][c]);
      }
    }
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) {
        row_max[c] = lane_max(row_max[c], sum[r][c]);
        store(s + r * stride + c * w, sum[r][c]);
      }
    }
  }
  LONGSPAN_UNROLL
  for (int c = 0; c < packets; ++c) store(highest + c * w, row_max[c]);
}

/// P[j][lane] = exp_score(S[j][lane] - shift[lane]) in place for `keys` rows; total[lane] grows by their sum.
template <int packets, class Real>
void exp_rows(Real* s, Index s_stride, Index keys, const Real* shift, Real* total) {
  constexpr int w = lanes<Real>;
  Packet<Real> by[std::size_t(packets)], sum[std::size_t(packets)];
  LONGSPAN_UNROLL
  for (int c = 0; c < packets; ++c) {
    by[c] = load(shift + c * w);
    sum[c] = load(static_cast<const Real*>(total) + c * w);
  }
  LONGSPAN_UNROLL_BY_2
  for (Index j = 0; j < keys; ++j) {
    Real* row = s + j * s_stride;
    LONGSPAN_UNROLL
    for (int c = 0; c < packets; ++c) {
      const Packet<Real> p = exp_score(load(static_cast<const Real*>(row) + c * w) - by[c]);
      sum[c] = sum[c] + p;
      store(row + c * w, p);
    }
  }
  LONGSPAN_UNROLL
  for (int c = 0; c < packets; ++c) store(total + c * w, sum[c]);
}

/// How value_rows writes the sum over its rows.
enum class Accumulate : unsigned char {
  overwrite,  ///< O = sum
  add,        ///< O = O + sum, where the sum starts from O
  rescale,    ///< O = scale * O + sum
};

/// Rows of values and weights in which only the packets [first_packet, first_packet + packets) take part.
struct RowRun {
  Index rows = 0;
  int first_packet = 0;
  int packets = 0;
};

/// sum[r][c] grows by V[j][r] * P[j][packet c] over `rows` rows j, for `count` packets from `first` on.
template <int packets, int first, int count, class Factors, class Ahead>
LONGSPAN_INLINE void add_products(
    const typename Factors::Element* v, Index v_stride, const typename Factors::Element* p, Index p_stride,
    Index rows, Ahead& ahead,
    Packet<typename Factors::Real> (&sum)[std::size_t(tile_rows)][std::size_t(packets)]) {
  constexpr int w = lanes<typename Factors::Real>;
  LONGSPAN_UNROLL_BY_4
  for (Index j = 0; j < rows; ++j, v += v_stride, p += p_stride) {
    ahead.step();
    typename Factors::Factor of_query[std::size_t(count)];
    LONGSPAN_UNROLL
    for (int c = 0; c < count; ++c) of_query[c] = Factors::load(p + (first + c) * w);
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      const auto of_value = Factors::broadcast(v + r);
      LONGSPAN_UNROLL
      for (int c = 0; c < count; ++c)
        sum[r][first + c] = Factors::add_product(of_value, of_query[c], sum[r][first + c]);
    }
  }
}

/// The same for a run, with only the packets that take part in it.
template <int packets, class Factors, class Ahead>
LONGSPAN_INLINE void add_run(
    const typename Factors::Element* v, Index v_stride, const typename Factors::Element* p, Index p_stride,
    const RowRun& run, Ahead& ahead,
    Packet<typename Factors::Real> (&sum)[std::size_t(tile_rows)][std::size_t(packets)]) {
  const Index rows = run.rows;
  if (run.packets == packets)
    return add_products<packets, 0, packets, Factors>(v, v_stride, p, p_stride, rows, ahead, sum);
  if constexpr (packets > 2) {
    if (run.packets == 2) {
      if (run.first_packet == 0)
        return add_products<packets, 0, 2, Factors>(v, v_stride, p, p_stride, rows, ahead, sum);
      return add_products<packets, 1, 2, Factors>(v, v_stride, p, p_stride, rows, ahead, sum);
    }
    if (run.first_packet == 2)
      return add_products<packets, 2, 1, Factors>(v, v_stride, p, p_stride, rows, ahead, sum);
  }
  if constexpr (packets > 1) {
    if (run.first_packet == 1)
      return add_products<packets, 1, 1, Factors>(v, v_stride, p, p_stride, rows, ahead, sum);
    add_products<packets, 0, 1, Factors>(v, v_stride, p, p_stride, rows, ahead, sum);
  }
}

/// O[column][lane] = sum_j V[j][column] * P[j][lane] over the rows of `runs`, which follow each other, for `columns`
/// columns, a multiple of tile_rows. The sums stay in registers from run to run.
template <int packets, class Real, class Factors = SingleFactors<Real>, class StrideOfP, class StrideOfO,
          class Ahead = NothingAhead>
void value_rows(const typename Factors::Element* v, Index v_stride, Index columns,
                const typename Factors::Element* p, StrideOfP p_stride, std::span<const RowRun> runs, Real* o,
                StrideOfO o_stride, Accumulate into, const Real* scale, Ahead ahead = {}) {
  constexpr int w = lanes<Real>;
  for (Index column = 0; column < columns; column += tile_rows, v += tile_rows, o += tile_rows * o_stride) {
    Packet<Real> sum[std::size_t(tile_rows)][std::size_t(packets)];
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) sum[r][c] = broadcast(Real(0));
    }
    if (into == Accumulate::add) {
      LONGSPAN_UNROLL
      for (int r = 0; r < tile_rows; ++r) {
        LONGSPAN_UNROLL
        for (int c = 0; c < packets; ++c)
          sum[r][c] = load(static_cast<const Real*>(o) + r * o_stride + c * w);
      }
    }
    const typename Factors::Element *v_of_run = v, *p_of_run = p;
    for (const RowRun& run : runs) {
      add_run<packets, Factors>(v_of_run, v_stride, p_of_run, p_stride, run, ahead, sum);
      v_of_run += run.rows * v_stride;
      p_of_run += run.rows * p_stride;
    }
    if (into == Accumulate::rescale) {
      Packet<Real> by[std::size_t(packets)];
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) by[c] = load(scale + c * w);
      LONGSPAN_UNROLL
      for (int r = 0; r < tile_rows; ++r) {
        LONGSPAN_UNROLL
        for (int c = 0; c < packets; ++c)
          sum[r][c] = fma(by[c], load(static_cast<const Real*>(o) + r * o_stride + c * w), sum[r][c]);
      }
    }
    LONGSPAN_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      LONGSPAN_UNROLL
      for (int c = 0; c < packets; ++c) store(o + r * o_stride + c * w, sum[r][c]);
    }
  }
}

/// The same over `rows` rows in which all packets take part.
template <int packets, class Real>
void value_rows(const Real* v, Index v_stride, Index columns, const Real* p, Index p_stride, Index rows,
                Real* o, Index o_stride, Accumulate into, const Real* scale) {
  const RowRun run{rows, 0, packets};
  value_rows<packets>(v, v_stride, columns, p, p_stride, std::span(&run, 1), o, o_stride, into, scale);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
