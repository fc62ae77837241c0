// The products of the backward pass through a compressive memory, over blocks of rows.
//
// M and z are one matrix [M | z], and the value of a key is [v | 1], so that a read, its norm, a write and the
// gradients of all of them are products with this matrix or with its transpose.
#pragma once

#include <algorithm>
#include <cstddef>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/gradient/products.hpp"
#include "longspan/detail/infini/memory_kernels.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <class Real, FeatureMap F>
Packet<Real> feature_slope_of(const F& feature, Packet<Real> x) {
  if constexpr (requires { feature.derivative_on_packet(x); }) {
    return feature.derivative_on_packet(x);
  } else {
    alignas(64) Real of_lane[std::size_t(lanes<Real>)];
    store<Real>(of_lane, x);
    for (Real& y : of_lane) y = static_cast<Real>(feature.derivative(static_cast<double>(y)));
    return load<Real>(of_lane);
  }
}

/// The sizes of [M | z] of one KV head, and of its gradient: [head_dim][columns], with z after the columns of M and
/// zeros after z. The transpose is [value_dim + 1][padded_head_dim].
template <class Real>
struct StateSizes {
  Index head_dim = 0, value_dim = 0;

  Index columns() const noexcept { return round_up(value_dim + 1, Index{lanes<Real>}); }
  Index padded_head_dim() const noexcept { return round_up(head_dim, Index{lanes<Real>}); }
  Index size() const noexcept { return head_dim * columns(); }
  Index transposed_size() const noexcept { return (value_dim + 1) * padded_head_dim(); }
  /// A sum of products, whose last register tile may be taller than the rows that are left.
  Index sum_size() const noexcept { return round_up(head_dim, rows_in_query_block) * columns(); }
};

/// [M | z] of one KV head, and its transpose.
template <class Real>
struct State {
  const Real* rows = nullptr;
  const Real* transposed = nullptr;
};

/// Blocks of at most rows_in_query_block rows of queries or keys in the scratch memory of one worker. The members
/// called `add_...` and `differentiate_...` use the rows that were loaded last.
template <class Real, FeatureMap F>
class StateRows {
 public:
  static constexpr Index w = lanes<Real>, most = rows_in_query_block;

  static StateRows take(Arena& arena, const StateSizes<Real>& sizes) {
    StateRows rows;
    rows.sizes_ = sizes;
    const Index d = sizes.padded_head_dim(), columns = sizes.columns();
    for (Real** of : {&rows.x_, &rows.phi_, &rows.dphi_}) *of = arena.take<Real>(most * d);
    rows.phi_transposed_ = arena.take<Real>(sizes.head_dim * round_up(most, w));
    for (Real** of : {&rows.value_, &rows.read_, &rows.dvalue_}) *of = arena.take<Real>(most * columns);
    return rows;
  }

  /// Loads rows of queries or keys, and computes their features.
  template <class T, Position P>
  void load_rows(const MatrixView<const T>& x, const F& feature, const P& position, Index first, Role role) {
    const Index d = sizes_.padded_head_dim();
    count_ = x.rows;
    convert_rows(x.data, x.row_stride, count_, x.cols, x_, d);
    position.encode(MatrixView<Real>{x_, count_, x.cols, d}, first, role);
    for (Index at = 0; at < count_ * d; at += w)
      store(phi_ + at, feature_of(feature, load(static_cast<const Real*>(x_ + at))));
  }

  /// [v | 1] of the rows.
  template <class T>
  void load_values(const MatrixView<const T>& v) {
    convert_rows(v.data, v.row_stride, count_, v.cols, value_, sizes_.columns());
    for (Index i = 0; i < count_; ++i) value(i)[v.cols] = 1;
  }

  /// [numerator | norm] of what the memory returns for the rows.
  void read(const State<Real>& state) { multiply<false>(phi_, state.rows, read_); }

  /// The factor that turns the numerator of row i into what the memory returns.
  Real quotient(Index i) const {
    const Real norm = read_row(i)[sizes_.value_dim];
    return norm == Real(0) ? Real(0) : 1 / (std::max)(norm, static_cast<Real>(infini_least_norm));
  }
  /// The derivative of the loss with respect to the norm of row i, from the scalar product of what the memory returned
  /// and its gradient. A norm that was replaced by infini_least_norm has none.
  Real norm_gradient(Index i, Real dot, Real by) const {
    return read_row(i)[sizes_.value_dim] < static_cast<Real>(infini_least_norm) ? Real(0) : -dot * by;
  }

  /// value -= what the memory returns: the rows that the delta rule writes.
  void subtract_read() {
    for (Index i = 0; i < count_; ++i) {
      const Real by = quotient(i);
      for (Index c = 0; c < sizes_.value_dim; ++c) value(i)[c] -= read_row(i)[c] * by;
    }
  }

  /// sum = phi^T [value | 1], or that added to it: a write.
  void add_write(Real* sum, bool is_first) { add_outer(value_, sum, is_first); }
  /// The same with the gradient that replaced the rows of `read`.
  void add_read_gradient(Real* sum, bool is_first) { add_outer(read_, sum, is_first); }

  /// dphi = read [M | z]^T, or that added: the rows of `read` hold the gradient of [numerator | norm].
  void differentiate_read(const State<Real>& state, bool adds) {
    if (adds) {
      multiply_transposed<true>(read_, state.transposed);
    } else {
      multiply_transposed<false>(read_, state.transposed);
    }
  }
  /// dvalue = phi [dM | dz], dphi = [value | 1] [dM | dz]^T.
  void differentiate_write(const State<Real>& change) {
    multiply<false>(phi_, change.rows, dvalue_);
    multiply_transposed<false>(value_, change.transposed);
  }
  /// After `read` and differentiate_write: the rows of `read` become the gradient of [numerator | norm] of the delta
  /// rule.
  void differentiate_difference() {
    for (Index i = 0; i < count_; ++i) {
      const Real by = quotient(i);
      Real dot = 0;
      for (Index c = 0; c < sizes_.value_dim; ++c) {
        dot -= dvalue(i)[c] * read_row(i)[c] * by;
      }
      const Real of_norm = norm_gradient(i, dot, by);
      for (Index c = 0; c < sizes_.value_dim; ++c) read_row(i)[c] = -dvalue(i)[c] * by;
      end_read_row(i, of_norm);
    }
  }
  void end_read_row(Index i, Real of_norm) {
    Real* row = read_row(i);
    row[sizes_.value_dim] = of_norm;
    std::fill(row + sizes_.value_dim + 1, row + sizes_.columns(), Real(0));
  }

  /// Adds dphi, taken back through the feature map and the position encoding, to rows of dq or dk.
  template <Position P>
  void add_to(const MatrixView<Real>& to, const F& feature, const P& position, Index first, Role role) {
    const Index d = sizes_.padded_head_dim();
    for (Index at = 0; at < count_ * d; at += w) {
      store(dphi_ + at, load(static_cast<const Real*>(dphi_ + at)) *
                            feature_slope_of(feature, load(static_cast<const Real*>(x_ + at))));
    }
    position.encode_transposed(MatrixView<Real>{dphi_, count_, sizes_.head_dim, d}, first, role);
    add_rows(dphi_, d, to);
  }
  /// Adds dvalue to rows of dv.
  void add_values_to(const MatrixView<Real>& to) const { add_rows(dvalue_, sizes_.columns(), to); }

  Real* read_row(Index i) const { return read_ + i * sizes_.columns(); }

 private:
  Real* value(Index i) const { return value_ + i * sizes_.columns(); }
  const Real* dvalue(Index i) const { return dvalue_ + i * sizes_.columns(); }

  /// to = a B, B [head_dim][columns].
  template <bool adds>
  void multiply(const Real* a, const Real* b, Real* to) const {
    const Index columns = sizes_.columns();
    multiply_columns<adds>(a, sizes_.padded_head_dim(), count_, b, columns, sizes_.head_dim, to, columns,
                           columns / w);
  }
  /// dphi = a B, B [value_dim + 1][padded_head_dim].
  template <bool adds>
  void multiply_transposed(const Real* a, const Real* b) const {
    const Index d = sizes_.padded_head_dim();
    multiply_columns<adds>(a, sizes_.columns(), count_, b, d, sizes_.value_dim + 1, dphi_, d, d / w);
  }
  /// sum = phi^T a, or that added.
  void add_outer(const Real* a, Real* sum, bool is_first) {
    const Index columns = sizes_.columns(), stride = round_up(most, w);
    for (Index lane = 0; lane < count_; lane += w) {
      const auto row_of = [&](Index i) {
        return static_cast<const Real*>(phi_ + (std::min)(lane + i, count_ - 1) * sizes_.padded_head_dim());
      };
      FloatArithmetic<Real>::pack(row_of, sizes_.head_dim, Real(1), phi_transposed_ + lane, stride);
    }
    if (is_first) {
      multiply_columns<false>(static_cast<const Real*>(phi_transposed_), stride, sizes_.head_dim, a, columns,
                              count_, sum, columns, columns / w);
    } else {
      multiply_columns<true>(static_cast<const Real*>(phi_transposed_), stride, sizes_.head_dim, a, columns,
                             count_, sum, columns, columns / w);
    }
  }
  void add_rows(const Real* from, Index stride, const MatrixView<Real>& to) const {
    for (Index i = 0; i < count_; ++i) {
      const Real* x = from + i * stride;
      Real* y = to.row(i);
      for (Index c = 0; c < to.cols; ++c) y[c] += x[c];
    }
  }

  StateSizes<Real> sizes_;
  Index count_ = 0;
  Real *x_ = nullptr, *phi_ = nullptr, *dphi_ = nullptr;         ///< [rows][padded head_dim]
  Real* phi_transposed_ = nullptr;                               ///< [head_dim][rows]
  Real *value_ = nullptr, *read_ = nullptr, *dvalue_ = nullptr;  ///< [rows][columns]
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
