// Infini-attention token by token: the compressive memory and the open segment.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <istream>
#include <ostream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/infini/open_rows.hpp"
#include "longspan/detail/infini/pass.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN

/// infini_attention carried from call to call: rows taken in by `extend` stand behind those of the calls
/// before. When a segment is full it is written to the memory and forgotten.
///
///   infini_attention attend;
///   auto memory = attend.stream({.heads = 8, .kv_heads = 2, .head_dim = 128, .value_dim = 128});
///   memory.extend(q, k, v, out);  // a prompt, a chunk of one or a single token; an execution as ever
///
/// Shapes    q [batch, heads, n, head_dim]           k [batch, kv_heads, n, head_dim]
///           v [batch, kv_heads, n, value_dim]       out [batch, heads, n, value_dim], any n >= 0
/// Local     answers the new queries over the rows of the open segment so far, and so has to hide later keys:
///           softmax_attention, dilated_attention and landmark_attention with a causal mask, or a composition
///           of them, do. Landmarks stand at `every` so many rows: a list would not fit an open segment.
///           infini_attention, which wants a query for each key, is refused when it is compiled
/// Types     rows of the open segment are kept as T. M and z, and all arithmetic, are double where T is, else
///           float, and so must q's be; k and v are any elements
/// State     batch * kv_heads * (head_dim * (value_dim + 1) + segment * (head_dim + value_dim)) numbers,
///           however many tokens have come. A copy is a stream of its own
/// Cost      that of local for the new queries over the open segment, and what infini_attention takes to read
///           and to write. For one token landmark_attention takes 3 times as long as softmax_attention, which
///           has a kernel for a few queries
/// Equal     to the one call over all rows within the error bound, however the rows are cut into calls, by
///           both rules: a segment is written when it is full, from its own rows. M and z are the same to the
///           bit where T is the type of k and v; rows of `out` are where local attention gives them so
/// Throws    Error when shapes disagree, before anything changes. What an executor or a score throws leaves a
///           stream that has taken in some of the call's rows
/// Source    that of infini_attention
template <Element T, class Local, FeatureMap F>
class infini_memory : public detail::StreamCalls<infini_memory<T, Local, F>, false> {
  static_assert(
      detail::answers_last_queries<Local>,
      "longspan: the local attention of a stream cannot be infini_attention, which wants a query for "
      "each key");
  static_assert(!detail::shows_later_keys<Local>,
                "longspan: the local attention of a stream has to hide later keys: give it causal{}");

 public:
  using Real = Arithmetic<T>;

  /// `attend.lengths` must be empty: a row of a batch that has ended is reset or ignored.
  infini_memory(infini_attention<Local, F> attend, const StreamShape& shape)
      : attend_(std::move(attend)), shape_(shape), open_(shape) {
    detail::check_stream_shape(function, shape);
    attend_.check(function, shape.batch, shape.heads, shape.head_dim, shape.value_dim);
    if (!attend_.lengths.empty())
      detail::refuse(function, "lengths", "given", "none: a stream has no padding");
    if constexpr (requires { attend_.local.at.fit_any_length(); }) {
      if (!attend_.local.at.fit_any_length()) {
        detail::refuse(function, "at of the local attention", "a list of landmarks",
                       "every: an open segment ends before some of the list");
      }
    }
    const detail::MemoryView<Real> memory = view_of(0, shape.batch);
    m_.resize(static_cast<std::size_t>(memory.m_size()));
    z_.resize(static_cast<std::size_t>(memory.z_size()));
    filled_.resize(static_cast<std::size_t>(shape.batch));
    written_.resize(static_cast<std::size_t>(shape.batch));
  }

  const StreamShape& shape() const noexcept { return shape_; }
  /// Tokens taken in by batch row b since it was new, or reset.
  Index size(Index b = 0) const noexcept { return written_[at(b)] + filled_[at(b)]; }
  /// Those of them in the open segment.
  Index open_rows(Index b = 0) const noexcept { return filled_[at(b)]; }
  /// Memory of M and z, and of the open segments.
  Index bytes() const noexcept {
    return static_cast<Index>((m_.capacity() + z_.capacity()) * sizeof(Real)) + open_.bytes();
  }
  /// M[c][column] and z[c] of a KV head.
  Real memory(Index b, Index kv_head, Index c, Index column) const noexcept {
    const auto view = const_cast<infini_memory*>(this)->view_of(b, 1);
    return view.matrix(kv_head)[c * view.stride() + column];
  }
  Real norm(Index b, Index kv_head, Index c) const noexcept {
    return const_cast<infini_memory*>(this)->view_of(b, 1).norm(kv_head)[c];
  }

  /// Forgets everything, or what batch row b holds.
  void clear() {
    for (Index b = 0; b < shape_.batch; ++b) reset(b);
  }
  void reset(Index b) {
    check_row("infini_memory::reset", b);
    view_of(b, 1).clear();
    filled_[at(b)] = written_[at(b)] = 0;
  }
  /// Forgets the tokens of each batch row from number `tokens` on. Refused where some of them are in the
  /// memory: nothing can be taken out of it.
  void truncate(Index tokens) {
    for (Index b = 0; b < shape_.batch; ++b) {
      if (tokens < written_[at(b)] || tokens > size(b))
        detail::refuse(
            "infini_memory::truncate", "the number of tokens", std::to_string(tokens),
            std::to_string(written_[at(b)]) + ".." + std::to_string(size(b)) + ", those of the open segment");
    }
    for (Index b = 0; b < shape_.batch; ++b) filled_[at(b)] = tokens - written_[at(b)];
  }

  /// What `extend` would give, the stream left as it is. Copies the stream if the rows would close a segment.
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, ExecutionLike E = openmp>
  void peek(const Q& q, const K& k, const V& v, Out&& out, E&& execution = E{}) {
    const auto filled = filled_;
    const Index most = filled.empty() ? 0 : *std::max_element(filled.begin(), filled.end());
    if (view(q).rows >= attend_.segment - most) {
      infini_memory copy = *this;
      return copy.extend(q, k, v, out, execution);
    }
    this->extend(q, k, v, out, execution);
    filled_ = filled;
  }

  /// Takes rows k and v [1, kv_heads, n, ..] of batch row b that no query comes with.
  template <TensorLike K, TensorLike V, ExecutionLike E = openmp>
  void absorb(Index b, const K& k, const V& v, E&& execution = E{}) {
    check_row("infini_memory::absorb", b);
    const auto keys = view(k);
    const auto values = view(v);
    detail::check_tokens("infini_memory::absorb", keys, values, 1, shape_);
    make_room(keys.rows);
    detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
      for (Index first = 0, count = 0; first < keys.rows; first += count) {
        count = std::min(attend_.segment - filled_[at(b)], keys.rows - first);
        open_.append(keys.slice_rows(first, count), values.slice_rows(first, count), b, 1, filled_[at(b)]);
        filled_[at(b)] += count;
        if (filled_[at(b)] == attend_.segment) close(b, 1, executor, workspace);
      }
    });
  }

  /// out = g * what the memory gives for q + (1 - g) * out: for a local part that comes from elsewhere. The
  /// open segment is not seen. Where nothing has been written, `first` says what happens.
  template <TensorLike Q, TensorLike Out, ExecutionLike E = openmp>
  void recall(const Q& q, Out&& out, E&& execution = E{}) {
    static_assert(std::is_same_v<detail::LseOf<Q>, Real>, "longspan: q is of the arithmetic of the memory");
    const auto queries = view(q);
    const auto to = view(out);
    const auto wanted = [&](const auto& x, const char* what, Index cols) {
      if (x.batch != shape_.batch || x.heads != shape_.heads || x.rows != queries.rows || x.cols != cols) {
        detail::refuse("infini_memory::recall", what, detail::shape_text(x),
                       detail::shape_text(shape_.batch, shape_.heads, queries.rows, cols));
      }
    };
    wanted(queries, "q", shape_.head_dim);
    wanted(to, "out", shape_.value_dim);
    using Tq = std::remove_const_t<typename std::remove_cvref_t<decltype(queries)>::Element>;
    detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
      for_each_run_of_rows([&](Index b, Index rows) {
        if (!knows(b)) return;
        pass_with_gate(b, rows, workspace)
            .recall(TensorView<const Tq>(detail::batch_rows(queries, b, rows)), 0,
                    detail::batch_rows(to, b, rows), written_[at(b)], executor, workspace);
      });
    });
  }

  /// Writes the open segments as they are, and begins new ones.
  template <ExecutionLike E = openmp>
  void flush(E&& execution = E{}) {
    detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
      for_each_run_of_rows([&](Index b, Index rows) {
        if (filled_[at(b)] > 0) close(b, rows, executor, workspace);
      });
    });
  }

  /// Writes the state; a stream of the same shape, segment, rule and T can load it.
  void save(std::ostream& to) const;
  /// Takes over what `save` wrote. Throws Error, and changes nothing, where the file is damaged, belongs to
  /// another stream, or holds a norm that is negative or not finite.
  void load(std::istream& from);

 private:
  friend detail::StreamCalls<infini_memory, false>;
  using Numbers = std::array<std::int64_t, 9>;
  static constexpr std::string_view function = "infini_memory";
  static constexpr detail::StateKind kind{"infini", 1, "infini_memory::save", "infini_memory::load"};

  static std::size_t at(Index b) noexcept { return static_cast<std::size_t>(b); }

  void check_row(std::string_view name, Index b) const {
    if (b < 0 || b >= shape_.batch)
      detail::refuse(name, "the batch row", std::to_string(b), "0.." + std::to_string(shape_.batch - 1));
  }

  /// The memories of batch rows [b, b + rows).
  detail::MemoryView<Real> view_of(Index b, Index rows) {
    detail::MemoryView<Real> view{m_.data(),       z_.data(),       rows,
                                  shape_.kv_heads, shape_.head_dim, shape_.value_dim};
    view.m += b * shape_.kv_heads * view.rows() * view.stride();
    view.z += b * shape_.kv_heads * view.rows();
    return view;
  }

  /// Room for `more` rows in each open segment, as far as a segment goes.
  void make_room(Index more) {
    const Index most = filled_.empty() ? 0 : *std::max_element(filled_.begin(), filled_.end());
    const Index wanted =
        std::min(attend_.segment, more > attend_.segment - most ? attend_.segment : most + more);
    if (wanted <= open_.room()) return;
    open_.resize(std::min(attend_.segment, std::max<Index>(wanted, 2 * open_.room())), filled_);
  }

  /// work(b, rows) for each run of batch rows that are equally far.
  template <class Work>
  void for_each_run_of_rows(const Work& work) {
    for (Index b = 0, end; b < shape_.batch; b = end) {
      for (end = b + 1;
           end < shape_.batch && filled_[at(end)] == filled_[at(b)] && written_[at(end)] == written_[at(b)];)
        ++end;
      work(b, end - b);
    }
  }

  template <class Call, class E>
  void take(const Call& call, const E& executor, Workspace& workspace) {
    static_assert(
        std::is_same_v<typename Call::Real, Real>,
        "longspan: the stream computes in double if its rows are double, else in float, and so must q");
    make_room(call.q_len());
    if (call.q_len() > 0)
      for_each_run_of_rows([&](Index b, Index rows) { check_local(call, b, rows, executor, workspace); });
    for_each_run_of_rows([&](Index b, Index rows) { take_in(call, b, rows, executor, workspace); });
  }

  template <class Call, class E>
  void take_in(const Call& call, Index b, Index rows, const E& executor, Workspace& workspace) {
    const auto part = [&](auto x, Index first, Index count) {
      return detail::batch_rows(x, b, rows).slice_rows(first, count);
    };
    for (Index first = 0; first < call.q_len();) {
      const Index filled = filled_[at(b)], count = std::min(attend_.segment - filled, call.q_len() - first);
      const auto q = part(call.q, first, count);
      const auto out = part(call.out, first, count);
      if constexpr (std::is_same_v<typename Call::Key, T> && std::is_same_v<typename Call::Value, T>) {
        // A whole segment is read where it lies: kept first, a long chunk took 20 % longer.
        if (count == attend_.segment) {
          const auto k = part(call.k, first, count), v = part(call.v, first, count);
          attend(q, k, v, out, b, rows, executor, workspace);
          write(k, v, b, rows, executor, workspace);
          first += count;
          continue;
        }
      }
      open_.append(part(call.k, first, count), part(call.v, first, count), b, rows, filled);
      attend(q, TensorView<const T>(open_.keys(b, rows, filled + count)),
             TensorView<const T>(open_.values(b, rows, filled + count)), out, b, rows, executor, workspace);
      for (Index row = b; row < b + rows; ++row) filled_[at(row)] += count;
      if (filled + count == attend_.segment) close(b, rows, executor, workspace);
      first += count;
    }
  }

  auto pass_over(Index b, Index rows) {
    return detail::InfiniPass<Real, Local, F>{attend_.local,
                                              attend_.feature,
                                              attend_.rule,
                                              attend_.memory_uses_positions,
                                              attend_.absolute_positions,
                                              view_of(b, rows)};
  }

  bool knows(Index b) const noexcept { return written_[at(b)] > 0 || attend_.first == InfiniFirst::gate; }

  auto pass_with_gate(Index b, Index rows, Workspace& workspace) {
    auto pass = pass_over(b, rows);
    const Index size = shape_.heads * pass.memory.stride();
    const auto take = [&](detail::Arena& arena) {
      return std::array<Real*, 2>{arena.take<Real>(size), arena.take<Real>(size)};
    };
    detail::Arena counting;
    take(counting);
    detail::Arena arena(workspace.reserve(counting.used()));
    const auto shares = take(arena);
    pass.gate = detail::gate_shares(attend_.beta, shape_.heads, shape_.value_dim, pass.memory.stride(),
                                    shares[0], shares[1]);
    return pass;
  }

  /// With the one key of a segment that has begun: what fits it fits all that come.
  template <class Call, class E>
  void check_local(const Call& call, Index b, Index rows, const E& executor, Workspace& workspace) {
    pass_over(b, rows).check(detail::batch_rows(call.q, b, rows), TensorView<const T>(open_.keys(b, rows, 1)),
                             TensorView<const T>(open_.values(b, rows, 1)),
                             detail::batch_rows(call.out, b, rows), executor, workspace,
                             [](Index) { return Index{1}; });
  }

  template <class Tq, class To, class E>
  void attend(TensorView<const Tq> q, TensorView<const T> k, TensorView<const T> v, TensorView<To> out,
              Index b, Index rows, const E& executor, Workspace& workspace) {
    pass_with_gate(b, rows, workspace)
        .attend(q, k, v, out, written_[at(b)], knows(b), executor, workspace, [&](Index) { return k.rows; });
  }

  /// Writes the open segments of batch rows [b, b + rows) and begins new ones.
  template <class E>
  void close(Index b, Index rows, const E& executor, Workspace& workspace) {
    const Index filled = filled_[at(b)];
    write(TensorView<const T>(open_.keys(b, rows, filled)),
          TensorView<const T>(open_.values(b, rows, filled)), b, rows, executor, workspace);
    for (Index row = b; row < b + rows; ++row) filled_[at(row)] = 0;
  }

  template <class E>
  void write(TensorView<const T> k, TensorView<const T> v, Index b, Index rows, const E& executor,
             Workspace& workspace) {
    auto pass = pass_over(b, rows);
    const auto take = [&](detail::Arena& arena) {
      return detail::InfiniScratch<Real>::take(arena, pass.memory, 0, k.rows, attend_.rule);
    };
    detail::Arena counting;
    take(counting);
    detail::Arena arena(workspace.reserve(counting.used()));
    const auto scratch = take(arena);
    if (attend_.rule == InfiniRule::delta) {
      pass.difference =
          detail::difference_shares(pass.memory.stride(), scratch.difference[0], scratch.difference[1]);
    }
    pass.write(k, v, compact_view(scratch.change, rows, shape_.kv_heads, k.rows, shape_.value_dim),
               written_[at(b)], executor, workspace, [&](Index) { return k.rows; });
    for (Index row = b; row < b + rows; ++row) written_[at(row)] += k.rows;
  }

  Numbers numbers() const {
    return {shape_.batch,
            shape_.heads,
            shape_.kv_heads,
            shape_.head_dim,
            shape_.value_dim,
            attend_.segment,
            static_cast<std::int64_t>(attend_.rule),
            sizeof(T),
            std::is_same_v<T, Eigen::half> ? 1 : 0};
  }
  /// Bytes of a payload whose batch rows hold `filled` open rows.
  Index payload_bytes(const std::vector<std::int64_t>& filled) const {
    Index open = 0;
    for (const std::int64_t rows : filled) open += rows;
    const Index heads = shape_.batch * shape_.kv_heads;
    return 2 * shape_.batch * 8 +
           heads * shape_.head_dim * (shape_.value_dim + 1) * static_cast<Index>(sizeof(Real)) +
           open * shape_.kv_heads * (shape_.head_dim + shape_.value_dim) * static_cast<Index>(sizeof(T));
  }

  infini_attention<Local, F> attend_;
  StreamShape shape_;
  std::vector<Real> m_, z_;
  detail::OpenRows<T> open_;
  std::vector<std::int64_t> filled_;   ///< rows of the open segment of each batch row
  std::vector<std::int64_t> written_;  ///< tokens that its memory has taken
};

LONGSPAN_END

#include "longspan/stream/infini_memory-inl.hpp"
