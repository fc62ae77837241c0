// landmark_attention: blocks of 64 keys whose last key is the landmark, with tokens of a model not trained for it.
#include <memory>

#include "compare/contender.hpp"
#include "longspan/landmark_attention.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "support/landmark_rows.hpp"
#include "support/retrieval_rows.hpp"

namespace bench {

Contender landmark(Index threads) {
  constexpr Index block = 64;
  const auto execution = std::make_shared<longspan::Execution<longspan::openmp>>(longspan::openmp{threads});
  Contender contender;
  contender.name = "landmark_attention";
  contender.description = "grouped softmax, blocks of 64 keys with landmarks; decoding retrieves 4 blocks";
  contender.exact = false;
  contender.flop = causal_flop;
  contender.state_bytes = [](const Shape& s) {
    const Index landmarks = s.length / block;
    return cache_bytes(s) - 4.0 * static_cast<double>(s.batch * s.kv_heads * landmarks * s.value_dim);
  };
  contender.run = [execution](const Inputs<float>& in, longspan::TensorView<float> out) {
    const longspan::landmark_attention attend{longspan::landmarks::every(block)};
    attend(in.q.view(), in.k.view(), in.v.view(), out, *execution);
  };
  contender.oracle = [threads](const Inputs<float>& in, std::span<const RowId> rows) {
    return exact_landmark_rows(in, longspan::landmarks::every(block), rows, threads);
  };
  contender.stream = "landmark_cache";
  contender.decode = [execution](const Inputs<float>& in, Index prompt, longspan::TensorView<float> out) {
    longspan::landmark_cache<float> cache(stream_shape(in), {.block_size = block, .top_k = 4});
    return decoder_behind(std::move(cache), in, prompt, out, execution);
  };
  contender.decode_oracle = [threads](const Inputs<float>& in, std::span<const RowId> rows) {
    return exact_retrieval_rows(in, {.block_size = block, .top_k = 4}, rows, threads);
  };
  return contender;
}

}  // namespace bench
