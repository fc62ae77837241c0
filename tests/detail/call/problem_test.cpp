#include "longspan/detail/call/problem.hpp"

#include <cmath>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/refusal.hpp"

namespace {

using namespace longspan;

struct Views {
  std::vector<float> memory = std::vector<float>(1000);
  TensorView<const float> q = compact_view<const float>(memory.data(), 1, 6, 5, 4);
  TensorView<const float> k = compact_view<const float>(memory.data() + 200, 1, 2, 7, 4);
  TensorView<const float> v = compact_view<const float>(memory.data() + 400, 1, 2, 7, 3);
  TensorView<float> out = compact_view(memory.data() + 600, 1, 6, 5, 3);
  RowsView<float> lse = compact_rows_view(memory.data() + 800, 1, 6, 5);

  auto checked() const { return detail::checked_problem("tried", q, k, v, out, lse); }
};

}  // namespace

TEST_CASE("problem: contains the views and the sizes of a call", "[problem]") {
  const Views views;
  const auto problem = views.checked();
  CHECK(problem.group() == 3);
  CHECK(problem.q_len() == 5);
  CHECK(problem.kv_len() == 7);
  CHECK(problem.head_dim() == 4);
  CHECK(problem.value_dim() == 3);
  CHECK(problem.flop() == 2 * 6 * 5 * 7 * (4 + 3));
  CHECK(problem.q.data == views.q.data);
  CHECK(problem.out.data == views.out.data);
  CHECK(problem.lse.data == views.lse.data);
}

TEST_CASE("problem: options are resolved with the sizes", "[problem]") {
  const auto problem = Views().checked();
  const auto by_default = problem.at("f", queries_end_at_keys, {});
  CHECK(by_default.first_query == 7 - 5);
  CHECK(by_default.scale == 1 / std::sqrt(4.0));
  const auto chosen = problem.at("f", -3, 0.75);
  CHECK(chosen.first_query == -3);
  CHECK(chosen.scale == 0.75);

  Views no_columns;
  no_columns.q.cols = no_columns.k.cols = 0;
  CHECK(no_columns.checked().at("f", 0, {}).scale == 1);
}

TEST_CASE("problem: lse is optional", "[problem]") {
  Views views;
  views.lse = detail::no_rows<float>();
  CHECK(views.checked().lse.data == nullptr);
}

TEST_CASE("problem: errors contain the name of the function", "[problem]") {
  Views views;
  views.v.rows = 8;
  CHECK(test::refusal([&] { views.checked(); }) ==
        "longspan: tried: v is [1, 2, 8, 3], wanted [1, 2, 7, value_dim] as k is [1, 2, 7, 4]");
}

TEST_CASE("problem: empty tensors are allowed", "[problem]") {
  Views views;
  views.q.heads = views.k.heads = views.v.heads = views.out.heads = views.lse.heads = 0;
  CHECK(views.checked().group() == 1);
  // Empty tensors may share an address.
  views.out.data = const_cast<float*>(views.q.data);
  CHECK(test::refusal([&] { views.checked(); }).empty());
}
