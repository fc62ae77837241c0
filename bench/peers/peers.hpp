// Attention of other libraries, each a contender in one file, compiled where the library is installed.
#pragma once

#include <algorithm>

#include "compare/contender.hpp"
#include "support/format.hpp"

namespace bench {

Contender ggml(Index threads);
Contender onednn(Index threads);
Contender onnxruntime(Index threads);
Contender torch(Index threads);

/// What is the same for all of them.
inline Contender peer(std::string name, std::string description) {
  Contender contender;
  contender.name = std::move(name);
  contender.description = std::move(description);
  contender.flop = causal_flop;
  contender.state_bytes = cache_bytes;
  return contender;
}

/// For `Contender::obstacle` of a library that is given its mask as a square of `bytes` a pair.
inline std::string square_mask_too_large(const Shape& shape, double bytes) {
  constexpr Index longest = 16384;
  if (shape.length <= longest) return {};
  const std::string n = std::to_string(shape.length);
  const auto length = static_cast<double>(shape.length);
  return "skipped: needs a mask of " + n + " x " + n + ", " + bytes_text(bytes * length * length);
}

inline void copy_rows(const longspan::TensorView<const float>& from, const longspan::TensorView<float>& to) {
  for (Index b = 0; b < to.batch; ++b) {
    for (Index h = 0; h < to.heads; ++h) {
      for (Index i = 0; i < to.rows; ++i) std::copy_n(from.row(b, h, i), to.cols, to.row(b, h, i));
    }
  }
}

/// A [batch, rows, heads, cols] buffer.
template <class T>
longspan::TensorView<T> rows_before_heads(T* data, const longspan::TensorView<const float>& like) {
  const Index row = like.heads * like.cols;
  return {data, like.batch, like.heads, like.rows, like.cols, like.rows * row, like.cols, row};
}

}  // namespace bench
