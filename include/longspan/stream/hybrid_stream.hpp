// A stream with bounded memory: exact attention in a window, retrieval by landmarks from the blocks before the window,
// and a compressive memory of the blocks that retrieval evicts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <istream>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/landmark/block_counts.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/detail/storage/state_fields.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/gates.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

struct hybrid_options {
  Index block_size = 64;       ///< keys of a block: every block_size-th key of the stream is a landmark
  Index top_k = 4;             ///< blocks outside the window that a query retrieves
  Index window_blocks = 8;     ///< full blocks with exact attention, in addition to the open block
  Index capacity = 1024;       ///< blocks outside the window that can be retrieved
  Index evicted_at_once = 32;  ///< blocks that are evicted together; until then they exceed the capacity
  Index rollback = 16;         ///< as in landmark_cache_options; costs a copy of the memory after an eviction
  /// Multiplies q.k; 1 / sqrt(head_dim) unless set. The feature map of the memory is applied to q and k without scale.
  std::optional<double> scale{};
  MatrixView<const float> beta{};        ///< of the memory's gate, as in infini_attention; 0 unless set
  InfiniRule rule = InfiniRule::linear;  ///< how blocks are written to the memory
  EmptyMemory empty_memory = EmptyMemory::bypass;  ///< bypass: no gate while the memory is empty
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN

/// Let A be the output of a landmark_cache with an exact window (one softmax over the tokens of the window and the
/// landmarks of retrieved blocks), and M, z an Infini memory of all tokens evicted before the query's block. Then
///
///   out = g * phi(q) M / (phi(q) z) + (1 - g) * A,   g = sigmoid(beta).
///
///   hybrid_retrieval retrieve{{.window_blocks = 8}};
///   auto stream = retrieve.stream({.heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64});
///   stream.extend(q, k, v, out);  // a chunk or one token; execution is optional
///
/// Shapes    q [batch, heads, n, head_dim]      k [batch, kv_heads, n, head_dim]
///           v [batch, kv_heads, n, value_dim]  out [batch, heads, n, value_dim], any n >= 0. There is no lse
/// Landmarks every block_size-th token is a landmark, as in landmark_cache. The memory contains the other tokens
/// Positions none: the caller encodes q and k (encode_positions of position.hpp, from position size() on), for the
///           memory too. A memory of keys without positions next to a cache of encoded keys would need both
///           forms of every row
/// Types     rows and landmarks are stored as T. Arithmetic is double if T is, otherwise float; that of q must be
///           the same. With std::int8_t the rows of blocks outside the window are int8 with a scale for each
///           row; landmarks and the window are float
/// State     bounded: batch * kv_heads * (head_dim + value_dim) * block_size * (1 + window_blocks + capacity +
///           evicted_at_once) elements of T, and M and z
/// Rollback  truncate(n) removes tokens under the same conditions as in landmark_cache; all later outputs have
///           the bits of a stream that never saw the removed tokens. Until an eviction is `rollback` tokens old,
///           the stream keeps a second memory and the evicted blocks: bytes() counts both. An eviction copies
///           the memory even if rollback is 0
/// Cost      per token that of landmark_cache with `capacity` blocks, and 4 head_dim * value_dim flop per head
///           for the memory. A chunk is cut at the ends of blocks
/// Equal     within the error bound, for all ways to cut the same rows into calls
/// Error     g times that of infini_attention's memory plus 1 - g times that of landmark_cache, over the stored rows
/// Bits      do not depend on the executor, nor on its number of threads
/// Throws    Error if shapes or options disagree, before anything changes. After a later exception, including
///           bad_alloc, the stream is as it was at the end of the last complete block of the call, or before the
///           call
/// Source    landmarks: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.2; memory: Munkhdalai et al.
///           2024 (arXiv 2404.07143), eq. 6-10. The combination of both is our own
template <StoredElement T = float>
class hybrid_stream : public detail::StreamCalls<hybrid_stream<T>, false> {
 public:
  using Real = detail::ArithmeticOf<T>;
  /// The compressive memory, which sums rows in the arithmetic type; rows of int8 are decoded for it.
  using Memory = infini_memory<std::conditional_t<std::is_same_v<T, std::int8_t>, float, T>,
                               softmax_attention<causal>, elu_plus_one>;

  explicit hybrid_stream(const StreamShape& shape, const hybrid_options& options = {})
      : options_(checked(shape, options)),
        cache_(shape, {.block_size = options.block_size,
                       .top_k = options.top_k,
                       .window_blocks = options.window_blocks,
                       .exact_window = true,
                       .rollback = options.rollback,
                       .scale = options.scale}),
        memory_(memory_options(options), shape) {
    cache_.store_ = cache_.empty_store(options.capacity, options.evicted_at_once);
  }
  hybrid_stream(const hybrid_stream&) = default;
  hybrid_stream(hybrid_stream&&) = default;
  ~hybrid_stream() = default;
  hybrid_stream& operator=(hybrid_stream&&) = default;
  /// Changes nothing if memory runs out.
  hybrid_stream& operator=(const hybrid_stream& other) {
    if (this == &other) return *this;
    hybrid_stream copy(other);
    return *this = std::move(copy);
  }

  const StreamShape& shape() const noexcept { return cache_.shape(); }
  const hybrid_options& options() const noexcept { return options_; }
  /// The number of tokens, including landmarks.
  Index size() const noexcept { return cache_.size(); }
  Index bytes() const noexcept {
    Index bytes = cache_.bytes() + memory_.bytes();
    for (const Past& past : past_) bytes += past.memory.bytes();
    return bytes;
  }
  /// The number of tokens before the next landmark.
  Index tokens_to_landmark() const noexcept { return cache_.tokens_to_landmark(); }
  /// The cache, with the window, the blocks that can be retrieved, and those that the last call retrieved.
  const landmark_cache<T>& cache() const noexcept { return cache_; }
  const Memory& memory() const noexcept { return memory_; }

  void clear() {
    cache_.clear();
    memory_.clear();
    past_.clear();
  }

  /// Appends tokens whose queries are not needed.
  template <TensorLike K, TensorLike V, ExecutionLike E = openmp>
  void append(const K& k, const V& v, E&& execution = E{}) {
    const auto keys = view(k);
    const auto values = view(v);
    detail::check_tokens("hybrid_stream::append", keys, values, shape().batch, shape());
    detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
      by_blocks(keys.rows, executor, workspace, [&](Index first, Index count, auto&) {
        cache_.append_piece(keys.slice_rows(first, count), values.slice_rows(first, count), executor);
      });
    });
  }

  /// Replaces batch row b by the previous batch row rows[b], as beam search does. Changes nothing if it throws.
  void reorder(std::span<const Index> rows) {
    detail::check_reorder("hybrid_stream::reorder", rows, shape().batch);
    hybrid_stream next = *this;
    next.cache_.reorder(rows);
    next.memory_.reorder(rows);
    for (Past& past : next.past_) past.memory.reorder(rows);
    *this = std::move(next);
  }

  /// True if truncate(tokens) will succeed.
  bool can_truncate(Index tokens) const noexcept { return cache_.can_truncate(tokens); }
  /// Removes all tokens except the first `tokens`; the stream continues as if it had never seen the others.
  void truncate(Index tokens) {
    if (!can_truncate(tokens)) {
      const std::string least = std::to_string(counts().least());
      detail::refuse(
          "hybrid_stream::truncate", "the number of tokens", std::to_string(tokens),
          least + ".." + std::to_string(size()) + ", because the stream cannot be truncated further");
    }
    cache_.truncate(tokens);
    const auto evicted_later = std::find_if(past_.begin(), past_.end(),
                                            [&](const Past& x) { return x.evicted >= cache_.dropped(); });
    if (evicted_later == past_.end()) return;
    memory_ = std::move(evicted_later->memory);
    past_.erase(evicted_later, past_.end());
  }

  void save(std::ostream& to) const {
    const auto numbers = detail::values_of(fields());
    detail::StateWriter(to, state, numbers, 0).finish();
    cache_.save(to);
    for (const Past& past : past_) past.memory.save(to);
    memory_.save(to);
  }
  /// Loads the state of a stream with the same shape and options; only beta and `rollback` may differ. Changes
  /// nothing if it throws.
  void load(std::istream& from) {
    const auto wanted = fields();
    std::vector<std::int64_t> numbers(wanted.size());
    detail::StateReader reader(from, state, numbers);
    detail::check_fields(state.load, numbers, wanted);
    reader.expect_payload(0);
    reader.finish();
    hybrid_stream loaded(shape(), options_);
    loaded.cache_.load(from);
    const Index evicted = loaded.cache_.dropped();
    for (Index n = loaded.counts().gone(); n < evicted; n += options_.evicted_at_once)
      loaded.past_.push_back({n, loaded.loaded_memory(from, n)});
    loaded.memory_ = loaded.loaded_memory(from, evicted);
    *this = std::move(loaded);
  }

 private:
  friend detail::StreamCalls<hybrid_stream, false>;
  static constexpr const char* function = "hybrid_stream::extend";
  static constexpr detail::StateKind state{"hybrid", 1, "hybrid_stream::save", "hybrid_stream::load"};

  /// A copy of the memory from when only `evicted` blocks had been evicted.
  struct Past {
    Index evicted;
    Memory memory;
  };

  static const hybrid_options& checked(const StreamShape& shape, const hybrid_options& options) {
    detail::check_stream_shape("hybrid_stream", shape);
    const auto at_least = [](const char* what, Index got, Index least) {
      if (got < least)
        detail::refuse("hybrid_stream", what, std::to_string(got), "at least " + std::to_string(least));
    };
    at_least("block_size", options.block_size, 2);
    at_least("top_k", options.top_k, 0);
    at_least("window_blocks", options.window_blocks, 0);
    at_least("capacity", options.capacity, 0);
    at_least("evicted_at_once", options.evicted_at_once, 1);
    at_least("rollback", options.rollback, 0);
    return options;
  }

  /// Blocks that are evicted together are a segment of the memory: summed separately, added once, and visible
  /// afterwards.
  static infini_attention<> memory_options(const hybrid_options& options) {
    infini_attention attend;
    attend.segment = options.evicted_at_once * (options.block_size - 1);
    attend.beta = options.beta;
    attend.rule = options.rule;
    attend.empty_memory = options.empty_memory;
    return attend;
  }

  const detail::BlockCounts& counts() const noexcept { return cache_.store_.counts(); }
  /// The options that the states of the cache and of the memory do not contain.
  std::vector<detail::StateField> fields() const {
    return {{"empty_memory", static_cast<std::int64_t>(options_.empty_memory), [](std::int64_t x) {
               return std::string(x == static_cast<std::int64_t>(EmptyMemory::gate) ? "gate" : "bypass");
             }}};
  }
  /// Loads the memory of a state in which `evicted` blocks had been evicted.
  Memory loaded_memory(std::istream& from, Index evicted) const {
    Memory memory(memory_options(options_), shape());
    memory.load(from);
    const Index wanted = evicted * (options_.block_size - 1);
    for (Index b = 0; b < shape().batch; ++b) {
      if (memory.size(b) != wanted || memory.open_rows(b) != 0) {
        detail::refuse<FileError>(state.load, "the number of tokens in the memory",
                                  std::to_string(memory.size(b)),
                                  std::to_string(wanted) + " for the blocks that have been evicted");
      }
    }
    return memory;
  }

  template <class Call, class E>
  void take(const Call& call, const E& executor, Workspace& workspace) {
    by_blocks(call.q_len(), executor, workspace, [&](Index first, Index count, auto& inner) {
      const auto part = detail::part_of(call, first, count);
      cache_.extend_piece(part, executor, workspace);
      memory_.recall(part.q, part.out, inner);
    });
  }

  /// append(first, count, execution) for the tokens of each block in turn, and evictions in between.
  template <class E, class Append>
  void by_blocks(Index tokens, const E& executor, Workspace& workspace, const Append& append) {
    detail::ExecutionRef<E> inner{executor, workspace};
    for (Index first = 0, count = 0; first < tokens; first += count) {
      count = (std::min)(cache_.tokens_to_landmark() + 1, tokens - first);
      typename landmark_cache<T>::Undo undo(cache_);
      append(first, count, inner);
      evict(inner);
      cache_.settle(undo);
      std::erase_if(past_, [&](const Past& x) { return x.evicted < counts().gone(); });
    }
  }

  /// Writes the blocks that are due for eviction to the memory. The memory is unchanged if this throws.
  template <class E>
  void evict(E& execution) {
    const Index count = counts().dropped_at(counts().sealed) - counts().dropped;
    if (count == 0) return;
    Memory next = memory_;
    for (Index b = 0; b < shape().batch; ++b) {
      for (Index n = 0; n < count; ++n) append_block(b, n, next, execution);
    }
    past_.push_back({counts().dropped, std::move(next)});
    std::swap(past_.back().memory, memory_);
  }

  template <class E>
  void append_block(Index b, Index n, Memory& memory, E& execution) {
    if constexpr (Element<T>) {
      memory.append(b, cache_.block_keys(b, n), cache_.block_values(b, n), execution);
    } else {
      const Index heads = shape().kv_heads, rows = options_.block_size - 1,
                  keys = heads * rows * shape().head_dim;
      decoded_.resize(static_cast<std::size_t>(keys + heads * rows * shape().value_dim));
      const auto k = compact_view(decoded_.data(), 1, heads, rows, shape().head_dim),
                 v = compact_view(decoded_.data() + keys, 1, heads, rows, shape().value_dim);
      cache_.decode_block(b, n, k, v);
      memory.append(b, k, v, execution);
    }
  }

  hybrid_options options_;
  std::vector<Real> decoded_;  ///< an int8 block decoded for the memory
  landmark_cache<T> cache_;
  Memory memory_;
  std::vector<Past> past_;  ///< earlier memories that a truncation may bring back, the oldest first
};

/// The options of a hybrid_stream as a value from which streams are made, as from a functor.
///
///   hybrid_retrieval retrieve{{.window_blocks = 8, .capacity = 256}};
///   auto stream = retrieve.stream<Eigen::bfloat16>(shape);
struct hybrid_retrieval {
  hybrid_options options{};

  template <StoredElement T = float>
  hybrid_stream<T> stream(const StreamShape& shape) const {
    return hybrid_stream<T>(shape, options);
  }
};

LONGSPAN_NAMESPACE_END
