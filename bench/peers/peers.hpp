// Attention of other libraries: each is a contender in one file, compiled if the library is installed.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "compare/contender.hpp"
#include "support/format.hpp"

namespace bench {

Contender ggml(Index threads);
Contender onednn(Index threads);
Contender onnxruntime(Index threads);
Contender torch(Index threads);

/// A `Library` has the members prepare(in), run(out), and, if it writes to its own memory, collect(out), as in
/// Contender.
template <class Library>
Contender peer(std::string name, std::string description, Index threads) {
  const auto library = std::make_shared<Library>(threads);
  Contender contender;
  contender.name = std::move(name);
  contender.description = std::move(description);
  contender.flop = causal_flop;
  contender.state_bytes = cache_bytes;
  contender.prepare = [library](const Inputs<float>& in) { library->prepare(in); };
  contender.run = [library](const Inputs<float>&, longspan::TensorView<float> out) { library->run(out); };
  if constexpr (requires { &Library::collect; })
    contender.collect = [library](longspan::TensorView<float> out) { library->collect(out); };
  return contender;
}

/// For `Contender::obstacle` of a library that needs the whole mask or keeps all scores.
inline std::string too_large(const Shape& shape, const std::string& what, double bytes_a_pair) {
  const double bytes = bytes_a_pair * std::pow(static_cast<double>(shape.length), 2);
  return bytes <= 4.5e9 ? std::string() : "skipped: needs " + what + ", " + bytes_text(bytes);
}

/// A matrix [length, length] with `hidden` after the diagonal.
template <class T>
OwnedTensor<T> causal_mask(Index length, T hidden) {
  OwnedTensor<T> mask(1, 1, length, length);
  for (Index i = 0; i < length; ++i) std::fill_n(mask.view().row(0, 0, i) + i + 1, length - i - 1, hidden);
  return mask;
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
