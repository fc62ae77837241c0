// attend_npy infini: Infini-attention in chunks, and its memory after the last token.
#include <array>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "attend_files.hpp"
#include "chunks.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "variants.hpp"

namespace attend_npy {
namespace {

/// A functor that passes its tokens through an infini_memory in chunks, and returns the memory as additional outputs.
struct InfiniStream {
  longspan::infini_attention<> attend;
  std::vector<Index> chunks;
  bool flush = false;
  std::string memory_out, norm_out;

  template <class Q, class K, class V, class Out, class Lse, class E>
  auto operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse&, const E& executor) const {
    using Real = std::remove_const_t<typename Q::Element>;
    const auto lengths = chunks_of("infini", chunks, q.rows, k.rows);
    auto memory = attend.stream<Real>({q.batch, q.heads, k.heads, q.cols, v.cols});
    for (const Chunk chunk : lengths) extend(memory, chunk, q, k, v, out, executor);
    if (flush) memory.flush(executor);

    Output<Real> m{memory_out, {q.batch, k.heads, q.cols, v.cols}, {}};
    Output<Real> z{norm_out, {q.batch, k.heads, q.cols}, {}};
    for (Index b = 0; b < q.batch; ++b) {
      for (Index h = 0; h < k.heads; ++h) {
        for (Index c = 0; c < q.cols; ++c) {
          z.values.push_back(memory.norm(b, h, c));
          for (Index column = 0; column < v.cols; ++column)
            m.values.push_back(memory.memory(b, h, c, column));
        }
      }
    }
    return std::vector{m, z};
  }
};

void run(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("infini",
             std::array<std::string_view, 6>{"segment", "rule", "first", "chunks", "flush", "scale"});
  if (!arguments.lse.empty())
    throw Error("infini has no lse, because its output is not a softmax over all keys");
  InfiniStream stream;
  const auto segment = keys.positive_integer("segment");
  if (!segment) throw Error("the key segment is missing");
  stream.attend.segment = *segment;
  stream.attend.rule = keys.choice("rule", "linear", "delta") == 0 ? longspan::InfiniRule::linear
                                                                   : longspan::InfiniRule::delta;
  stream.attend.empty_memory = keys.choice("first", "gate", "bypass") == 0 ? longspan::EmptyMemory::gate
                                                                           : longspan::EmptyMemory::bypass;
  if (const auto scale = keys.nonzero("scale")) stream.attend.local.scale = *scale;
  stream.chunks = keys.positive_integers("chunks");
  stream.flush = keys.flag("flush");
  stream.memory_out = arguments.memory_out;
  stream.norm_out = arguments.norm_out;
  const Gates gates = read_gates(arguments);
  stream.attend.beta = gates.view();
  attend_files(arguments, read_inputs(arguments), stream);
}

}  // namespace

const Variant infini{
    "infini",
    "segment=S                tokens of a segment\n"
    "rule=linear|delta        how a segment is written to the memory (default linear)\n"
    "first=gate|bypass        bypass: only local attention while the memory is empty (default gate)\n"
    "chunks=n,n,...           tokens in each chunk (default: one chunk)\n"
    "flush=0|1                1: the last segment is written even if it is not full (default 0)\n"
    "scale=x                  multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n",
    run, true, true};

}  // namespace attend_npy
