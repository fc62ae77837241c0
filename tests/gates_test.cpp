#include "longspan/gates.hpp"

#include <cmath>
#include <concepts>
#include <vector>

#include "longspan/partial.hpp"
#include "support/catch.hpp"
#include "support/tensor.hpp"

using longspan::MatrixView;
using longspan::per_head_gate;
using longspan::scalar_gate;

namespace {

template <class T>
concept MakesPerHeadGate = requires(T&& logits) { per_head_gate(static_cast<T&&>(logits)); };
template <class T>
concept MakesScalarGate = requires(T&& logit) { scalar_gate(static_cast<T&&>(logit)); };

// What would leave a view of a dead object is refused.
static_assert(MakesPerHeadGate<std::vector<float>&> && MakesPerHeadGate<const std::vector<double>&>);
static_assert(!MakesPerHeadGate<std::vector<float>> && !MakesPerHeadGate<std::vector<double>>);
static_assert(MakesScalarGate<float&> && MakesScalarGate<const double&>);
static_assert(!MakesScalarGate<float> && !MakesScalarGate<double> && !MakesScalarGate<int&>);
static_assert(std::same_as<decltype(scalar_gate(std::declval<const double&>())), MatrixView<const double>>);

}  // namespace

TEST_CASE("gates: views of the caller's logits", "[gates]") {
  std::vector<float> logits{1, 2, 3};
  const MatrixView<const float> heads = per_head_gate(logits), one = scalar_gate(logits[1]);
  CHECK((heads.rows == 3 && heads.cols == 1));
  CHECK((one.rows == 1 && one.cols == 1));
  logits[1] = 7;
  CHECK(heads.row(1)[0] == 7);
  CHECK(one.row(0)[0] == 7);
}

TEST_CASE("gates: a gate for each head, and one for all", "[gates]") {
  test::Tensor<double> a(1, 2, 1, 2), b(1, 2, 1, 2), out(1, 2, 1, 2);
  a.values.assign(4, 1);
  b.values.assign(4, -3);
  const std::vector<double> logits{std::log(3.0), -std::log(3.0)};
  longspan::gate(per_head_gate(logits), a.view(), b.view(), out.view());
  CHECK(std::abs(out.values[0] - 0) < 1e-14);
  CHECK(std::abs(out.values[3] - -2) < 1e-14);
  longspan::gate(scalar_gate(logits[1]), a.view(), b.view(), out.view());
  CHECK(std::abs(out.values[0] - -2) < 1e-14);
  CHECK(std::abs(out.values[3] - -2) < 1e-14);
}
