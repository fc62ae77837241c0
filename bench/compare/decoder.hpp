// Decoding: a stream with a prompt, which continues token by token.
#pragma once

#include <algorithm>
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

template <class T>
longspan::TensorView<T> batch_row(longspan::TensorView<T> x, Index b) {
  x.data += b * x.batch_stride;
  x.batch = 1;
  return x;
}

/// The stream after the first `prompt` tokens, without computing their outputs if possible.
template <class Stream, class Execution>
void take_in(Stream& stream, const Inputs<float>& in, Index prompt, longspan::TensorView<float> out,
             Execution& execution) {
  const auto k = in.k.view().slice_rows(0, prompt), v = in.v.view().slice_rows(0, prompt);
  if constexpr (requires { stream.append(k, v, execution); }) {
    stream.append(k, v, execution);
  } else if constexpr (requires { stream.append(Index{}, k, v, execution); }) {
    for (Index b = 0; b < k.batch; ++b) stream.append(b, batch_row(k, b), batch_row(v, b), execution);
  } else {
    constexpr Index chunk = 4096;
    for (Index first = 0, count = 0; first < prompt; first += count) {
      count = std::min(chunk, prompt - first);
      stream.extend(in.q.view().slice_rows(first, count), k.slice_rows(first, count),
                    v.slice_rows(first, count), out.slice_rows(first, count), execution);
    }
  }
}

/// The inputs and the output must outlive the decoder.
template <class Stream, class Execution>
Decoder decoder_behind(Stream stream, const Inputs<float>& in, Index prompt, longspan::TensorView<float> out,
                       const std::shared_ptr<Execution>& execution) {
  take_in(stream, in, prompt, out, *execution);
  const auto held = std::make_shared<Stream>(std::move(stream));
  return {[=, q = in.q.view(), k = in.k.view(), v = in.v.view()](Index i) {
            held->extend(q.slice_rows(i, 1), k.slice_rows(i, 1), v.slice_rows(i, 1), out.slice_rows(i, 1),
                         *execution);
          },
          [=] { return static_cast<double>(held->bytes()); }};
}

}  // namespace bench
