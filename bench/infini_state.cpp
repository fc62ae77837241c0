// The state of Infini-attention compared with the keys and values that exact attention would keep.
//
// The model of Munkhdalai et al. 2024 (arXiv 2404.07143), section 4: 12 layers of 8 heads of 128, segments of
// 2048. Every figure is the bytes() of a stream after these tokens, or of the cache that it replaces.
#include <cstdio>

#include "longspan/stream/infini_memory.hpp"
#include "support/hashed_values.hpp"

namespace bench {
namespace {

constexpr Index layers = 12, heads = 8, head_dim = 128, segment = 2048;

/// Floats of one layer: of the memory, and of the memory with half a segment.
struct State {
  double memory = 0, half_full = 0;
};

State state_of_layer() {
  longspan::infini_attention attend;
  attend.segment = segment;
  auto stream = attend.stream({1, heads, heads, head_dim, head_dim});
  State state;
  state.memory = static_cast<double>(stream.bytes()) / sizeof(float);
  const Inputs<float> in = hashed_inputs<float>(heads, heads, segment / 2, segment / 2, head_dim);
  OwnedTensor<float> out = in.empty_output();
  stream.extend(in.q.view(), in.k.view(), in.v.view(), out.view());
  state.half_full = static_cast<double>(stream.bytes()) / sizeof(float);
  return state;
}

void print() {
  const State state = state_of_layer();
  // The strongest baseline of the paper's table 2, Memorizing Transformers: a cache of 2048 tokens in each
  // layer, and a memory of 65536 keys and values in one.
  const double token = 2.0 * heads * head_dim, baseline = token * (layers * segment + 65536);
  std::printf("floats of %td layers, %td heads, d = %td\n\n", layers, heads, head_dim);
  std::printf("%-44s %12.3f M\n", "memory (M and z)", layers * state.memory / 1e6);
  std::printf("%-44s %12.3f M\n", "memory and half a segment", layers * state.half_full / 1e6);
  std::printf("%-44s %12.3f M  %5.0f x the memory\n", "2048 tokens per layer and 65536 in one",
              baseline / 1e6, baseline / (layers * state.memory));
  for (const double tokens : {32768.0, 500e3, 1e6, 1e7}) {
    char name[64];
    std::snprintf(name, sizeof name, "keys and values of %.0f tokens", tokens);
    const double cache = layers * token * tokens;
    std::printf("%-44s %12.3f M  %5.0f x the memory\n", name, cache / 1e6, cache / (layers * state.memory));
  }
}

}  // namespace
}  // namespace bench

int main() { bench::print(); }
