// softmax_attention: exact, blocked, without a square of scores in memory.
#include <memory>

#include "compare/contender.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/stream/kv_cache.hpp"

namespace bench {

Contender softmax(Index threads) {
  const auto execution = std::make_shared<longspan::Execution<longspan::openmp>>(longspan::openmp{threads});
  Contender contender;
  contender.name = "softmax_attention";
  contender.description = "exact attention of longspan, blocked; keeps K and V of every token";
  contender.flop = causal_flop;
  contender.state_bytes = cache_bytes;
  contender.run = [execution](const Inputs<float>& in, longspan::TensorView<float> out) {
    const longspan::softmax_attention attend{longspan::causal{}};
    attend(in.q.view(), in.k.view(), in.v.view(), out, *execution);
  };
  contender.stream = "kv_cache";
  contender.decode = [execution](const Inputs<float>& in, Index prompt, longspan::TensorView<float> out) {
    const longspan::softmax_attention attend{longspan::causal{}};
    return decoder_behind(attend.stream<float>(stream_shape(in)), in, prompt, out, execution);
  };
  return contender;
}

}  // namespace bench
