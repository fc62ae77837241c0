// A needle-in-a-haystack test at the level of attention: facts are hidden in a text and queried at its end.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "support/hashed_values.hpp"
#include "support/owned_tensor.hpp"

namespace bench {

/// Fact n is hidden in every head at a depth of (n + 1/2) / count of the text, and the n-th of the last
/// `count` tokens queries it. Its key has its own direction and is 2.5 times as long as the keys of the text;
/// the query has the length of the text's queries and the direction of the key; the value has its own direction
/// and the length of the text's values. The last token of the fact's block of 64 has the key of the fact too: like a
/// trained landmark it represents its block. The querying tokens have keys and values of 0.
class Needles {
 public:
  static constexpr Index count = 10, block = 64;

  /// The smallest length with which each fact has its own block before the first query.
  static constexpr Index shortest = 2 * block * count;

  explicit Needles(Inputs<float>& in) : length_(in.q_len()) {
    for (Index b = 0; b < in.batch(); ++b) {
      for (Index h = 0; h < in.kv_heads(); ++h) hide(in, b, h);
    }
    for (Index n = 0; n < count; ++n) {
      for (Index b = 0; b < in.batch(); ++b) {
        for (Index h = 0; h < in.kv_heads(); ++h) {
          clear(in.k.view().row(b, h, question(n)), in.head_dim());
          clear(in.v.view().row(b, h, question(n)), in.value_dim());
        }
      }
    }
  }

  Index question(Index n) const { return length_ - count + n; }

  /// The number of heads whose output for query n is closer to the value of fact n than to that of any other fact.
  Index found(const longspan::TensorView<const float>& out, const longspan::TensorView<const float>& v,
              Index n) const {
    Index hits = 0;
    for (Index b = 0; b < out.batch; ++b) {
      for (Index h = 0; h < out.heads; ++h) {
        const float* answer = out.row(b, h, question(n));
        double best = 0;
        Index nearest = -1;
        for (Index other = 0; other < count; ++other) {
          const float* value = v.row(b, h / (out.heads / v.heads), place(other));
          double product = 0;
          for (Index c = 0; c < v.cols; ++c)
            product += static_cast<double>(answer[c]) * static_cast<double>(value[c]);
          if (nearest < 0 || product > best) best = product, nearest = other;
        }
        hits += nearest == n;
      }
    }
    return hits;
  }

 private:
  Index place(Index n) const {
    const Index depth = (2 * n + 1) * (length_ - count) / (2 * count);
    return depth / block * block + 7;
  }

  static double norm_of(const longspan::TensorView<const float>& x, Index b, Index h) {
    double sum = 0;
    constexpr Index sampled = 64;
    for (Index s = 0; s < sampled; ++s) {
      const float* row = x.row(b, h, s * (x.rows - count - 1) / sampled);
      for (Index c = 0; c < x.cols; ++c) sum += static_cast<double>(row[c]) * static_cast<double>(row[c]);
    }
    return std::sqrt(sum / sampled);
  }

  /// A random vector for `name` with the given norm.
  static std::vector<float> direction(std::uint64_t name, Index cols, double norm) {
    std::vector<float> x(static_cast<std::size_t>(cols));
    double sum = 0;
    for (std::size_t c = 0; c < x.size(); ++c) {
      x[c] = hashed_normal(name, c);
      sum += static_cast<double>(x[c]) * static_cast<double>(x[c]);
    }
    for (float& value : x) value *= static_cast<float>(norm / std::sqrt(sum));
    return x;
  }

  void hide(Inputs<float>& in, Index b, Index h) const {
    constexpr double sharper = 2.5;
    const Index group = in.heads() / in.kv_heads();
    const double key_norm = norm_of(in.k.view(), b, h), value_norm = norm_of(in.v.view(), b, h);
    for (Index n = 0; n < count; ++n) {
      const auto name = static_cast<std::uint64_t>((b * in.kv_heads() + h) * count + n);
      const std::vector<float> key = direction(keys + name, in.head_dim(), sharper * key_norm),
                               value = direction(values + name, in.value_dim(), value_norm);
      const Index last = (place(n) / block + 1) * block - 1;
      for (const Index i : {place(n), last}) {
        std::copy(key.begin(), key.end(), in.k.view().row(b, h, i));
        std::copy(value.begin(), value.end(), in.v.view().row(b, h, i));
      }
      for (Index g = 0; g < group; ++g) {
        const Index head = h * group + g;
        const double length = norm_of(in.q.view(), b, head);
        const std::vector<float> query = direction(keys + name, in.head_dim(), length);
        std::copy(query.begin(), query.end(), in.q.view().row(b, head, question(n)));
      }
    }
  }

  static void clear(float* row, Index cols) { std::fill_n(row, cols, 0.0f); }

  static constexpr std::uint64_t keys = 5u << 20, values = 6u << 20;
  Index length_;
};

}  // namespace bench
