// Dilated attention token by token: the rows that later queries can see, and no others.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <istream>
#include <iterator>
#include <ostream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/dilated/decode.hpp"
#include "longspan/detail/dilated/forward.hpp"
#include "longspan/detail/dilated/strands.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/dilated_attention.hpp"
#include "longspan/dilation.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN

/// A causal dilated_attention carried from call to call: rows taken in by `extend` stand behind those of the
/// calls before, and each gets what the one call over all rows would give it.
///
///   dilated_attention attend{geometric_branches_to({2048, 1}, 2, longest), causal{}};
///   auto stream = attend.stream({.heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64});
///   stream.extend(q, k, v, out);  // a prompt, a chunk of one or a single token; lse and execution as ever
///
/// Shapes    those of dilated_attention with kv_len = q_len, which may be 0 and differ from call to call
/// Types     rows are kept as T: float, double, Eigen::bfloat16, Eigen::half or std::int8_t; where keys are
///           position-encoded, they are in the arithmetic type unless T is std::int8_t. q, k, v and out are
///           any elements. Arithmetic is double where T is, else float, and so must q's be
/// State     for each head at most sum_i w_i / r_i rows, those of the open segments that its offset keeps;
///           query heads that share KV head and offset share them. In int8 each has 8 bytes besides, the
///           scales of its key and its value. A copy is a stream of its own
/// Cost      as dilated_attention; every row is copied once for each branch and offset that keeps it. One
///           token reads the rows that its branches show it, once for each head; int8 in 0.47 of float's time
/// Scratch   2^14 / (batch heads) tokens, at least 1024, are taken in together
/// Error     that of dilated_attention over the rows as they are kept. Keeping rounds each element of k and
///           v: bfloat16 by 2^-9 of it, half by 2^-12, int8 by 1 / 254 of the largest of its row
/// Bits      do not depend on how rows are cut into calls of more than one token. One token, with no mask
///           beside causal, no score and Overlap::multiset, has a kernel of its own
/// Masked    a mask of the functor holds beside the causal one
/// Throws    Error when shapes disagree, before anything changes. What an executor or a score throws leaves a
///           stream that has taken in some of the call's rows
template <StoredElement T, Mask M, Score S, Position P>
class dilated_cache : public detail::StreamCalls<dilated_cache<T, M, S, P>, true> {
 public:
  using Real = detail::ArithmeticOf<T>;
  /// A row is encoded once, when it comes: it would else be at every query.
  using Key = std::conditional_t<std::is_same_v<P, no_position> || std::is_same_v<T, std::int8_t>, T, Real>;

  dilated_cache(dilated_attention<M, S, P> attend, const StreamShape& shape)
      : attend_(std::move(attend)), shape_(shape) {
    detail::check_branches(function, attend_.branches);
    detail::check_stream_shape(function, shape_);
    attend_.position.check(shape.head_dim);
    const Index group = shape.kv_heads == 0 ? 1 : shape.heads / shape.kv_heads;
    for (std::size_t n = 0; n < attend_.branches.size(); ++n) {
      for (Index h = 0; h < shape.heads; ++h) {
        const Index offset = head_offset(attend_.phase, h, shape.heads, attend_.branches[n].dilation);
        const detail::Strand strand{n, h / group, offset};
        const auto found = std::find(strands_.begin(), strands_.end(), strand);
        strand_of_.push_back(static_cast<std::size_t>(found - strands_.begin()));
        if (found == strands_.end()) strands_.push_back(strand);
      }
    }
    rows_.resize(static_cast<std::size_t>(shape.batch) * strands_.size());
  }

  /// Tokens taken in.
  Index size() const noexcept { return size_; }
  const StreamShape& shape() const noexcept { return shape_; }

  /// Rows of keys and values that are kept, of all heads and batch rows.
  Index rows() const noexcept {
    Index rows = 0;
    for (const detail::Strand& strand : strands_) rows += kept(strand, size_);
    return rows * shape_.batch;
  }
  /// Memory of the rows, with what they may grow into.
  Index bytes() const noexcept {
    std::size_t bytes = 0;
    for (const Rows& rows : rows_)
      for_arrays(rows, [&](const auto& array, Index) { bytes += array.capacity() * sizeof(array[0]); });
    return static_cast<Index>(bytes);
  }

  void clear() noexcept { size_ = 0; }

  /// Forgets the tokens from number `tokens` on. Refused where rows are gone that were open then.
  void truncate(Index tokens) {
    constexpr std::string_view name = "dilated_cache::truncate";
    if (tokens < 0 || tokens > size_)
      detail::refuse(name, "the number of tokens", std::to_string(tokens), "0.." + std::to_string(size_));
    for (const Branch& branch : attend_.branches) {
      if (tokens % branch.segment != 0 && tokens / branch.segment != size_ / branch.segment) {
        detail::refuse(name, "the number of tokens", std::to_string(tokens),
                       "at least " + std::to_string(size_ / branch.segment * branch.segment) +
                           ": a closed segment is forgotten");
      }
    }
    size_ = tokens;
  }

  /// Writes the rows; a stream of the same functor, shape and T can load them.
  void save(std::ostream& to) const {
    const std::vector<std::int64_t> branches = branch_numbers();
    detail::StateWriter writer(to, kind(), numbers(), payload_bytes(size_));
    writer.array(branches.data(), std::ssize(branches));
    for (std::size_t n = 0; n < rows_.size(); ++n) {
      const Index count = kept(strands_[n % strands_.size()], size_);
      for_arrays(rows_[n], [&](const auto& array, Index cols) { writer.array(array.data(), count * cols); });
    }
    writer.finish();
  }

  /// Takes over what `save` wrote. Throws Error, and changes nothing, where the file is damaged or belongs to
  /// other branches, shapes or types.
  void load(std::istream& from) {
    Numbers found{};
    detail::StateReader reader(from, kind(), found);
    Numbers wanted = numbers();
    const Index size = found.back();
    wanted.back() = size;
    if (found != wanted || size < 0)
      detail::refuse(load_name, "the file", "a state of other shapes or options", "one of this stream's");
    reader.expect_payload(payload_bytes(size));
    const std::vector<std::int64_t> branches = branch_numbers();
    if (reader.template array<std::int64_t>(std::ssize(branches)) != branches)
      detail::refuse(load_name, "the file", "a state of other branches", "one of this stream's");
    std::vector<Rows> loaded(rows_.size());
    for (std::size_t n = 0; n < loaded.size(); ++n) {
      const Index count = kept(strands_[n % strands_.size()], size);
      for_arrays(loaded[n], [&](auto& array, Index cols) {
        array = reader.template array<typename std::decay_t<decltype(array)>::value_type>(count * cols);
      });
    }
    reader.finish();
    rows_ = std::move(loaded);
    size_ = size;
  }

 private:
  friend detail::StreamCalls<dilated_cache, true>;
  using Rows = detail::StrandRows<Key, T>;
  using Causal = std::conditional_t<std::is_same_v<M, causal>, causal, both<causal, M>>;
  using Numbers = std::array<std::int64_t, 10>;
  static constexpr bool encodes = !std::is_same_v<P, no_position>, is_scaled = std::is_same_v<T, std::int8_t>;
  static constexpr std::string_view function = "dilated_cache", save_name = "dilated_cache::save",
                                    load_name = "dilated_cache::load";

  static constexpr detail::StateKind kind() { return {"dilated", 1, save_name, load_name}; }
  Numbers numbers() const {
    return {shape_.batch,
            shape_.heads,
            shape_.kv_heads,
            shape_.head_dim,
            shape_.value_dim,
            sizeof(Key),
            std::is_same_v<T, Eigen::half> ? 1 : 0,
            static_cast<std::int64_t>(attend_.phase),
            static_cast<std::int64_t>(attend_.branches.size()),
            size_};
  }
  std::vector<std::int64_t> branch_numbers() const {
    std::vector<std::int64_t> numbers;
    for (const Branch& branch : attend_.branches)
      numbers.insert(numbers.end(), {branch.segment, branch.dilation});
    return numbers;
  }
  Index row_bytes() const {
    return shape_.head_dim * static_cast<Index>(sizeof(Key)) +
           shape_.value_dim * static_cast<Index>(sizeof(T)) +
           (is_scaled ? 2 * static_cast<Index>(sizeof(float)) : 0);
  }
  /// work(array, numbers of a row) for all that `rows` holds.
  template <class AnyRows, class Work>
  void for_arrays(AnyRows& rows, const Work& work) const {
    work(rows.k, shape_.head_dim);
    work(rows.v, shape_.value_dim);
    if constexpr (is_scaled) {
      work(rows.k_scale, 1);
      work(rows.v_scale, 1);
    }
  }

  /// `size` may come from a file: where it stands for more than any memory, an Index would overflow.
  Index payload_bytes(Index size) const {
    double rows = 0;
    for (const detail::Strand& strand : strands_) rows += static_cast<double>(kept(strand, size));
    const double bytes = rows * static_cast<double>(shape_.batch) * static_cast<double>(row_bytes());
    if (bytes > 1e18) detail::refuse(load_name, "the number of tokens", std::to_string(size), "far fewer");
    return 2 * std::ssize(attend_.branches) * static_cast<Index>(sizeof(std::int64_t)) +
           static_cast<Index>(rows) * shape_.batch * row_bytes();
  }

  /// At 8 heads of 64 and 32768 tokens 2048 at once reach 73 % of the FMA roof, 512 and 8192 only 68 and 70:
  /// fewer leave the tiles of thin branches narrow, more leave the cache.
  Index tokens_at_once() const {
    return std::max<Index>(1024, (Index{1} << 14) / std::max<Index>(1, shape_.batch * shape_.heads));
  }

  /// Rows of a strand when `size` tokens have come: those of the segment that is open then.
  Index kept(const detail::Strand& strand, Index size) const {
    const Branch& branch = attend_.branches[strand.branch];
    return kept_rows(size % branch.segment, strand.offset, branch.dilation);
  }
  /// Rows of a strand from the segment that holds token `from` up to token `to`.
  Index rows_between(const detail::Strand& strand, Index from, Index to) const {
    const Branch& branch = attend_.branches[strand.branch];
    const Index segments = to / branch.segment - from / branch.segment;
    return segments * kept_rows(branch.segment, strand.offset, branch.dilation) + kept(strand, to);
  }

  template <class Call, class E>
  void take(const Call& call, const E& executor, Workspace& workspace) {
    static_assert(
        std::is_same_v<typename Call::Real, Real>,
        "longspan: the stream computes in double if its rows are double, else in float, and so must q");
    const Index most = tokens_at_once();
    for (Index first = 0; first < call.q_len(); first += most)
      take_in(detail::part_of(call, first, std::min(most, call.q_len() - first)), executor, workspace);
  }

  template <class Call, class E>
  void take_in(const Call& call, const E& executor, Workspace& workspace) {
    const Index end = size_ + call.q_len(), strands = static_cast<Index>(strands_.size());
    make_room(end);
    const auto copy = [&](Index n, Index worker) {
      append(n / strands, strands_[static_cast<std::size_t>(n % strands)], call,
             rows_[static_cast<std::size_t>(n)],
             encodes ? key_rows_.data() + worker * shape_.head_dim : nullptr);
    };
    detail::run_where_it_pays(
        static_cast<double>(call.q_len() * shape_.batch * strands * row_bytes()), 1e5, executor,
        [&](const auto& where) {
          if constexpr (encodes)
            key_rows_.resize(static_cast<std::size_t>(where.workers() * shape_.head_dim));
          where.for_each(shape_.batch * strands, copy);
        });
    if (!call.out.empty()) attend(call, end, executor, workspace);
    for (std::size_t n = 0; n < rows_.size(); ++n) drop_closed(strands_[n % strands_.size()], end, rows_[n]);
    size_ = end;
  }

  /// Room for the rows of all strands up to token `end`, and for as many again where a strand must grow, but
  /// not for more than a segment holds: a stream of single tokens seldom allocates.
  void make_room(Index end) {
    for (std::size_t n = 0; n < rows_.size(); ++n) {
      const detail::Strand& strand = strands_[n % strands_.size()];
      const Branch& branch = attend_.branches[strand.branch];
      const Index needed = rows_between(strand, size_, end);
      const Index twice = std::min(2 * needed, kept_rows(branch.segment, strand.offset, branch.dilation));
      const auto grow = [&](auto& values, Index cols) {
        const auto wanted = static_cast<std::size_t>(needed * cols);
        if (values.capacity() < wanted)
          values.reserve(static_cast<std::size_t>(std::max(needed, twice) * cols));
        if (values.size() < wanted) values.resize(wanted);
      };
      for_arrays(rows_[n], grow);
    }
  }

  /// Copies the rows of the call that a strand keeps behind those it has.
  template <class Call>
  void append(Index b, const detail::Strand& strand, const Call& call, Rows& rows, Real* encoded) const {
    const Branch& branch = attend_.branches[strand.branch];
    const Index end = size_ + call.q_len();
    Index row = kept(strand, size_);
    for (Index begin = size_ / branch.segment * branch.segment; begin < end;) {
      const Index past = std::max<Index>(0, size_ - begin);
      const Index length = branch.segment < end - begin ? branch.segment : end - begin;
      Index t = kept_rows(past, strand.offset, branch.dilation);
      for (const Index last = kept_rows(length, strand.offset, branch.dilation); t < last; ++t, ++row) {
        const Index n = begin + strand.offset + t * branch.dilation, i = n - size_;
        const auto* key = call.k.row(b, strand.kv_head, i);
        if constexpr (encodes) {
          detail::store_row(key, shape_.head_dim, encoded);
          attend_.position.encode(MatrixView<Real>{encoded, 1, shape_.head_dim, shape_.head_dim}, n,
                                  Role::key);
          store(encoded, shape_.head_dim, rows.k, rows.k_scale, row);
        } else {
          store(key, shape_.head_dim, rows.k, rows.k_scale, row);
        }
        store(call.v.row(b, strand.kv_head, i), shape_.value_dim, rows.v, rows.v_scale, row);
      }
      begin += length;
    }
  }
  /// Row number `row` of a strand.
  template <class From, class To>
  static void store(const From* from, Index cols, std::vector<To>& rows, std::vector<float>& scales,
                    Index row) {
    To* to = rows.data() + row * cols;
    if constexpr (is_scaled) {
      detail::store_row(from, cols, to, scales[static_cast<std::size_t>(row)]);
    } else {
      detail::store_row(from, cols, to);
    }
  }

  template <class Tq, class Tk, class Tv, class To, class E>
  void attend(const detail::Problem<Tq, Tk, Tv, To>& call, Index end, const E& executor,
              Workspace& workspace) {
    if constexpr (!encodes) {
      attend_encoded(call.q, call, end, executor, workspace);
    } else {
      queries_.resize(static_cast<std::size_t>(shape_.batch * shape_.heads * call.q_len() * shape_.head_dim));
      const auto q = compact_view(queries_.data(), shape_.batch, shape_.heads, call.q_len(), shape_.head_dim);
      for (Index b = 0; b < shape_.batch; ++b) {
        for (Index h = 0; h < shape_.heads; ++h) {
          for (Index i = 0; i < q.rows; ++i)
            detail::store_row(call.q.row(b, h, i), shape_.head_dim, q.row(b, h, i));
          attend_.position.encode(q.matrix(b, h), size_, Role::query);
        }
      }
      attend_encoded(TensorView<const Real>(q), call, end, executor, workspace);
    }
  }

  template <class Tq, class Call, class E>
  void attend_encoded(TensorView<const Tq> q, const Call& call, Index end, const E& executor,
                      Workspace& workspace) const {
    using To = typename decltype(call.out)::Element;
    // The shapes of all keys so far; their rows are in the strands.
    const TensorView<const Key> k{nullptr, shape_.batch, shape_.kv_heads, end, shape_.head_dim, 0, 0, 0};
    const TensorView<const T> v{nullptr, shape_.batch, shape_.kv_heads, end, shape_.value_dim, 0, 0, 0};
    const auto problem =
        detail::Problem<Tq, Key, T, To>{q, k, v, call.out, call.lse, 0, 1}.at(function, size_, attend_.scale);
    const detail::StoredRows<Key, T> stored{
        &attend_.branches, &strand_of_,      &rows_, shape_.heads, static_cast<Index>(strands_.size()),
        shape_.head_dim,   shape_.value_dim, size_};
    const detail::Dilation dilation{attend_.branches, attend_.phase, attend_.overlap, false};
    if constexpr (std::is_same_v<Causal, causal> && std::is_same_v<S, unchanged>) {
      if (q.rows == 1 && attend_.overlap == Overlap::multiset && attend_.branches.size() <= 64)
        return detail::decode_dilated(problem, stored, dilation, executor, workspace);
    }
    double keys = 0;
    for (const detail::Strand& strand : strands_)
      keys += static_cast<double>(rows_between(strand, size_, end));
    const double flop =
        2 * keys * static_cast<double>(q.batch * q.rows * (shape_.head_dim + shape_.value_dim));
    const Causal mask = causal_mask();
    detail::run_where_it_pays(flop, detail::least_parallel_tile_flop, executor, [&](const auto& where) {
      detail::run_dilated<detail::FloatArithmetic<Real>>(problem, stored, dilation, mask, attend_.score,
                                                         no_position{}, where, workspace);
    });
  }

  Causal causal_mask() const {
    if constexpr (std::is_same_v<M, causal>) {
      return attend_.mask;
    } else {
      return causal{} & attend_.mask;
    }
  }

  /// Drops the rows of segments that are closed when `end` tokens have come.
  void drop_closed(const detail::Strand& strand, Index end, Rows& rows) const {
    const Index count = kept(strand, end), closed = rows_between(strand, size_, end) - count;
    if (closed == 0) return;
    for_arrays(rows, [&](auto& array, Index cols) {
      std::copy_n(array.begin() + closed * cols, count * cols, array.begin());
    });
  }

  dilated_attention<M, S, P> attend_;
  StreamShape shape_;
  std::vector<detail::Strand> strands_;
  std::vector<std::size_t> strand_of_;  ///< [branches][heads]
  std::vector<Rows> rows_;              ///< [batch][strands]
  std::vector<Real> queries_;           ///< of one call, encoded
  std::vector<Real> key_rows_;          ///< [workers][head_dim], on their way to the strands
  Index size_ = 0;
};

template <Mask M, Score S, Position P>
dilated_cache(dilated_attention<M, S, P>, StreamShape) -> dilated_cache<float, M, S, P>;

template <Mask M, Score S, Position P>
template <StoredElement T>
dilated_cache<T, M, S, P> dilated_attention<M, S, P>::stream(const StreamShape& shape) const {
  return {*this, shape};
}

LONGSPAN_END
