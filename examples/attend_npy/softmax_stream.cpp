// attend_npy softmax_stream: exact attention in chunks, from a cache of keys and values.
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "attend_files.hpp"
#include "chunks.hpp"
#include "longspan/score.hpp"
#include "longspan/stream/kv_cache.hpp"
#include "softmax_mask.hpp"
#include "variants.hpp"

namespace attend_npy {
namespace {

/// The names of Storage in its order, and int8.
constexpr std::array<std::string_view, 5> row_types{"f32", "f64", "bf16", "f16", "int8"};
constexpr std::string_view f64_rows = row_types[1];

/// The type of the stored rows. It is f64 if and only if the arithmetic is double, which makes five kernels instead
/// of ten.
std::string_view row_type(std::optional<std::size_t> wanted, Storage storage) {
  const std::string_view own = row_types[static_cast<std::size_t>(storage)];
  const std::string_view type = wanted ? row_types[*wanted] : own;
  if ((type == f64_rows) != (own == f64_rows)) {
    throw Error("the key rows is '" + std::string(type) + "', wanted " +
                (own == f64_rows ? "f64 as the kernel computes in double"
                                 : "f32, bf16, f16 or int8 as the kernel computes in float"));
  }
  return type;
}

/// A functor that passes its tokens through a kv_cache in chunks.
template <class S>
struct SoftmaxStream {
  longspan::softmax_attention<longspan::window, S> attend;
  longspan::kv_cache_options options;
  std::string_view rows;
  std::vector<Index> chunks;

  template <class Q, class K, class V, class Out, class Lse, class E>
  void operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse& lse,
                  const E& executor) const {
    const auto take = [&]<class T>(std::type_identity<T>) {
      auto cache = attend.template stream<T>({q.batch, q.heads, k.heads, q.cols, v.cols}, options);
      for (const Chunk chunk : chunks_of("softmax_stream", chunks, q.rows, k.rows))
        extend(cache, chunk, q, k, v, out, lse, executor);
    };
    if constexpr (std::is_same_v<typename Q::Element, const double>) {
      take(std::type_identity<double>());
    } else if (rows == "bf16") {
      take(std::type_identity<Eigen::bfloat16>());
    } else if (rows == "f16") {
      take(std::type_identity<Eigen::half>());
    } else if (rows == "int8") {
      take(std::type_identity<std::int8_t>());
    } else {
      take(std::type_identity<float>());
    }
  }
};

void run(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("softmax_stream",
             std::array<std::string_view, 6>{"window", "scale", "softcap", "chunks", "page", "rows"});
  const longspan::window mask = softmax_mask(keys, true);
  const auto scale = keys.nonzero("scale");
  const auto cap = keys.positive_float("softcap");
  const longspan::kv_cache_options options{.page_size = keys.integer_from_0("page").value_or(0)};
  const std::vector<Index> chunks = keys.positive_integers("chunks");
  const auto rows = keys.word("rows", row_types);
  Inputs inputs = read_inputs(arguments);
  const std::string_view type = row_type(rows, inputs.storage);
  const auto attend_with = [&](auto score) {
    longspan::softmax_attention attend{mask, score};
    if (scale) attend.scale = *scale;
    attend_files(arguments, std::move(inputs), SoftmaxStream<decltype(score)>{attend, options, type, chunks});
  };
  if (cap) {
    attend_with(longspan::softcap{*cap});
  } else {
    attend_with(longspan::unchanged{});
  }
}

}  // namespace

const Variant softmax_stream{
    "softmax_stream",
    "window=W                    a query sees the last W keys\n"
    "chunks=n,n,...              tokens in each chunk (default: one chunk)\n"
    "page=n                      tokens in a page of the cache (default 0: one array)\n"
    "rows=f32|f64|bf16|f16|int8  type in which the cache stores k and v (default: --dtype);\n"
    "                            f64 if and only if --dtype is f64\n"
    "scale=x                     multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n"
    "softcap=c                   scores become c * tanh(score / c)\n",
    run};

}  // namespace attend_npy
