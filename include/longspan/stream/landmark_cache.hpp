// Landmark attention token by token: a stream that seals full blocks and retrieves some of them by their landmarks.
#pragma once

#include <algorithm>
#include <cmath>
#include <istream>
#include <ostream>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/landmark/choice.hpp"
#include "longspan/detail/landmark/file.hpp"
#include "longspan/detail/landmark/retrieve.hpp"
#include "longspan/detail/landmark/sealed_rows.hpp"
#include "longspan/detail/landmark/store.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/landmark_retrieval.hpp"
#include "longspan/landmarks.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// Landmark attention over an unbounded stream. A query attends to all unsealed tokens (the open block and its own
/// chunk, whose full blocks count by their landmarks) and to the top_k sealed blocks whose landmarks have the highest
/// scores. The tokens of its own block and the landmarks of the other blocks form one softmax group.
///
///   landmark_retrieval retrieve{{.block_size = 64, .top_k = 4}, rotary(Pairing::half_split)};
///   auto cache = retrieve.stream({.heads = 32, .kv_heads = 8, .head_dim = 128, .value_dim = 128});
///   cache.extend(q, k, v, out);  // a chunk or one token; lse and execution are optional
///
/// Shapes    q [batch, heads, n, head_dim]   k [batch, kv_heads, n, head_dim]   v [.., n, value_dim]
///           out [batch, heads, n, value_dim]   lse [batch, heads, n]
///           n may differ from call to call, and a chunk may cross blocks.
/// Landmarks every block_size-th token is a landmark; `tokens_to_landmark` returns the number of tokens before
///           the next one.
/// Positions the cache applies the encoding to q and k, at stingy_positions, exact_positions or a user-defined
///           PositionMap.
/// Index     every_landmark scores all blocks; a user-defined index proposes some blocks, see LandmarkIndex.
/// Types     tensors have any type of softmax_attention. Keys, values and landmarks are stored as T; a 16-bit T
///           is rounded once more when a block is sealed with its positions. Arithmetic is double if T is, and
///           then q must be double, otherwise float. With std::int8_t the rows of sealed blocks are int8, with
///           a scale for each row; the landmarks that select blocks, and all unsealed rows, are float.
/// Chunks    a chunk retrieves from the blocks that were sealed before it, as in the paper, so results depend
///           on how tokens are cut into calls. With split_at_blocks the results are those of single tokens,
///           unless `select` takes the maximum over tokens. If top_k covers all sealed blocks, every chunking
///           returns the results of landmark_attention, except for the rounding of int8, which begins when a
///           block is sealed.
/// Cost      per token 2 * heads * head_dim flop for each sealed block, whose landmarks are read once per KV
///           head, and attention to top_k blocks, in place, and to the open tokens. Copies share the blocks. One
///           token after 32768 takes with blocks of int8 0.57 of the time with float.
/// Rollback  truncate(n) removes tokens; all later outputs have the bits of a stream that never saw them. It can
///           remove options.rollback tokens before the largest size so far, often more, but no block that `drop`
///           removed; can_truncate(n) tells in advance. The cache keeps the rows of sealed blocks, and dropped
///           blocks, for `rollback` more tokens: bytes() counts them.
/// File      with options.path, sealed blocks that no truncation can unseal are written to this file and read
///           from it in place. Memory contains landmarks, the open tokens, the blocks of the last `rollback`
///           tokens, and about `resident_bytes` of the file in addition to what one query retrieves. A cache
///           that opens the file of an earlier cache has all blocks that were sealed `rollback` tokens before
///           the end of the earlier one, size() tokens, whenever its process ended; later tokens must be
///           appended again. (This does not hold if the machine stops, because nothing is flushed to the disk.)
///           Opening reads the file once, compares its checksums, and locks it. A copy of the cache shares the
///           blocks, and keeps in memory what it seals itself. If another process shortens the file, reading it
///           raises SIGBUS. After fork() parent and child hold the same lock: only one of them may use the cache.
/// Error     that of landmark_attention over the stored rows; int8 rounds each element of a sealed row by
///           1 / 254 of the largest element of the row.
/// Bits      do not depend on the executor, nor on its number of threads.
/// Throws    Error if shapes or options disagree; FileError if the disk has no space for what a call writes, or
///           the file is damaged, belongs to another cache, or is in use; each before anything changes. After a
///           call that throws, including bad_alloc, the cache is as it was before; with split_at_blocks it has the
///           pieces before the one that failed. Outputs may have been written.
/// Source    Mohtashami and Jaggi 2023 (arXiv 2305.16300), sections 3.2 and 3.2.1.
template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
class landmark_cache : public detail::StreamCalls<landmark_cache<T, P, Map, Finder>, true> {
 public:
  using Real = detail::ArithmeticOf<T>;

  /// As landmark_retrieval::stream.
  explicit landmark_cache(const StreamShape& shape, const landmark_cache_options& options = {},
                          const P& position = P{}, const Map& map = Map{}, const Finder& finder = Finder{})
      : shape_(detail::checked(shape, options)),
        options_(options),
        position_(position),
        map_(map),
        finder_(finder),
        store_(empty_store(options.capacity, options.capacity > 0 ? 1 : 0)),
        choice_(options.select, shape.batch, shape.heads, shape.kv_heads) {
    position_.check(shape.head_dim);
    if (options.path.empty()) return;
    detail::open_landmark_blocks(options.path, options.resident_bytes, row_fields(), store_);
    index_blocks(0);
  }
  landmark_cache(const landmark_cache&) = default;
  landmark_cache(landmark_cache&&) = default;
  ~landmark_cache() = default;
  landmark_cache& operator=(landmark_cache&&) = default;
  /// Changes nothing if memory runs out.
  landmark_cache& operator=(const landmark_cache& other) {
    if (this == &other) return *this;
    landmark_cache copy(other);
    return *this = std::move(copy);
  }

  /// Appends tokens whose queries are not needed: no outputs are computed.
  template <TensorLike K, TensorLike V, ExecutionLike E = openmp>
  void append(const K& k, const V& v, E&& execution = E{}) {
    const auto keys = view(k);
    const auto values = view(v);
    detail::check_tokens("landmark_cache::append", keys, values, shape_.batch, shape_);
    Undo undo(*this);
    detail::with_executor(execution, [&](const auto& executor) { append_piece(keys, values, executor); });
    settle(undo);
  }

  const StreamShape& shape() const noexcept { return shape_; }
  /// The number of tokens, including landmarks.
  Index size() const noexcept { return store_.counts().tokens; }
  /// The number of sealed blocks that can be retrieved.
  Index blocks() const noexcept { return store_.counts().blocks(); }
  /// The number of sealed blocks that have been dropped.
  Index dropped() const noexcept { return store_.counts().dropped; }
  /// The number of tokens before the next landmark.
  Index tokens_to_landmark() const noexcept { return options_.block_size - 1 - size() % options_.block_size; }
  /// Memory in bytes of keys, values and landmarks, including those shared with copies and those kept for a
  /// truncation, but not those in a file.
  Index bytes() const noexcept { return store_.bytes(); }
  /// The blocks that query i of the last call retrieved, in rising order, numbered from `retrieved_from()` on. With
  /// split_at_blocks this function, `mass` and `retrieved_from` refer to the last piece of the call.
  std::span<const Index> retrieved(Index b, Index h, Index i) const {
    return held_.top_k == 0 ? std::span<const Index>() : choice_.of(b, h, i);
  }
  /// With options.mass_sample: the softmax mass of the tokens that query i of the last call attended to, and that of
  /// the blocks that it did not retrieve, all at the positions that the cache gives them. The mass of a block that
  /// was not retrieved is estimated from `mass_sample` tokens, always the same ones. The estimate is unbiased if the
  /// order of tokens carries no information, exact if the sample is the whole block, and cannot notice a single token
  /// outside the sample. Outputs differ from softmax attention to all tokens by this dropped share, and by the
  /// weights that landmarks give to blocks. For each query the estimate costs mass_sample / block_size of a scan of
  /// all keys.
  LandmarkMass mass(Index b, Index h, Index i) const;
  /// The number of blocks that had been dropped before the last call.
  Index retrieved_from() const noexcept { return held_.dropped; }

  /// The stored keys or values of sealed block n of batch row b, without its landmark: [1, kv_heads, block_size - 1,
  /// columns]. For a cache of int8, whose rows have scales, use `decode_block`.
  TensorView<const T> block_keys(Index b, Index n) const
  requires Element<T>
  {
    return block_rows(b, n, true);
  }
  TensorView<const T> block_values(Index b, Index n) const
  requires Element<T>
  {
    return block_rows(b, n, false);
  }
  /// Converts keys and values of the block to the arithmetic type and writes them to k and v
  /// [1, kv_heads, block_size - 1, columns].
  void decode_block(Index b, Index n, TensorView<Real> k, TensorView<Real> v) const;
  /// Drops the `count` oldest sealed blocks permanently: no truncation can unseal them.
  void drop(Index count);

  /// Removes everything, or changes nothing if it throws. A file is replaced by an empty one, which is first created
  /// under the same name with ".new" appended; copies continue to use the blocks of the old file.
  void clear();

  /// True if truncate(tokens) will succeed.
  bool can_truncate(Index tokens) const noexcept {
    return tokens >= store_.counts().least() && tokens <= size();
  }
  /// Removes all tokens except the first `tokens`; the stream continues as if it had never seen the others.
  void truncate(Index tokens);

  /// Replaces batch row b by the previous batch row rows[b], as beam search does.
  void reorder(std::span<const Index> rows);

  void save(std::ostream& to) const { detail::save_landmark_store(to, fields(), store_); }
  /// Loads the state of a cache with the same shape, options and position encoding; `rollback`, `mass_sample`, `path`
  /// and `resident_bytes` may differ. Changes nothing if it throws.
  void load(std::istream& from);

 private:
  friend detail::StreamCalls<landmark_cache, true>;
  template <StoredElement>
  friend class hybrid_stream;
  static constexpr const char* function = "landmark_cache::extend";
  static constexpr bool encodes = !std::is_same_v<P, no_position>;
  static constexpr bool finds = !std::is_same_v<Finder, every_landmark>;
  static constexpr bool places_of_text = requires { Map::are_of_the_text; };
  static constexpr Index w = detail::lanes<Real>;

  /// Undoes the appending and sealing of a call that throws.
  struct Undo {
    landmark_cache& cache;
    detail::BlockCounts before;
    bool is_done = false;

    explicit Undo(landmark_cache& of) : cache(of), before(of.store_.counts()) {}
    Undo(const Undo&) = delete;
    Undo& operator=(const Undo&) = delete;
    ~Undo() {
      if (is_done) return;
      cache.store_.go_back(before);
      cache.forget_last_call();
      cache.is_index_stale_ = finds;
    }
  };

  template <class Call, class E>
  void take(const Call& call, const E& executor, Workspace& workspace) {
    static_assert(std::is_same_v<typename Call::Real, Real>,
                  "longspan: q must be double if and only if the cache is a landmark_cache<double>");
    Index first = 0;
    do {
      const Index left = call.q_len() - first,
                  count = options_.split_at_blocks ? (std::min)(tokens_to_landmark() + 1, left) : left;
      Undo undo(*this);
      extend_piece(detail::part_of(call, first, count), executor, workspace);
      settle(undo);
      first += count;
    } while (first < call.q_len());
  }

  /// Appends tokens and seals blocks; `settle` must follow.
  template <class Tk, class Tv, class E>
  void append_piece(TensorView<Tk> k, TensorView<Tv> v, const E& executor) {
    store_.reserve(k.rows);
    store_.append(k, v);
    seal(executor);
  }
  /// The same, and computes the outputs of the queries.
  template <class Call, class E>
  void extend_piece(const Call& call, const E& executor, Workspace& workspace) {
    if (is_index_stale_) index_anew();
    store_.reserve(call.q.rows);
    const detail::BlockCounts& counts = store_.counts();
    held_ = {blocks(), dropped(), (std::min)(options_.top_k, blocks()), options_.top_k, options_.block_size};
    chunk_ = call.q.rows;
    first_ = counts.open();
    store_.append(call.k, call.v);
    if (call.q.batch * call.q.heads * call.q.rows > 0) {
      attend_open(call, executor, workspace);
      if (held_.top_k > 0) {
        choose(call, executor);
        attend_blocks(call, executor);
      }
      write(call);
      if (options_.mass_sample > 0) weigh_tokens(call, executor);
    }
    seal(executor);
  }

  static std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
  Index group() const noexcept { return shape_.kv_heads == 0 ? 1 : shape_.heads / shape_.kv_heads; }
  Index padded_head_dim() const noexcept { return detail::round_up(shape_.head_dim, w); }
  double scale() const { return detail::resolved_scale("landmark_cache", options_.scale, shape_.head_dim); }
  /// The position of block n at which its landmark was encoded.
  Index stored_place(Index n) const { return places_of_text ? (held_.dropped + n) * options_.block_size : 0; }
  /// The position of query i.
  Index position_of(Index i) const { return map_.local(held_) + first_ + i; }

  /// Writes the queries at token i of the heads that share a KV head, [group][padded_head_dim], scaled, encoded at
  /// position `place`, and with columns in the order that score_keys needs for keys of type Tk.
  template <class Tk = T, class Tq>
  void encode_queries(TensorView<const Tq> q, Index b, Index kv_head, Index i, Index place, Real* to) const {
    const double factor = scale() * double(detail::score_unit<Real>);
    for (Index g = 0; g < group(); ++g) {
      const Tq* from = q.row(b, kv_head * group() + g, i);
      Real* row = to + g * padded_head_dim();
      for (Index c = 0; c < shape_.head_dim; ++c)
        row[c] = static_cast<Real>(factor * static_cast<double>(from[c]));
      std::fill(row + shape_.head_dim, row + padded_head_dim(), Real(0));
    }
    detail::encode_at(position_, MatrixView<Real>{to, group(), shape_.head_dim, padded_head_dim()},
                      detail::RowPositions{place, group()}, Role::query);
    for (Index g = 0; g < group(); ++g)
      detail::interleave_columns<Tk>(to + g * padded_head_dim(), shape_.head_dim);
  }

  detail::LandmarkStore<T> empty_store(Index capacity, Index drop_at_once) const {
    return {shape_,
            {.block = options_.block_size,
             .window_blocks = options_.window_blocks,
             .capacity = capacity,
             .drop_at_once = drop_at_once,
             .rollback = options_.rollback}};
  }
  std::vector<detail::StateField> row_fields() const {
    return detail::landmark_row_fields<T>(shape_, options_.block_size, position_, places_of_text);
  }
  std::vector<detail::StateField> fields() const {
    return detail::landmark_fields<T>(shape_, options_, store_.counts(), position_, places_of_text);
  }
  void forget_last_call() noexcept {
    held_ = {};
    chunk_ = 0;
    masses_.clear();
  }
  void refuse_with_file(const char* name) const {
    if (store_.has_file())
      detail::fail(name, "the blocks of this cache are in a file, and only blocks in memory can be replaced");
  }

  template <class Call, class E>
  void attend_open(const Call& call, const E& executor, Workspace& workspace);
  template <class Call, class E>
  void choose(const Call& call, const E& executor);
  template <class Call, class ScoresOf>
  void score_blocks(const Call& call, Index b, Index kv_head, Index i, Index tokens, Real* q,
                    const ScoresOf& scores_of) const;
  template <class ScoresOf>
  void score_candidates(Index b, Index kv_head, KeyRange blocks, MatrixView<const Real> queries,
                        const ScoresOf& scores_of) const;
  template <class Call, class E>
  void attend_blocks(const Call& call, const E& executor);
  template <class Call>
  void write(const Call& call) const;
  template <class Call, class E>
  void weigh_tokens(const Call& call, const E& executor);

  template <class E>
  void seal(const E& executor) {
    const Index before = blocks();
    store_.seal(position_, places_of_text, executor);
    if (!is_index_stale_) index_blocks(before);
  }
  /// Drops the blocks that exceed the capacity, and frees what no truncation can bring back.
  void settle(Undo& undo) {
    const Index before = dropped();
    store_.settle();
    undo.is_done = true;
    if (dropped() > before) finder_.drop(dropped());
  }

  void check_block(const char* name, Index b, Index n) const {
    if (b < 0 || b >= shape_.batch || n < 0 || n >= blocks())
      detail::fail(name, "block " + std::to_string(n) + " of batch row " + std::to_string(b) +
                             " does not exist: there are " + std::to_string(blocks()) + " blocks and " +
                             std::to_string(shape_.batch) + " batch rows");
  }

  TensorView<const T> block_rows(Index b, Index n, bool of_keys) const {
    check_block(of_keys ? "landmark_cache::block_keys" : "landmark_cache::block_values", b, n);
    const auto rows = [&](Index h) { return of_keys ? store_.rows(b, h, n).k : store_.rows(b, h, n).v; };
    if (shape_.kv_heads == 0)
      return {nullptr, 1, 0, options_.block_size - 1, of_keys ? shape_.head_dim : shape_.value_dim};
    const auto first = rows(0);
    const Index head_stride = shape_.kv_heads > 1 ? rows(1).data - first.data : 0;
    return {first.data, 1,           shape_.kv_heads, options_.block_size - 1,
            first.cols, head_stride, head_stride,     first.row_stride};
  }

  /// Adds the blocks from number `first` of those that can be retrieved to the index.
  void index_blocks(Index first);
  void index_anew();
  /// Updates the index after a truncation has unsealed blocks; `returns`: it has also brought back dropped blocks.
  void unindex_blocks(bool returns);

  StreamShape shape_;
  landmark_cache_options options_;
  P position_;
  Map map_;
  Finder finder_;
  bool is_index_stale_ = false;  ///< the index must be rebuilt before the next call
  detail::LandmarkStore<T> store_;

  // The state of the last call.
  detail::LandmarkChoice<Real> choice_;
  Retrieval held_;
  Index chunk_ = 0;              ///< the number of its tokens
  Index first_ = 0;              ///< the index of its first key among the unsealed keys
  std::vector<Real> out_, lse_;  ///< [batch, heads, chunk, value_dim] and without value_dim
  std::vector<Real> worker_rows_;
  std::vector<Real> open_keys_;       ///< [batch][kv_heads][open][head_dim], only for masses
  std::vector<LandmarkMass> masses_;  ///< [batch, heads, chunk]
  std::vector<Index> worker_places_;
};

LONGSPAN_NAMESPACE_END

#include "longspan/stream/landmark_cache-inl.hpp"
#include "longspan/stream/landmark_cache_state-inl.hpp"
