// The bits of the gradient of Infini-attention: they do not depend on threads, executor, checkpoints, batch and heads.
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/infini_gradient.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using longspan::infini_attention;
using longspan::InfiniRule;

bool same_bits(const InfiniGradientCall<float>& a, const InfiniGradientCall<float>& b) {
  return a.dq == b.dq && a.dk == b.dk && a.dv == b.dv && Tensor<float>::same_bits(a.dbeta, b.dbeta) &&
         a.dinitial == b.dinitial;
}

}  // namespace

TEST_CASE("gradient of infini_attention: bits do not depend on the executor or on checkpoints",
          "[bits][gradient][infini][slow]") {
  Random random(1);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    const Shape shape{2, 4, 2, 1700, 1700, 24, 20};
    InfiniGradientCall<float> wanted(shape, random);
    infini_attention attend;
    attend.segment = 500;
    attend.rule = rule;
    attend.beta = wanted.draw_beta(random);
    OwnedState initial(shape), dfinal(shape);
    initial.fill(random);
    dfinal.fill(random);
    auto backward = gradient(attend);
    backward.initial = initial.constant();
    backward.dfinal = dfinal.constant();
    InfiniGradientCall<float> call = wanted;
    wanted.run(backward, longspan::serial{});
    for (const Index threads : {1, 2, 3, 7, 16}) {
      call.run(backward, longspan::openmp{threads});
      CHECK(same_bits(call, wanted));
    }
    call.run(backward, ThreadPool(3));
    CHECK(same_bits(call, wanted));
    longspan::Execution execution{longspan::openmp{2}};
    for (const Index apart : {2, 3, 100}) {
      backward.checkpoint_segments = apart;
      call.run(backward, execution);
      CHECK(same_bits(call, wanted));
    }
  }
}

TEST_CASE("gradient of infini_attention: bits of a KV head do not depend on the others",
          "[bits][gradient][infini]") {
  Random random(2);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    InfiniGradientCall<float> call(Shape{3, 4, 2, 700, 700, 16, 16}, random);
    infini_attention attend;
    attend.segment = 300;
    attend.rule = rule;
    auto backward = gradient(attend);
    call.run(backward, longspan::openmp{2});
    const auto part = [](auto x, Index heads) {
      return longspan::detail::slice_heads(longspan::detail::batch_rows(x, 1, 1), heads, heads);
    };
    Tensor<float> dq(1, 2, 700, 16), dk(1, 1, 700, 16), dv = dk;
    auto alone = gradient(attend);
    alone(part(std::as_const(call.q).view(), 2), part(std::as_const(call.k).view(), 1),
          part(std::as_const(call.v).view(), 1), part(std::as_const(call.dout).view(), 2), dq.view(),
          dk.view(), dv.view());
    const auto same = [](const Tensor<float>& x, const Tensor<float>& of, Index first) {
      const std::size_t size = x.values.size();
      const float* from = of.row(1, first, 0);
      return Tensor<float>::same_bits(x.values, std::vector<float>(from, from + size));
    };
    CHECK(same(dq, call.dq, 2));
    CHECK(same(dk, call.dk, 1));
    CHECK(same(dv, call.dv, 1));
  }
}
