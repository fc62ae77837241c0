// infini_attention: segments of 2048, and a memory of all earlier segments with gate 1/2.
#include <memory>

#include "compare/contender.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "support/infini_rows.hpp"

namespace bench {

Contender infini(Index threads) {
  constexpr Index segment = 2048;
  const auto execution = std::make_shared<longspan::Execution<longspan::openmp>>(longspan::openmp{threads});
  Contender contender;
  contender.name = "infini_attention";
  contender.description = "Infini-attention: segments of 2048 and a compressive memory, gate 1/2";
  contender.exact = false;
  contender.flop = [](const Shape& s) {
    return infini_flop(s.batch, s.heads, s.kv_heads, s.length, segment, s.head_dim, s.value_dim);
  };
  contender.state_bytes = [](const Shape& s) {
    const Index open = s.length < segment ? s.length : segment;
    return 4.0 * static_cast<double>(s.batch * s.kv_heads *
                                     (s.head_dim * (s.value_dim + 1) + open * (s.head_dim + s.value_dim)));
  };
  contender.run = [execution](const Inputs<float>& in, longspan::TensorView<float> out) {
    longspan::infini_attention attend;
    attend.segment = segment;
    attend(in.q.view(), in.k.view(), in.v.view(), out, *execution);
  };
  contender.oracle = [threads](const Inputs<float>& in, std::span<const RowId> rows) {
    return exact_infini_rows(in, segment, rows, threads);
  };
  contender.stream = "infini_memory";
  contender.decode = [execution](const Inputs<float>& in, Index prompt, longspan::TensorView<float> out) {
    longspan::infini_attention attend;
    attend.segment = segment;
    return decoder_behind(attend.stream<float>(stream_shape(in)), in, prompt, out, execution);
  };
  return contender;
}

}  // namespace bench
