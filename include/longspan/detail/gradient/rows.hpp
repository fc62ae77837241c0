// Rows in and out of the backward pass: tensors of any type as rows of the arithmetic's type, and gradients back.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The rows of some heads as numbers of type Row that can be read up to a multiple of `padding` columns: in place if
/// type and layout allow it, otherwise copied. Heads are counted through all batch rows.
template <class Row, class T>
class KernelRows {
 public:
  /// For `heads` heads at a time.
  static KernelRows take(Arena& arena, TensorView<const T> of, Index padding, bool is_encoded, Index heads) {
    KernelRows rows;
    rows.of_ = of;
    rows.copies_ = !std::is_same_v<T, Row> || is_encoded || of.cols % padding != 0;
    rows.cols_ = round_up(of.cols, padding);
    if (rows.copies_) rows.copy_ = arena.take<Row>(heads * of.rows * rows.cols_);
    return rows;
  }

  /// Copies the rows [first, first + count) of head `head`, the n-th of those held at a time.
  template <Position P>
  void prepare(Index n, Index head, Index first, Index count, const P& position, Index first_position,
               Role role) const {
    if (!copies_) return;
    Row* to = copy_ + (n * of_.rows + first) * cols_;
    convert_rows(of_.row(head / of_.heads, head % of_.heads, first), of_.row_stride, count, of_.cols, to,
                 cols_);
    position.encode(MatrixView<Row>{to, count, of_.cols, cols_}, first_position + first, role);
  }

  MatrixView<const Row> matrix(Index n, Index head) const {
    if constexpr (std::is_same_v<T, Row>) {
      if (!copies_) return of_.matrix(head / of_.heads, head % of_.heads);
    }
    return {copy_ + n * of_.rows * cols_, of_.rows, of_.cols, cols_};
  }

 private:
  TensorView<const T> of_;
  Row* copy_ = nullptr;
  Index cols_ = 0;
  bool copies_ = false;
};

/// Rows [first, first + count) of a matrix.
template <class T>
MatrixView<T> slice_rows(const MatrixView<T>& x, Index first, Index count) {
  return {x.row(first), count, x.cols, x.row_stride};
}

/// to[c] = from[c], rounded to T. A -0 becomes 0.
template <class Real, class T>
void round_row(const Real* from, Index cols, T* to) {
  constexpr Index w = lanes<Real>;
  Index c = 0;
  for (; c + w <= cols; c += w) store_as(to + c, load(from + c) + broadcast(Real(0)));
  for (; c < cols; ++c) to[c] = static_cast<T>(from[c] + Real(0));
}

/// factor * each row, taken back through a position encoding, rounded to T. Overwrites `rows`.
template <class Real, Position P, class T>
void finish_rows(MatrixView<Real> rows, double factor, const P& position, Index first_position, Role role,
                 MatrixView<T> to) {
  const Real by = static_cast<Real>(factor);
  for (Index i = 0; i < rows.rows; ++i) {
    Real* row = rows.row(i);
    for (Index c = 0; c < rows.cols; ++c) row[c] = by * row[c];
  }
  position.encode_transposed(rows, first_position, role);
  for (Index i = 0; i < rows.rows; ++i) round_row(rows.row(i), rows.cols, to.row(i));
}

/// The lse of a row in score units. A row that sees no key gets a number that makes every weight 0.
template <class Real>
Real shift_of(Real lse) {
  return is_minus_infinity(lse) ? (std::numeric_limits<Real>::max)() / 4
                                : static_cast<Real>(static_cast<double>(lse) * double(score_unit<Real>));
}

/// D = dout.out - dlse.
template <class Real, class Td, class To>
Real delta_of(const Td* dout, const To* out, Index cols, Real dlse) {
  constexpr Index w = lanes<Real>;
  Packet<Real> sum = broadcast(Real(0));
  Index c = 0;
  for (; c + w <= cols; c += w) sum = fma(load_as<Real>(dout + c), load_as<Real>(out + c), sum);
  if (c < cols) sum = fma(load_part<Real>(dout + c, cols - c), load_part<Real>(out + c, cols - c), sum);
  return sum_in_pairs(sum) - dlse;
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
