// A contender: one way to compute attention, in one small file, entered in one list.
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

/// Causal prefill: `length` queries against as many keys.
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
  /// Computes softmax attention itself. One that does not brings its own `oracle`.
  bool exact = true;
  /// The speed-ups in the report are over this one.
  bool baseline = false;
  /// The work the method needs, not what an implementation spends: causal counts half of the square.
  std::function<double(const Shape&)> flop;
  /// What has to be kept to continue behind the last token.
  std::function<double(const Shape&)> state_bytes;
  /// Why it cannot run on this shape; empty where it can.
  std::function<std::string(const Shape&)> obstacle;
  /// Untimed, before the calls of a length: what the users of another library have at hand when they call it,
  /// such as a mask. Empty: nothing. The inputs stay where they are until the next call.
  std::function<void(const Inputs<float>&)> prepare;
  /// Writes every row of `out`. May keep memory from call to call.
  std::function<void(const Inputs<float>&, longspan::TensorView<float> out)> run;
  /// Untimed, behind a call: brings to `out` what a library writes to memory or in a layout of its own.
  std::function<void(longspan::TensorView<float> out)> collect;
  /// What it should give, in double; empty: exact causal attention.
  Oracle oracle;

  /// The stream that decodes; empty where the method has none.
  std::string stream;
  /// The stream behind the first `prompt` tokens, which writes to `out`.
  std::function<Decoder(const Inputs<float>&, Index prompt, longspan::TensorView<float> out)> decode;
  /// Seconds of `decode` are those of `run`: the prompt's outputs are computed too.
  bool prompt_is_attended = false;
  /// What it should give where that is not the prefill's.
  Oracle decode_oracle;
};

inline double causal_flop(const Shape& s) {
  return attention_flop(Visible::causal, s.batch, s.heads, s.length, s.length, s.head_dim, s.value_dim);
}

/// Keys and values of every token, in float.
inline double cache_bytes(const Shape& s) {
  return 4.0 * static_cast<double>(s.batch * s.kv_heads * s.length * (s.head_dim + s.value_dim));
}

Contender softmax(Index threads);
Contender landmark(Index threads);
Contender infini(Index threads);
Contender dilated(Index threads);
Contender hybrid(Index threads);
Contender eigen_naive(Index threads);
/// Of the libraries that are installed: bench/peers.
std::vector<Contender> peers(Index threads);

/// The list. A new contender is a file like softmax.cpp, a line above and a line here.
inline std::vector<Contender> all_contenders(Index threads) {
  std::vector<Contender> all{softmax(threads), landmark(threads), infini(threads),
                             dilated(threads), hybrid(threads),   eigen_naive(threads)};
  for (Contender& peer : peers(threads)) all.push_back(std::move(peer));
  return all;
}

}  // namespace bench
