// Real text as attention input: one token for each byte, embedded and projected by fixed tables.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "longspan/execution.hpp"
#include "longspan/position.hpp"
#include "support/hashed_values.hpp"
#include "support/usage_error.hpp"

namespace bench {

inline std::string read_bytes(const std::filesystem::path& path) {
  std::error_code ignored;
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path, ignored)) {
    throw UsageError(path.string() + " cannot be read, wanted a file");
  }
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// The sources of this repository one after the other, in the order of their paths.
inline std::string repository_text(const std::filesystem::path& root) {
  namespace fs = std::filesystem;
  std::vector<std::string> paths;
  for (const char* folder : {"include", "tests", "bench", "examples"}) {
    if (!fs::is_directory(root / folder)) continue;
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(root / folder)) {
      const fs::path extension = entry.path().extension();
      const bool is_source =
          extension == ".hpp" || extension == ".cpp" || extension == ".md" || extension == ".txt";
      if (entry.is_regular_file() && is_source)
        paths.push_back(fs::relative(entry.path(), root).generic_string());
    }
  }
  if (fs::is_regular_file(root / "README.md")) paths.emplace_back("README.md");
  std::sort(paths.begin(), paths.end());
  std::string text;
  for (const std::string& path : paths) text += read_bytes(root / path);
  if (text.empty())
    throw UsageError("the sources of the library are not at the place of the build; use --text FILE");
  return text;
}

/// The first `length` tokens of a text as q, k, v. A text that is too short is repeated.
///
/// The embedding x of a token is the sum of three hashed vectors, of its last one, two and three bytes, so that equal
/// phrases have similar embeddings. Keys are x W_k; queries are 1.5 x (match W_k + rest W_q), so that a query prefers
/// keys of a similar context, as in trained heads; values are x W_v. Rotary positions make the distance matter. The
/// factor 1.5 makes the softmax neither flat nor one-hot. Keys in effect (exp of the entropy) of the median row, for
/// C++ sources, head_dim 64, at 512 and at 32768 tokens, factor 1: 200 and 16000, factor 1.5: 20 and 6500, factor 2:
/// 3 and 2000.
class TextInput {
 public:
  TextInput(std::string text, Index threads) : text_(std::move(text)), threads_(threads) {
    if (text_.empty()) throw UsageError("the text is empty, wanted at least one byte");
  }

  const std::string& text() const { return text_; }

  Inputs<float> first(Index length, Index heads, Index kv_heads, Index head_dim) const {
    const std::vector<float> x = embedded(length);
    Inputs<float> in{
        {1, heads, length, head_dim}, {1, kv_heads, length, head_dim}, {1, kv_heads, length, head_dim}};
    const float match = std::min(0.9f, 4.5f / std::sqrt(static_cast<float>(head_dim)));
    const float rest = std::sqrt(1 - match * match), sharpness = 1.5f;
    const Index group = heads / kv_heads;
    longspan::openmp{threads_}.for_each(heads + 2 * kv_heads, [&](Index task, Index) {
      if (task < heads) {
        std::vector<float> w = projection(key_table + index(task / group), head_dim);
        const std::vector<float> own = projection(query_table + index(task), head_dim);
        for (std::size_t n = 0; n < w.size(); ++n) w[n] = sharpness * (match * w[n] + rest * own[n]);
        project(x, w, in.q.view().matrix(0, task));
        turn(in.q.view().matrix(0, task), longspan::Role::query);
      } else if (task < heads + kv_heads) {
        const Index head = task - heads;
        project(x, projection(key_table + index(head), head_dim), in.k.view().matrix(0, head));
        turn(in.k.view().matrix(0, head), longspan::Role::key);
      } else {
        const Index head = task - heads - kv_heads;
        project(x, projection(value_table + index(head), head_dim), in.v.view().matrix(0, head));
      }
    });
    return in;
  }

 private:
  static constexpr Index channels = 64;
  static constexpr std::uint64_t key_table = 1u << 20, query_table = 2u << 20, value_table = 3u << 20;

  static std::uint64_t index(Index n) { return static_cast<std::uint64_t>(n); }

  std::vector<float> embedded(Index length) const {
    std::vector<float> x(static_cast<std::size_t>(length * channels));
    longspan::openmp{threads_}.for_each((length + 1023) / 1024, [&](Index task, Index) {
      for (Index i = task * 1024; i < std::min(length, (task + 1) * 1024); ++i) {
        std::uint64_t phrase = 0;
        for (Index back = 0; back < 3; ++back) {
          phrase |= (i >= back ? byte_at(i - back) + 1 : 0) << (16 * back);
          for (Index c = 0; c < channels; ++c) {
            const std::uint64_t name = phrase << 8 | index(back);
            x[static_cast<std::size_t>(i * channels + c)] += hashed_normal(name, index(c)) * 0.57735f;
          }
        }
      }
    });
    return x;
  }

  std::uint64_t byte_at(Index i) const {
    return static_cast<unsigned char>(text_[static_cast<std::size_t>(i) % text_.size()]);
  }

  static std::vector<float> projection(std::uint64_t table, Index head_dim) {
    std::vector<float> w(static_cast<std::size_t>(channels * head_dim));
    for (std::size_t n = 0; n < w.size(); ++n) w[n] = hashed_normal(table, n) * 0.125f;  // 1 / sqrt(channels)
    return w;
  }

  static void project(const std::vector<float>& x, const std::vector<float>& w,
                      longspan::MatrixView<float> to) {
    for (Index i = 0; i < to.rows; ++i) {
      float* row = to.row(i);
      for (Index c = 0; c < channels; ++c) {
        const float factor = x[static_cast<std::size_t>(i * channels + c)];
        const float* from = w.data() + c * to.cols;
        for (Index n = 0; n < to.cols; ++n) row[n] += factor * from[n];
      }
    }
  }

  static void turn(longspan::MatrixView<float> rows, longspan::Role role) {
    if (rows.cols < 2) return;
    longspan::rotary{longspan::Pairing::half_split, 10000, rows.cols / 2 * 2}.encode(rows, 0, role);
  }

  std::string text_;
  Index threads_;
};

}  // namespace bench
