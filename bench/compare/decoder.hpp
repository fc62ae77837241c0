// Decoding: a stream with a prompt, which continues token by token.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "longspan/execution.hpp"
#include "longspan/stream_shape.hpp"
#include "support/owned_tensor.hpp"

namespace bench {

struct Decoder {
  /// Appends token i of the inputs and writes row i of the output.
  std::function<void(Index i)> step;
  std::function<double()> state_bytes;
};

inline longspan::StreamShape stream_shape(const Inputs<float>& in) {
  return {in.batch(), in.heads(), in.kv_heads(), in.head_dim(), in.value_dim()};
}

/// The inputs and the output must outlive the decoder.
template <class Stream, class Execution>
Decoder decoder_behind(Stream stream, const Inputs<float>& in, Index prompt, longspan::TensorView<float> out,
                       const std::shared_ptr<Execution>& execution) {
  stream.append(in.k.view().slice_rows(0, prompt), in.v.view().slice_rows(0, prompt), *execution);
  const auto held = std::make_shared<Stream>(std::move(stream));
  return {[=, q = in.q.view(), k = in.k.view(), v = in.v.view()](Index i) {
            held->extend(q.slice_rows(i, 1), k.slice_rows(i, 1), v.slice_rows(i, 1), out.slice_rows(i, 1),
                         *execution);
          },
          [=] { return static_cast<double>(held->bytes()); }};
}

}  // namespace bench
