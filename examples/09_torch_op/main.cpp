// Calls the operator from a program with libtorch, and compares it with torch's own arithmetic in double.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

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

int main() {
  const c10::InferenceMode no_gradients;
  const auto attention =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("longspan::attention", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool)>();

  // Tensors [sequences, tokens, heads, head_dim], as projections write them, and a cache with room for more tokens.
  constexpr std::ptrdiff_t sequences = 2, heads = 8, kv_heads = 2, head_dim = 64, room = 1024, length = 530;
  const at::Tensor cache = at::randn({2, sequences, room, kv_heads, head_dim});
  bool right = true;
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
