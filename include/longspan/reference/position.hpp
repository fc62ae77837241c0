// Naive position encodings in double.
#pragma once

#include <cmath>
#include <vector>

#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <Position P>
struct ShiftedPosition;

}  // namespace detail

namespace reference {

/// Rotates the columns (first, second) of a row by an angle and multiplies them by `stretch`.
inline void turn(double* row, Index first, Index second, double angle, double stretch) {
  const double a = row[first], b = row[second];
  row[first] = stretch * (a * std::cos(angle) - b * std::sin(angle));
  row[second] = stretch * (a * std::sin(angle) + b * std::cos(angle));
}

/// `direction` is 1 to encode a row, -1 for the transpose of that.
inline void encode_row(double*, Index, const no_position&, Index, Role, double = 1) {}

inline void encode_row(double* row, Index cols, const rotary& encoding, Index n, Role, double direction = 1) {
  const Index turned = encoding.dims == 0 ? cols : encoding.dims;
  for (Index p = 0; p < turned / 2; ++p) {
    const double frequency =
        std::pow(encoding.base, -2.0 * static_cast<double>(p) / static_cast<double>(turned));
    const bool neighbours = encoding.pairing == Pairing::interleaved;
    turn(row, neighbours ? 2 * p : p, neighbours ? 2 * p + 1 : p + turned / 2,
         direction * static_cast<double>(n) * frequency, 1);
  }
}

inline void encode_row(double* row, Index cols, const xpos& encoding, Index n, Role role,
                       double direction = 1) {
  const double from_centre = static_cast<double>(n - encoding.centre);
  for (Index p = 0; p < cols / 2; ++p) {
    const double frequency =
        std::pow(encoding.base, -2.0 * static_cast<double>(p) / static_cast<double>(cols));
    const double zeta = (2.0 * static_cast<double>(p) / static_cast<double>(cols) + 0.4) / 1.4;
    const double power = std::pow(zeta, from_centre / encoding.scale_base);
    const bool neighbours = encoding.pairing == Pairing::interleaved;
    turn(row, neighbours ? 2 * p : p, neighbours ? 2 * p + 1 : p + cols / 2,
         direction * from_centre * frequency, role == Role::query ? power : 1 / power);
  }
}

template <Position P>
void encode_row(double* row, Index cols, const detail::ShiftedPosition<P>& encoding, Index n, Role role,
                double direction = 1) {
  encode_row(row, cols, encoding.position, encoding.offset + n, role, direction);
}

/// The gradient with respect to a row, from the gradient with respect to the encoded row.
template <Position P>
void encode_row_transposed(double* row, Index cols, const P& encoding, Index n, Role role) {
  encode_row(row, cols, encoding, n, role, -1);
}

/// The rows of a matrix in double, with row i encoded at position first_position + i; [rows, cols], compact.
template <class T, Position P>
std::vector<double> encoded(MatrixView<T> x, const P& encoding, Index first_position, Role role) {
  std::vector<double> rows(static_cast<std::size_t>(x.rows * x.cols));
  for (Index i = 0; i < x.rows; ++i) {
    double* row = rows.data() + i * x.cols;
    for (Index c = 0; c < x.cols; ++c) row[c] = static_cast<double>(x.row(i)[c]);
    encode_row(row, x.cols, encoding, first_position + i, role);
  }
  return rows;
}

}  // namespace reference
LONGSPAN_NAMESPACE_END
