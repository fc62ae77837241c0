#include "longspan/eigen.hpp"

#include <cstddef>
#include <type_traits>
#include <unsupported/Eigen/CXX11/Tensor>
#include <vector>

#include "support/catch.hpp"
#include "support/refusal.hpp"

using longspan::Index;
using longspan::RowsView;
using longspan::TensorView;
using longspan::view;

namespace {

template <class T, int rank>
using RowMajorTensor = Eigen::Tensor<T, rank, Eigen::RowMajor>;
template <class T>
using RowMajorMatrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class T>
std::vector<Index> shape_of(const TensorView<T>& x) {
  return {x.batch, x.heads, x.rows, x.cols};
}
template <class T>
std::vector<Index> shape_of(const RowsView<T>& x) {
  return {x.batch, x.heads, x.rows};
}
using Shape = std::vector<Index>;

/// True if every coefficient of the matrix is at the address that the view of one head has for it.
template <class Matrix, class T>
bool shows(const TensorView<T>& x, const Matrix& matrix) {
  if (shape_of(x) != Shape{1, 1, matrix.rows(), matrix.cols()}) return false;
  for (Index i = 0; i < matrix.rows(); ++i) {
    for (Index c = 0; c < matrix.cols(); ++c) {
      if (&x.row(0, 0, i)[c] != &matrix.coeffRef(i, c)) return false;
    }
  }
  return true;
}

}  // namespace

TEMPLATE_TEST_CASE("view: an Eigen tensor of rank 4", "[eigen]", float, double, Eigen::bfloat16,
                   Eigen::half) {
  RowMajorTensor<TestType, 4> x(2, 3, 4, 5);
  const auto v = view(x);
  STATIC_REQUIRE(std::is_same_v<decltype(v), const TensorView<TestType>>);
  CHECK(shape_of(v) == Shape{2, 3, 4, 5});
  bool right = true;
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 3; ++h) {
      for (Index i = 0; i < 4; ++i) {
        for (Index c = 0; c < 5; ++c) right &= &v.row(b, h, i)[c] == &x(b, h, i, c);
      }
    }
  }
  CHECK(right);
}

TEST_CASE("view: Eigen tensors of rank 2 and 3", "[eigen]") {
  RowMajorTensor<float, 3> three(3, 4, 5);
  CHECK(shape_of(view(three)) == Shape{1, 3, 4, 5});
  CHECK(view(three).row(0, 2, 3) == &three(2, 3, 0));
  RowMajorTensor<float, 2> two(4, 5);
  CHECK(shape_of(view(two)) == Shape{1, 1, 4, 5});
  CHECK(view(two).row(0, 0, 3) == &two(3, 0));
}

TEST_CASE("view: a const tensor gives a view of const elements", "[eigen]") {
  const RowMajorTensor<float, 4> x(1, 2, 3, 4);
  STATIC_REQUIRE(std::is_same_v<decltype(view(x)), TensorView<const float>>);
  CHECK(view(x).row(0, 1, 2) == &x(0, 1, 2, 0));
}

TEST_CASE("view: an Eigen::TensorMap", "[eigen]") {
  std::vector<float> memory(2 * 3 * 4 * 5);
  Eigen::TensorMap<RowMajorTensor<float, 4>> x(memory.data(), 2, 3, 4, 5);
  STATIC_REQUIRE(std::is_same_v<decltype(view(x)), TensorView<float>>);
  CHECK(shape_of(view(x)) == Shape{2, 3, 4, 5});
  CHECK(view(x).row(1, 2, 3) == memory.data() + (1 * 3 + 2) * 20 + 15);

  const float* read_only = memory.data();
  Eigen::TensorMap<const RowMajorTensor<float, 4>> of_const_tensor(read_only, 2, 3, 4, 5);
  STATIC_REQUIRE(std::is_same_v<decltype(view(of_const_tensor)), TensorView<const float>>);
  CHECK(view(of_const_tensor).row(1, 2, 3) == read_only + 115);
  Eigen::TensorMap<RowMajorTensor<const float, 3>> of_const_elements(read_only, 6, 4, 5);
  STATIC_REQUIRE(std::is_same_v<decltype(view(of_const_elements)), TensorView<const float>>);
  CHECK(shape_of(view(of_const_elements)) == Shape{1, 6, 4, 5});
}

TEST_CASE("view: a tensor with 32-bit indices, and one without elements", "[eigen]") {
  Eigen::Tensor<float, 4, Eigen::RowMajor, int> small_index(2, 3, 4, 5);
  CHECK(shape_of(view(small_index)) == Shape{2, 3, 4, 5});
  STATIC_REQUIRE(std::is_same_v<decltype(view(small_index).row_stride), Index>);
  RowMajorTensor<float, 4> nothing(2, 3, 0, 5);
  CHECK(shape_of(view(nothing)) == Shape{2, 3, 0, 5});
  CHECK(view(nothing).empty());
}

TEMPLATE_TEST_CASE("view: an Eigen matrix is one head", "[eigen]", float, double, Eigen::bfloat16,
                   Eigen::half) {
  RowMajorMatrix<TestType> x(4, 5);
  STATIC_REQUIRE(std::is_same_v<decltype(view(x)), TensorView<TestType>>);
  CHECK(shows(view(x), x));
  const RowMajorMatrix<TestType> fixed = x;
  STATIC_REQUIRE(std::is_same_v<decltype(view(fixed)), TensorView<const TestType>>);
  CHECK(shows(view(fixed), fixed));
}

TEST_CASE("view: matrices with gaps between rows", "[eigen]") {
  RowMajorMatrix<float> x(8, 10);
  auto block = x.block(2, 3, 5, 4);
  CHECK(shows(view(block), block));
  CHECK(shows(view(x.block(2, 3, 5, 4)), block));
  CHECK(shows(view(x.middleRows(1, 6)), x.middleRows(1, 6)));
  CHECK(shows(view(x.leftCols(3)), x.leftCols(3)));

  std::vector<float> memory(100);
  Eigen::Map<RowMajorMatrix<float>> compact(memory.data(), 9, 11);
  CHECK(shows(view(compact), compact));
  Eigen::Map<RowMajorMatrix<float>, 0, Eigen::OuterStride<>> apart(memory.data() + 1, 6, 5,
                                                                   Eigen::OuterStride<>(17));
  CHECK(shows(view(apart), apart));
  CHECK(view(apart).row_stride == 17);
  Eigen::Map<const RowMajorMatrix<float>> read_only(memory.data(), 9, 11);
  STATIC_REQUIRE(std::is_same_v<decltype(view(read_only)), TensorView<const float>>);
  CHECK(shows(view(read_only), read_only));

  Eigen::Ref<RowMajorMatrix<float>> ref = block;
  CHECK(shows(view(ref), block));
  const Eigen::Ref<const RowMajorMatrix<float>> const_ref = block;
  STATIC_REQUIRE(std::is_same_v<decltype(view(const_ref)), TensorView<const float>>);
  CHECK(shows(view(const_ref), block));
}

TEST_CASE("view: matrices of a fixed size, of one row and without rows", "[eigen]") {
  Eigen::Matrix<float, 3, 7, Eigen::RowMajor> fixed;
  CHECK(shows(view(fixed), fixed));
  Eigen::RowVectorXf row(6);
  CHECK(shows(view(row), row));
  RowMajorMatrix<float> nothing(0, 6);
  CHECK(shape_of(view(nothing)) == Shape{1, 1, 0, 6});
  CHECK(view(nothing).empty());
}

TEST_CASE("view: a matrix whose rows are not contiguous is refused", "[eigen][errors]") {
  std::vector<float> memory(100);
  using Strides = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
  Eigen::Map<RowMajorMatrix<float>, 0, Strides> apart(memory.data(), 4, 5, Strides(20, 2));
  CHECK(test::refusal([&] { view(apart); }) ==
        "longspan: view: the inner stride of an Eigen matrix is 2, wanted 1");
  Eigen::Map<RowMajorMatrix<float>, 0, Strides> contiguous(memory.data(), 4, 5, Strides(20, 1));
  CHECK(shows(view(contiguous), contiguous));
}

TEST_CASE("view: a view of a view is the same view", "[eigen]") {
  float memory[24];
  const TensorView<float> x{memory, 1, 2, 3, 4, 0, 12, 4};
  CHECK(view(x).data == memory);
  CHECK(shape_of(view(x)) == Shape{1, 2, 3, 4});
  const RowsView<float> rows = longspan::compact_rows_view(&memory[0], 2, 3, 4);
  CHECK(longspan::rows_view(rows).data == memory);
  CHECK(shape_of(longspan::rows_view(rows)) == Shape{2, 3, 4});
}

TEST_CASE("rows_view: Eigen tensors of rank 1 to 3", "[eigen]") {
  RowMajorTensor<float, 3> three(2, 3, 4);
  STATIC_REQUIRE(std::is_same_v<decltype(longspan::rows_view(three)), RowsView<float>>);
  CHECK(shape_of(longspan::rows_view(three)) == Shape{2, 3, 4});
  CHECK(&longspan::rows_view(three)(1, 2, 3) == &three(1, 2, 3));
  RowMajorTensor<double, 2> two(3, 4);
  CHECK(shape_of(longspan::rows_view(two)) == Shape{1, 3, 4});
  CHECK(&longspan::rows_view(two)(0, 2, 3) == &two(2, 3));
  const RowMajorTensor<float, 1> one(4);
  STATIC_REQUIRE(std::is_same_v<decltype(longspan::rows_view(one)), RowsView<const float>>);
  CHECK(shape_of(longspan::rows_view(one)) == Shape{1, 1, 4});
  CHECK(&longspan::rows_view(one)(0, 0, 3) == &one(3));
}

TEST_CASE("rows_view: Eigen vectors, including a column of a matrix", "[eigen]") {
  Eigen::VectorXf column(5);
  CHECK(shape_of(longspan::rows_view(column)) == Shape{1, 1, 5});
  CHECK(&longspan::rows_view(column)(0, 0, 4) == &column(4));
  Eigen::RowVectorXd row(5);
  STATIC_REQUIRE(std::is_same_v<decltype(longspan::rows_view(row)), RowsView<double>>);
  CHECK(&longspan::rows_view(row)(0, 0, 4) == &row(4));
  RowMajorMatrix<float> x(6, 7);
  auto third = x.col(3);
  CHECK(shape_of(longspan::rows_view(third)) == Shape{1, 1, 6});
  CHECK(&longspan::rows_view(third)(0, 0, 5) == &x(5, 3));
  auto last = column.tail(2);
  CHECK(&longspan::rows_view(last)(0, 0, 1) == &column(4));
  const Eigen::VectorXf fixed = column;
  STATIC_REQUIRE(std::is_same_v<decltype(longspan::rows_view(fixed)), RowsView<const float>>);
}

TEST_CASE("TensorLike and RowsLike: only types with memory", "[eigen]") {
  STATIC_REQUIRE(longspan::TensorLike<TensorView<float>>);
  STATIC_REQUIRE(longspan::TensorLike<const TensorView<const float>&>);
  STATIC_REQUIRE(longspan::TensorLike<RowMajorTensor<float, 4>&>);
  STATIC_REQUIRE(longspan::TensorLike<Eigen::TensorMap<RowMajorTensor<float, 4>>&>);
  STATIC_REQUIRE(longspan::TensorLike<RowMajorMatrix<float>&>);
  STATIC_REQUIRE_FALSE(longspan::TensorLike<RowsView<float>>);
  STATIC_REQUIRE_FALSE(longspan::TensorLike<int>);
  STATIC_REQUIRE_FALSE(longspan::TensorLike<float*>);
  STATIC_REQUIRE_FALSE(longspan::TensorLike<std::vector<float>&>);
  using Sum = decltype(RowMajorMatrix<float>() + RowMajorMatrix<float>());
  STATIC_REQUIRE_FALSE(longspan::TensorLike<Sum>);
  using TensorSum = decltype(RowMajorTensor<float, 4>() + RowMajorTensor<float, 4>());
  STATIC_REQUIRE_FALSE(longspan::TensorLike<TensorSum>);

  STATIC_REQUIRE(longspan::RowsLike<RowsView<float>>);
  STATIC_REQUIRE(longspan::RowsLike<Eigen::VectorXf&>);
  STATIC_REQUIRE(longspan::RowsLike<RowMajorTensor<float, 3>&>);
  STATIC_REQUIRE_FALSE(longspan::RowsLike<TensorView<float>>);
  STATIC_REQUIRE_FALSE(longspan::RowsLike<std::vector<float>&>);
}
