// The gradient of dilated attention: the kernel against its reference, the laws of bits, and errors.
#include "longspan/gradient/dilated_attention.hpp"

#include <cmath>
#include <vector>

#include "longspan/reference/gradient/dilated_attention.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"
#include "support/gradient.hpp"
#include "support/refusal.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::dilated_attention;
using longspan::Mixing;
using longspan::Overlap;

/// The largest error of a tensor, in u of its largest number.
template <class T>
double error_of(const Tensor<T>& got, const std::vector<double>& wanted) {
  double worst = 0, size = 1e-30;
  for (std::size_t n = 0; n < wanted.size(); ++n) {
    const double error = std::abs(static_cast<double>(got.values[n]) - wanted[n]);
    if (!(error <= worst)) worst = error;
    size = std::fmax(size, std::abs(wanted[n]));
  }
  return worst / size / (std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24);
}

template <class T, class Gradient>
void check_gradient(const Shape& shape, const Gradient& gradient, bool with_dlse = false) {
  Random random(11);
  GradientCall<T> call(shape, Values::normal, random);
  call.forward.run(gradient.attend, longspan::openmp{2});
  const auto& forward = std::as_const(call.forward);
  const auto& dout = std::as_const(call.dout);
  std::vector<double> dq(call.dq.values.size()), dk(call.dk.values.size()), dv(call.dv.values.size());
  const auto to_q = longspan::compact_view(dq.data(), shape.batch, shape.heads, shape.q_len, shape.head_dim),
             to_k =
                 longspan::compact_view(dk.data(), shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim),
             to_v = longspan::compact_view(dv.data(), shape.batch, shape.kv_heads, shape.kv_len,
                                           shape.value_dim);
  const longspan::reference::exact reference{gradient};
  if (with_dlse) {
    gradient(forward.q.view(), forward.k.view(), forward.v.view(), forward.out.view(), forward.lse.view(),
             dout.view(), call.dlse.view(), call.dq.view(), call.dk.view(), call.dv.view(),
             longspan::openmp{2});
    reference(forward.q.view(), forward.k.view(), forward.v.view(), dout.view(), call.dlse.view(), to_q, to_k,
              to_v);
  } else {
    gradient(forward.q.view(), forward.k.view(), forward.v.view(), forward.out.view(), forward.lse.view(),
             dout.view(), call.dq.view(), call.dk.view(), call.dv.view(), longspan::openmp{2});
    reference(forward.q.view(), forward.k.view(), forward.v.view(), dout.view(), to_q, to_k, to_v);
  }
  // Sums of these sizes stay below a tenth of this; a wrong or missing term is larger than 10^6.
  constexpr double most = std::is_same_v<T, Eigen::bfloat16> ? 0x1p-7 / 0x1p-24 : 200;
  CHECK(error_of(call.dq, dq) <= most);
  CHECK(error_of(call.dk, dk) <= most);
  CHECK(error_of(call.dv, dv) <= most);
}

/// Both gradients of a functor.
template <class T = float, class Attend>
void check_both(const Shape& shape, const Attend& attend) {
  check_gradient<T>(shape, longspan::gradient(attend), true);
  check_gradient<T>(shape, longspan::gradient(attend, Mixing::detached));
}

}  // namespace

TEST_CASE("gradient of dilated attention: as the reference", "[gauge]") {
  SECTION("segments in one tile, longer ones, and GQA with other offsets") {
    check_both(Shape{2, 6, 2, 333, 333, 24, 17}, dilated_attention{{{16, 1}, {50, 3}, {700, 4}}, causal{}});
  }
  SECTION("double") {
    check_both<double>(Shape{1, 4, 2, 200, 200, 9, 16}, dilated_attention{{{32, 1}, {128, 4}}, causal{}});
  }
  SECTION("bfloat16, by matrix tiles where the machine has them") {
    check_both<Eigen::bfloat16>(Shape{1, 4, 2, 500, 500, 24, 16},
                                dilated_attention{{{32, 1}, {256, 2}, {512, 4}}, causal{}});
  }
  SECTION("without a mask, tokens that no branch keeps") {
    check_both(Shape{1, 4, 4, 150, 150, 16, 16}, dilated_attention{{{20, 2}, {100, 3}}});
  }
  SECTION("more keys than a group of tiles, fewer queries than keys") {
    check_both(Shape{1, 2, 1, 500, 1200, 8, 8}, dilated_attention{{{600, 1}, {1200, 2}}, causal{}});
  }
  SECTION("each key once") {
    dilated_attention attend{{{16, 1}, {64, 2}}, causal{}};
    attend.overlap = Overlap::set;
    check_both(Shape{1, 4, 2, 250, 250, 16, 16}, attend);
  }
  SECTION("zeros of torchscale") {
    dilated_attention attend{{{16, 3}, {64, 5}}};
    attend.zero_pad_compat = true;
    check_both(Shape{1, 5, 5, 201, 201, 16, 16}, attend);
  }
  SECTION("rotary and a cap") {
    check_both(Shape{1, 4, 1, 200, 200, 16, 16},
               dilated_attention{{{64, 1}, {128, 2}},
                                 causal{},
                                 longspan::rotary{longspan::Pairing::half_split},
                                 longspan::softcap{3}});
  }
  SECTION("a mask that is no range") {
    check_both(Shape{1, 2, 2, 200, 200, 16, 16},
               dilated_attention{{{64, 1}, {128, 2}},
                                 causal{} & (longspan::sinks{3} | longspan::window{.left = 9})});
  }
  SECTION("sizes of 0 and 1") {
    check_both(Shape{1, 2, 1, 1, 1, 3, 2}, dilated_attention{{{1, 1}}});
    GradientCall<float> call = [] {
      Random random(1);
      return GradientCall<float>(Shape{1, 2, 1, 0, 5, 3, 2}, Values::normal, random);
    }();
    call.run(dilated_attention{{{4, 1}}});
    for (const float x : call.dk.values) CHECK(x == 0.0f);
    for (const float x : call.dv.values) CHECK(x == 0.0f);
  }
}

TEST_CASE("gradient of dilated attention: one branch (N, 1) is softmax attention", "[laws]") {
  Random random(5);
  GradientCall<float> call(Shape{1, 4, 4, 300, 300, 32, 32}, Values::normal, random);
  call.run(longspan::softmax_attention{causal{}});
  GradientCall<float> dilated = call;
  dilated.differentiate(dilated_attention{{{300, 1}}, causal{}}, longspan::openmp{2});
  // With several spans of keys dq is summed in another order.
  CHECK(dilated.dk == call.dk);
  CHECK(dilated.dv == call.dv);
}

TEST_CASE("gradient of dilated attention: bits do not depend on the threads, nor on the rest of the call",
          "[bits]") {
  Random random(6);
  const dilated_attention attend{{{64, 1}, {256, 4}, {1024, 8}}, causal{}};
  const Shape shape{2, 4, 2, 700, 700, 16, 24};
  GradientCall<float> call(shape, Values::normal, random);
  call.run(attend);
  for (const Index threads : {2, 3, 7, 16}) {
    GradientCall<float> again = call;
    again.differentiate(attend, longspan::openmp{threads});
    CHECK(again.same_gradients(call));
  }
  GradientCall<float> again = call;
  again.differentiate(attend, ThreadPool(3));
  CHECK(again.same_gradients(call));

  // The second batch row alone.
  GradientCall<float> alone(Shape{1, 4, 2, 700, 700, 16, 24}, Values::normal, random);
  const auto second_half = [](const auto& from, auto& to) {
    to.values.assign(from.values.begin() + static_cast<std::ptrdiff_t>(from.values.size() / 2),
                     from.values.end());
  };
  second_half(call.forward.q, alone.forward.q);
  second_half(call.forward.k, alone.forward.k);
  second_half(call.forward.v, alone.forward.v);
  second_half(call.dout, alone.dout);
  alone.run(attend, longspan::openmp{3});
  for (const auto& [whole, part] :
       {std::pair{&call.dq, &alone.dq}, std::pair{&call.dk, &alone.dk}, std::pair{&call.dv, &alone.dv}}) {
    Tensor<float> half = *part;
    second_half(*whole, half);
    CHECK(half == *part);
  }
}

TEST_CASE("gradient of dilated attention: what is hidden has no effect, even if it is NaN", "[masked]") {
  Random random(7);
  const std::vector<Index> kept{150};
  const dilated_attention attend{{{64, 1}, {256, 3}}, longspan::padding{kept}};
  GradientCall<float> call(Shape{1, 3, 3, 200, 200, 16, 16}, Values::normal, random);
  GradientCall<float> poisoned = call;
  for (Index h = 0; h < 3; ++h) {
    for (Index j = 150; j < 200; ++j) {
      std::fill_n(call.forward.k.row(0, h, j), 16, 0.0f);
      std::fill_n(call.forward.v.row(0, h, j), 16, 0.0f);
      std::fill_n(poisoned.forward.k.row(0, h, j), 16, NAN);
      std::fill_n(poisoned.forward.v.row(0, h, j), 16, INFINITY);
    }
  }
  call.run(attend);
  poisoned.run(attend);
  CHECK(poisoned.same_gradients(call));
  for (Index h = 0; h < 3; ++h) {
    for (Index j = 150; j < 200; ++j) CHECK(call.dk.row(0, h, j)[0] == 0.0f);
  }
}

TEST_CASE("gradient of dilated attention: errors", "[errors]") {
  Random random(8);
  GradientCall<float> call(Shape{1, 2, 2, 8, 8, 4, 4}, Values::normal, random);
  call.forward.run(dilated_attention{{{4, 1}}}, longspan::serial{});
  const auto differentiate = [&](const auto& gradient, auto&&... dlse) {
    return refusal([&] {
      gradient(call.forward.q.view(), call.forward.k.view(), call.forward.v.view(), call.forward.out.view(),
               call.forward.lse.view(), call.dout.view(), dlse..., call.dq.view(), call.dk.view(),
               call.dv.view());
    });
  };
  CHECK(differentiate(longspan::gradient(dilated_attention{{{0, 1}}})) ==
        "longspan: gradient(dilated_attention): branch 0 is [segment 0, dilation 1], wanted both at "
        "least 1");
  CHECK(differentiate(longspan::gradient(dilated_attention{{{4, 1}}}, Mixing::detached), call.dlse.view()) ==
        "longspan: gradient(dilated_attention): dlse is a tensor, wanted none with mixing = detached, "
        "where lse "
        "counts as a constant");
  for (const float x : call.dq.values) CHECK(std::isnan(x));
}
