// Strided, non-owning views: the only tensors that the kernels use. This header does not include Eigen.
#pragma once

#include <cstddef>
#include <type_traits>

#include "longspan/version.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// The type of every size, stride, position and offset: 64 bits, signed, counted in elements.
using Index = std::ptrdiff_t;

/// A [rows, cols] matrix. Rows are `row_stride` elements apart, each row is contiguous.
template <class T>
struct MatrixView {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index row_stride = 0;

  LONGSPAN_INLINE constexpr T* row(Index i) const noexcept { return data + i * row_stride; }
  LONGSPAN_INLINE constexpr operator MatrixView<const T>() const noexcept
  requires(!std::is_const_v<T>)
  {
    return {data, rows, cols, row_stride};
  }
};

/// A [batch, heads, rows, cols] tensor in any memory order whose last dimension is contiguous: a [batch, rows, heads,
/// cols] buffer is the same view with other strides, and a stride of 0 repeats an input. A view of mutable elements
/// converts to a view of const elements, but not the other way round.
template <class T>
struct TensorView {
  using Element = T;

  T* data = nullptr;
  Index batch = 0;
  Index heads = 0;
  Index rows = 0;
  Index cols = 0;
  Index batch_stride = 0;
  Index head_stride = 0;
  Index row_stride = 0;

  LONGSPAN_INLINE constexpr T* row(Index b, Index h, Index i) const noexcept {
    return data + b * batch_stride + h * head_stride + i * row_stride;
  }
  LONGSPAN_INLINE constexpr MatrixView<T> matrix(Index b, Index h) const noexcept {
    return {row(b, h, 0), rows, cols, row_stride};
  }
  LONGSPAN_INLINE constexpr bool empty() const noexcept {
    return batch == 0 || heads == 0 || rows == 0 || cols == 0;
  }
  /// Rows [first, first + count) of every head.
  LONGSPAN_INLINE constexpr TensorView slice_rows(Index first, Index count) const noexcept {
    TensorView part = *this;
    part.data = empty() ? data : row(0, 0, first);
    part.rows = count;
    return part;
  }
  LONGSPAN_INLINE constexpr operator TensorView<const T>() const noexcept
  requires(!std::is_const_v<T>)
  {
    return {data, batch, heads, rows, cols, batch_stride, head_stride, row_stride};
  }
};

/// One number for each query: [batch, heads, rows]. Used for log-sum-exps.
template <class T>
struct RowsView {
  using Element = T;

  T* data = nullptr;
  Index batch = 0;
  Index heads = 0;
  Index rows = 0;
  Index batch_stride = 0;
  Index head_stride = 0;
  Index row_stride = 1;

  LONGSPAN_INLINE constexpr T& operator()(Index b, Index h, Index i) const noexcept {
    return data[b * batch_stride + h * head_stride + i * row_stride];
  }
  LONGSPAN_INLINE constexpr operator RowsView<const T>() const noexcept
  requires(!std::is_const_v<T>)
  {
    return {data, batch, heads, rows, batch_stride, head_stride, row_stride};
  }
};

/// A compact [batch, heads, rows, cols] buffer, last dimension fastest.
template <class T>
LONGSPAN_INLINE constexpr TensorView<T> compact_view(T* data, Index batch, Index heads, Index rows,
                                                     Index cols) noexcept {
  return {data, batch, heads, rows, cols, heads * rows * cols, rows * cols, cols};
}

/// A compact [batch, heads, rows] buffer.
template <class T>
LONGSPAN_INLINE constexpr RowsView<T> compact_rows_view(T* data, Index batch, Index heads,
                                                        Index rows) noexcept {
  return {data, batch, heads, rows, heads * rows, rows, 1};
}

LONGSPAN_VOCABULARY_END
