// dilated_attention: LongNet's geometric schedule, dense in segments of 2048, with larger dilations in longer segments.
#include <algorithm>
#include <memory>

#include "compare/contender.hpp"
#include "longspan/dilated_attention.hpp"
#include "longspan/stream/dilated_cache.hpp"
#include "support/dilated_rows.hpp"

namespace bench {
namespace {

std::vector<longspan::Branch> branches_for(Index length) {
  return longspan::geometric_branches_to({2048, 1}, 2, length);
}

}  // namespace

Contender dilated(Index threads) {
  const auto execution = std::make_shared<longspan::Execution<longspan::openmp>>(longspan::openmp{threads});
  Contender contender;
  contender.name = "dilated_attention";
  contender.description =
      "LongNet of longspan: segments 2048, 4096, ... with dilations 1, 2, ... up to the length";
  contender.exact = false;
  contender.flop = [](const Shape& s) {
    return static_cast<double>(s.batch) *
           longspan::dilated_flop(branches_for(s.length), s.heads, s.length, s.head_dim, s.value_dim, true);
  };
  // Query heads with the same KV head may keep different rows.
  contender.state_bytes = [](const Shape& s) {
    double rows = 0;
    for (const longspan::Branch& branch : branches_for(s.length))
      rows +=
          static_cast<double>(longspan::kept_rows(std::min(branch.segment, s.length), 0, branch.dilation));
    return 4 * rows * static_cast<double>(s.batch * s.heads * (s.head_dim + s.value_dim));
  };
  contender.run = [execution](const Inputs<float>& in, longspan::TensorView<float> out) {
    const longspan::dilated_attention attend{branches_for(in.q_len()), longspan::causal{}};
    attend(in.q.view(), in.k.view(), in.v.view(), out, *execution);
  };
  contender.oracle = [threads](const Inputs<float>& in, std::span<const RowId> rows) {
    return exact_dilated_rows<float>(in.q.view(), in.k.view(), in.v.view(), branches_for(in.q_len()), rows,
                                     threads);
  };
  contender.stream = "dilated_cache";
  contender.prompt_is_attended = true;
  contender.decode = [execution](const Inputs<float>& in, Index prompt, longspan::TensorView<float> out) {
    const longspan::dilated_attention attend{branches_for(in.q_len()), longspan::causal{}};
    return decoder_behind(attend.stream<float>(stream_shape(in)), in, prompt, out, execution);
  };
  return contender;
}

}  // namespace bench
