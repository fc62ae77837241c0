// The error of softmax_attention does not grow with the number of keys.
#include <utility>

#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::softmax_attention;

/// Values of one sign, so that errors add up, with nearly equal scores.
template <class T>
void check_long(const Shape& shape, bool bf16_products, double limit) {
  Random random(11);
  Call<T, T, T, T> call(shape, Values::log_normal, random);
  softmax_attention attend;
  attend.bf16_products = bf16_products;
  call.run(attend, longspan::openmp{2});
  const Exact exact = exact_attention({}, call);
  const Errors errors = check_against(exact, call, allowance_of<T, T, T, T>(bf16_products));
  INFO(shape.text());
  CHECK(errors.out <= limit);
}

}  // namespace

TEST_CASE("softmax_attention: within the bound for 140000 keys, more than a span", "[gauge][slow]") {
  static_assert(longspan::detail::keys_in_span < 140000);
  for (const Index q_len : {1, 4, 12}) {
    const Shape shape{1, 1, 1, q_len, 140000, 8, 8};
    check_long<float>(shape, true, 8);
    check_long<bfloat16>(shape, false, 8);
    check_long<bfloat16>(shape, true, 16);
  }
}

TEST_CASE("softmax_attention: within the bound for a window far into 140000 keys", "[gauge][mask]") {
  Random random(12);
  for (const Index q_len : {2, 60}) {
    Call<float> call(Shape{1, 2, 1, q_len, 140000, 8, 8}, Values::rising, random);
    softmax_attention attend{longspan::causal{} & longspan::window{.left = 3000}};
    attend.first_query = 131000;
    call.run(attend, longspan::openmp{2});
    Definition what{.sees = [](Index, Index, Index i, Index j) { return j <= i && j >= i - 3000; }};
    what.first_query = 131000;
    check_against(exact_attention(what, call), call);
  }
}

TEST_CASE("softmax_attention: within the bound for 2^20 keys", "[gauge][long]") {
  for (const Index q_len : {2, 12}) {
    const Shape shape{1, 1, 1, q_len, Index{1} << 20, 8, 8};
    check_long<float>(shape, true, 8);
    check_long<bfloat16>(shape, false, 8);
    check_long<bfloat16>(shape, true, 16);
  }
}

TEST_CASE("softmax_attention: every one of 2^18 keys counts", "[exact]") {
  // Equal scores, so p = 2^-18 for each key. Column c of V counts the keys whose bit c is set, so that a lost or
  // repeated key changes some column. Every sum is exact.
  constexpr Index kv_len = Index{1} << 18;
  for (const Index q_len : {1, 9, 30}) {
    Call<float> call(Shape{1, 1, 1, q_len, kv_len, 2, 18});
    for (Index j = 0; j < kv_len; ++j) {
      for (Index c = 0; c < 18; ++c) call.v.row(0, 0, j)[c] = static_cast<float>((j >> c) & 1);
    }
    for (const Index threads : {1, 3}) {
      Call<float> own = call;
      own.run(softmax_attention{}, longspan::openmp{threads});
      for (const float x : own.out.values) REQUIRE(x == 0.5f);
    }
  }
}
