// Which memory landmark_attention reads, writes and allocates.
#include <algorithm>
#include <utility>
#include <vector>

#include "longspan/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::landmark_attention;
using longspan::landmarks;

/// A copy of x with the memory layout [batch, rows, heads, cols + gap] and NaN in the gaps.
template <class T>
struct RowsFirst {
  std::vector<T> values;
  TensorView<T> view;

  RowsFirst(const Tensor<T>& x, Index gap) {
    const Index row = x.cols + gap;
    values.assign(static_cast<std::size_t>(x.batch * x.rows * x.heads * row), static_cast<T>(NAN));
    view = {values.data(), x.batch, x.heads, x.rows, x.cols, x.rows * x.heads * row, row, x.heads * row};
    for (Index b = 0; b < x.batch; ++b) {
      for (Index h = 0; h < x.heads; ++h) {
        for (Index i = 0; i < x.rows; ++i) std::copy_n(x.row(b, h, i), x.cols, view.row(b, h, i));
      }
    }
  }
};

}  // namespace

TEST_CASE("landmark_attention: nothing is allocated from the second call on", "[memory]") {
  Random random(1);
  Call<float> call(Shape{2, 4, 2, 300, 700, 16, 10}, Values::normal, random);
  const std::vector<Index> keys{0, 5, 90, 300, 301, 350};
  for (const auto at : {landmarks::every(64), landmarks::every(3), landmarks::at(keys)}) {
    const landmark_attention attend{at};
    longspan::Execution execution(longspan::serial{});
    const auto run = [&] { call.run(attend, execution); };
    CHECK(allocations_of(run) == 1);
    CHECK(allocations_of(run) == 0);
  }
}

TEST_CASE("landmark_attention: strided tensors give the bits of compact ones, and gaps stay untouched",
          "[memory]") {
  for (const Index length : {5, 64, 200}) {
    Random random(static_cast<std::uint64_t>(length));
    Call<float> call(Shape{2, 6, 2, 100, 450, 20, 13}, Values::normal, random);
    const landmark_attention attend{landmarks::every(length)};
    call.run(attend);
    const RowsFirst<float> q(call.q, 3), k(call.k, 1), v(call.v, 2);
    RowsFirst<float> out(Tensor<float>(2, 6, 100, 13), 3);
    attend(TensorView<const float>(q.view), TensorView<const float>(k.view), TensorView<const float>(v.view),
           out.view);
    const RowsFirst<float> wanted(call.out, 3);
    CHECK(Tensor<float>::same_bits(out.values, wanted.values));
  }
}
