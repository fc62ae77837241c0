// References of gradients, checked against differences of the forward reference.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <vector>

#include "longspan/reference/gradient/exact.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace test {

/// Inputs of a call, and its gradients with respect to each of them.
struct DifferenceCall {
  Tensor<double> q, k, v, dout;
  Rows<double> dlse;
  bool has_dlse = true;
  Tensor<double> dq, dk, dv;

  DifferenceCall(const Shape& s, Random& random)
      : q(s.batch, s.heads, s.q_len, s.head_dim),
        k(s.batch, s.kv_heads, s.kv_len, s.head_dim),
        v(s.batch, s.kv_heads, s.kv_len, s.value_dim),
        dout(s.batch, s.heads, s.q_len, s.value_dim),
        dlse(s.batch, s.heads, s.q_len),
        dq(s.batch, s.heads, s.q_len, s.head_dim, NAN),
        dk(s.batch, s.kv_heads, s.kv_len, s.head_dim, NAN),
        dv(s.batch, s.kv_heads, s.kv_len, s.value_dim, NAN) {
    for (auto* x : {&q, &k, &v, &dout}) fill_normal(*x, random);
    for (double& x : dlse.values) x = random.normal();
  }

  /// sum dout . out + sum dlse . lse
  template <class Attend>
  double loss(const Attend& attend) const {
    Tensor<double> out = dout;
    Rows<double> lse = dlse;
    longspan::reference::exact{attend}(q.view(), k.view(), v.view(), out.view(), lse.view());
    double sum = 0;
    for (std::size_t n = 0; n < out.values.size(); ++n) sum += out.values[n] * dout.values[n];
    for (std::size_t n = 0; n < lse.values.size() && has_dlse; ++n) {
      if (std::isfinite(lse.values[n])) sum += lse.values[n] * dlse.values[n];
    }
    return sum;
  }
  template <class Attend>
  void differentiate(const Attend& attend) {
    differentiate_exactly(longspan::gradient(attend));
  }
  template <class Gradient>
  void differentiate_exactly(const Gradient& gradient) {
    const longspan::reference::exact exact{gradient};
    if (has_dlse) {
      exact(q.view(), k.view(), v.view(), dout.view(), dlse.view(), dq.view(), dk.view(), dv.view());
    } else {
      exact(q.view(), k.view(), v.view(), dout.view(), dq.view(), dk.view(), dv.view());
    }
  }

  std::array<Tensor<double>*, 3> inputs() { return {&q, &k, &v}; }
  std::array<Tensor<double>*, 3> gradients() { return {&dq, &dk, &dv}; }
};

/// The derivative of f at 0 by central differences of fourth order.
template <class F>
double slope_of(const F& f, double h = 1e-3) {
  return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h);
}

/// Every number of dq, dk and dv against central differences of the loss.
template <class C, class Attend>
void check_differences(const Attend& attend, C problem) {
  problem.differentiate(attend);
  for (std::size_t which = 0; which < 3; ++which) {
    std::vector<double>& x = problem.inputs()[which]->values;
    const std::vector<double>& got = problem.gradients()[which]->values;
    double largest = 1e-3;
    for (const double g : got) largest = std::max(largest, std::abs(g));
    std::size_t wrong = 0;
    for (std::size_t n = 0; n < x.size(); ++n) {
      const double at = x[n];
      const double wanted = slope_of([&](double step) {
        x[n] = at + step;
        return problem.loss(attend);
      });
      x[n] = at;
      wrong += !(std::abs(got[n] - wanted) <= 1e-6 * std::abs(wanted) + 1e-9 * largest);
    }
    INFO("input " << which);
    CHECK(wrong == 0);
  }
}

/// <J x, y> = <x, J^T y> for a random direction x; y are dout and dlse.
template <class C, class Attend>
void check_adjoint(const Attend& attend, C problem, Random& random) {
  problem.differentiate(attend);
  const C at = problem;
  std::array<Tensor<double>, 3> direction{at.q, at.k, at.v};
  double wanted = 0, size = 0;
  for (std::size_t which = 0; which < 3; ++which) {
    fill_normal(direction[which], random);
    const std::vector<double>& gradient = problem.gradients()[which]->values;
    for (std::size_t n = 0; n < gradient.size(); ++n) {
      wanted += direction[which].values[n] * gradient[n];
      size += std::abs(direction[which].values[n] * gradient[n]);
    }
  }
  const double got = slope_of([&](double step) {
    C moved = at;
    for (std::size_t which = 0; which < 3; ++which) {
      for (std::size_t n = 0; n < direction[which].values.size(); ++n)
        moved.inputs()[which]->values[n] += step / 16 * direction[which].values[n];
    }
    return 16 * moved.loss(attend);
  });
  CHECK(std::abs(got - wanted) <= 1e-7 * size);
}

}  // namespace test
