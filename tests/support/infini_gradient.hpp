// Calls of the gradient of Infini-attention, with everything that it can write.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "longspan/gradient/infini_attention.hpp"
#include "longspan/reference/gradient/infini_attention.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace test {

/// A compressive memory of floats that owns its numbers. They are multiples of 2^-8, so that small steps are exact.
struct OwnedState {
  Tensor<float> m;
  Rows<float> z;

  explicit OwnedState(const Shape& shape)
      : m(shape.batch, shape.kv_heads, shape.head_dim, shape.value_dim),
        z(shape.batch, shape.kv_heads, shape.head_dim) {}

  /// A memory as of a few tokens: z is positive.
  void fill(Random& random) {
    for (float& x : m.values) x = static_cast<float>(std::round(256 * 3 * random.normal()) / 256);
    for (float& x : z.values) x = static_cast<float>(std::round(256 * (2 + 3 * random.uniform())) / 256);
  }
  longspan::InfiniState<float> view() { return {m.view(), z.view()}; }
  longspan::InfiniState<const float> constant() const { return {m.view(), z.view()}; }
  bool operator==(const OwnedState& other) const { return m == other.m && z == other.z; }
};

/// The tensors of a call, and all gradients. Tv is also the type of dout.
template <class T>
struct InfiniGradientCall {
  Shape shape;
  Tensor<T> q, k, v, dout, dq, dk, dv;
  std::vector<float> beta, dbeta;
  OwnedState dinitial;

  InfiniGradientCall(const Shape& of, Random& random)
      : shape(of),
        q(of.batch, of.heads, of.q_len, of.head_dim),
        k(of.batch, of.kv_heads, of.kv_len, of.head_dim),
        v(of.batch, of.kv_heads, of.kv_len, of.value_dim),
        dout(of.batch, of.heads, of.q_len, of.value_dim),
        dq(q),
        dk(k),
        dv(v),
        dinitial(of) {
    for (Tensor<T>* x : {&q, &k, &v, &dout}) fill_normal(*x, random);
    // The second derivative of elu + 1 jumps at 0.
    for (Tensor<T>* x : {&q, &k}) {
      for (T& value : x->values) {
        if (std::abs(static_cast<double>(value)) < 0.0625) value = static_cast<T>(0.125f);
      }
    }
  }

  /// Logits of a shape that `gate` accepts, multiples of 2^-8.
  longspan::MatrixView<const float> draw_beta(Random& random) {
    const Index rows = random.chance(0.5) ? 1 : shape.heads, cols = random.chance(0.5) ? 1 : shape.value_dim;
    beta.assign(static_cast<std::size_t>(rows * cols), 0.0f);
    for (float& x : beta) x = static_cast<float>(std::round(256 * 1.5 * random.normal()) / 256);
    return {beta.data(), rows, cols, cols};
  }

  /// Fills all gradients; those of states and beta only if the gradient object asks for them.
  template <class Gradient, class E>
  void run(Gradient& gradient, E&& execution) {
    set(gradient);
    gradient(std::as_const(q).view(), std::as_const(k).view(), std::as_const(v).view(),
             std::as_const(dout).view(), dq.view(), dk.view(), dv.view(), execution);
  }
  template <class Gradient>
  void run_reference(Gradient& gradient) {
    set(gradient);
    longspan::reference::exact{gradient}(std::as_const(q).view(), std::as_const(k).view(),
                                         std::as_const(v).view(), std::as_const(dout).view(), dq.view(),
                                         dk.view(), dv.view());
  }

 private:
  template <class Gradient>
  void set(Gradient& gradient) {
    const auto& of = gradient.attend.beta;
    const Index rows = of.data == nullptr ? 1 : of.rows, cols = of.data == nullptr ? 1 : of.cols;
    dbeta.assign(static_cast<std::size_t>(rows * cols), 7.0f);
    gradient.dbeta = {dbeta.data(), rows, cols, cols};
    gradient.dinitial = dinitial.view();
  }
};

/// The largest difference of two lists, as a share of the largest number of the second, or of 0.1 if all are smaller:
/// gradients that are exactly 0 have rounding errors.
template <class A, class B>
double worst_share(const std::vector<A>& got, const std::vector<B>& wanted) {
  double largest = 0.1, worst = 0;
  for (const auto x : wanted) largest = std::max(largest, std::abs(static_cast<double>(x)));
  for (std::size_t n = 0; n < got.size(); ++n) {
    const double error = std::abs(static_cast<double>(got[n]) - static_cast<double>(wanted[n]));
    if (!(error <= worst)) worst = error;  // NaN is the worst
  }
  return worst / largest;
}

/// The worst of dq, dk and dv of two calls, and of what the options of a gradient ask for.
template <class A, class B>
double worst_of_tensors(const InfiniGradientCall<A>& got, const InfiniGradientCall<B>& wanted) {
  return std::max({worst_share(got.dq.values, wanted.dq.values), worst_share(got.dk.values, wanted.dk.values),
                   worst_share(got.dv.values, wanted.dv.values)});
}
template <class A, class B>
double worst_of_options(const InfiniGradientCall<A>& got, const InfiniGradientCall<B>& wanted) {
  return std::max({worst_share(got.dbeta, wanted.dbeta),
                   worst_share(got.dinitial.m.values, wanted.dinitial.m.values),
                   worst_share(got.dinitial.z.values, wanted.dinitial.z.values)});
}

}  // namespace test
