// Numbers that are pure functions of their name: the same on every machine and with any number of threads,
// which std:: distributions do not guarantee.
#pragma once

#include <algorithm>
#include <cstdint>

#include "support/owned_tensor.hpp"

namespace bench {

/// Mixes the bits of `x` by two multiplications and shifts, so that every bit of the result depends on every bit of x.
inline std::uint64_t hashed(std::uint64_t x) {
  x ^= x >> 31;
  x *= 0x9E3779B97F4A7C15u;
  x ^= x >> 30;
  x *= 0xC2B2AE3D27D4EB4Fu;
  return x ^ (x >> 32);
}

inline std::uint64_t hashed(std::uint64_t a, std::uint64_t b) { return hashed(hashed(a + 1) + b); }

/// Nearly normal, mean 0, variance 1: the sum of the four 16-bit parts of a hash, which is exact in float.
inline float hashed_normal(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t bits = hashed(a, b);
  const auto sum =
      static_cast<float>((bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48));
  return (sum - 131070.0f) * (1.0f / 37837.2f);  // 37837.2 = 65536 sqrt(4 / 12)
}

/// Fills a tensor with nearly normal numbers of the stream `seed`.
template <class T>
void fill_hashed(OwnedTensor<T>& tensor, std::uint64_t seed) {
  constexpr Index chunk = 65536;
  const auto count = static_cast<Index>(tensor.values().size());
  longspan::openmp{}.for_each((count + chunk - 1) / chunk, [&](Index task, Index) {
    for (Index n = task * chunk; n < std::min(count, (task + 1) * chunk); ++n) {
      const auto at = static_cast<std::size_t>(n);
      tensor.values()[at] = static_cast<T>(hashed_normal(seed, at));
    }
  });
}

template <class T>
Inputs<T> hashed_inputs(Index heads, Index kv_heads, Index q_len, Index kv_len, Index head_dim) {
  Inputs<T> inputs{
      {1, heads, q_len, head_dim}, {1, kv_heads, kv_len, head_dim}, {1, kv_heads, kv_len, head_dim}};
  fill_hashed(inputs.q, 1);
  fill_hashed(inputs.k, 2);
  fill_hashed(inputs.v, 3);
  return inputs;
}

}  // namespace bench
