// One decoding loop with five kinds of attention: they differ only in the line that makes the stream.
// Copy this file, and replace `Model` by your model.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <longspan/longspan.hpp>
#include <vector>

using longspan::Index;

namespace {

constexpr longspan::StreamShape shape{.heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64};

/// Queries, keys and values of the tokens [first, first + count), each [1, heads, count, 64].
class Model {
 public:
  void take(Index first, Index count) {
    q_ = projected(shape.heads, first, count, 0.013);
    k_ = projected(shape.kv_heads, first, count, 0.017);
    v_ = projected(shape.kv_heads, first, count, 0.023);
  }
  auto q() const { return longspan::compact_view(q_.data(), 1, shape.heads, tokens(), 64); }
  auto k() const { return longspan::compact_view(k_.data(), 1, shape.kv_heads, tokens(), 64); }
  auto v() const { return longspan::compact_view(v_.data(), 1, shape.kv_heads, tokens(), 64); }

 private:
  Index tokens() const { return static_cast<Index>(q_.size()) / (shape.heads * 64); }
  static std::vector<float> projected(Index heads, Index first, Index count, double frequency) {
    std::vector<float> x;
    for (Index h = 0; h < heads; ++h) {
      for (Index i = first; i < first + count; ++i) {
        for (Index c = 0; c < 64; ++c)
          x.push_back(static_cast<float>(std::sin(frequency * static_cast<double>((i + 7 * h) * (c + 1)))));
      }
    }
    return x;
  }
  std::vector<float> q_, k_, v_;
};

/// The loop: a prompt, then token by token. Prints the memory of the stream and the time of a token.
template <longspan::Stream Stream>
bool decode(const char* name, Stream stream) {
  constexpr Index prompt = 8000, tokens = 200;
  Model model;
  longspan::Execution execution;
  std::vector<float> out(shape.heads * prompt * 64);
  const auto rows = [&](Index count) {
    return longspan::compact_view(out.data(), 1, shape.heads, count, 64);
  };
  double seconds = 0;
  for (Index first = 0, count = prompt; first < prompt + tokens; first += count, count = 1) {
    model.take(first, count);
    const auto start = std::chrono::steady_clock::now();
    stream.extend(model.q(), model.k(), model.v(), rows(count), execution);
    if (count == 1)
      seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  std::printf("%-16s %td tokens %8.2f MB %8.1f us a token\n", name, stream.size(),
              static_cast<double>(stream.bytes()) / 1e6, 1e6 * seconds / tokens);
  return std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); });
}

}  // namespace

int main() {
  using namespace longspan;
  const std::vector<Branch> branches{{2048, 1}, {4096, 2}, {8192, 4}};
  bool fine = decode("kv_cache", softmax_attention{causal{}}.stream(shape));
  fine &= decode("kv_cache, int8", softmax_attention{causal{}}.stream<std::int8_t>(shape));
  fine &= decode("landmark_cache", landmark_retrieval{{.block_size = 64, .top_k = 4}}.stream(shape));
  fine &= decode("infini_memory", infini_attention{}.stream(shape));
  fine &= decode("dilated_cache", dilated_attention{branches, causal{}}.stream(shape));
  fine &= decode("hybrid_stream", hybrid_retrieval{{.capacity = 32}}.stream(shape));
  return fine ? 0 : 1;
}
