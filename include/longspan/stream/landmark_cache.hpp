// Landmark attention carried token by token: blocks are sealed as they fill up, and queries retrieve some of
// them by their landmarks.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <deque>
#include <istream>
#include <memory>
#include <new>
#include <ostream>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/landmark_forward.hpp"
#include "longspan/detail/landmark_scan.hpp"
#include "longspan/detail/problem.hpp"
#include "longspan/detail/state_file.hpp"
#include "longspan/eigen.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/landmarks.hpp"
#include "longspan/position.hpp"
#include "longspan/stream/landmark_retrieval.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN

struct landmark_cache_shape {
  Index batch = 1, heads = 1, kv_heads = 1, head_dim = 0, value_dim = 0;
};

struct landmark_cache_options {
  Index block = 64;  ///< keys of a block: every block-th key of the stream is a landmark
  Index top_k = 4;   ///< sealed blocks that a query retrieves
  LandmarkSelect select = LandmarkSelect::per_token_and_head;
  Index local_blocks = 0;  ///< the last full blocks that are always attended, and sealed later
  Index capacity = 0;      ///< sealed blocks that are kept, the oldest leave first; 0: all
  double scale = default_scale;
};

/// Landmark attention over an unbounded stream. Each query attends to what is not sealed yet (the open block
/// and the chunk with it, whose full blocks count by their landmarks) and to the top_k sealed blocks whose
/// landmarks have the highest scores: one softmax group of the own block's tokens and of the landmarks of the
/// others.
///
///   landmark_cache<float, rotary> cache({.heads = 32, .kv_heads = 8, .head_dim = 128, .value_dim = 128},
///                                       {.block = 64, .top_k = 4}, rotary(Pairing::half_split));
///   cache.extend(q, k, v, out);  // a chunk, or one token; lse and an execution may follow
///
/// Shapes    q [batch, heads, n, head_dim], k [batch, kv_heads, n, head_dim], v [.., n, value_dim], out
/// [batch,
///           heads, n, value_dim], lse [batch, heads, n]; n may differ from call to call, and cross blocks
/// Landmarks every block-th token of the stream is one; `tokens_to_landmark()` says when the next is due
/// Positions written by the cache: q and k come without. stingy_positions, exact_positions, or a map of your
/// own Types     tensors float, double, bfloat16, half; keys, values and arithmetic in T, float or double Law
/// with top_k of at least the sealed blocks, any chunking gives the results of landmark_attention Cost of a
/// token: heads * head_dim * 2 flop for each sealed block, read once for each KV head; top_k blocks;
///           the open part. Sealed blocks are attended in place and shared by copies of the cache
/// Bits      do not depend on the executor, nor on how many threads it has
/// Throws    Error when shapes or options disagree, before anything changes
/// Source    Mohtashami and Jaggi 2023 (arXiv 2305.16300), sections 3.2 and 3.2.1, with min(top_k, sealed)
/// blocks
template <class T = float, Position P = no_position, PositionMap Map = stingy_positions>
class landmark_cache {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>,
                "longspan: a landmark_cache keeps float or double");

 public:
  explicit landmark_cache(const landmark_cache_shape& shape, const landmark_cache_options& options = {},
                          const P& position = P{}, const Map& map = Map{})
      : shape_(shape), options_(options), position_(position), map_(map) {
    check_options();
    clear();
  }

  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out>
  void extend(const Q& q, const K& k, const V& v, Out&& out) {
    extend(q, k, v, out, detail::no_rows<detail::LseOf<Q>>());
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, ExecutionLike E>
  void extend(const Q& q, const K& k, const V& v, Out&& out, E&& execution) {
    extend(q, k, v, out, detail::no_rows<detail::LseOf<Q>>(), execution);
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse>
  void extend(const Q& q, const K& k, const V& v, Out&& out, Lse&& lse) {
    extend(q, k, v, out, lse, openmp{});
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse, ExecutionLike E>
  void extend(const Q& q, const K& k, const V& v, Out&& out, Lse&& lse, E&& execution) {
    const auto call = detail::checked_problem(name, view(q), view(k), view(v), view(out), rows_view(lse));
    check_shapes(call);
    detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
      held_ = {blocks(), dropped_, std::min(options_.top_k, blocks()), options_.top_k, options_.block};
      chunk_ = call.q.rows;
      first_ = local_;
      append(call.k, call.v);
      if (call.out.empty() && call.lse.data == nullptr) return seal(executor);
      attend_local(call, executor, workspace);
      if (held_.top_k > 0) {
        choose(call, executor);
        attend_blocks(call, executor);
      }
      write(call);
      seal(executor);
    });
  }

  /// Takes tokens whose queries nobody asks for.
  template <TensorLike K, TensorLike V, ExecutionLike E = openmp>
  void absorb(const K& k, const V& v, E&& execution = E{}) {
    const auto keys = view(k);
    const auto values = view(v);
    const auto wanted = [&](const auto& x, const char* what, Index cols) {
      if (x.batch != shape_.batch || x.heads != shape_.kv_heads || x.rows != keys.rows || x.cols != cols) {
        detail::refuse("landmark_cache::absorb", what, detail::shape_text(x),
                       detail::shape_text(shape_.batch, shape_.kv_heads, keys.rows, cols));
      }
    };
    wanted(keys, "k", shape_.head_dim);
    wanted(values, "v", shape_.value_dim);
    append(keys, values);
    detail::with_executor(execution, [&](const auto& executor) { seal(executor); });
  }

  /// Tokens so far, landmarks included.
  Index size() const noexcept { return size_; }
  /// Sealed blocks that can be retrieved.
  Index blocks() const noexcept { return static_cast<Index>(pages_.front().size()); }
  /// Sealed blocks that have left.
  Index dropped() const noexcept { return dropped_; }
  /// How many tokens come before the next landmark.
  Index tokens_to_landmark() const noexcept { return options_.block - 1 - size_ % options_.block; }
  /// What the last call retrieved for a query: numbers of blocks in the stream, rising.
  std::span<const Index> retrieved(Index b, Index h, Index i) const {
    return {chosen_.data() + selection(b, h, i) * held_.top_k, static_cast<std::size_t>(held_.top_k)};
  }
  /// Memory of keys, values and landmarks, those shared with copies included.
  Index bytes() const noexcept {
    const Index sealed = shape_.batch * blocks() * (page_size() + shape_.kv_heads * shape_.head_dim);
    return static_cast<Index>(sizeof(T)) * (sealed + static_cast<Index>(local_k_.size() + local_v_.size()));
  }

  void clear() {
    pages_.assign(static_cast<std::size_t>(std::max<Index>(1, shape_.batch)), {});
    landmarks_.assign(static_cast<std::size_t>(shape_.batch * shape_.kv_heads), {});
    local_k_.clear();
    local_v_.clear();
    chosen_.clear();
    size_ = dropped_ = local_ = room_ = 0;
    held_ = {};
  }

  /// Batch row b becomes what row rows[b] was: the step of a beam search.
  void reorder(std::span<const Index> rows) {
    if (static_cast<Index>(rows.size()) != shape_.batch) {
      detail::refuse("landmark_cache::reorder", "the number of rows", std::to_string(rows.size()),
                     std::to_string(shape_.batch));
    }
    for (const Index row : rows) {
      if (row < 0 || row >= shape_.batch) {
        detail::refuse("landmark_cache::reorder", "a row", std::to_string(row),
                       "0 to " + std::to_string(shape_.batch - 1));
      }
    }
    const landmark_cache before = *this;
    const auto copy_row = [&](const std::vector<T>& from, std::vector<T>& to, Index b, Index row) {
      const Index count = static_cast<Index>(from.size()) / shape_.batch;
      std::copy_n(from.data() + row * count, count, to.data() + b * count);
    };
    for (Index b = 0; b < shape_.batch; ++b) {
      const Index row = rows[static_cast<std::size_t>(b)];
      pages_[at(b)] = before.pages_[at(row)];
      for (Index h = 0; h < shape_.kv_heads; ++h)
        landmarks_[at(b * shape_.kv_heads + h)] = before.landmarks_[at(row * shape_.kv_heads + h)];
      copy_row(before.local_k_, local_k_, b, row);
      copy_row(before.local_v_, local_v_, b, row);
    }
  }

  void save(std::ostream& to) const;
  /// Takes the state of a cache of the same shape and options; unchanged where that fails.
  void load(std::istream& from);

 private:
  static constexpr const char* name = "landmark_cache::extend";
  static constexpr bool encodes = !std::is_same_v<P, no_position>;
  static constexpr Index w = detail::lanes<T>;
  static constexpr detail::StateKind kind{"landmark", 1, "landmark_cache::save", "landmark_cache::load"};

  /// A sealed block of one batch row, never changed: for each KV head keys [block][head_dim], encoded as if
  /// the block stood at position 0, and values [block - 1][value_dim].
  using Page = std::shared_ptr<const T>;

  static std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
  Index group() const noexcept { return shape_.kv_heads == 0 ? 1 : shape_.heads / shape_.kv_heads; }
  Index head_size() const noexcept {
    return options_.block * shape_.head_dim + (options_.block - 1) * shape_.value_dim;
  }
  Index page_size() const noexcept { return shape_.kv_heads * head_size(); }
  Index padded_head_dim() const noexcept { return detail::round_up(shape_.head_dim, w); }

  TensorView<T> local(std::vector<T>& rows, Index cols) const {
    return {rows.data(),  shape_.batch, shape_.kv_heads, local_, cols, shape_.kv_heads * room_ * cols,
            room_ * cols, cols};
  }

  /// Which list of chosen blocks belongs to a query.
  Index selection(Index b, Index h, Index i) const noexcept {
    switch (options_.select) {
      case LandmarkSelect::per_token_and_head:
        return (b * shape_.heads + h) * chunk_ + i;
      case LandmarkSelect::max_over_heads:
        return b * chunk_ + i;
      case LandmarkSelect::max_over_tokens:
        return b * shape_.heads + h;
      case LandmarkSelect::max_over_both:
        return b;
      case LandmarkSelect::per_kv_group:
        break;
    }
    return (b * shape_.kv_heads + h / group()) * chunk_ + i;
  }

  void check_options() const;
  template <class Call>
  void check_shapes(const Call& call) const;
  template <class K, class V>
  void append(const K& k, const V& v);
  template <class Call, class E>
  void attend_local(const Call& call, const E& executor, Workspace& workspace);
  template <class Call, class E>
  void choose(const Call& call, const E& executor);
  template <class Call, class E>
  void attend_blocks(const Call& call, const E& executor);
  template <class Call>
  void write(const Call& call) const;
  template <class E>
  void seal(const E& executor);

  /// The row of a query as scores need it, as if it stood at `position`.
  template <class Tq>
  void encode_query(const Tq* from, Index position, T* to) const {
    const double factor = scale() * double(detail::score_unit<T>);
    for (Index c = 0; c < shape_.head_dim; ++c) to[c] = static_cast<T>(factor * static_cast<double>(from[c]));
    std::fill(to + shape_.head_dim, to + padded_head_dim(), T(0));
    position_.encode(MatrixView<T>{to, 1, shape_.head_dim, shape_.head_dim}, position, Role::query);
  }
  double scale() const {
    return options_.scale != default_scale
               ? options_.scale
               : 1 / std::sqrt(static_cast<double>(std::max<Index>(1, shape_.head_dim)));
  }
  /// Where the stored landmark of block n was encoded: as in a block at 0, or in the text.
  Index stored_place(Index n) const {
    if constexpr (requires { Map::are_of_the_text; }) return (held_.dropped + n) * options_.block;
    return 0;
  }
  std::array<std::int64_t, 15> numbers() const;

  landmark_cache_shape shape_;
  landmark_cache_options options_;
  P position_;
  Map map_;
  std::vector<std::deque<Page>> pages_;    ///< of each batch row
  std::vector<std::vector<T>> landmarks_;  ///< of each batch row and KV head, [blocks][head_dim]
  std::vector<T> local_k_, local_v_;       ///< [batch][kv_heads][room][cols], without positions
  Index local_ = 0;                        ///< keys there
  Index room_ = 0;
  Index size_ = 0;
  Index dropped_ = 0;

  // Of the last call.
  Retrieval held_;
  Index chunk_ = 0;            ///< its tokens
  Index first_ = 0;            ///< its first key among the local ones
  std::vector<Index> chosen_;  ///< [selections][top_k]
  std::vector<T> out_, lse_, scores_, best_, highest_;
};

// ----------------------------------------------------------------------------------------------------------
// A chunk

template <class T, Position P, PositionMap Map>
void landmark_cache<T, P, Map>::check_options() const {
  const auto at_least = [](const char* what, Index got, Index least) {
    if (got < least)
      detail::refuse("landmark_cache", what, std::to_string(got), "at least " + std::to_string(least));
  };
  at_least("batch", shape_.batch, 0);
  at_least("heads", shape_.heads, 0);
  at_least("kv_heads", shape_.kv_heads, 0);
  at_least("head_dim", shape_.head_dim, 0);
  at_least("value_dim", shape_.value_dim, 0);
  at_least("block", options_.block, 2);
  at_least("top_k", options_.top_k, 0);
  at_least("local_blocks", options_.local_blocks, 0);
  at_least("capacity", options_.capacity, 0);
  if (shape_.kv_heads == 0 ? shape_.heads != 0 : shape_.heads % shape_.kv_heads != 0) {
    detail::refuse("landmark_cache", "kv_heads", std::to_string(shape_.kv_heads),
                   "a divisor of the " + std::to_string(shape_.heads) + " heads");
  }
  position_.check(shape_.head_dim);
}

template <class T, Position P, PositionMap Map>
template <class Call>
void landmark_cache<T, P, Map>::check_shapes(const Call& call) const {
  static_assert(std::is_same_v<typename Call::Real, T>,
                "longspan: a landmark_cache of double takes queries of double, one of float the others");
  const auto expect = [](const char* what, Index got, Index wanted) {
    if (got != wanted) detail::refuse(name, what, std::to_string(got), std::to_string(wanted));
  };
  expect("batch", call.q.batch, shape_.batch);
  expect("the number of heads", call.q.heads, shape_.heads);
  expect("the number of KV heads", call.k.heads, shape_.kv_heads);
  expect("head_dim", call.q.cols, shape_.head_dim);
  expect("value_dim", call.v.cols, shape_.value_dim);
  expect("the number of rows of k", call.k.rows, call.q.rows);
}

/// Keys and values go behind the local ones.
template <class T, Position P, PositionMap Map>
template <class K, class V>
void landmark_cache<T, P, Map>::append(const K& k, const V& v) {
  const Index lanes = shape_.batch * shape_.kv_heads;
  if (local_ + k.rows > room_) {
    const Index room = std::max(2 * room_, local_ + k.rows);
    const auto grown = [&](const std::vector<T>& rows, Index cols) {
      std::vector<T> to(at(lanes * room * cols));
      for (Index n = 0; n < lanes; ++n)
        std::copy_n(rows.data() + n * room_ * cols, local_ * cols, to.data() + n * room * cols);
      return to;
    };
    auto grown_k = grown(local_k_, shape_.head_dim), grown_v = grown(local_v_, shape_.value_dim);
    local_k_ = std::move(grown_k);
    local_v_ = std::move(grown_v);
    room_ = room;
  }
  for (Index n = 0; n < lanes; ++n) {
    const Index b = n / shape_.kv_heads, h = n % shape_.kv_heads, row = n * room_ + local_;
    const auto copy = [&](const auto& from, T* to) {
      if (!from.empty())
        detail::convert_rows(from.row(b, h, 0), from.row_stride, from.rows, from.cols, to, from.cols);
    };
    copy(k, local_k_.data() + row * shape_.head_dim);
    copy(v, local_v_.data() + row * shape_.value_dim);
  }
  local_ += k.rows;
  size_ += k.rows;
}

template <class T, Position P, PositionMap Map>
template <class Call, class E>
void landmark_cache<T, P, Map>::attend_local(const Call& call, const E& executor, Workspace& workspace) {
  const Index rows = shape_.batch * shape_.heads * chunk_;
  out_.resize(at(rows * shape_.value_dim));
  lse_.resize(at(rows));
  using Tq = typename std::remove_const_t<typename decltype(call.q)::Element>;
  detail::Problem<Tq, T, T, T> problem;
  problem.q = call.q;
  problem.k = local(local_k_, shape_.head_dim);
  problem.v = local(local_v_, shape_.value_dim);
  problem.out = compact_view(out_.data(), shape_.batch, shape_.heads, chunk_, shape_.value_dim);
  problem.lse = compact_rows_view(lse_.data(), shape_.batch, shape_.heads, chunk_);
  problem.first_query = first_;
  problem.scale = scale();
  detail::LandmarkOptions options;
  options.at = landmarks::every(options_.block);
  detail::landmark_forward(problem, options, causal{}, unchanged{}, position_, executor, workspace);
}

/// Scores every landmark for the queries of some tokens at a time, and keeps the best blocks.
template <class T, Position P, PositionMap Map>
template <class Call, class E>
void landmark_cache<T, P, Map>::choose(const Call& call, const E& executor) {
  const Index count = held_.blocks, heads = shape_.heads, batch = shape_.batch, k = held_.top_k;
  const bool weighs = options_.select != LandmarkSelect::per_token_and_head;
  const bool over_tokens =
      options_.select == LandmarkSelect::max_over_tokens || options_.select == LandmarkSelect::max_over_both;
  constexpr Index most_scores = Index{1} << 24;
  const Index slice = std::clamp<Index>(most_scores / std::max<Index>(1, batch * heads * count), 1, chunk_);
  const Index selections = selection(batch - 1, heads - 1, chunk_ - 1) + 1;
  chosen_.resize(at(selections * k));
  best_.resize(at(selections * k));
  scores_.resize(at(batch * heads * slice * count));
  highest_.assign(over_tokens ? at(selections * count) : 0, T(-1));
  const Index q_room = group() * padded_head_dim();
  std::vector<T> encoded(at(executor.workers() * q_room));
  std::vector<T> merged(at(weighs && !over_tokens ? executor.workers() * count : 0));
  const Index local_place = map_.local(held_) + first_;
  const auto row_of = [&](Index b, Index h, Index i) {
    return scores_.data() + ((b * heads + h) * slice + i) * count;
  };
  const auto raise = [&](T* to, const T* from) {
    for (Index n = 0; n < count; ++n) to[n] = std::max(to[n], from[n]);
  };
  for (Index first = 0; first < chunk_; first += slice) {
    const Index tokens = std::min(slice, chunk_ - first);
    executor.for_each(batch * shape_.kv_heads * tokens, [&](Index task, Index worker) {
      const Index i = task % tokens, n = task / tokens, b = n / shape_.kv_heads,
                  first_head = n % shape_.kv_heads * group();
      T* q = encoded.data() + worker * q_room;
      // Blocks that stand in one place are scored together.
      for (Index begin = 0, end = 0; begin < count; begin = end) {
        const Index shift = map_.scored(held_, begin) - stored_place(begin);
        for (end = begin + 1; end < count && map_.scored(held_, end) - stored_place(end) == shift;) ++end;
        for (Index g = 0; g < group(); ++g) {
          encode_query(call.q.row(b, first_head + g, first + i), local_place + first + i - shift,
                       q + g * padded_head_dim());
        }
        detail::score_landmarks<T>({landmarks_[at(n)].data() + begin * shape_.head_dim, end - begin,
                                    shape_.head_dim, shape_.head_dim},
                                   {q, group(), shape_.head_dim, padded_head_dim()},
                                   row_of(b, first_head, i) + begin, slice * count);
      }
      for (Index g = 0; g < group() && weighs; ++g) detail::softmax_row(row_of(b, first_head + g, i), count);
    });
    if (over_tokens) {
      const bool per_head = options_.select == LandmarkSelect::max_over_tokens;
      executor.for_each(selections, [&](Index s, Index) {
        const Index b = per_head ? s / heads : s, head = per_head ? s % heads : 0;
        for (Index h = head; h < (per_head ? head + 1 : heads); ++h) {
          for (Index i = 0; i < tokens; ++i) raise(highest_.data() + s * count, row_of(b, h, i));
        }
      });
      continue;
    }
    const Index lists = options_.select == LandmarkSelect::per_token_and_head ? heads
                        : options_.select == LandmarkSelect::per_kv_group     ? shape_.kv_heads
                                                                              : 1;
    executor.for_each(batch * lists * tokens, [&](Index task, Index worker) {
      const Index i = task % tokens, b = task / tokens / lists, together = heads / lists,
                  head = task / tokens % lists * together;
      const T* scores = row_of(b, head, i);
      if (together > 1) {
        T* to = merged.data() + worker * count;
        std::copy_n(scores, count, to);
        for (Index h = head + 1; h < head + together; ++h) raise(to, row_of(b, h, i));
        scores = to;
      }
      const Index s = selection(b, head, first + i);
      detail::choose_highest(scores, count, k, chosen_.data() + s * k, best_.data() + s * k);
    });
  }
  for (Index s = 0; s < selections && over_tokens; ++s) {
    detail::choose_highest(highest_.data() + s * count, count, k, chosen_.data() + s * k,
                           best_.data() + s * k);
  }
}

template <class T, Position P, PositionMap Map>
template <class Call, class E>
void landmark_cache<T, P, Map>::attend_blocks(const Call& call, const E& executor) {
  const Index d = shape_.head_dim, dv = shape_.value_dim, block = options_.block;
  const Index row_room = padded_head_dim() + detail::round_up(dv, w) + detail::round_up(block, w) + w;
  scores_.resize(std::max(scores_.size(), at(executor.workers() * row_room)));
  executor.for_each(shape_.batch * shape_.heads * chunk_, [&](Index row, Index worker) {
    const Index i = row % chunk_, h = row / chunk_ % shape_.heads, b = row / chunk_ / shape_.heads;
    T* q = scores_.data() + worker * row_room;
    detail::RetrievedRow<T> retrieved{q + padded_head_dim(), q + padded_head_dim() + detail::round_up(dv, w)};
    std::fill_n(retrieved.o, detail::round_up(dv, w), T(0));
    const Index* chosen = chosen_.data() + selection(b, h, i) * held_.top_k;
    for (Index rank = 0; rank < held_.top_k; ++rank) {
      const Index n = chosen[rank];
      const Index place = map_.local(held_) + first_ + i - map_.attended(held_, n, rank);
      if (rank == 0 || encodes) encode_query(call.q.row(b, h, i), place, q);
      const T* keys = pages_[at(b)][at(n)].get() + h / group() * head_size();
      retrieved.absorb(q, padded_head_dim(), {keys, block, d, d}, {keys + block * d, block - 1, dv, dv});
    }
    retrieved.merge_into(out_.data() + row * dv, lse_[at(row)], dv);
  });
  // To numbers of the stream.
  for (Index& n : chosen_) n += held_.dropped;
}

template <class T, Position P, PositionMap Map>
template <class Call>
void landmark_cache<T, P, Map>::write(const Call& call) const {
  using To = typename decltype(call.out)::Element;
  for (Index row = 0; row < shape_.batch * shape_.heads * chunk_; ++row) {
    const Index i = row % chunk_, h = row / chunk_ % shape_.heads, b = row / chunk_ / shape_.heads;
    To* to = call.out.row(b, h, i);
    for (Index c = 0; c < shape_.value_dim; ++c)
      to[c] = static_cast<To>(out_[at(row * shape_.value_dim + c)]);
    if (call.lse.data != nullptr) call.lse(b, h, i) = lse_[at(row)];
  }
}

// ----------------------------------------------------------------------------------------------------------
// Blocks

/// Full blocks become pages, but for the last local_blocks of them.
template <class T, Position P, PositionMap Map>
template <class E>
void landmark_cache<T, P, Map>::seal(const E& executor) {
  const Index d = shape_.head_dim, dv = shape_.value_dim, block = options_.block;
  const Index full = std::max<Index>(0, local_ / block - options_.local_blocks), first = blocks() + dropped_;
  if (full == 0) return;
  const auto new_page = [&] {
    const auto bytes = at(page_size()) * sizeof(T);
    return std::shared_ptr<T>(static_cast<T*>(::operator new (bytes, std::align_val_t{64})),
                              [](T* page) { ::operator delete (page, std::align_val_t{64}); });
  };
  std::vector<std::shared_ptr<T>> sealed;
  for (Index n = 0; n < shape_.batch * full; ++n) sealed.push_back(new_page());
  executor.for_each(shape_.batch * full * shape_.kv_heads, [&](Index task, Index) {
    const Index h = task % shape_.kv_heads, n = task / shape_.kv_heads % full,
                b = task / shape_.kv_heads / full;
    T* keys = sealed[at(b * full + n)].get() + h * head_size();
    const Index row = (b * shape_.kv_heads + h) * room_ + n * block;
    std::copy_n(local_k_.data() + row * d, block * d, keys);
    std::copy_n(local_v_.data() + row * dv, (block - 1) * dv, keys + block * d);
    position_.encode(MatrixView<T>{keys, block, d, d}, 0, Role::key);
  });
  for (Index b = 0; b < shape_.batch; ++b) {
    for (Index n = 0; n < full; ++n) {
      for (Index h = 0; h < shape_.kv_heads; ++h) {
        auto& list = landmarks_[at(b * shape_.kv_heads + h)];
        const T* raw = local_k_.data() + ((b * shape_.kv_heads + h) * room_ + n * block + block - 1) * d;
        list.insert(list.end(), raw, raw + d);
        Index place = block - 1;
        if constexpr (requires { Map::are_of_the_text; }) place += (first + n) * block;
        position_.encode(MatrixView<T>{list.data() + list.size() - at(d), 1, d, d}, place, Role::key);
      }
      pages_[at(b)].push_back(std::move(sealed[at(b * full + n)]));
    }
  }
  const auto drop_front = [&](std::vector<T>& rows, Index cols) {
    for (Index n = 0; n < shape_.batch * shape_.kv_heads; ++n) {
      T* lane = rows.data() + n * room_ * cols;
      std::copy(lane + full * block * cols, lane + local_ * cols, lane);
    }
  };
  drop_front(local_k_, d);
  drop_front(local_v_, dv);
  local_ -= full * block;
  if (options_.capacity == 0 || blocks() <= options_.capacity) return;
  const Index leave = blocks() - options_.capacity;
  for (auto& row : pages_) row.erase(row.begin(), row.begin() + leave);
  for (auto& list : landmarks_) list.erase(list.begin(), list.begin() + leave * d);
  dropped_ += leave;
}

// ----------------------------------------------------------------------------------------------------------
// Files

template <class T, Position P, PositionMap Map>
std::array<std::int64_t, 15> landmark_cache<T, P, Map>::numbers() const {
  return {static_cast<Index>(sizeof(T)),
          shape_.batch,
          shape_.heads,
          shape_.kv_heads,
          shape_.head_dim,
          shape_.value_dim,
          options_.block,
          options_.top_k,
          static_cast<Index>(options_.select),
          options_.local_blocks,
          options_.capacity,
          size_,
          dropped_,
          blocks(),
          local_};
}

template <class T, Position P, PositionMap Map>
void landmark_cache<T, P, Map>::save(std::ostream& to) const {
  const Index lanes = shape_.batch * shape_.kv_heads;
  const Index elements = shape_.batch * blocks() * page_size() + lanes * blocks() * shape_.head_dim +
                         lanes * local_ * (shape_.head_dim + shape_.value_dim);
  const auto all = numbers();
  detail::StateWriter writer(to, kind, all, elements * static_cast<Index>(sizeof(T)));
  for (Index b = 0; b < shape_.batch; ++b) {
    for (const Page& page : pages_[at(b)]) writer.array(page.get(), page_size());
  }
  for (const auto& list : landmarks_) writer.array(list.data(), static_cast<Index>(list.size()));
  for (Index n = 0; n < lanes; ++n) {
    writer.array(local_k_.data() + n * room_ * shape_.head_dim, local_ * shape_.head_dim);
    writer.array(local_v_.data() + n * room_ * shape_.value_dim, local_ * shape_.value_dim);
  }
  writer.finish();
}

template <class T, Position P, PositionMap Map>
void landmark_cache<T, P, Map>::load(std::istream& from) {
  const char* load_name = "landmark_cache::load";
  static constexpr const char* names[] = {"bytes of a number", "batch", "heads", "kv_heads", "head_dim",
                                          "value_dim",         "block", "top_k", "select",   "local_blocks",
                                          "capacity"};
  std::array<std::int64_t, 15> all{};
  detail::StateReader reader(from, kind, all);
  const auto own = numbers();
  for (std::size_t n = 0; n < std::size(names); ++n) {
    if (all[n] != own[n]) detail::refuse(load_name, names[n], std::to_string(all[n]), std::to_string(own[n]));
  }
  landmark_cache loaded(shape_, options_, position_, map_);
  const Index tokens = all[11], left = all[12], sealed = all[13], rows = all[14], block = options_.block;
  constexpr Index most = Index{1} << 48;
  if (tokens < 0 || left < 0 || sealed < 0 || rows < 0 || tokens > most || left > most / block ||
      sealed > most / block || (left + sealed) * block + rows != tokens ||
      rows >= (options_.local_blocks + 1) * block || (options_.capacity > 0 && sealed > options_.capacity)) {
    detail::refuse(load_name, "the sizes", std::to_string(tokens) + " tokens", "those of its blocks");
  }
  const Index lanes = shape_.batch * shape_.kv_heads, d = shape_.head_dim, dv = shape_.value_dim;
  const Index of_blocks = detail::array_bytes<T>(load_name, shape_.batch * page_size() + lanes * d);
  if (of_blocks > 0 && sealed > PTRDIFF_MAX / 2 / of_blocks)
    detail::refuse(load_name, "the number of blocks", std::to_string(sealed), "fewer");
  reader.expect_payload(of_blocks * sealed + detail::array_bytes<T>(load_name, lanes * rows * (d + dv)));
  for (Index n = 0; n < shape_.batch * sealed; ++n) {
    auto page = std::make_shared<std::vector<T>>(reader.template array<T>(page_size()));
    loaded.pages_[at(n / sealed)].push_back(Page(page, page->data()));
  }
  for (auto& list : loaded.landmarks_) list = reader.template array<T>(sealed * d);
  for (Index n = 0; n < lanes; ++n) {
    const auto k = reader.template array<T>(rows * d), v = reader.template array<T>(rows * dv);
    loaded.local_k_.insert(loaded.local_k_.end(), k.begin(), k.end());
    loaded.local_v_.insert(loaded.local_v_.end(), v.begin(), v.end());
  }
  reader.finish();
  loaded.size_ = tokens;
  loaded.dropped_ = left;
  loaded.local_ = loaded.room_ = rows;
  *this = std::move(loaded);
}

LONGSPAN_END
