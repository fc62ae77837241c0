// Calls the operator from a program with libtorch, and compares it and its gradients with torch's own arithmetic in
// double.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <utility>

/// softmax(q k^T / sqrt(d)) v, causal, where the last query sees all keys.
static at::Tensor exact(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const std::int64_t group = q.size(1) / k.size(1), n = q.size(2), m = k.size(2);
  const auto wide = [&](const at::Tensor& x) { return x.to(at::kDouble).repeat_interleave(group, 1); };
  const at::Tensor hidden = at::ones({n, m}, at::kBool).triu(m - n + 1);
  const at::Tensor scores =
      at::matmul(q.to(at::kDouble), wide(k).transpose(2, 3)) * std::pow(q.size(3), -0.5);
  return at::matmul(scores.masked_fill(hidden, -INFINITY).softmax(-1), wide(v));
}

using Attention = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool);

/// The largest difference between the gradients of sum(out * dout) through the operator and through torch's arithmetic.
static double gradients_off(const c10::TypedOperatorHandle<Attention>& attention, at::ScalarType type) {
  const auto leaf = [&](std::int64_t heads, std::int64_t rows) {
    return at::randn({2, heads, rows, 32}).to(type).requires_grad_();
  };
  const at::Tensor q = leaf(6, 70), k = leaf(3, 90), v = leaf(3, 90),
                   dout = at::randn({2, 6, 70, 32}).to(type);
  (attention.call(q, k, v, /*causal=*/true) * dout).sum().backward();
  const std::array<at::Tensor, 3> ours{q.grad().clone(), k.grad().clone(), v.grad().clone()};
  for (const at::Tensor& x : {q, k, v}) x.mutable_grad().zero_();
  (exact(q, k, v) * dout.to(at::kDouble)).sum().backward();
  double off = 0;
  for (std::size_t n = 0; n < ours.size(); ++n) {
    const at::Tensor& theirs = (n == 0 ? q : n == 1 ? k : v).grad();
    off = std::fmax(off, (ours[n].to(at::kDouble) - theirs.to(at::kDouble)).abs().max().item<double>());
  }
  return off;
}

int main() {
  const auto attention =
      c10::Dispatcher::singleton().findSchemaOrThrow("longspan::attention", "").typed<Attention>();

  // Tensors [sequences, tokens, heads, head_dim], as projections write them, and a cache with room for more tokens.
  constexpr std::ptrdiff_t sequences = 2, heads = 8, kv_heads = 2, head_dim = 64, room = 1024, length = 530;
  const at::Tensor cache = at::randn({2, sequences, room, kv_heads, head_dim});
  bool right = true;
  for (const auto& [type, bound] : {std::pair{at::kDouble, 1e-12}, std::pair{at::kFloat, 1e-5}}) {
    const double off = gradients_off(attention, type);
    std::printf("gradients, %s: %.1e from those of exact attention\n", at::toString(type), off);
    right = right && off < bound;
  }
  const c10::InferenceMode no_gradients;
  for (const std::ptrdiff_t rows : {500, 1}) {
    for (const auto& [type, bound] : {std::pair{at::kFloat, 1e-5}, std::pair{at::kBFloat16, 2e-2}}) {
      const at::Tensor q = at::randn({sequences, rows, heads, head_dim}).to(type).transpose(1, 2);
      const at::Tensor tokens = cache.to(type).narrow(2, 0, length).transpose(2, 3);
      const at::Tensor k = tokens.select(0, 0), v = tokens.select(0, 1);
      const at::Tensor out = attention.call(q, k, v, /*causal=*/true);
      const double off = (out.to(at::kDouble) - exact(q, k, v)).abs().max().item<double>();
      std::printf("%td queries over %td keys, %s: %.1e from exact attention\n", rows, length,
                  at::toString(type), off);
      right = right && off < bound;
    }
  }
  return right ? 0 : 1;
}
