// attend_npy dilated_stream: causal dilated attention in chunks.
#include <array>
#include <string_view>
#include <type_traits>
#include <vector>

#include "attend_files.hpp"
#include "chunks.hpp"
#include "dilated_functor.hpp"
#include "longspan/mask.hpp"
#include "longspan/stream/dilated_cache.hpp"
#include "variants.hpp"

namespace attend_npy {
namespace {

/// A functor that passes its tokens through a dilated_cache in chunks.
struct DilatedStream {
  longspan::dilated_attention<longspan::causal> attend;
  std::vector<Index> chunks;

  template <class Q, class K, class V, class Out, class Lse, class E>
  void operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse& lse,
                  const E& executor) const {
    auto cache =
        attend.stream<std::remove_const_t<typename Q::Element>>({q.batch, q.heads, k.heads, q.cols, v.cols});
    for (const Chunk chunk : chunks_of("dilated_stream", chunks, q.rows, k.rows))
      extend(cache, chunk, q, k, v, out, lse, executor);
  }
};

void run(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("dilated_stream",
             std::array<std::string_view, 6>{"segments", "dilations", "phase", "overlap", "chunks", "scale"});
  const DilatedStream stream{dilated_functor(keys, longspan::causal{}), keys.positive_integers("chunks")};
  attend_files(arguments, read_inputs(arguments), stream);
}

}  // namespace

const Variant dilated_stream{
    "dilated_stream",
    "segments=W,W,...         segment lengths, one for each branch\n"
    "dilations=r,r,...        their dilations (default 1 each)\n"
    "phase=modulo|blocked     offset of head h: h mod r, or as torchscale (default modulo)\n"
    "overlap=multiset|set     a key of several branches counts several times, or once (default multiset)\n"
    "chunks=n,n,...           tokens in each chunk (default: one chunk)\n"
    "scale=x                  multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n",
    run};

}  // namespace attend_npy
