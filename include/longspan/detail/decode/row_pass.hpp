// The steps of the decode kernel that depend on neither the mask nor the score: compiled once for all of them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/decode/prefetch.hpp"
#include "longspan/detail/decode/row_accumulator.hpp"
#include "longspan/detail/decode/row_kernel.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The most queries per KV head (q_len times the heads of a group) for this kernel. With more, the tile kernel, whose
/// lanes hold queries, is at least as fast.
inline constexpr Index most_decode_queries = 8;

/// The columns of a row of T that are loaded in pairs of packets.
template <class Real, class T>
Index columns_in_pairs(Index columns) {
  constexpr Index pair = 2 * lanes<Real>;
  return loads_in_pairs<Real, T> ? columns / pair * pair : 0;
}

/// work.operator()<n>() where n = `wanted` is 1, 2, 4 or 8, and at most `most`.
template <Index most, class Work>
void with_power_of_two(Index wanted, const Work& work) {
  if constexpr (most >= 8) {
    if (wanted == 8) return work.template operator()<8>();
  }
  if constexpr (most >= 4) {
    if (wanted == 4) return work.template operator()<4>();
  }
  if constexpr (most >= 2) {
    if (wanted == 2) return work.template operator()<2>();
  }
  work.template operator()<1>();
}

/// A run of keys and `count` queries, which are a power of two of at most a packet: their scores and, afterwards, their
/// weights are in `scores`, [keys][count].
template <class Real, class Tk, class Tv>
struct RowPass {
  using Run = KeyRun<Tk, Tv>;
  static constexpr Index w = lanes<Real>;
  static constexpr bool is_scaled = std::is_same_v<Tk, std::int8_t>;
  /// Rows of k and v come from memory and are read once in a call, unless more queries than lanes need several passes.
  static constexpr PrefetchHint hint =
      w >= most_decode_queries ? PrefetchHint::streaming : PrefetchHint::reused;

  /// The scores of the queries q, [count][q_stride]. `next`: see score_keys.
  static LONGSPAN_NOINLINE void score(const Run& run, Index count, const Real* q, Index q_stride,
                                      Index head_dim, Real* scores, const void* next) {
    with_power_of_two<w>(count, [&]<int queries>() {
      score_keys<queries, hint>(run.k.data, run.k.row_stride, run.k.rows, q, q_stride, head_dim, scores,
                                next);
    });
    if constexpr (is_scaled) scale_scores(scores, run.k_scale, run.k.rows, count);
  }

  /// Scores, `size` of them, become weights: see RowAccumulator::weigh.
  static LONGSPAN_NOINLINE void weigh(const Run& run, Index count, Real* scores, Index size, Index first,
                                      const RowAccumulator<Real>& state, Real* rescale) {
    state.weigh(scores, size, count, first, rescale);
    if constexpr (is_scaled) scale_scores(scores, run.v_scale, run.k.rows, count);
  }

  /// Adds the weighted values to the queries of `state` from `first` on. `sums` has room for their rows.
  static LONGSPAN_NOINLINE void add_values(const Run& run, Index count, const Real* weights, Real* sums,
                                           Index first, const RowAccumulator<Real>& state,
                                           const Real* rescale, const void* next) {
    with_power_of_two<w>(count, [&]<int queries>() {
      add_values_of<queries>(run.v, weights, sums, state.o + first * state.stride, state.stride, rescale,
                             next);
    });
  }

  /// A weight of 0 does not hide a value that is NaN or infinite, so this function skips hidden pairs one by one.
  static LONGSPAN_NOINLINE void add_seen_values(const Run& run, Index count, const Real* weights,
                                                const bool* seen, Index first,
                                                const RowAccumulator<Real>& state, const Real* rescale) {
    const MatrixView<const Tv> v = run.v;
    for (Index g = 0; g < count; ++g) {
      Real* o = state.o + (first + g) * state.stride;
      for (Index c = 0; c < state.stride; c += w) {
        Packet<Real> sum = broadcast(Real(0));
        for (Index j = 0; j < v.rows; ++j) {
          const Index at = j * count + g;
          if (!seen[at]) continue;
          alignas(64) Real row[std::size_t(w)] = {};
          for (Index i = 0; i < (std::min)(w, v.cols - c); ++i)
            row[i] = static_cast<Real>(v.row(j)[column_of_index<Real, Tv>(c + i, v.cols)]);
          sum = fma(broadcast(weights[at]), load<Real>(row), sum);
        }
        store(o + c, fma(broadcast(rescale[g]), load<Real>(o + c), sum));
      }
    }
  }

  static LONGSPAN_NOINLINE bool all_finite(const Run& run) {
    if constexpr (is_scaled) {
      return std::all_of(run.v_scale, run.v_scale + run.v.rows, [](float x) { return is_finite(x); });
    }
    for (Index j = 0; j < run.v.rows; ++j) {
      const Tv* row = run.v.row(j);
      Real zero = 0;
      const Real by = opaque(zero);  // as in FloatArithmetic::values_finite
      for (Index c = 0; c < run.v.cols; ++c) zero += static_cast<Real>(row[c]) * by;
      if (!is_finite(zero)) return false;
    }
    return true;
  }

 private:
  /// How many accumulators of add_values leave registers for the rows.
  static constexpr int value_accumulators = vector_registers == 32 ? 16 : 8;
  static constexpr int most_value_packets = vector_registers == 32 ? 8 : 4;
  /// Rows of several queries whose sums stay in registers have at least so many columns. Shorter ones are rare in
  /// models, and a kernel of their own would be compiled by every program.
  static constexpr Index least_value_columns = 64;

  template <int queries>
  static void add_values_of(MatrixView<const Tv> v, const Real* weights, Real* sums, Real* o, Index o_stride,
                            const Real* rescale, const void* next) {
    constexpr int widest = (std::min)(most_value_packets, value_accumulators / queries);
    const auto add_columns = [&]<int packets>(Index column) {
      detail::add_values<queries, packets, hint>(v.data + column, v.row_stride, v.cols - column, v.rows,
                                                 weights, queries, o + column, o_stride, rescale);
    };
    if constexpr (queries > 1) {
      if constexpr (widest * w >= least_value_columns) {
        if (v.cols == widest * w) return add_columns.template operator()<widest>(0);
      }
      if constexpr (widest / 2 * w >= least_value_columns) {
        if (v.cols == widest / 2 * w) return add_columns.template operator()<widest / 2>(0);
      }
      add_long_values<queries, hint>(v.data, v.row_stride, v.cols, v.rows, weights, sums, o, o_stride,
                                     rescale, next);
    } else {
      const Index in_pairs = columns_in_pairs<Real, Tv>(v.cols);
      for (Index column = 0; column < o_stride;) {
        const Index left = (column < in_pairs ? in_pairs : v.cols) - column;
        const auto whole = static_cast<std::size_t>(std::max<Index>(1, left / w));
        const Index packets = std::min<Index>(widest, static_cast<Index>(std::bit_floor(whole)));
        with_power_of_two<widest>(packets,
                                  [&]<int wide>() { add_columns.template operator()<wide>(column); });
        column += packets * w;
      }
    }
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
