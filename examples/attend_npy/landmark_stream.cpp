// attend_npy landmark_stream: landmark attention in chunks, with retrieval of sealed blocks.
#include <array>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

#include "attend_files.hpp"
#include "chunks.hpp"
#include "longspan/position.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "variants.hpp"

namespace attend_npy {
namespace {

/// One of the two position maps, in one type, so that the kernels are compiled only once.
struct ChosenPositions {
  bool exact = false;

  Index local(const longspan::Retrieval& held) const {
    return exact ? longspan::exact_positions().local(held) : longspan::stingy_positions().local(held);
  }
  Index scored(const longspan::Retrieval& held, Index n) const {
    return exact ? longspan::exact_positions().scored(held, n) : longspan::stingy_positions().scored(held, n);
  }
  Index attended(const longspan::Retrieval& held, Index n, Index rank) const {
    return exact ? longspan::exact_positions().attended(held, n, rank)
                 : longspan::stingy_positions().attended(held, n, rank);
  }
};

/// Rotary positions or none, in one type, so that the kernels are compiled only once.
struct ChosenEncoding {
  std::optional<longspan::rotary> rotary;

  template <class Real>
  void encode(longspan::MatrixView<Real> rows, Index first_position, longspan::Role role) const {
    if (rotary) rotary->encode(rows, first_position, role);
  }
  template <class Real>
  void encode_at(longspan::MatrixView<Real> rows, const longspan::detail::RowPositions& positions,
                 longspan::Role role) const {
    if (rotary) rotary->encode_at(rows, positions, role);
  }
  void check(Index cols) const {
    if (rotary) rotary->check(cols);
  }
};

/// A functor that passes its tokens through a landmark_cache in chunks.
struct LandmarkStream {
  longspan::landmark_cache_options options;
  ChosenEncoding encoding;
  ChosenPositions places;
  std::vector<Index> chunks;

  template <class Q, class K, class V, class Out, class Lse, class E>
  void operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse& lse,
                  const E& executor) const {
    using Real = std::remove_const_t<typename Q::Element>;
    const auto lengths = chunks_of("landmark_stream", chunks, q.rows, k.rows);
    longspan::landmark_cache<Real, ChosenEncoding, ChosenPositions> cache(
        {q.batch, q.heads, k.heads, q.cols, v.cols}, options, encoding, places);
    for (const Chunk chunk : lengths) extend(cache, chunk, q, k, v, out, lse, executor);
  }
};

longspan::landmark_cache_options options_of(const Keys& keys) {
  longspan::landmark_cache_options options;
  const auto block = keys.positive_integer("block");
  if (!block) throw Error("the key block is missing");
  options.block_size = *block;
  options.top_k = keys.positive_integer("top_k").value_or(options.top_k);
  options.capacity = keys.positive_integer("capacity").value_or(0);
  options.scale = keys.nonzero("scale");
  constexpr std::array selections{longspan::LandmarkSelect::per_token_and_head,
                                  longspan::LandmarkSelect::max_over_heads,
                                  longspan::LandmarkSelect::max_over_tokens};
  constexpr std::array<std::string_view, 3> names{"token_head", "max_heads", "max_tokens"};
  options.select = selections[keys.word("select", names).value_or(0)];
  return options;
}

void run(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("landmark_stream",
             std::array<std::string_view, 9>{"block", "chunks", "top_k", "select", "capacity", "positions",
                                             "rope_base", "rope_layout", "scale"});
  LandmarkStream stream;
  stream.options = options_of(keys);
  stream.chunks = keys.positive_integers("chunks");
  stream.places.exact = keys.choice("positions", "stingy", "exact") == 1;
  const auto base = keys.positive_float("rope_base");
  const auto layout = keys.word("rope_layout", std::array<std::string_view, 2>{"interleaved", "half"});
  if (base && !layout) throw Error("the key rope_base needs the key rope_layout");
  if (layout) {
    stream.encoding.rotary.emplace(
        *layout == 0 ? longspan::Pairing::interleaved : longspan::Pairing::half_split,
        static_cast<double>(base.value_or(10000.0f)));
  }
  attend_files(arguments, read_inputs(arguments), stream);
}

}  // namespace

const Variant landmark_stream{
    "landmark_stream",
    "block=B                             every B-th key is a landmark, the last of its block\n"
    "chunks=n,n,...                      tokens in each chunk (default: one chunk)\n"
    "top_k=k                             blocks that a query retrieves (default 4)\n"
    "select=token_head|max_heads|max_tokens  which queries share a choice of blocks (default token_head)\n"
    "capacity=n                          blocks that are kept (default: all)\n"
    "positions=stingy|exact              positions of retrieved blocks (default stingy)\n"
    "rope_base=x                         base of rotary positions (default 10000)\n"
    "rope_layout=interleaved|half        rotary positions; none if omitted\n"
    "scale=x                             multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n",
    run};

}  // namespace attend_npy
