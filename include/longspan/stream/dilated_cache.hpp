// Dilated attention token by token: a stream that keeps the rows that later queries can see.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <istream>
#include <iterator>
#include <limits>
#include <ostream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/call/stream_mask.hpp"
#include "longspan/detail/dilated/decode.hpp"
#include "longspan/detail/dilated/forward.hpp"
#include "longspan/detail/dilated/strands.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/dilated_attention.hpp"
#include "longspan/dilation.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A stream of dilated_attention: `extend` appends rows after those of earlier calls, and the output of each query is
/// that of a single call over all rows.
///
///   dilated_attention attend{geometric_branches_to({2048, 1}, 2, longest), causal{}};
///   auto stream = attend.stream({.heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64});
///   stream.extend(q, k, v, out);  // a prompt, part of a prompt, or one token; lse and execution are optional
///   stream.truncate(stream.size() - 3);  // the last 3 tokens were a draft that was rejected
///
/// Shapes    those of dilated_attention with kv_len = q_len, which may be 0 and differ from call to call
/// Types     rows are stored as T: float, double, Eigen::bfloat16, Eigen::half or std::int8_t. Keys with a
///           position encoding are stored in the arithmetic type unless T is std::int8_t. q, k, v and out
///           may have any element types. Arithmetic is double if T is, otherwise float; that of q must be the same
/// State     for each head the rows of the open segments that its offset keeps, at most sum_i w_i / r_i; while
///           `rollback` tokens may still be removed, also the rows of the segments that were open before them.
///           Query heads with the same KV head and offset share rows. A row of int8 has 8 additional bytes, the
///           scales of its key and its value. A copy is an independent stream
/// Cost      that of dilated_attention; every row is copied once for each branch and offset that keeps it. One
///           token reads the rows that its branches show it, once for each head; with int8 it takes 0.47 of
///           the time with float
/// Scratch   2^14 / (batch heads) tokens, at least 1024, are appended together
/// Error     that of dilated_attention over the stored rows. Storing rounds each element of k and v: bfloat16
///           by 2^-8 of the element, half by 2^-11, int8 by 1 / 254 of the largest element of its row
/// Bits      do not depend on how rows are cut into calls of more than one token, nor on removed tokens. A call
///           of one token with no mask other than causal and with Overlap::multiset has a kernel of its own
/// Masked    as in kv_cache: the mask of the functor, taken literally for every query whose keys it limits on the
///           right, as `causal{} | sinks{n}` does. Every other query sees no key after itself. A chunk must
///           contain all keys that its branches and the mask show to its queries
/// Throws    Error if shapes disagree or a chunk is too short for its mask, before anything changes. If an executor
///           or a score throws, or memory runs out (bad_alloc), the stream has appended the first size() tokens,
///           possibly some of the call's. An assignment or a load that throws changes nothing
template <StoredElement T, Mask M, Score S, Position P>
class dilated_cache : public detail::StreamCalls<dilated_cache<T, M, S, P>, true> {
 public:
  using Real = detail::ArithmeticOf<T>;
  /// A key is encoded once, when it is appended, and not again for every query.
  using Key = std::conditional_t<std::is_same_v<P, no_position> || std::is_same_v<T, std::int8_t>, T, Real>;

  dilated_cache(dilated_attention<M, S, P> attend, const StreamShape& shape,
                const dilated_cache_options& options = {})
      : attend_(std::move(attend)),
        mask_(detail::stream_mask(attend_.mask)),
        shape_(shape),
        options_(options) {
    detail::check_branches(class_name, attend_.branches);
    detail::check_stream_shape(class_name, shape_);
    detail::check_stream_parts(class_name, attend_, shape);
    if (options.rollback < 0)
      detail::refuse(class_name, "rollback", std::to_string(options.rollback), "at least 0 tokens");
    if (attend_.first_query != queries_end_at_keys) {
      detail::refuse(class_name, "first_query", std::to_string(attend_.first_query),
                     "no value, because queries are at the positions of their tokens");
    }
    if (!detail::hides_later_keys<Shown> && attend_.zero_pad_compat) {
      detail::refuse(class_name, "zero_pad_compat", "true with a mask that may show later keys",
                     "false, or causal{} & the mask: a stream has no zeros after the last key");
    }
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

  dilated_cache(const dilated_cache&) = default;
  dilated_cache(dilated_cache&&) = default;
  dilated_cache& operator=(const dilated_cache& other)
  requires std::is_move_assignable_v<dilated_attention<M, S, P>>
  {
    return *this = dilated_cache(other);
  }
  dilated_cache& operator=(dilated_cache&&) = default;

  /// The number of tokens appended and not removed.
  Index size() const noexcept { return size_; }
  const StreamShape& shape() const noexcept { return shape_; }
  const dilated_cache_options& options() const noexcept { return options_; }

  /// The number of rows of keys and values that are kept, for all heads and batch rows, including those kept for
  /// `truncate`.
  Index rows() const noexcept {
    Index rows = 0;
    for (const detail::Strand& strand : strands_) rows += rows_between(strand, least_, size_);
    return rows * shape_.batch;
  }
  /// Memory of the rows in bytes, including reserved memory.
  Index bytes() const noexcept {
    std::size_t bytes = 0;
    for (const Rows& rows : rows_)
      for_arrays(rows, [&](const auto& array, Index) { bytes += array.capacity() * sizeof(array[0]); });
    return static_cast<Index>(bytes);
  }

  void clear() noexcept { size_ = least_ = 0; }

  /// Appends tokens whose queries are not needed.
  template <TensorLike K, TensorLike V, ExecutionLike E = openmp>
  void append(const K& k, const V& v, E&& execution = E{});

  /// Replaces batch row b by the previous batch row rows[b], as beam search does. Changes nothing if it throws.
  void reorder(std::span<const Index> rows);

  /// True if truncate(tokens) will succeed. The last `rollback` tokens before the largest size can always be removed,
  /// and more if no segment has closed since then.
  bool can_truncate(Index tokens) const noexcept {
    if (tokens < 0 || tokens > size_) return false;
    return tokens >= least_ ||
           std::all_of(attend_.branches.begin(), attend_.branches.end(), [&](const Branch& branch) {
             return tokens % branch.segment == 0 || tokens / branch.segment == least_ / branch.segment;
           });
  }
  /// Removes the tokens from number `tokens` on. Throws Error, and changes nothing, unless can_truncate(tokens).
  void truncate(Index tokens);

  /// Writes the rows, including those kept for `truncate`. A stream with the same functor, shape and T, and no larger
  /// rollback, can load them.
  void save(std::ostream& to) const;
  /// Reads what `save` wrote. Throws FileError, and changes nothing, if the file is damaged or was written by a stream
  /// with other options; the text names the first option that differs.
  void load(std::istream& from);

 private:
  friend detail::StreamCalls<dilated_cache, true>;
  using Rows = detail::StrandRows<Key, T>;
  using Shown = detail::StreamMask<M>;
  static constexpr bool encodes = !std::is_same_v<P, no_position>, is_scaled = std::is_same_v<T, std::int8_t>;
  static constexpr std::string_view class_name = "dilated_cache", function = "dilated_cache::extend";

  Index row_bytes() const {
    return shape_.head_dim * static_cast<Index>(sizeof(Key)) +
           shape_.value_dim * static_cast<Index>(sizeof(T)) +
           (is_scaled ? 2 * static_cast<Index>(sizeof(float)) : 0);
  }
  /// The payload of a state of `size` tokens that can be truncated to `least` tokens.
  Index payload_bytes(Index least, Index size) const;
  /// Calls work(array, numbers of a row) for each array of `rows`.
  template <class AnyRows, class Work>
  void for_arrays(AnyRows& rows, const Work& work) const {
    work(rows.k, shape_.head_dim);
    work(rows.v, shape_.value_dim);
    if constexpr (is_scaled) {
      work(rows.k_scale, 1);
      work(rows.v_scale, 1);
    }
  }

  /// The number of tokens that are processed together. Percent of the FMA peak with 8 heads of 64 and 32768 tokens,
  /// 512 at once: 68, 2048: 73, 8192: 70. Fewer tokens do not fill the tiles of branches with a large step; more
  /// tokens do not stay in the cache.
  Index tokens_at_once() const {
    return std::max<Index>(1024, (Index{1} << 14) / std::max<Index>(1, shape_.batch * shape_.heads));
  }

  /// The number of rows of a strand from the beginning of the segment that contains token `from` up to token `to`.
  Index rows_between(const detail::Strand& strand, Index from, Index to) const noexcept {
    const Branch& branch = attend_.branches[strand.branch];
    const Index segments = to / branch.segment - from / branch.segment;
    return segments * kept_rows(branch.segment, strand.offset, branch.dilation) +
           kept_rows(to % branch.segment, strand.offset, branch.dilation);
  }
  /// The maximum number of rows of a strand while single tokens are appended: those of a segment, and of the following
  /// tokens until the segment's last token can no longer be removed.
  Index most_rows(const detail::Strand& strand) const noexcept {
    const Index segment = attend_.branches[strand.branch].segment, most = (std::numeric_limits<Index>::max)();
    return rows_between(strand, 0, segment > most - options_.rollback ? most : segment + options_.rollback);
  }

  template <class Call, class E>
  void take(const Call& call, const E& executor, Workspace& workspace) {
    static_assert(
        std::is_same_v<typename Call::Real, Real>,
        "longspan: q must be double if the rows of the stream are double, otherwise float or 16-bit");
    const detail::WithinSegments<Shown> shown{mask_, attend_.branches};
    const Index begin = size_, end = begin + call.q_len();
    detail::check_reach(function, shown, shape_.batch, shape_.heads, begin, end);
    while (size_ < end) {
      const Index next =
          detail::end_of_piece(shown, shape_.batch, shape_.heads, size_, end, tokens_at_once());
      take_in(detail::part_of(call, size_ - begin, next - size_), executor, workspace);
    }
  }

  template <class Call, class E>
  void take_in(const Call& call, const E& executor, Workspace& workspace) {
    const Index end = size_ + call.q_len();
    keep(call.k, call.v, executor);
    // Even with value_dim 0 there is an lse.
    if (call.q_len() > 0 && shape_.batch > 0 && shape_.heads > 0) attend(call, end, executor, workspace);
    count_rows(end);
  }

  /// Copies rows after those of all strands, without counting them.
  template <class Tk, class Tv, class E>
  void keep(TensorView<Tk> k, TensorView<Tv> v, const E& executor) {
    const Index strands = static_cast<Index>(strands_.size());
    make_room(size_ + k.rows);
    const auto copy = [&](Index n, Index worker) {
      copy_rows(n / strands, strands_[static_cast<std::size_t>(n % strands)], k, v,
                rows_[static_cast<std::size_t>(n)],
                encodes ? key_rows_.data() + worker * shape_.head_dim : nullptr);
    };
    detail::run_where_it_pays(
        static_cast<double>(k.rows * shape_.batch * strands * row_bytes()), 1e5, executor,
        [&](const auto& where) {
          if constexpr (encodes)
            key_rows_.resize(static_cast<std::size_t>(where.workers() * shape_.head_dim));
          where.for_each(shape_.batch * strands, copy);
        });
  }
  /// Counts the rows up to token `end`, and drops those that no later token sees.
  void count_rows(Index end) {
    const Index least = (std::max)(least_, end - options_.rollback);
    for (std::size_t n = 0; n < rows_.size(); ++n)
      drop_before(least, strands_[n % strands_.size()], end, rows_[n]);
    size_ = end;
    least_ = least;
  }

  /// Makes room for the rows of all strands up to token `end`. A strand that must grow doubles its room, limited to
  /// what single tokens need, so that a stream of single tokens seldom allocates.
  void make_room(Index end) {
    for (std::size_t n = 0; n < rows_.size(); ++n) {
      const detail::Strand& strand = strands_[n % strands_.size()];
      const Index needed = rows_between(strand, least_, end),
                  twice = (std::min)(2 * needed, most_rows(strand));
      const auto grow = [&](auto& values, Index cols) {
        const auto wanted = static_cast<std::size_t>(needed * cols);
        if (values.capacity() < wanted)
          values.reserve(static_cast<std::size_t>((std::max)(needed, twice) * cols));
        if (values.size() < wanted) values.resize(wanted);
      };
      for_arrays(rows_[n], grow);
    }
  }

  /// Appends the rows that a strand keeps.
  template <class Tk, class Tv>
  void copy_rows(Index b, const detail::Strand& strand, TensorView<Tk> k, TensorView<Tv> v, Rows& rows,
                 Real* encoded) const {
    const Branch& branch = attend_.branches[strand.branch];
    const Index end = size_ + k.rows;
    Index row = rows_between(strand, least_, size_);
    for (Index begin = size_ / branch.segment * branch.segment; begin < end;) {
      const Index past = std::max<Index>(0, size_ - begin);
      const Index length = branch.segment < end - begin ? branch.segment : end - begin;
      Index t = kept_rows(past, strand.offset, branch.dilation);
      for (const Index last = kept_rows(length, strand.offset, branch.dilation); t < last; ++t, ++row) {
        const Index n = begin + strand.offset + t * branch.dilation, i = n - size_;
        const auto* key = k.row(b, strand.kv_head, i);
        if constexpr (encodes) {
          detail::store_row(key, shape_.head_dim, encoded);
          attend_.position.encode(MatrixView<Real>{encoded, 1, shape_.head_dim, shape_.head_dim}, n,
                                  Role::key);
          store(encoded, shape_.head_dim, rows.k, rows.k_scale, row);
        } else {
          store(key, shape_.head_dim, rows.k, rows.k_scale, row);
        }
        store(v.row(b, strand.kv_head, i), shape_.value_dim, rows.v, rows.v_scale, row);
      }
      begin += length;
    }
  }
  /// Stores row number `row` of a strand.
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
        shape_.head_dim,   shape_.value_dim, least_};
    const detail::Dilation dilation{attend_.branches, attend_.phase, attend_.overlap, false};
    if constexpr (std::is_same_v<Shown, causal>) {
      if (q.rows == 1 && attend_.overlap == Overlap::multiset && attend_.branches.size() <= 64)
        return detail::decode_dilated(problem, stored, dilation, attend_.score, executor, workspace);
    }
    double keys = 0;
    for (const detail::Strand& strand : strands_)
      keys += static_cast<double>(rows_between(strand, size_, end));
    const double flop =
        2 * keys * static_cast<double>(q.batch * q.rows * (shape_.head_dim + shape_.value_dim));
    detail::run_where_it_pays(flop, detail::least_parallel_tile_flop, executor, [&](const auto& where) {
      detail::run_dilated<detail::FloatArithmetic<Real>>(problem, stored, dilation, mask_, attend_.score,
                                                         no_position{}, where, workspace);
    });
  }

  /// Drops the rows of segments before the one that contains token `least`; `end` tokens have been appended.
  void drop_before(Index least, const detail::Strand& strand, Index end, Rows& rows) const {
    const Index count = rows_between(strand, least, end), dropped = rows_between(strand, least_, end) - count;
    if (dropped == 0) return;
    for_arrays(rows, [&](auto& array, Index cols) {
      std::copy_n(array.begin() + dropped * cols, count * cols, array.begin());
    });
  }

  dilated_attention<M, S, P> attend_;
  Shown mask_;
  StreamShape shape_;
  dilated_cache_options options_;
  std::vector<detail::Strand> strands_;
  std::vector<std::size_t> strand_of_;  ///< [branches][heads]
  std::vector<Rows> rows_;              ///< [batch][strands]
  std::vector<Real> queries_;           ///< the encoded queries of one call
  std::vector<Real> key_rows_;          ///< [workers][head_dim], scratch for encoding
  Index size_ = 0;
  Index least_ = 0;  ///< rows begin with the segments that contain token number least_
};

template <Mask M, Score S, Position P>
dilated_cache(dilated_attention<M, S, P>, StreamShape, dilated_cache_options = {})
    -> dilated_cache<float, M, S, P>;

LONGSPAN_NAMESPACE_END

#include "longspan/stream/dilated_cache-inl.hpp"
