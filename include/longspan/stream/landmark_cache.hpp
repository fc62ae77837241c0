// Landmark attention carried token by token: blocks are sealed as they fill up, and queries retrieve some of
// them by their landmarks.
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

/// Landmark attention over an unbounded stream. A query attends to what is not sealed yet (the open block and
/// its own chunk, whose full blocks count by their landmarks) and to the top_k sealed blocks whose landmarks
/// have the highest scores: one group of the own block's tokens and of the landmarks of the others.
///
///   landmark_retrieval retrieve{{.block_size = 64, .top_k = 4}, rotary(Pairing::half_split)};
///   auto cache = retrieve.stream({.heads = 32, .kv_heads = 8, .head_dim = 128, .value_dim = 128});
///   cache.extend(q, k, v, out);  // a chunk, or one token; lse and an execution may follow
///
/// Shapes    q [batch, heads, n, head_dim]   k [batch, kv_heads, n, head_dim]   v [.., n, value_dim]
///           out [batch, heads, n, value_dim]   lse [batch, heads, n]
///           n may differ from call to call, and a chunk may cross blocks.
/// Landmarks every block_size-th token is one; `tokens_to_landmark` says how many come before the next.
/// Positions are written by the cache, q and k come without: stingy_positions, exact_positions or your own.
/// Index     every_landmark scores all blocks; an index of your own names some, see LandmarkIndex.
/// Types     tensors of any type of softmax_attention. T is what keys, values and landmarks are kept in, a
///           type of 16 bits too, rounded once more when a block is sealed with its positions; arithmetic is
///           in double for T = double, which takes queries of double, and else in float. With std::int8_t
///           the rows of sealed blocks are int8, with a scale to each; the landmarks that choose blocks, and
///           what is not sealed, are float.
/// Chunks    a chunk retrieves from the blocks that were sealed before it, as in the paper, so results depend
///           on how tokens are cut into calls. With split_at_blocks they are those of single steps, except
///           where `select` takes the maximum over tokens. With a top_k of all sealed blocks, any chunking
///           returns the results of landmark_attention, but for the rounding of int8, which begins when a
///           block is sealed.
/// Cost      for a token 2 * heads * head_dim flop for each sealed block, its landmarks read once for a KV
///           head; attention to top_k blocks, where they lie, and to the open part. Copies share the blocks.
///           Behind 32768 tokens a token takes 0.57 of the time of float with blocks of int8.
/// Rollback  truncate(n) takes back tokens, all outputs after it having the bits of a stream that never had
///           them. That reaches back options.rollback tokens from the largest size so far, often more, and
///           never before a block that `drop` removed; can_truncate(n) says it beforehand. Costs the rows of
///           sealed blocks, and dropped blocks, for `rollback` tokens: bytes() counts them.
/// File      with options.path, sealed blocks that no truncation reaches are written there and attended
///           there; landmarks, the open part and the blocks of the last `rollback` tokens are in memory, and
///           of the file about `resident_bytes` beyond what one query retrieves. A cache that opens the file of
///           an earlier one has all blocks that were sealed `rollback` tokens before its end, size() tokens,
///           whenever the process ended; the later tokens have to come again. (Not when the machine stops:
///           nothing is flushed to the disk.) Opening reads the file once, compares its checksums, and locks
///           it. A copy shares the blocks, and keeps in memory what it seals itself. If another
///           process shortens the file, reading it raises SIGBUS. After fork() parent and child hold the same
///           lock: only one of them may use the cache again.
/// Error     that of landmark_attention over the rows as they are kept; int8 rounds each element of a sealed
///           row by 1 / 254 of the largest of the row.
/// Bits      do not depend on the executor, nor on how many threads it has.
/// Throws    Error when shapes or options disagree; FileError if the disk has no space for what a call writes, or
///           the file is damaged, of another cache, or in use; each before anything changes. A call that
///           throws, std::bad_alloc too, leaves the cache as it was; with split_at_blocks, with the
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
  /// Changes nothing if memory is short.
  landmark_cache& operator=(const landmark_cache& other) {
    if (this == &other) return *this;
    landmark_cache copy(other);
    return *this = std::move(copy);
  }

  /// Appends tokens whose queries are not needed.
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
  /// Tokens so far, landmarks included.
  Index size() const noexcept { return store_.counts().tokens; }
  /// Sealed blocks that can be retrieved.
  Index blocks() const noexcept { return store_.counts().blocks(); }
  /// Sealed blocks that have left.
  Index dropped() const noexcept { return store_.counts().dropped; }
  /// How many tokens come before the next landmark.
  Index tokens_to_landmark() const noexcept { return options_.block_size - 1 - size() % options_.block_size; }
  /// Memory of keys, values and landmarks: those shared with copies and those kept for a truncation included,
  /// those in a file not.
  Index bytes() const noexcept { return store_.bytes(); }
  /// The blocks that query i of the last call retrieved, rising, counted from `retrieved_from()` on. With
  /// split_at_blocks this, `mass` and `retrieved_from` are of the last piece of the call.
  std::span<const Index> retrieved(Index b, Index h, Index i) const {
    return held_.top_k == 0 ? std::span<const Index>() : choice_.of(b, h, i);
  }
  /// With options.mass_sample: the softmax mass of what query i of the last call attended, against that of the
  /// blocks it did not retrieve, all standing where the cache put them. Of those blocks `mass_sample` tokens each,
  /// always the same, stand for all: an unbiased estimate of their sum where the order of tokens says
  /// nothing, exact where the sample is the block, and blind to a single token that it does not hold. With
  /// it, outputs differ from those of softmax attention to all tokens by the share that was passed over and
  /// by how landmarks weigh the blocks. Costs mass_sample / block_size of a scan of all keys for each query.
  LandmarkMass mass(Index b, Index h, Index i) const;
  /// Blocks that had left before the last call.
  Index retrieved_from() const noexcept { return held_.dropped; }

  /// Keys and values of sealed block n of batch row b, without its landmark, as they are kept: [1, kv_heads,
  /// block_size - 1, ..]. Of a cache of int8, whose rows are numbers only with their scales, `decode_block` has them.
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
  /// The same in the arithmetic type, into k and v [1, kv_heads, block_size - 1, ..].
  void decode_block(Index b, Index n, TensorView<Real> k, TensorView<Real> v) const;
  /// Forgets the oldest sealed blocks, for good: no truncation goes back to where one of them was not sealed.
  void drop(Index count);

  /// Forgets everything, or changes nothing. A file is replaced by an empty one, made under the name of the
  /// file with ".new" after it; copies go on with what they shared of the old one.
  void clear();

  /// Can the stream forget all tokens but the first `tokens`?
  bool can_truncate(Index tokens) const noexcept {
    return tokens >= store_.counts().least() && tokens <= size();
  }
  /// Forgets all tokens but the first `tokens`, which go on as if no others had come.
  void truncate(Index tokens);

  /// Batch row b becomes what row rows[b] was: the step of a beam search.
  void reorder(std::span<const Index> rows);

  void save(std::ostream& to) const { detail::save_landmark_store(to, fields(), store_); }
  /// Takes over the state of a cache of the same shape, options and position; `rollback`, `mass_sample`, `path` and
  /// `resident_bytes` may differ. Changes nothing if that fails.
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

  /// Undoes what a call that throws has appended and sealed.
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
                  "longspan: a landmark_cache of double takes queries of double, others those of the others");
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

  /// Appends tokens and seals blocks; nothing is settled yet.
  template <class Tk, class Tv, class E>
  void append_piece(TensorView<Tk> k, TensorView<Tv> v, const E& executor) {
    store_.reserve(k.rows);
    store_.append(k, v);
    seal(executor);
  }
  /// The same, and answers the queries of the tokens.
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
  /// Where block n stood when its landmark was encoded.
  Index stored_place(Index n) const { return places_of_text ? (held_.dropped + n) * options_.block_size : 0; }
  /// Position of query i.
  Index position_of(Index i) const { return map_.local(held_) + first_ + i; }

  /// The queries at i of the heads that share a KV head, [group][padded_head_dim], as scores need them, as if
  /// they stood at `place`, for keys of type Tk.
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
    detail::encode_alike(position_, MatrixView<Real>{to, group(), shape_.head_dim, padded_head_dim()}, place,
                         Role::query);
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
  /// Drops what the capacity does not hold, and lets go what no truncation reaches.
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

  /// Tells the index of the blocks from number `first` of those that are kept.
  void index_blocks(Index first);
  void index_anew();
  /// Tells the index that blocks are not sealed any more; `returns`: and that dropped ones are back.
  void unindex_blocks(bool returns);

  StreamShape shape_;
  landmark_cache_options options_;
  P position_;
  Map map_;
  Finder finder_;
  bool is_index_stale_ = false;  ///< before the next call the index has to be made anew
  detail::LandmarkStore<T> store_;

  // Of the last call.
  detail::LandmarkChoice<Real> choice_;
  Retrieval held_;
  Index chunk_ = 0;              ///< its tokens
  Index first_ = 0;              ///< its first key among those not sealed
  std::vector<Real> out_, lse_;  ///< [batch, heads, chunk, value_dim] and without value_dim
  std::vector<Real> worker_rows_;
  std::vector<Real> open_keys_;       ///< [batch][kv_heads][open][head_dim], where masses are asked for
  std::vector<LandmarkMass> masses_;  ///< [batch, heads, chunk]
  std::vector<Index> worker_places_;
};

LONGSPAN_NAMESPACE_END

#include "longspan/stream/landmark_cache-inl.hpp"
#include "longspan/stream/landmark_cache_state-inl.hpp"
