// Eigen tensors, maps and matrices as views.
//
// Eigen::Tensor is recognised by its members (data, dimension, Layout), so this header does not include Eigen's Tensor
// module, which takes about as long to compile as all of <Eigen/Core>.
#pragma once

#include <concepts>
#include <type_traits>

#include "longspan/detail/eigen_core.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

namespace detail {

template <class X>
concept EigenTensor = requires(X& x) {
  { std::remove_cvref_t<X>::NumDimensions } -> std::convertible_to<int>;
  { std::remove_cvref_t<X>::Layout } -> std::convertible_to<int>;
  x.dimension(0);
  x.data();
};

template <class X>
concept EigenMatrix = requires(X& x) {
  { std::remove_cvref_t<X>::IsVectorAtCompileTime } -> std::convertible_to<bool>;
  x.data();
  x.outerStride();
  x.innerStride();
};

template <class T>
inline constexpr bool is_view = false;
template <class T>
inline constexpr bool is_view<TensorView<T>> = true;
template <class T>
inline constexpr bool is_view<RowsView<T>> = true;

template <class X>
inline constexpr bool is_tensor_view = false;
template <class T>
inline constexpr bool is_tensor_view<TensorView<T>> = true;

/// The size of a dimension of a tensor, counted from the last one; 1 if the tensor has fewer dimensions.
template <class X>
Index dimension_from_end(const X& x, int from_end) {
  constexpr int rank = X::NumDimensions;
  return from_end < rank ? static_cast<Index>(x.dimensions()[static_cast<std::size_t>(rank - 1 - from_end)])
                         : 1;
}

template <class X>
constexpr void require_row_major() {
  static_assert(int(X::Layout) == int(Eigen::RowMajor),
                "longspan: this tensor is column-major, which is Eigen's default; "
                "declare it Eigen::Tensor<float, 4, Eigen::RowMajor> (or TensorMap of one)");
}

}  // namespace detail

/// Everything that `view()` converts to a TensorView: a TensorView, a row-major Eigen::Tensor or TensorMap of rank 2
/// to 4 ([rows, cols], [heads, rows, cols], [batch, heads, rows, cols]), or an Eigen matrix, Map, Ref or block, which
/// is one head.
template <class X>
concept TensorLike =
    detail::is_tensor_view<std::remove_cvref_t<X>> || detail::EigenTensor<X> || detail::EigenMatrix<X>;

/// The view of a tensor. Costs nothing; the tensor must outlive the view.
template <class T>
constexpr TensorView<T> view(const TensorView<T>& x) noexcept {
  return x;
}

template <detail::EigenTensor X>
auto view(X&& x) {
  using Tensor = std::remove_cvref_t<X>;
  static_assert(Tensor::NumDimensions >= 2 && Tensor::NumDimensions <= 4,
                "longspan: a tensor must have rank 2 [rows, cols], 3 [heads, rows, cols] or 4 [batch, heads, "
                "rows, cols]");
  detail::require_row_major<Tensor>();
  return compact_view(x.data(), detail::dimension_from_end(x, 3), detail::dimension_from_end(x, 2),
                      detail::dimension_from_end(x, 1), detail::dimension_from_end(x, 0));
}

template <detail::EigenMatrix X>
auto view(X&& x) {
  using Matrix = std::remove_cvref_t<X>;
  static_assert(bool(Matrix::IsRowMajor),
                "longspan: this matrix is column-major, which is Eigen's default; declare it "
                "Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>, with one query or "
                "key in each row");
  if (x.innerStride() != 1) {
    detail::refuse("view", "the inner stride of an Eigen matrix", std::to_string(x.innerStride()), "1");
  }
  using Pointer = decltype(x.data());
  const Index rows = x.rows(), cols = x.cols(), stride = x.outerStride();
  return TensorView<std::remove_pointer_t<Pointer>>{x.data(),      1,     1, rows, cols, rows * stride,
                                                    rows * stride, stride};
}

/// Everything that `rows_view()` converts to a RowsView: a RowsView, a row-major Eigen::Tensor or TensorMap of rank 1
/// to 3 ([rows], [heads, rows], [batch, heads, rows]), or an Eigen vector.
template <class X>
concept RowsLike =
    (detail::is_view<std::remove_cvref_t<X>> && !detail::is_tensor_view<std::remove_cvref_t<X>>) ||
    detail::EigenTensor<X> || detail::EigenMatrix<X>;

template <class T>
constexpr RowsView<T> rows_view(const RowsView<T>& x) noexcept {
  return x;
}

template <detail::EigenTensor X>
auto rows_view(X&& x) {
  using Tensor = std::remove_cvref_t<X>;
  static_assert(Tensor::NumDimensions >= 1 && Tensor::NumDimensions <= 3,
                "longspan: log-sum-exps must have rank 1 [rows], 2 [heads, rows] or 3 [batch, heads, rows]");
  detail::require_row_major<Tensor>();
  return compact_rows_view(x.data(), detail::dimension_from_end(x, 2), detail::dimension_from_end(x, 1),
                           detail::dimension_from_end(x, 0));
}

template <detail::EigenMatrix X>
auto rows_view(X&& x) {
  static_assert(bool(std::remove_cvref_t<X>::IsVectorAtCompileTime),
                "longspan: log-sum-exps of one head must be an Eigen vector, with one number for each query");
  using Pointer = decltype(x.data());
  return RowsView<std::remove_pointer_t<Pointer>>{
      x.data(), 1, 1, static_cast<Index>(x.size()), 0, 0, static_cast<Index>(x.innerStride())};
}

LONGSPAN_NAMESPACE_END
