// Streams a text of a million tokens through a landmark cache and finds a needle in its first part.
// Copy this file, and replace `Text` by your model's projections.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <longspan/longspan.hpp>
#include <vector>

using longspan::Index;

namespace model {
constexpr Index heads = 4, kv_heads = 1, head_dim = 64, block = 64, chunk = 4096;
}

/// Keys and values instead of a model's: noise, except for one token, the needle. A trained landmark represents its
/// block, so the landmark of the needle's block is similar to the needle.
class Text {
 public:
  explicit Text(Index needle) : needle_(needle), meaning_(row(-1)) {}

  std::vector<float> keys(Index first, Index count) const {
    std::vector<float> k;
    for (Index j = first; j < first + count; ++j) {
      const bool stands_out = j == needle_ || j == needle_ / model::block * model::block + model::block - 1;
      const std::vector<float> key = stands_out ? meaning_ : row(j);
      k.insert(k.end(), key.begin(), key.end());
    }
    return k;
  }
  /// The first column of a value is the position of its token.
  std::vector<float> values(Index first, Index count) const {
    std::vector<float> v(static_cast<std::size_t>(count * model::head_dim));
    for (Index j = 0; j < count; ++j)
      v[static_cast<std::size_t>(j * model::head_dim)] = static_cast<float>(first + j);
    return v;
  }
  /// Queries for every head that are similar to the needle.
  std::vector<float> question() const {
    std::vector<float> q;
    for (Index h = 0; h < model::heads; ++h) {
      for (const float x : meaning_) q.push_back(16 * x);
    }
    return q;
  }

 private:
  /// Numbers from -1 to 1 that depend only on the token.
  static std::vector<float> row(Index token) {
    std::vector<float> x;
    auto state = static_cast<std::uint32_t>(token) * 2654435761u + 1;
    for (Index c = 0; c < model::head_dim; ++c) {
      state = state * 1664525u + 1013904223u;
      x.push_back(static_cast<float>(state >> 8) * 0x1p-23f - 1);
    }
    return x;
  }

  Index needle_;
  std::vector<float> meaning_;
};

int main(int count, char** words) {
  const Index length = count > 1 ? std::atoll(words[1]) : 1'000'000, needle = 12345;
  if (length <= needle + model::block) {
    std::fprintf(stderr, "usage: landmark [tokens, more than %td]\n", needle + model::block);
    return 2;
  }
  const Text text(needle);
  const longspan::landmark_retrieval retrieve{{.block_size = model::block, .top_k = 4}};
  auto cache = retrieve.stream({.heads = model::heads,
                                .kv_heads = model::kv_heads,
                                .head_dim = model::head_dim,
                                .value_dim = model::head_dim});

  // The text. A model would also have queries here: cache.extend(q, k, v, out).
  for (Index first = 0; first < length; first += model::chunk) {
    const Index tokens = std::min(model::chunk, length - first);
    const auto k = text.keys(first, tokens), v = text.values(first, tokens);
    cache.append(longspan::compact_view(k.data(), 1, model::kv_heads, tokens, model::head_dim),
                 longspan::compact_view(v.data(), 1, model::kv_heads, tokens, model::head_dim));
  }
  std::printf("%td tokens in %td blocks, %.0f MB\n", cache.size(), cache.blocks(),
              static_cast<double>(cache.bytes()) / 1e6);

  // A few more tokens, each of which queries the needle.
  const auto q = text.question();
  std::vector<float> out(static_cast<std::size_t>(model::heads * model::head_dim));
  longspan::Execution execution;
  std::chrono::duration<double, std::milli> took{};
  for (Index token = length; token < length + 3; ++token) {
    const auto k = text.keys(token, 1), v = text.values(token, 1);
    const auto start = std::chrono::steady_clock::now();
    cache.extend(longspan::compact_view(q.data(), 1, model::heads, 1, model::head_dim),
                 longspan::compact_view(k.data(), 1, model::kv_heads, 1, model::head_dim),
                 longspan::compact_view(v.data(), 1, model::kv_heads, 1, model::head_dim),
                 longspan::compact_view(out.data(), 1, model::heads, 1, model::head_dim), execution);
    took = std::chrono::steady_clock::now() - start;
  }

  std::printf("retrieved blocks:");
  for (const Index n : cache.retrieved(0, 0, 0)) std::printf(" %td", n);
  std::printf("\nthe needle is in block %td; the answer is token %.1f, in %.2f ms\n", needle / model::block,
              static_cast<double>(out[0]), took.count());
  return std::abs(out[0] - static_cast<float>(needle)) < 1 ? 0 : 1;
}
