// Infini-attention token by token: a stream that keeps the compressive memory and the open segment.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <istream>
#include <limits>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/infini/open_rows.hpp"
#include "longspan/detail/infini/pass.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A stream of infini_attention: `extend` appends rows after those of earlier calls. When a segment is full, it is
/// written to the memory, and its rows are dropped unless `rollback` needs them.
///
///   infini_attention attend;
///   auto memory = attend.stream({.heads = 8, .kv_heads = 2, .head_dim = 128, .value_dim = 128});
///   memory.extend(q, k, v, out);  // a prompt, part of a prompt, or one token; execution is optional
///
/// Shapes    q [batch, heads, n, head_dim]           k [batch, kv_heads, n, head_dim]
///           v [batch, kv_heads, n, value_dim]       out [batch, heads, n, value_dim], any n >= 0
/// Local     attends from the new queries to the rows of the open segment so far, so it must hide later keys:
///           the mask of each softmax_attention, dilated_attention or landmark_attention in it must be causal{},
///           causal{} & another mask, or window{.right = 0}. Others are rejected by the compiler or by the
///           constructor. Landmarks must be landmarks::every(n), because a list would not fit an open segment.
///           infini_attention is rejected by the compiler, because it needs a query for each key
/// Types     rows of the open segment are stored as T. M, z and all arithmetic are double if T is, otherwise
///           float; the arithmetic of q must be the same. k and v may have any element types
/// State     batch * kv_heads * (head_dim * (value_dim + 1) + segment * (head_dim + value_dim)) numbers,
///           whatever the number of tokens, and what infini_memory_options documents. A copy is an independent
///           stream
/// Cost      that of local for the new queries over the open segment, and that of infini_attention for reads
///           and writes of the memory. For one token landmark_attention takes 3 times as long as
///           softmax_attention, which has a kernel for a few queries
/// Equal     to a single call over all rows within the error bound, with both rules and however the rows are
///           cut into calls: a segment is written when it is full, from its own rows. If T is the type of k and
///           v, M and z are the same to the bit; rows of `out` are if those of local attention are
/// Bits      of all remaining tokens, and of M and z, are those of a stream that never saw the removed tokens
/// Throws    Error if shapes disagree, before anything changes. If a score throws, or memory runs out
///           (bad_alloc), the stream has appended the first size(b) tokens of batch row b, possibly some of the
///           call's. If an executor or a feature map throws while a segment is written, M and z are invalid
///           until `clear`, `reset` or `load`. An assignment, a load or a truncate that throws changes nothing
/// Source    that of infini_attention
template <Element T, class Local, FeatureMap F>
class infini_memory : public detail::StreamCalls<infini_memory<T, Local, F>, false> {
  static_assert(
      detail::answers_last_queries<Local>,
      "longspan: the local functor of a stream must not be infini_attention, which needs a query for "
      "each key");
  static_assert(detail::LocalHidesLaterKeys<Local>::known,
                "longspan: the local functor of a stream must hide later keys: use the mask causal{} or "
                "causal{} & your mask");

 public:
  using Real = Arithmetic<T>;

  /// `attend.lengths` must be empty: the caller resets or ignores a batch row that has ended.
  infini_memory(infini_attention<Local, F> attend, const StreamShape& shape,
                const infini_memory_options& options = {})
      : attend_(std::move(attend)), shape_(shape), options_(options), open_(shape) {
    detail::check_stream_shape(class_name, shape);
    attend_.check(class_name, shape.batch, shape.heads, shape.head_dim, shape.value_dim);
    attend_.check_segment(shape);
    if (!attend_.lengths.empty())
      detail::refuse(class_name, "lengths", "given", "none, because a stream has no padding");
    if (options.rollback < 0)
      detail::refuse(class_name, "rollback", std::to_string(options.rollback), "at least 0 tokens");
    if (!detail::LocalHidesLaterKeys<Local>::holds(attend_.local)) {
      detail::refuse(
          class_name, "the mask of the local attention", "a mask that shows later keys",
          "causal{}, causal{} & another mask, or window{.right = 0}, because later keys do not exist yet");
    }
    if constexpr (requires { attend_.local.landmarks.fit_any_length(); }) {
      if (!attend_.local.landmarks.fit_any_length()) {
        detail::refuse(class_name, "landmarks of the local attention", "a list of landmarks",
                       "landmarks::every(n), because a list does not fit an open segment");
      }
    }
    const detail::MemoryView<Real> memory = view_of(0, shape.batch);
    m_.resize(static_cast<std::size_t>(memory.m_size()));
    z_.resize(static_cast<std::size_t>(memory.z_size()));
    if (options.rollback > 0) {
      base_m_.resize(m_.size());
      base_z_.resize(z_.size());
    }
    filled_.resize(static_cast<std::size_t>(shape.batch));
    written_.resize(static_cast<std::size_t>(shape.batch));
    closed_.resize(static_cast<std::size_t>(shape.batch));
  }

  infini_memory(const infini_memory&) = default;
  infini_memory(infini_memory&&) = default;
  infini_memory& operator=(const infini_memory& other)
  requires std::is_move_assignable_v<infini_attention<Local, F>>
  {
    return *this = infini_memory(other);
  }
  infini_memory& operator=(infini_memory&&) = default;

  const StreamShape& shape() const noexcept { return shape_; }
  const infini_memory_options& options() const noexcept { return options_; }
  /// The number of tokens appended to batch row b, and not removed, since construction or reset. 0 if there is no such
  /// row.
  Index size(Index b = 0) const noexcept { return has(b) ? written_[at(b)] + filled_[at(b)] : 0; }
  /// The number of these tokens in the open segment.
  Index open_rows(Index b = 0) const noexcept { return has(b) ? filled_[at(b)] : 0; }
  /// Memory in bytes of M and z, of the open segments, and of what `rollback` keeps.
  Index bytes() const noexcept {
    const std::size_t numbers = m_.capacity() + z_.capacity() + base_m_.capacity() + base_z_.capacity();
    std::size_t lengths = 0;
    for (const detail::ClosedSegments& closed : closed_) lengths += closed.lengths.capacity();
    return static_cast<Index>(numbers * sizeof(Real) + lengths * sizeof(Index)) + open_.bytes();
  }
  /// M[c][column] of a KV head; `norm` returns z[c].
  Real memory(Index b, Index kv_head, Index c, Index column) const noexcept {
    const auto view = const_cast<infini_memory*>(this)->view_of(b, 1);
    return view.matrix(kv_head)[c * view.stride() + column];
  }
  Real norm(Index b, Index kv_head, Index c) const noexcept {
    return const_cast<infini_memory*>(this)->view_of(b, 1).norm(kv_head)[c];
  }

  /// Removes everything; `reset` removes everything in batch row b.
  void clear() {
    for (Index b = 0; b < shape_.batch; ++b) reset(b);
  }
  void reset(Index b) {
    check_row("infini_memory::reset", b);
    view_of(m_, z_, b, 1).clear();
    if (options_.rollback > 0) view_of(base_m_, base_z_, b, 1).clear();
    filled_[at(b)] = written_[at(b)] = 0;
    closed_[at(b)].clear();
  }

  /// True if truncate(tokens) will succeed. The tokens of the open segment, and the last `rollback` tokens before the
  /// largest size, can always be removed.
  bool can_truncate(Index tokens) const noexcept {
    if (shape_.batch == 0) return tokens == 0;
    for (Index b = 0; b < shape_.batch; ++b) {
      if (tokens < closed_[at(b)].begin || tokens > size(b)) return false;
    }
    return true;
  }
  /// Removes the tokens of each batch row from number `tokens` on. Throws Error, and changes nothing, unless
  /// can_truncate(tokens). If this reopens a closed segment, M and z are computed from the second memory and the
  /// segments that stay closed, in the same order.
  template <ExecutionLike E = openmp>
  void truncate(Index tokens, E&& execution = E{});

  /// Writes the outputs that `extend` would write, without changing the stream. Copies the stream if the rows would
  /// close a segment.
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, ExecutionLike E = openmp>
  void peek(const Q& q, const K& k, const V& v, Out&& out, E&& execution = E{});

  /// Appends tokens whose queries are not needed: k and v [batch, kv_heads, n, columns], or [1, kv_heads, n, columns]
  /// to batch row b alone.
  template <TensorLike K, TensorLike V, ExecutionLike E = openmp>
  void append(const K& k, const V& v, E&& execution = E{});
  template <TensorLike K, TensorLike V, ExecutionLike E = openmp>
  void append(Index b, const K& k, const V& v, E&& execution = E{});

  /// Batch row b becomes what row rows[b] was: the step of a beam search. Changes nothing if it throws.
  void reorder(std::span<const Index> rows);

  /// out = g * (output of the memory for q) + (1 - g) * out, for a local part that was computed elsewhere. Does not
  /// use the open segment. If the memory is empty, the option `empty_memory` determines the result.
  template <TensorLike Q, TensorLike Out, ExecutionLike E = openmp>
  void recall(const Q& q, Out&& out, E&& execution = E{});

  /// Writes the open segments to the memory before they are full, and begins new ones.
  template <ExecutionLike E = openmp>
  void flush(E&& execution = E{});

  /// Writes the state. A stream with the same functor, shape and T, and no larger rollback, can load it.
  void save(std::ostream& to) const;
  /// Reads what `save` wrote. Throws FileError, and changes nothing, if the file is damaged, contains a norm that is
  /// negative or not finite, or was written by a stream with other options; the text names the first option that
  /// differs.
  void load(std::istream& from);

 private:
  friend detail::StreamCalls<infini_memory, false>;
  static constexpr std::string_view class_name = "infini_memory", function = "infini_memory::extend";

  static std::size_t at(Index b) noexcept { return static_cast<std::size_t>(b); }

  bool has(Index b) const noexcept { return b >= 0 && b < shape_.batch; }
  void check_row(std::string_view name, Index b) const {
    if (has(b)) return;
    detail::refuse(
        name, "the batch row", std::to_string(b),
        shape_.batch == 0 ? "none, because the batch is 0" : "0.." + std::to_string(shape_.batch - 1));
  }

  /// The memories of the batch rows [b, b + rows).
  detail::MemoryView<Real> view_of(Index b, Index rows) { return view_of(m_, z_, b, rows); }
  detail::MemoryView<Real> view_of(std::vector<Real>& m, std::vector<Real>& z, Index b, Index rows) const {
    detail::MemoryView<Real> view{m.data(),        z.data(),        rows,
                                  shape_.kv_heads, shape_.head_dim, shape_.value_dim};
    view.m += b * shape_.kv_heads * view.rows() * view.stride();
    view.z += b * shape_.kv_heads * view.rows();
    return view;
  }

  /// The number of rows of batch row b in open_: those of closed segments, then those of the open one.
  Index stored(Index b) const noexcept { return closed_[at(b)].rows + filled_[at(b)]; }

  /// Makes room for `more` rows in each batch row, at most for a segment and what `rollback` keeps.
  void make_room(Index more);

  /// Calls work(b, rows) for each group of consecutive batch rows [b, b + rows) with the same sizes.
  template <class Work>
  void for_each_run_of_rows(const Work& work) {
    for (Index b = 0, end; b < shape_.batch; b = end) {
      const auto is_as_far = [&](Index other) {
        return filled_[at(other)] == filled_[at(b)] && written_[at(other)] == written_[at(b)] &&
               closed_[at(other)] == closed_[at(b)];
      };
      for (end = b + 1; end < shape_.batch && is_as_far(end);) ++end;
      work(b, end - b);
    }
  }

  template <class Call, class E>
  void take(const Call& call, const E& executor, Workspace& workspace) {
    static_assert(
        std::is_same_v<typename Call::Real, Real>,
        "longspan: q must be double if the rows of the stream are double, otherwise float or 16-bit");
    make_room(call.q_len());
    check_local(call, executor, workspace);
    for_each_run_of_rows([&](Index b, Index rows) { take_in(call, b, rows, executor, workspace); });
  }

  template <class Call, class E>
  void take_in(const Call& call, Index b, Index rows, const E& executor, Workspace& workspace);
  template <class Tk, class Tv, class E>
  void append_rows(TensorView<Tk> k, TensorView<Tv> v, Index b, Index rows, const E& executor,
                   Workspace& workspace);

  /// Copies rows, which must fit into the open segment, to its end without counting them, and writes the outputs of
  /// their queries.
  template <class Tq, class Tk, class Tv, class To, class E>
  void answer(TensorView<const Tq> q, TensorView<const Tk> k, TensorView<const Tv> v, TensorView<To> out,
              Index b, Index rows, const E& executor, Workspace& workspace) {
    const Index begin = closed_[at(b)].rows, filled = filled_[at(b)];
    open_.write(k, v, b, rows, begin + filled);
    attend(q, TensorView<const T>(open_.keys(b, rows, begin, filled + k.rows)),
           TensorView<const T>(open_.values(b, rows, begin, filled + k.rows)), out, b, rows, executor,
           workspace);
  }

  /// Counts `count` more rows in the open segments of the batch rows [b, b + rows), and closes these segments if they
  /// are full.
  template <class E>
  void append_open(Index b, Index rows, Index count, const E& executor, Workspace& workspace) {
    const Index filled = filled_[at(b)] + count;
    if (filled == attend_.segment) return close(b, rows, filled, executor, workspace);
    for (Index row = b; row < b + rows; ++row) filled_[at(row)] = filled;
  }

  auto pass_over(const detail::MemoryView<Real>& memory) const {
    return detail::InfiniPass<Real, Local, F>{attend_.local,
                                              attend_.feature,
                                              attend_.rule,
                                              attend_.memory_uses_positions,
                                              attend_.absolute_positions,
                                              memory};
  }

  bool knows(Index b) const noexcept {
    return written_[at(b)] > 0 || attend_.empty_memory == EmptyMemory::gate;
  }

  auto pass_with_gate(Index b, Index rows, Workspace& workspace) {
    auto pass = pass_over(view_of(b, rows));
    const Index size = shape_.heads * pass.memory.stride();
    const auto shares = detail::take_scratch(workspace, [&](detail::Arena& arena) {
      return std::array<Real*, 2>{arena.take<Real>(size), arena.take<Real>(size)};
    });
    pass.gate = detail::gate_shares(attend_.beta, shape_.heads, shape_.value_dim, pass.memory.stride(),
                                    shares[0], shares[1]);
    return pass;
  }

  /// Checks that the local functor accepts the call, with only the first key of a segment: a functor that accepts it
  /// accepts all later keys.
  template <class Call, class E>
  void check_local(const Call& call, const E& executor, Workspace& workspace);

  template <class Tq, class To, class E>
  void attend(TensorView<const Tq> q, TensorView<const T> k, TensorView<const T> v, TensorView<To> out,
              Index b, Index rows, const E& executor, Workspace& workspace) {
    pass_with_gate(b, rows, workspace)
        .attend(q, k, v, out, written_[at(b)], knows(b), executor, workspace, [&](Index) { return k.rows; });
  }

  /// Writes the open segments of the batch rows [b, b + rows), which have `filled` rows, to the memory, and begins
  /// new ones.
  template <class E>
  void close(Index b, Index rows, Index filled, const E& executor, Workspace& workspace) {
    if (options_.rollback > 0) {
      for (Index row = b; row < b + rows; ++row) closed_[at(row)].make_room();
    }
    write(b, rows, closed_[at(b)].rows, filled, view_of(b, rows), written_[at(b)], executor, workspace);
    count_closed(b, rows, filled);
  }
  void count_closed(Index b, Index rows, Index count) noexcept {
    for (Index row = b; row < b + rows; ++row) {
      filled_[at(row)] = 0;
      written_[at(row)] += count;
      if (options_.rollback > 0) {
        closed_[at(row)].append(count);
      } else {
        closed_[at(row)].begin = written_[at(row)];
      }
    }
  }

  /// Advances the second memory of batch row b to the last segment border that is at least `rollback` tokens old.
  template <class E>
  void settle(Index b, const E& executor, Workspace& workspace);

  /// Writes the rows [first, first + count) of open_, which begin at `position` in the sequence, to a memory.
  template <class E>
  void write(Index b, Index rows, Index first, Index count, const detail::MemoryView<Real>& memory,
             Index position, const E& executor, Workspace& workspace) {
    write(TensorView<const T>(open_.keys(b, rows, first, count)),
          TensorView<const T>(open_.values(b, rows, first, count)), memory, position, executor, workspace);
  }
  template <class E>
  void write(TensorView<const T> k, TensorView<const T> v, const detail::MemoryView<Real>& memory,
             Index position, const E& executor, Workspace& workspace) const {
    auto pass = pass_over(memory);
    const auto scratch = detail::take_scratch(workspace, [&](detail::Arena& arena) {
      return detail::InfiniScratch<Real>::take(arena, pass.memory, 0, k.rows, attend_.rule);
    });
    if (attend_.rule == InfiniRule::delta) {
      pass.difference =
          detail::difference_shares(pass.memory.stride(), scratch.difference[0], scratch.difference[1]);
    }
    pass.write(k, v, compact_view(scratch.change, k.batch, k.heads, k.rows, shape_.value_dim), position,
               executor, workspace, [&](Index) { return k.rows; });
  }

  Index payload_bytes(Index options_of_local, bool has_base, const std::vector<std::int64_t>& stored,
                      const std::vector<std::int64_t>& closed) const;
  /// Becomes what another stream of the same functor, shape and rollback is. The functor stays, because a functor
  /// that contains a lambda cannot be assigned.
  void take_state(infini_memory&& other) noexcept;
  /// Drops what is not needed if rollback is 0.
  void keep_no_closed();

  infini_attention<Local, F> attend_;
  StreamShape shape_;
  infini_memory_options options_;
  std::vector<Real> m_, z_;
  std::vector<Real> base_m_, base_z_;  ///< the second memory, without closed_; empty if rollback is 0
  detail::OpenRows<T> open_;           ///< for each batch row the rows of closed_, then the open segment
  std::vector<std::int64_t> filled_;   ///< rows of the open segment of each batch row
  std::vector<std::int64_t> written_;  ///< tokens written to the memory of each batch row
  std::vector<detail::ClosedSegments> closed_;  ///< segments in the memory that can be reopened
};

LONGSPAN_NAMESPACE_END

#include "longspan/stream/infini_memory-inl.hpp"
#include "longspan/stream/infini_memory_state-inl.hpp"
