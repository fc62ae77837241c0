// hybrid_stream: the last 512 tokens exact, 4 blocks retrieved from the 16384 before, a memory of all older tokens.
#include "compare/contender.hpp"
#include "longspan/stream/hybrid_stream.hpp"
#include "support/retrieval_rows.hpp"

namespace bench {
namespace {

constexpr RetrievalStream rows_of{
    .block_size = 64, .top_k = 4, .window_blocks = 8, .capacity = 256, .evicted_at_once = 32};

longspan::hybrid_stream<float> stream_for(const Inputs<float>& in) {
  return longspan::hybrid_stream<float>(stream_shape(in), {.block_size = rows_of.block_size,
                                                           .top_k = rows_of.top_k,
                                                           .window_blocks = rows_of.window_blocks,
                                                           .capacity = rows_of.capacity,
                                                           .evicted_at_once = rows_of.evicted_at_once});
}

/// Products with attended keys and values and with landmarks, and reads and writes of the memory.
double useful_flop(const Shape& s) {
  const auto heads = static_cast<double>(s.batch * s.heads),
             kv_heads = static_cast<double>(s.batch * s.kv_heads);
  const auto d = static_cast<double>(s.head_dim), dv = static_cast<double>(s.value_dim);
  double flop = 0;
  for (Index first = 0; first < s.length; first += rows_of.block_size) {
    const auto tokens = static_cast<double>(std::min(rows_of.block_size, s.length - first));
    const Index evicted = rows_of.evicted(first), candidates = rows_of.outside(first) - evicted;
    const Index exact = first - rows_of.outside(first) * rows_of.block_size;
    const auto keys = static_cast<double>(std::min(candidates, rows_of.top_k) * rows_of.block_size + exact) +
                      (tokens + 1) / 2;
    flop += 2 * heads * tokens * (keys * (d + dv) + static_cast<double>(candidates) * d);
    if (evicted > 0) flop += 2 * heads * tokens * d * dv;
  }
  return flop +
         2 * kv_heads * static_cast<double>(rows_of.evicted(s.length) * (rows_of.block_size - 1)) * d * dv;
}

}  // namespace

Contender hybrid(Index threads) {
  const auto execution = std::make_shared<longspan::Execution<longspan::openmp>>(longspan::openmp{threads});
  Contender contender;
  contender.name = contender.stream = "hybrid_stream";
  contender.description =
      "512 tokens exact, 4 blocks of 64 retrieved from the 16384 before, a memory of all older tokens";
  contender.exact = false;
  contender.flop = useful_flop;
  contender.state_bytes = [](const Shape& s) {
    const Index kept = s.length - rows_of.evicted(s.length) * rows_of.block_size;
    return 4.0 * static_cast<double>(s.batch * s.kv_heads *
                                     (kept * (s.head_dim + s.value_dim) + s.head_dim * (s.value_dim + 1)));
  };
  contender.run = [execution](const Inputs<float>& in, longspan::TensorView<float> out) {
    auto stream = stream_for(in);
    stream.extend(in.q.view(), in.k.view(), in.v.view(), out, *execution);
  };
  contender.prompt_is_attended = true;
  contender.decode = [execution](const Inputs<float>& in, Index prompt, longspan::TensorView<float> out) {
    return decoder_behind(stream_for(in), in, prompt, out, execution);
  };
  contender.oracle = [threads](const Inputs<float>& in, std::span<const RowId> rows) {
    return exact_hybrid_rows(in, rows_of, rows, threads);
  };
  return contender;
}

}  // namespace bench
