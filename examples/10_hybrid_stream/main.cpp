// A million tokens in bounded memory: exact attention in a window, retrieval from the blocks before it, and a
// compressive memory of all older tokens. Queries at the end look for facts of three ages. Copy this file, and
// replace `Text` by your model's projections.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <longspan/longspan.hpp>
#include <string>
#include <vector>

using longspan::Index;

namespace model {
constexpr Index head_dim = 64, block = 64, chunk = 4096, facts = 16;
constexpr Index retrieved_fact = facts - 2, recent_fact = facts - 1;
}  // namespace model

/// In fact n column n of the key is large, and so is column n of the value. The first facts are repeated in the first
/// half of the text; one fact occurs once, 10000 tokens before the end, and one 100 tokens before the end. A trained
/// landmark represents its block, so the block of the fact that occurs once has a similar landmark.
class Text {
 public:
  explicit Text(Index length) : length_(length) {}

  void token(Index i, float* key, float* value) {
    for (Index c = 0; c < model::head_dim; ++c) key[c] = -8 + noise() / 4;
    for (Index c = 0; c < model::head_dim; ++c) value[c] = noise();
    const Index once = (length_ - 10000) / model::block * model::block;
    if (i % model::block == 0 && i < length_ / 2)
      return tell(i / model::block % model::retrieved_fact, key, value);
    if (i == once || i == once + model::block - 1) return tell(model::retrieved_fact, key, value);
    if (i == length_ - 100) tell(model::recent_fact, key, value);
  }
  static std::vector<float> question(Index fact) {
    std::vector<float> q(model::head_dim, -8.0f);
    q[static_cast<std::size_t>(fact)] = 8;
    return q;
  }

 private:
  static void tell(Index fact, float* key, float* value) {
    key[fact] = 8;
    value[fact] = 4;
  }
  float noise() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(state_ >> 8) * 0x1p-23f - 1;
  }
  Index length_;
  std::uint32_t state_ = 1;
};

static double resident_megabytes() {
  double pages = 0;
  if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%*s %lf", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return pages * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1e6;
}

static void show_progress(Index done, Index all) {
  if (isatty(STDERR_FILENO) == 0) return;
  const auto filled = static_cast<std::size_t>(40 * done / all);
  std::fprintf(stderr, "\r[%s%s] %3td %%%s", std::string(filled, '#').c_str(),
               std::string(40 - filled, ' ').c_str(), 100 * done / all, done == all ? "\n" : "");
}

int main(int count, char** words) {
  const Index length = count > 1 ? std::atoll(words[1]) : 1'000'000, least = 300'000;
  if (length < least) {
    std::fprintf(stderr, "usage: hybrid_stream [tokens, at least %td]\n", least);
    return 2;
  }
  // 512 tokens exact, 16384 that can be retrieved; all older tokens are in the memory.
  const longspan::hybrid_retrieval retrieve{
      {.block_size = model::block, .top_k = 4, .window_blocks = 8, .capacity = 256}};
  auto stream = retrieve.stream({.head_dim = model::head_dim, .value_dim = model::head_dim});
  Text text(length);
  longspan::Execution execution;
  std::vector<float> k(model::chunk * model::head_dim), v(model::chunk * model::head_dim),
      out(model::chunk * model::head_dim);
  const auto rows = [](auto& x, Index tokens) {
    return longspan::compact_view(x.data(), 1, 1, tokens, model::head_dim);
  };
  double early_megabytes = 0;
  for (Index first = 0; first < length; first += model::chunk) {
    const Index tokens = std::min(model::chunk, length - first);
    for (Index i = 0; i < tokens; ++i)
      text.token(first + i, k.data() + i * model::head_dim, v.data() + i * model::head_dim);
    // A model has its own queries; here the keys are used as queries.
    stream.extend(rows(k, tokens), rows(k, tokens), rows(v, tokens), rows(out, tokens), execution);
    if (first < 100'000) early_megabytes = resident_megabytes();
    show_progress(first + tokens, length);
  }

  const auto knows = [&](Index fact) {
    const std::vector<float> q = Text::question(fact);
    const std::vector<float> nothing(model::head_dim);  // a key of zeros: the query must not find itself
    auto asked = stream;                                // a copy, so that the stream does not change
    asked.extend(rows(q, 1), rows(nothing, 1), rows(nothing, 1), rows(out, 1), execution);
    return std::max_element(out.begin(), out.begin() + model::head_dim) - out.begin() == fact;
  };
  Index remembered = 0;
  for (Index fact = 0; fact < model::retrieved_fact; ++fact) remembered += knows(fact);
  const bool retrieved = knows(model::retrieved_fact), seen = knows(model::recent_fact);
  std::printf("%td tokens; state %.1f MB, resident %.1f MB after 100000 of them and %.1f MB now\n",
              stream.size(), static_cast<double>(stream.bytes()) / 1e6, early_megabytes,
              resident_megabytes());
  std::printf("%td of %td facts from the memory, %d of 1 by retrieval, %d of 1 from the window\n", remembered,
              model::retrieved_fact, retrieved, seen);
  return remembered == model::retrieved_fact && retrieved && seen ? 0 : 1;
}
