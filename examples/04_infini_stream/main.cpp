// A million tokens through Infini-attention in constant memory: noise with pairs of a key and a value, which queries at
// the end find in the compressive memory.
// Copy this file, and replace `Pairs` by your model's projections.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <longspan/longspan.hpp>
#include <string>
#include <vector>

using longspan::Index;

constexpr Index head_dim = 64, value_dim = 64, pairs = 16, segment = 2048;

/// In pair n column n of the key is large, and so is column n of the value. A trained model would learn such keys,
/// because phi(q).phi(k) distinguishes keys by their large positive numbers.
class Pairs {
 public:
  /// The token at position i: every 64th token is one of the pairs, all others are noise.
  void token(Index i, float* key, float* value) {
    for (Index c = 0; c < head_dim; ++c) key[c] = -8 + noise();
    for (Index c = 0; c < value_dim; ++c) value[c] = noise();
    if (i % 64 != 0) return;
    const Index pair = i / 64 % pairs;
    key[pair] = 8;
    value[pair] = 4;
  }
  static std::vector<float> question(Index pair) {
    std::vector<float> q(head_dim, -8.0f);
    q[static_cast<std::size_t>(pair)] = 8;
    return q;
  }

 private:
  float noise() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(state_ >> 8) * 0x1p-23f - 1;
  }
  std::uint32_t state_ = 1;
};

double resident_megabytes() {
  double pages = 0;
  if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%*s %lf", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return pages * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1e6;
}

void show_progress(Index done, Index all) {
  if (isatty(STDERR_FILENO) == 0) return;
  const auto filled = static_cast<std::size_t>(40 * done / all);
  std::fprintf(stderr, "\r[%s%s] %3td %%%s", std::string(filled, '#').c_str(),
               std::string(40 - filled, ' ').c_str(), 100 * done / all, done == all ? "\n" : "");
}

int main(int count, char** words) {
  const Index length = count > 1 ? std::atoll(words[1]) : 1'000'000;
  if (length < 64 * pairs + segment) {
    std::fprintf(stderr, "usage: infini_stream [tokens, at least %td]\n", 64 * pairs + segment);
    return 2;
  }
  // With an open gate the outputs come only from the memory, not from the current segment.
  const float beta = std::numeric_limits<float>::infinity();
  longspan::infini_attention attend;
  attend.segment = segment;
  attend.beta = longspan::scalar_gate(beta);
  auto memory = attend.stream({.head_dim = head_dim, .value_dim = value_dim});

  Pairs text;
  longspan::Execution execution;
  std::vector<float> k(segment * head_dim), v(segment * value_dim), out(segment * value_dim);
  double first_megabytes = 0;
  for (Index first = 0; first < length; first += segment) {
    const Index tokens = std::min(segment, length - first);
    for (Index i = 0; i < tokens; ++i)
      text.token(first + i, k.data() + i * head_dim, v.data() + i * value_dim);
    // A model has its own queries; here the keys are used as queries.
    memory.extend(longspan::compact_view(k.data(), 1, 1, tokens, head_dim),
                  longspan::compact_view(k.data(), 1, 1, tokens, head_dim),
                  longspan::compact_view(v.data(), 1, 1, tokens, value_dim),
                  longspan::compact_view(out.data(), 1, 1, tokens, value_dim), execution);
    if (first == 0) first_megabytes = resident_megabytes();
    show_progress(first + tokens, length);
  }
  memory.flush();

  Index recalled = 0;
  for (Index pair = 0; pair < pairs; ++pair) {
    const std::vector<float> q = Pairs::question(pair);
    memory.peek(longspan::compact_view(q.data(), 1, 1, 1, head_dim),
                longspan::compact_view(q.data(), 1, 1, 1, head_dim),
                longspan::compact_view(v.data(), 1, 1, 1, value_dim),
                longspan::compact_view(out.data(), 1, 1, 1, value_dim), execution);
    recalled += std::max_element(out.begin(), out.begin() + value_dim) - out.begin() == pair;
  }
  std::printf("%td tokens; state %.2f MB, resident %.1f MB after the first segment and %.1f MB now\n", length,
              static_cast<double>(memory.bytes()) / 1e6, first_megabytes, resident_megabytes());
  std::printf("recalled %td of %td pairs from the memory\n", recalled, pairs);
  return recalled == pairs ? 0 : 1;
}
