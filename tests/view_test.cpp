#include "longspan/view.hpp"

#include <array>
#include <numeric>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

using longspan::Index;
using longspan::MatrixView;
using longspan::RowsView;
using longspan::TensorView;

namespace {

/// 0, 1, 2, ...: each element's value is its offset.
std::vector<Index> offsets(std::size_t count) {
  std::vector<Index> values(count);
  std::iota(values.begin(), values.end(), Index{0});
  return values;
}

}  // namespace

TEST_CASE("compact_view: the last dimension is contiguous", "[view]") {
  auto memory = offsets(2 * 3 * 4 * 5);
  const auto x = longspan::compact_view(memory.data(), 2, 3, 4, 5);
  CHECK(x.batch == 2);
  CHECK(x.heads == 3);
  CHECK(x.rows == 4);
  CHECK(x.cols == 5);
  bool right = true;
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 3; ++h) {
      for (Index i = 0; i < 4; ++i) {
        for (Index c = 0; c < 5; ++c) right &= x.row(b, h, i)[c] == ((b * 3 + h) * 4 + i) * 5 + c;
      }
    }
  }
  CHECK(right);
}

TEST_CASE("TensorView: a [batch, rows, heads, cols] buffer is the same view with other strides", "[view]") {
  constexpr Index batch = 2, rows = 3, heads = 4, cols = 5;
  auto memory = offsets(batch * rows * heads * cols);
  const TensorView<Index> x{memory.data(), batch, heads, rows, cols, rows * heads * cols, cols, heads * cols};
  bool right = true;
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < heads; ++h) {
      const MatrixView<Index> matrix = x.matrix(b, h);
      CHECK(matrix.rows == rows);
      CHECK(matrix.cols == cols);
      for (Index i = 0; i < rows; ++i) {
        right &= *x.row(b, h, i) == ((b * rows + i) * heads + h) * cols;
        right &= matrix.row(i) == x.row(b, h, i);
      }
    }
  }
  CHECK(right);
}

TEST_CASE("TensorView: a stride of 0 repeats an input", "[view]") {
  auto memory = offsets(3 * 2);
  TensorView<Index> x = longspan::compact_view(memory.data(), 1, 1, 3, 2);
  x.batch = 7;
  x.heads = 5;
  x.batch_stride = x.head_stride = 0;
  CHECK(x.row(6, 4, 2) == memory.data() + 4);
  CHECK(x.row(0, 0, 2) == x.row(6, 4, 2));
}

TEST_CASE("TensorView: slice_rows returns the same rows of every head", "[view]") {
  auto memory = offsets(2 * 3 * 8 * 4);
  const auto x = longspan::compact_view(memory.data(), 2, 3, 8, 4);
  const auto part = x.slice_rows(2, 5);
  CHECK(part.rows == 5);
  CHECK(part.cols == 4);
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 3; ++h) {
      for (Index i = 0; i < 5; ++i) CHECK(part.row(b, h, i) == x.row(b, h, i + 2));
    }
  }
  CHECK(x.slice_rows(8, 0).empty());
  CHECK(x.slice_rows(0, 8).row(1, 2, 7) == x.row(1, 2, 7));
}

TEST_CASE("TensorView: an empty tensor is sliced without arithmetic on its pointer", "[view]") {
  const TensorView<float> nothing{};
  CHECK(nothing.empty());
  CHECK(nothing.slice_rows(3, 0).data == nullptr);
}

TEST_CASE("TensorView: empty if any dimension is 0", "[view]") {
  float one = 0;
  CHECK_FALSE(longspan::compact_view(&one, 1, 1, 1, 1).empty());
  CHECK(longspan::compact_view(&one, 0, 1, 1, 1).empty());
  CHECK(longspan::compact_view(&one, 1, 0, 1, 1).empty());
  CHECK(longspan::compact_view(&one, 1, 1, 0, 1).empty());
  CHECK(longspan::compact_view(&one, 1, 1, 1, 0).empty());
}

TEST_CASE("RowsView: each index has its stride", "[view]") {
  auto memory = offsets(2 * 3 * 4);
  const auto compact = longspan::compact_rows_view(memory.data(), 2, 3, 4);
  CHECK(compact(1, 2, 3) == (1 * 3 + 2) * 4 + 3);
  const RowsView<Index> strided{memory.data(), 2, 3, 4, 12, 1, 3};  // [batch, rows, heads]
  CHECK(strided(1, 2, 3) == 12 + 3 * 3 + 2);
  compact(0, 0, 1) = 100;
  CHECK(memory[1] == 100);
}

TEST_CASE("views: mutable views convert to const views, but not the other way round", "[view]") {
  STATIC_REQUIRE(std::is_convertible_v<TensorView<float>, TensorView<const float>>);
  STATIC_REQUIRE(std::is_convertible_v<MatrixView<float>, MatrixView<const float>>);
  STATIC_REQUIRE(std::is_convertible_v<RowsView<float>, RowsView<const float>>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<TensorView<const float>, TensorView<float>>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<MatrixView<const float>, MatrixView<float>>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<RowsView<const float>, RowsView<float>>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<TensorView<float>, TensorView<const double>>);

  auto memory = offsets(64);
  const TensorView<Index> x{memory.data(), 1, 2, 3, 4, 30, 14, 4};
  const TensorView<const Index> y = x;
  CHECK(y.row(0, 1, 2) == x.row(0, 1, 2));
  CHECK(y.batch_stride == 30);
  CHECK(y.cols == 4);
  const MatrixView<const Index> matrix = x.matrix(0, 1);
  CHECK(matrix.row(2) == x.row(0, 1, 2));
  const RowsView<const Index> rows = RowsView<Index>{memory.data(), 1, 2, 3, 9, 4, 2};
  CHECK(rows(0, 1, 2) == 4 + 2 * 2);
}

TEST_CASE("views: can be used in constant expressions", "[view]") {
  static constexpr std::array<int, 12> memory{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  constexpr auto x = longspan::compact_view(memory.data(), 1, 2, 3, 2);
  STATIC_REQUIRE(*x.row(0, 1, 2) == 10);
  STATIC_REQUIRE(*x.slice_rows(1, 2).row(0, 1, 0) == 8);
  STATIC_REQUIRE(longspan::compact_rows_view(memory.data(), 1, 3, 4)(0, 2, 1) == 9);
}

#if defined(__linux__) && defined(__LP64__)
TEST_CASE("views: offsets beyond 2^31 elements reach their memory", "[view]") {
  // This is only address space: the test touches two pages of it.
  constexpr std::size_t bytes = std::size_t{24} << 30;
  constexpr Index far = (Index{1} << 31) + 16;
  void* space =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) {
    SUCCEED("this machine provides less address space");
    return;
  }
  auto* memory = static_cast<float*>(space);
  const TensorView<float> rows_apart{memory, 1, 1, 3, 4, 0, 0, far};
  rows_apart.row(0, 0, 2)[3] = 7;
  CHECK(memory[2 * far + 3] == 7);
  const TensorView<float> heads_apart{memory, 1, 3, 1, 4, 0, far, 4};
  CHECK(heads_apart.row(0, 2, 0)[3] == 7);
  CHECK(heads_apart.matrix(0, 2).row(0)[3] == 7);
  const RowsView<float> numbers{memory, 3, 1, 4, far, 4, 1};
  CHECK(numbers(2, 0, 3) == 7);
  CHECK(longspan::compact_view(memory, 3, 1, far / 16, 16).row(2, 0, 0)[3] == 7);
  munmap(space, bytes);
}
#endif
