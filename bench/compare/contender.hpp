// A contender: one implementation of attention, in one small file, registered in one list.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "compare/decoder.hpp"
#include "support/exact_rows.hpp"
#include "support/owned_tensor.hpp"

namespace bench {

/// Causal prefill: `length` queries and `length` keys.
struct Shape {
  Index batch = 1;
  Index heads = 8;
  Index kv_heads = 8;
  Index length = 0;
  Index head_dim = 64;
  Index value_dim = 64;
};

using Oracle = std::function<std::vector<ExactRow>(const Inputs<float>&, std::span<const RowId>)>;

struct Contender {
  std::string name;
  std::string description;
  /// True if it computes exact softmax attention. Otherwise it has its own `oracle`.
  bool exact = true;
  /// True for the contender to which the speed-ups in the report refer.
  bool baseline = false;
  /// The work that the method needs, whatever the implementation does: causal counts half of the square.
  std::function<double(const Shape&)> flop;
  /// The bytes that must be kept to continue after the last token.
  std::function<double(const Shape&)> state_bytes;
  /// The reason why it cannot run with this shape; empty if it can.
  std::function<std::string(const Shape&)> obstacle;
  /// Not timed, before the calls of a length: prepares what users of another library have before they call it,
  /// such as a mask. May be empty. The inputs stay in place until the next call.
  std::function<void(const Inputs<float>&)> prepare;
  /// Writes every row of `out`. May keep memory from call to call.
  std::function<void(const Inputs<float>&, longspan::TensorView<float> out)> run;
  /// Not timed, after a call: copies a result in the library's own memory or layout to `out`.
  std::function<void(longspan::TensorView<float> out)> collect;
  /// The exact result, in double; empty: exact causal attention.
  Oracle oracle;

  /// The name of the stream that decodes; empty if the method has none.
  std::string stream;
  /// The stream after the first `prompt` tokens, which writes to `out`.
  std::function<Decoder(const Inputs<float>&, Index prompt, longspan::TensorView<float> out)> decode;
  /// True if `decode` takes as long as `run`, because the prompt's outputs are computed too.
  bool prompt_is_attended = false;
  /// The exact result of decoding if it differs from that of the prefill.
  Oracle decode_oracle;
};

inline double causal_flop(const Shape& s) {
  return attention_flop(Visible::causal, s.batch, s.heads, s.length, s.length, s.head_dim, s.value_dim);
}

/// The bytes of the keys and values of every token, in float.
inline double cache_bytes(const Shape& s) {
  return 4.0 * static_cast<double>(s.batch * s.kv_heads * s.length * (s.head_dim + s.value_dim));
}

Contender softmax(Index threads);
Contender landmark(Index threads);
Contender infini(Index threads);
Contender dilated(Index threads);
Contender hybrid(Index threads);
Contender eigen_naive(Index threads);
/// The contenders of the installed libraries, see bench/peers.
std::vector<Contender> peers(Index threads);

/// The list of contenders. A new contender is a file like softmax.cpp, a line above, and a line here.
inline std::vector<Contender> all_contenders(Index threads) {
  std::vector<Contender> all{softmax(threads), landmark(threads), infini(threads),
                             dilated(threads), hybrid(threads),   eigen_naive(threads)};
  for (Contender& peer : peers(threads)) all.push_back(std::move(peer));
  return all;
}

}  // namespace bench
