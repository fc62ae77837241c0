// A stream of bounded memory that forgets nothing at once: a window kept exact, retrieval by landmarks from
// the blocks that left it, and a compressive memory of all that retrieval has given up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <istream>
#include <ostream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

struct hybrid_options {
  Index block = 64;            ///< keys of a block: every block-th key of the stream is a landmark
  Index top_k = 4;             ///< blocks outside the window that a query retrieves
  Index window_blocks = 8;     ///< full blocks that are attended token by token, beside the open one
  Index capacity = 1024;       ///< blocks outside the window that can be retrieved
  Index evicted_at_once = 32;  ///< blocks that go to the memory together, beyond the capacity until they do
  MatrixView<const float> beta{};        ///< of the memory's gate: [1 or heads][1 or value_dim]; 0 unless set
  InfiniRule rule = InfiniRule::linear;  ///< how blocks are written to the memory
  InfiniFirst first = InfiniFirst::bypass;  ///< before anything is: the window and retrieval alone
};

LONGSPAN_VOCABULARY_END

LONGSPAN_BEGIN

/// With A what a landmark_cache with an exact window gives, tokens of the window and landmarks of retrieved
/// blocks in one softmax, and M, z an Infini memory of all tokens evicted before the block of the query,
///
///   out = g * phi(q) M / (phi(q) z) + (1 - g) * A,   g = sigmoid(beta).
///
///   hybrid_stream<float> stream({.heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64});
///   stream.extend(q, k, v, out);  // a chunk or one token; an execution may follow
///
/// Shapes    q [batch, heads, n, head_dim]      k [batch, kv_heads, n, head_dim]
///           v [batch, kv_heads, n, value_dim]  out [batch, heads, n, value_dim], any n >= 0. There is no lse
/// Landmarks every block-th token is one, as in landmark_cache. The memory takes the other tokens
/// Positions none: rotary encodings, if any, are in q and k already, for the memory too
/// Types     rows and landmarks are kept as T; arithmetic is double where T is, else float, and q's too. With
///           std::int8_t the rows of blocks that have left the window are int8 with a scale to each, landmarks
///           and the window float
/// State     bounded: batch * kv_heads * (head_dim + value_dim) * block * (1 + window_blocks + capacity +
///           evicted_at_once) elements of T, and M and z
/// Cost      a token: that of landmark_cache with `capacity` blocks, and 4 head_dim * value_dim flop a head
///           for the memory. A chunk is cut where blocks end
/// Equal     for all ways to cut the same rows into calls, within the error bound
/// Error     g that of infini_attention's memory, 1 - g that of landmark_cache, over the rows as they are kept
/// Bits      do not depend on the executor, nor on how many threads it has
/// Throws    Error when shapes or options disagree, before anything changes
/// Source    landmarks: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.2; memory: Munkhdalai et al.
///           2024 (arXiv 2404.07143), eq. 6-10. That the second takes what the first evicts is in neither
template <StoredElement T = float>
class hybrid_stream : public detail::StreamCalls<hybrid_stream<T>, false> {
 public:
  using Real = detail::ArithmeticOf<T>;
  /// Of the memory, which sums rows in the arithmetic type: those of int8 reach it decoded.
  using Memory = infini_memory<std::conditional_t<std::is_same_v<T, std::int8_t>, float, T>,
                               softmax_attention<causal>, elu_plus_one>;

  explicit hybrid_stream(const StreamShape& shape, const hybrid_options& options = {})
      : options_(checked(shape, options)),
        cache_(shape, {.block = options.block,
                       .top_k = options.top_k,
                       .local_blocks = options.window_blocks,
                       .exact_window = true}),
        memory_(memory_options(options), shape) {}

  const StreamShape& shape() const noexcept { return cache_.shape(); }
  const hybrid_options& options() const noexcept { return options_; }
  /// Tokens taken in, landmarks included.
  Index size() const noexcept { return cache_.size(); }
  Index bytes() const noexcept { return cache_.bytes() + memory_.bytes(); }
  /// How many tokens come before the next landmark.
  Index tokens_to_landmark() const noexcept { return cache_.tokens_to_landmark(); }
  /// The window, the blocks that can be retrieved, what was retrieved; and the memory behind them.
  const landmark_cache<T>& cache() const noexcept { return cache_; }
  const Memory& memory() const noexcept { return memory_; }

  void clear() {
    cache_.clear();
    memory_.clear();
  }
  /// Forgets the tokens from number `tokens` on. Refused where some of them have left the window.
  void truncate(Index tokens) { cache_.truncate(tokens); }

  void save(std::ostream& to) const {
    cache_.save(to);
    memory_.save(to);
  }
  /// Takes the state of a stream of the same shape and options, and changes nothing where that fails.
  void load(std::istream& from) {
    hybrid_stream loaded = *this;
    loaded.cache_.load(from);
    loaded.memory_.load(from);
    *this = std::move(loaded);
  }

 private:
  friend detail::StreamCalls<hybrid_stream, false>;
  static constexpr const char* function = "hybrid_stream::extend";

  static const hybrid_options& checked(const StreamShape& shape, const hybrid_options& options) {
    detail::check_stream_shape("hybrid_stream", shape);
    const auto at_least = [](const char* what, Index got, Index least) {
      if (got < least)
        detail::refuse("hybrid_stream", what, std::to_string(got), "at least " + std::to_string(least));
    };
    at_least("block", options.block, 2);
    at_least("top_k", options.top_k, 0);
    at_least("window_blocks", options.window_blocks, 0);
    at_least("capacity", options.capacity, 0);
    at_least("evicted_at_once", options.evicted_at_once, 1);
    return options;
  }

  /// What is evicted at once is a segment of the memory: summed by itself, added once, and seen from then on.
  static infini_attention<> memory_options(const hybrid_options& options) {
    infini_attention attend;
    attend.segment = options.evicted_at_once * (options.block - 1);
    attend.beta = options.beta;
    attend.rule = options.rule;
    attend.first = options.first;
    return attend;
  }

  template <class Call, class E>
  void take(const Call& call, const E& executor, Workspace& workspace) {
    detail::ExecutionRef<E> inner{executor, workspace};
    for (Index first = 0, count = 0; first < call.q_len(); first += count) {
      count = std::min(cache_.tokens_to_landmark() + 1, call.q_len() - first);
      const auto part = detail::part_of(call, first, count);
      cache_.extend(part.q, part.k, part.v, part.out, inner);
      memory_.recall(part.q, part.out, inner);
      evict(inner);
    }
  }

  template <class E>
  void evict(E& execution) {
    if (cache_.blocks() < options_.capacity + options_.evicted_at_once) return;
    for (Index b = 0; b < shape().batch; ++b) {
      for (Index n = 0; n < options_.evicted_at_once; ++n) absorb_block(b, n, execution);
    }
    cache_.drop(options_.evicted_at_once);
  }

  template <class E>
  void absorb_block(Index b, Index n, E& execution) {
    if constexpr (Element<T>) {
      memory_.absorb(b, cache_.block_keys(b, n), cache_.block_values(b, n), execution);
    } else {
      const Index heads = shape().kv_heads, rows = options_.block - 1, keys = heads * rows * shape().head_dim;
      decoded_.resize(static_cast<std::size_t>(keys + heads * rows * shape().value_dim));
      const auto k = compact_view(decoded_.data(), 1, heads, rows, shape().head_dim),
                 v = compact_view(decoded_.data() + keys, 1, heads, rows, shape().value_dim);
      cache_.decode_block(b, n, k, v);
      memory_.absorb(b, k, v, execution);
    }
  }

  hybrid_options options_;
  std::vector<Real> decoded_;  ///< a block on its way from int8 to the memory
  landmark_cache<T> cache_;
  Memory memory_;
};

LONGSPAN_END
