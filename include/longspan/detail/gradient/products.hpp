// The register kernel of the backward pass: a product whose rows are read by broadcast and whose columns are lanes.
#pragma once

#include <algorithm>
#include <cstddef>

#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Queries in a block of the backward pass: a multiple of the rows of every register tile below, and for matrix tiles.
inline constexpr Index rows_in_query_block = 96, rows_in_tile_query_block = 192;

/// C[r][lane] = sum_k A[r][k] * B[k][lane], or that sum added to C, for `rows` rows and `packets` packets. The sum is
/// made first, in the order of k. Writes whole register tiles of `tall` rows; rows after the last one repeat it.
template <int tall, int packets, bool adds, class Real>
LONGSPAN_NOINLINE void multiply_rows(const Real* a, Index a_stride, Index rows, const Real* b, Index b_stride,
                                     Index depth, Real* c, Index c_stride) {
  constexpr int w = lanes<Real>;
  static_assert(rows_in_query_block % tall == 0);
  for (Index first = 0; first < rows; first += tall, c += tall * c_stride) {
    const Real* row[std::size_t(tall)];
    LONGSPAN_UNROLL
    for (int r = 0; r < tall; ++r)
      row[r] = r == 0 ? a + first * a_stride : row[r - 1] + (first + r < rows ? a_stride : 0);
    Packet<Real> sum[std::size_t(tall)][std::size_t(packets)];
    LONGSPAN_UNROLL
    for (int r = 0; r < tall; ++r) {
      LONGSPAN_UNROLL
      for (int n = 0; n < packets; ++n) sum[r][n] = broadcast(Real(0));
    }
    const Real* of_step = b;
    LONGSPAN_UNROLL_BY_4
    for (Index k = 0; k < depth; ++k, of_step += b_stride) {
      Packet<Real> factor[std::size_t(packets)];
      LONGSPAN_UNROLL
      for (int n = 0; n < packets; ++n) factor[n] = load(of_step + n * w);
      LONGSPAN_UNROLL
      for (int r = 0; r < tall; ++r) {
        const Packet<Real> of_row = broadcast(row[r] + k);
        LONGSPAN_UNROLL
        for (int n = 0; n < packets; ++n) sum[r][n] = fma(of_row, factor[n], sum[r][n]);
      }
    }
    LONGSPAN_UNROLL
    for (int r = 0; r < tall; ++r) {
      LONGSPAN_UNROLL
      for (int n = 0; n < packets; ++n) {
        Real* to = c + r * c_stride + n * w;
        if constexpr (adds) sum[r][n] = sum[r][n] + load(static_cast<const Real*>(to));
        store(to, sum[r][n]);
      }
    }
  }
}

/// Rows of a register tile that is `packets` wide: as many sums as the tile of the forward pass has.
template <int packets>
inline constexpr int product_rows = std::max(1, tile_rows* tile_packets / packets);

/// The same for any number of packets: as many wide register tiles as fit, each through all rows.
template <bool adds, class Real>
void multiply_columns(const Real* a, Index a_stride, Index rows, const Real* b, Index b_stride, Index depth,
                      Real* c, Index c_stride, Index packets) {
  constexpr Index w = lanes<Real>;
  for (Index done = 0; done < packets;) {
    const Index left = packets - done;
    // Four packets at once where registers allow it; 5 are 3 and 2 rather than 4 and 1.
    const Index wide = vector_registers == 32 && left >= 4 && left != 5 ? 4 : std::min<Index>(left, 3);
    const Real* from = b + done * w;
    Real* to = c + done * w;
    if constexpr (vector_registers == 32) {
      if (wide == 4)
        multiply_rows<product_rows<4>, 4, adds>(a, a_stride, rows, from, b_stride, depth, to, c_stride);
    }
    if (wide == 3)
      multiply_rows<product_rows<3>, 3, adds>(a, a_stride, rows, from, b_stride, depth, to, c_stride);
    if (wide == 2)
      multiply_rows<product_rows<2>, 2, adds>(a, a_stride, rows, from, b_stride, depth, to, c_stride);
    if (wide == 1)
      multiply_rows<product_rows<1>, 1, adds>(a, a_stride, rows, from, b_stride, depth, to, c_stride);
    done += wide;
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
