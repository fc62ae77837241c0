// What changes no bit of infini_attention: compiled as it is shipped, apart from the tests that compare with a
// tolerance.
#include <utility>

#include "longspan/dilated_attention.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::infini_attention;
using longspan::InfiniRule;

void run(const auto& attend, Call<float>& call, Index threads) {
  attend(std::as_const(call.q).view(), std::as_const(call.k).view(), std::as_const(call.v).view(),
         call.out.view(), longspan::openmp{threads});
}

}  // namespace

TEST_CASE("infini_attention: the same bits with any number of threads", "[bits][infini]") {
  Random random(11);
  Call<float> call(Shape{2, 6, 2, 300, 300, 40, 24}, Values::normal, random);
  const auto check = [&](auto attend) {
    attend.segment = 64;
    Call<float> one = call;
    run(attend, one, 1);
    for (const Index threads : {2, 3, 7, 16}) {
      Call<float> many = call;
      run(attend, many, threads);
      CHECK(many.out == one.out);
    }
  };
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    infini_attention attend;
    attend.rule = rule;
    check(attend);
  }
  check(infini_attention{longspan::dilated_attention({{16, 1}, {64, 3}}, causal{})});
  check(infini_attention{longspan::landmark_attention(longspan::landmarks::every(12))});
}
