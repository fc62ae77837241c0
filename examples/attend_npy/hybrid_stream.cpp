// attend_npy hybrid_stream: an exact window, retrieval of earlier blocks, and a compressive memory of the oldest
// tokens.
#include "longspan/stream/hybrid_stream.hpp"

#include <array>
#include <string_view>
#include <type_traits>
#include <vector>

#include "attend_files.hpp"
#include "chunks.hpp"
#include "variants.hpp"

namespace attend_npy {
namespace {

/// A functor that passes its tokens through a hybrid_stream in chunks.
struct HybridStream {
  longspan::hybrid_options options;
  std::vector<Index> chunks;

  template <class Q, class K, class V, class Out, class Lse, class E>
  void operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse&, const E& executor) const {
    using Real = std::remove_const_t<typename Q::Element>;
    const auto lengths = chunks_of("hybrid_stream", chunks, q.rows, k.rows);
    longspan::hybrid_stream<Real> stream({q.batch, q.heads, k.heads, q.cols, v.cols}, options);
    for (const Chunk chunk : lengths) extend(stream, chunk, q, k, v, out, executor);
  }
};

void run(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("hybrid_stream", std::array<std::string_view, 8>{"block", "top_k", "window_blocks", "capacity",
                                                              "evicted_at_once", "rule", "first", "chunks"});
  if (!arguments.lse.empty())
    throw Error("hybrid_stream has no lse, because its output is not a softmax over all keys");
  HybridStream stream;
  longspan::hybrid_options& options = stream.options;
  options.block_size = keys.positive_integer("block").value_or(options.block_size);
  options.top_k = keys.integer_from_0("top_k").value_or(options.top_k);
  options.window_blocks = keys.integer_from_0("window_blocks").value_or(options.window_blocks);
  options.capacity = keys.integer_from_0("capacity").value_or(options.capacity);
  options.evicted_at_once = keys.positive_integer("evicted_at_once").value_or(options.evicted_at_once);
  options.rule = keys.choice("rule", "linear", "delta") == 0 ? longspan::InfiniRule::linear
                                                             : longspan::InfiniRule::delta;
  options.empty_memory = keys.choice("first", "bypass", "gate") == 0 ? longspan::EmptyMemory::bypass
                                                                     : longspan::EmptyMemory::gate;
  stream.chunks = keys.positive_integers("chunks");
  const Gates gates = read_gates(arguments);
  options.beta = gates.view();
  attend_files(arguments, read_inputs(arguments), stream);
}

}  // namespace

const Variant hybrid_stream{
    "hybrid_stream",
    "block=B             every B-th key is a landmark, the last of its block (default 64)\n"
    "top_k=k             blocks outside the window that a query retrieves (default 4)\n"
    "window_blocks=n     full blocks with exact attention (default 8)\n"
    "capacity=n          blocks outside the window that can be retrieved (default 1024)\n"
    "evicted_at_once=n   blocks that are written to the memory together (default 32)\n"
    "rule=linear|delta   how they are written to the memory (default linear)\n"
    "first=bypass|gate   bypass: no gate while the memory is empty (default bypass)\n"
    "chunks=n,n,...      tokens in each chunk (default: one chunk)\n",
    run, true};

}  // namespace attend_npy
