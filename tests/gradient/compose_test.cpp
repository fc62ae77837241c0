#include "longspan/gradient/compose.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "longspan/gradient/infini_attention.hpp"
#include "longspan/reference/gradient/compose.hpp"
#include "longspan/reference/gradient/infini_attention.hpp"
#include "support/catch.hpp"
#include "support/infini_gradient.hpp"
#include "support/refusal.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::causal;
using longspan::for_heads;
using longspan::gated;
using longspan::infini_attention;
using longspan::merged;
using longspan::per_head;
using longspan::softmax_attention;
using longspan::window;

constexpr double u = 0x1p-24;
/// The allowed error in u, as a share of the largest number of a gradient.
constexpr double most_u = 400;

template <class T>
struct BackwardCall {
  Shape shape;
  Tensor<T> q, k, v, out, dout, dq, dk, dv;
  Rows<Arithmetic<T>> lse, dlse;

  BackwardCall(const Shape& of, Random& random)
      : shape(of),
        q(of.batch, of.heads, of.q_len, of.head_dim),
        k(of.batch, of.kv_heads, of.kv_len, of.head_dim),
        v(of.batch, of.kv_heads, of.kv_len, of.value_dim),
        out(of.batch, of.heads, of.q_len, of.value_dim),
        dout(out),
        dq(q),
        dk(k),
        dv(v),
        lse(of.batch, of.heads, of.q_len),
        dlse(lse) {
    for (Tensor<T>* x : {&q, &k, &v, &dout}) fill_normal(*x, random);
    for (auto& x : dlse.values) x = static_cast<Arithmetic<T>>(static_cast<float>(random.normal()));
  }

  BackwardCall<double> in_double() const {
    Random random(0);
    BackwardCall<double> same(shape, random);
    const auto copy = [](const auto& from, auto& to) {
      std::transform(from.values.begin(), from.values.end(), to.values.begin(),
                     [](auto x) { return static_cast<double>(x); });
    };
    copy(q, same.q);
    copy(k, same.k);
    copy(v, same.v);
    copy(dout, same.dout);
    copy(dlse, same.dlse);
    return same;
  }

  template <class Attend>
  void attend(const Attend& functor) {
    functor(std::as_const(q).view(), std::as_const(k).view(), std::as_const(v).view(), out.view(),
            lse.view());
  }
  template <class Gradient, class E>
  void with_lse(const Gradient& gradient, bool has_dlse, E&& execution) {
    const BackwardCall& in = *this;
    if (has_dlse) {
      gradient(in.q.view(), in.k.view(), in.v.view(), in.out.view(), in.lse.view(), in.dout.view(),
               in.dlse.view(), dq.view(), dk.view(), dv.view(), execution);
    } else {
      gradient(in.q.view(), in.k.view(), in.v.view(), in.out.view(), in.lse.view(), in.dout.view(), dq.view(),
               dk.view(), dv.view(), execution);
    }
  }
  template <class Gradient, class E>
  void without_lse(const Gradient& gradient, E&& execution) {
    const BackwardCall& in = *this;
    gradient(in.q.view(), in.k.view(), in.v.view(), in.dout.view(), dq.view(), dk.view(), dv.view(),
             execution);
  }
  template <class Gradient>
  void reference(const Gradient& gradient, bool has_dlse) {
    const BackwardCall& in = *this;
    const longspan::reference::exact exact{gradient};
    if (has_dlse) {
      exact(in.q.view(), in.k.view(), in.v.view(), in.dout.view(), in.dlse.view(), dq.view(), dk.view(),
            dv.view());
    } else {
      exact(in.q.view(), in.k.view(), in.v.view(), in.dout.view(), dq.view(), dk.view(), dv.view());
    }
  }
};

template <class A, class B>
double worst_of(const BackwardCall<A>& got, const BackwardCall<B>& wanted) {
  return std::max({worst_share(got.dq.values, wanted.dq.values), worst_share(got.dk.values, wanted.dk.values),
                   worst_share(got.dv.values, wanted.dv.values)});
}

double loss_of(const BackwardCall<double>& call, bool has_dlse) {
  double sum = 0;
  for (std::size_t n = 0; n < call.out.values.size(); ++n) sum += call.out.values[n] * call.dout.values[n];
  for (std::size_t n = 0; n < call.lse.values.size() && has_dlse; ++n)
    sum += call.lse.values[n] * call.dlse.values[n];
  return sum;
}

/// The worst central difference of a functor's reference, as a share of the largest number of a gradient.
template <class Attend>
double worst_difference(const Attend& attend, BackwardCall<double>& call, bool has_dlse) {
  const longspan::reference::exact exact{attend};
  const auto loss = [&] {
    if (has_dlse) {
      if constexpr (longspan::LseFunctor<Attend>)
        exact(call.q.view(), call.k.view(), call.v.view(), call.out.view(), call.lse.view());
    } else {
      exact(call.q.view(), call.k.view(), call.v.view(), call.out.view());
    }
    return loss_of(call, has_dlse);
  };
  double worst = 0;
  const auto compare = [&](std::vector<double>& x, const std::vector<double>& gradient) {
    std::vector<double> wanted;
    for (double& value : x) {
      const double step = 1e-5, at = value;
      value = at + step;
      const double above = loss();
      value = at - step;
      const double below = loss();
      value = at;
      wanted.push_back((above - below) / (2 * step));
    }
    worst = std::max(worst, worst_share(gradient, wanted));
  };
  compare(call.q.values, call.dq.values);
  compare(call.k.values, call.dk.values);
  compare(call.v.values, call.dv.values);
  return worst;
}

/// A functor that is not softmax_attention: its part of a union is computed again.
auto heads_apart(Index heads) {
  return per_head{for_heads{0, heads / 2, softmax_attention{causal{} & window{.left = 9}}},
                  for_heads{heads / 2, heads, softmax_attention{causal{}}}};
}

}  // namespace

TEST_CASE("references of gradients of compositions: equal central differences", "[gradient][compose]") {
  Random random(1);
  const Shape shape{1, 4, 2, 7, 7, 3, 2};
  const float beta[] = {0.5f, -1, 0, 2};
  const auto check = [&](const auto& attend, bool has_dlse) {
    BackwardCall<double> call(shape, random);
    call.reference(gradient(attend), has_dlse);
    CHECK(worst_difference(attend, call, has_dlse) <= 1e-6);
  };
  for (const bool has_dlse : {false, true}) {
    check(
        merged{softmax_attention{causal{} & window{.left = 2}}, softmax_attention{causal{}}, heads_apart(4)},
        has_dlse);
    check(heads_apart(4), has_dlse);
  }
  infini_attention memory;
  memory.segment = 3;
  const longspan::MatrixView<const float> logits = longspan::per_head_gate(beta);
  check(gated{logits, softmax_attention{causal{}}, heads_apart(4)}, false);
  check(gated{logits, memory, softmax_attention{}}, false);
  check(per_head{for_heads{0, 2, softmax_attention{causal{}}}, for_heads{2, 4, memory}}, false);
  infini_attention outer{gated{logits, softmax_attention{causal{}}, heads_apart(4)}};
  outer.segment = 4;
  check(outer, false);
}

TEST_CASE("gradient of merged: matches its reference", "[gauge][gradient][compose]") {
  for_each_case(20, [](Random& random) {
    const Shape shape{random.between(1, 2),       4, 2, 0, 0, random.pick<Index>({1, 8, 33}),
                      random.pick<Index>({3, 16})};
    Shape sized = shape;
    sized.q_len = sized.kv_len = random.pick<Index>({1, 30, 130});
    const bool has_dlse = random.chance(0.5);
    const auto check = [&](const auto& attend) {
      BackwardCall<float> call(sized, random);
      BackwardCall<double> wanted = call.in_double();
      wanted.reference(gradient(attend), has_dlse);
      call.attend(attend);
      call.with_lse(gradient(attend), has_dlse, longspan::openmp{2});
      INFO(sized.text() << " dlse=" << has_dlse);
      CHECK(worst_of(call, wanted) <= most_u * u);
    };
    const softmax_attention near{causal{} & window{.left = 9}};
    const softmax_attention far{causal{} & !window{.left = 9}};
    check(merged{near, far});
    check(merged{near});
    check(merged{near, heads_apart(4)});
    check(merged{heads_apart(4), merged{far, near}});
  });
}

TEST_CASE("gradient of merged: parts of disjoint keys give the gradient of all keys",
          "[laws][gradient][compose]") {
  Random random(2);
  BackwardCall<float> call(Shape{2, 4, 2, 90, 90, 16, 24}, random), whole = call;
  call.attend(merged{softmax_attention{causal{} & window{.left = 9}},
                     softmax_attention{causal{} & !window{.left = 9}}});
  whole.attend(softmax_attention{causal{}});
  call.with_lse(gradient(merged{softmax_attention{causal{} & window{.left = 9}},
                                softmax_attention{causal{} & !window{.left = 9}}}),
                true, longspan::openmp{2});
  whole.with_lse(gradient(softmax_attention{causal{}}), true, longspan::openmp{2});
  CHECK(worst_of(call, whole) <= most_u * u);
}

TEST_CASE("gradients of compositions: 16-bit tensors add one rounding", "[gauge][gradient][compose]") {
  Random random(3);
  const Shape shape{1, 4, 2, 60, 60, 32, 24};
  const auto check = [&](const auto& attend) {
    BackwardCall<bfloat16> call(shape, random);
    BackwardCall<double> wanted = call.in_double();
    wanted.reference(gradient(attend), false);
    if constexpr (longspan::LseFunctor<std::remove_cvref_t<decltype(attend)>>) {
      call.attend(attend);
      call.with_lse(gradient(attend), false, longspan::openmp{2});
      CHECK(worst_of(call, wanted) <= 3 * 0x1p-8);  // out is rounded too
    } else {
      call.without_lse(gradient(attend), longspan::openmp{2});
      CHECK(worst_of(call, wanted) <= 0x1p-8 + most_u * u);
    }
  };
  check(merged{softmax_attention{causal{}}, heads_apart(4)});
  check(heads_apart(4));
  check(gated{{}, softmax_attention{causal{}}, heads_apart(4)});
}

TEST_CASE("gradient of gated: matches its reference for every shape of beta", "[gauge][gradient][compose]") {
  for_each_case(12, [](Random& random) {
    const Index length = random.pick<Index>({1, 30, 130});
    const Shape shape{2, 4, 2, length, length, 8, 5};
    const Index rows = random.pick<Index>({1, 4}), cols = random.pick<Index>({1, 5});
    std::vector<float> beta(static_cast<std::size_t>(rows * cols)), dbeta = beta, wanted_beta = beta;
    for (float& x : beta) x = static_cast<float>(random.normal());
    infini_attention memory;
    memory.segment = 20;
    const auto check = [&](const auto& attend) {
      BackwardCall<float> call(shape, random);
      BackwardCall<double> wanted = call.in_double();
      auto backward = gradient(attend);
      backward.dbeta = {wanted_beta.data(), rows, cols, cols};
      wanted.reference(backward, false);
      backward.dbeta = {dbeta.data(), rows, cols, cols};
      call.without_lse(backward, longspan::openmp{2});
      CHECK(worst_of(call, wanted) <= most_u * u);
      CHECK(worst_share(dbeta, wanted_beta) <= most_u * u);
    };
    const longspan::MatrixView<const float> logits{beta.data(), rows, cols, cols};
    check(gated{logits, softmax_attention{causal{}}, softmax_attention{}});
    check(gated{logits, memory, heads_apart(4)});
  });
}

TEST_CASE("gradient of per_head: every range has the gradient of its functor", "[laws][gradient][compose]") {
  Random random(4);
  const Shape shape{2, 4, 2, 50, 50, 16, 8};
  BackwardCall<float> call(shape, random), alone(Shape{2, 2, 1, 50, 50, 16, 8}, random);
  const auto attend = heads_apart(4);
  call.attend(attend);
  call.with_lse(gradient(attend), true, longspan::openmp{2});
  const auto copy = [](const Tensor<float>& from, Tensor<float>& to) {
    for (Index b = 0; b < 2; ++b) {
      const float* x = from.row(b, from.heads / 2, 0);
      std::copy_n(x, to.heads * to.rows * to.cols, to.row(b, 0, 0));
    }
  };
  Tensor<float> dq = alone.dq, dk = alone.dk, dv = alone.dv;
  copy(call.q, alone.q);
  copy(call.k, alone.k);
  copy(call.v, alone.v);
  copy(call.dout, alone.dout);
  copy(call.dq, dq);
  copy(call.dk, dk);
  copy(call.dv, dv);
  for (Index b = 0; b < 2; ++b) {
    for (Index h = 0; h < 2; ++h) {
      for (Index i = 0; i < 50; ++i) alone.dlse.view()(b, h, i) = call.dlse(b, 2 + h, i);
    }
  }
  alone.attend(softmax_attention{causal{}});
  alone.with_lse(gradient(softmax_attention{causal{}}), true, longspan::openmp{2});
  CHECK(alone.dq == dq);
  CHECK(alone.dk == dk);
  CHECK(alone.dv == dv);

  // Without an lse of the whole, the functors that return one are called again.
  infini_attention memory;
  memory.segment = 20;
  const per_head mixed{for_heads{0, 2, softmax_attention{causal{}}}, for_heads{2, 4, memory}};
  BackwardCall<double> wanted = call.in_double();
  wanted.reference(gradient(mixed), false);
  call.without_lse(gradient(mixed), longspan::openmp{2});
  CHECK(worst_of(call, wanted) <= most_u * u);
}

TEST_CASE("gradient of infini_attention: a local part made of functors", "[gauge][gradient][infini]") {
  Random random(5);
  const Shape shape{2, 4, 2, 70, 70, 8, 6};
  const auto check = [&](auto attend) {
    attend.segment = 20;
    const std::vector<Index> lengths{70, 33};
    attend.lengths = lengths;
    BackwardCall<float> call(shape, random);
    BackwardCall<double> wanted = call.in_double();
    wanted.reference(gradient(attend), false);
    call.without_lse(gradient(attend), longspan::openmp{2});
    CHECK(worst_of(call, wanted) <= most_u * u);
  };
  check(infini_attention{heads_apart(4)});
  check(infini_attention{merged{softmax_attention{causal{}}, heads_apart(4)}});
  check(infini_attention{gated{{}, softmax_attention{causal{}}, heads_apart(4)}});
}

TEST_CASE("gradients of compositions: the executor does not change the result", "[gradient][compose]") {
  Random random(6);
  const Shape shape{2, 4, 2, 300, 300, 16, 8};
  const float beta = 0.3f;
  float dbeta = 0, wanted_beta = 0;
  BackwardCall<float> call(shape, random);
  const merged attend{softmax_attention{causal{} & window{.left = 9}}, heads_apart(4)};
  auto side = gradient(gated{longspan::scalar_gate(beta), softmax_attention{causal{}}, heads_apart(4)});
  call.attend(attend);
  BackwardCall<float> wanted = call, wanted_side = call;
  wanted.with_lse(gradient(attend), true, longspan::serial{});
  side.dbeta = {&wanted_beta, 1, 1, 1};
  wanted_side.without_lse(side, longspan::serial{});
  side.dbeta = {&dbeta, 1, 1, 1};
  const auto same = [&](const BackwardCall<float>& of) {
    return call.dq == of.dq && call.dk == of.dk && call.dv == of.dv;
  };
  for (const Index threads : {1, 2, 3, 7, 16}) {
    call.with_lse(gradient(attend), true, longspan::openmp{threads});
    CHECK(same(wanted));
    call.without_lse(side, longspan::openmp{threads});
    CHECK(same(wanted_side));
    CHECK(dbeta == wanted_beta);
  }
  longspan::Execution execution{ThreadPool(3)};
  call.with_lse(gradient(attend), true, execution);
  CHECK(same(wanted));
  call.without_lse(side, execution);
  CHECK(same(wanted_side));
}

TEST_CASE("gradients of compositions: what does not fit is refused", "[errors][gradient][compose]") {
  Random random(7);
  BackwardCall<float> call(Shape{1, 4, 2, 20, 20, 8, 6}, random), odd(Shape{1, 4, 2, 20, 20, 8, 5}, random);
  const std::vector<float> beta(3);
  std::vector<float> dbeta(4);
  const auto refuse = [&](const auto& gradient) {
    return refusal([&] { call.without_lse(gradient, longspan::serial{}); });
  };
  const softmax_attention attend{causal{}};
  CHECK(refuse(gradient(gated{longspan::per_head_gate(beta), attend, attend})) ==
        "longspan: gated: beta is [3, 1], wanted [1 or 4, 1 or 6]");
  auto backward = gradient(gated{{}, attend, attend});
  backward.dbeta = {dbeta.data(), 4, 1, 1};
  CHECK(refuse(backward) == "longspan: gradient(gated): dbeta is [4, 1], wanted [1, 1] as beta");
  call.dout = odd.dout;
  CHECK(refusal([&] {
          call.with_lse(gradient(merged{attend, attend}), false, longspan::serial{});
        }) == "longspan: gradient(merged): dout is [1, 4, 20, 5], wanted [1, 4, 20, 6]");
  CHECK(refusal([&] {
          odd.with_lse(gradient(per_head{for_heads{0, 2, attend}}), false, longspan::serial{});
        }) == "longspan: per_head: the end of the last range of heads is 2, wanted the 4 heads of q");
}
