// Softmax attention token by token: a stream that keeps the keys and values that later queries may see.
#pragma once

#include <algorithm>
#include <cstdint>
#include <istream>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/attend.hpp"
#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/call/stream_mask.hpp"
#include "longspan/detail/storage/key_pages.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/detail/storage/state_fields.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/eigen.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A stream of softmax_attention: `extend` appends rows after those of earlier calls, and each query sees the same
/// keys as in a single call over all rows.
///
///   softmax_attention attend{causal{} & window{.left = 4095}, rotary(Pairing::half_split)};
///   const StreamShape shape{.heads = 32, .kv_heads = 8, .head_dim = 128, .value_dim = 128};
///   auto cache = attend.stream<Eigen::bfloat16>(shape, {.page_size = 256});
///   cache.extend(q, k, v, out);  // a prompt, part of a prompt, or one token; lse and execution are optional
///
/// Shapes    q [batch, heads, n, head_dim]      k [batch, kv_heads, n, head_dim]
///           v [batch, kv_heads, n, value_dim]  out [batch, heads, n, value_dim]   lse [batch, heads, n]
///           any n >= 0, which may differ from call to call
/// Types     rows are stored as T: float, double, Eigen::bfloat16, Eigen::half or std::int8_t, whatever the types
///           of k and v. q and out may have any element types; arithmetic is double if q is, otherwise float
/// Positions the cache applies the encoding: keys are encoded once, when they are appended, and then rounded to T.
///           Queries are encoded in their arithmetic type; for matrix tiles, which multiply bfloat16 queries with rows
///           of bfloat16 or int8, they are then rounded to bfloat16 (see softmax_attention::bf16_products)
/// Masked    by the mask of the functor, unchanged for every query for which it sets an upper limit of the keys:
///           causal, segments, padding, sinks, closed documents, a window with a right side, and combinations
///           like `causal{} | sinks{n}`. A query without such a limit (everything, a window without a right
///           side, the last of the documents, a user-defined mask without key ranges) sees no key after itself.
///           A chunk must contain all keys that its queries may see, otherwise extend throws Error; the mask
///           `causal{} & mask` fits any chunk
/// Storage   see kv_cache_options. The kernels read pages in place. Copies share pages; only the partially filled
///           last page is ever copied, by the first stream that appends to it. A stream and its copies reuse the
///           pages that any of them evicts; copies may be used on different threads
/// State     batch * kv_heads * (head_dim + value_dim) elements of T for each token that is kept; for int8 also
///           4 bytes for each row of keys and each row of values; 8 bytes for each page that ever existed
/// Cost      that of softmax_attention; each row is converted once. Time of one token after 32768, relative to
///           float, int8: 0.49, half and bfloat16: 0.6 to 0.7
/// Error     that of softmax_attention over the stored rows, with pages of at least 16 tokens. Storing rounds
///           each element of k and v: bfloat16 by 2^-8 of the element, half by 2^-11, int8 by 1 / 254 of the
///           largest element of its row
/// Bits      with one array, or pages of a multiple of 256 tokens, the bits of a single call over all rows if both
///           use the same kernel (see softmax_attention: one for up to 8 queries per KV head, one for more).
///           Bits do not depend on copies, other batch rows and the executor
/// Throws    Error if shapes disagree, a chunk is too short for its mask, or sizes exceed any memory;
///           std::bad_alloc; what an executor or a score throws. The stream is then as it was before the call,
///           except that it may keep memory for more tokens; out and lse may be partially written
/// Source    pages: Kwon et al. 2023 (arXiv 2309.06180), section 4; sinks: Xiao et al. 2023
///           (arXiv 2309.17453)
template <StoredElement T, Mask M, Score S, Position P>
class kv_cache : public detail::StreamCalls<kv_cache<T, M, S, P>, true> {
 public:
  kv_cache(softmax_attention<M, S, P> attend, const StreamShape& shape, const kv_cache_options& options = {})
      : attend_(std::move(attend)),
        mask_(detail::stream_mask(attend_.mask)),
        shape_(checked(shape, options, attend_)),
        options_(options),
        pages_(shape, options.page_size) {}
  kv_cache(const kv_cache&) = default;
  kv_cache(kv_cache&&) = default;
  /// Changes nothing if it throws.
  kv_cache& operator=(const kv_cache& other)
  requires std::is_copy_assignable_v<softmax_attention<M, S, P>>
  {
    if (this != &other) *this = kv_cache(other);
    return *this;
  }
  kv_cache& operator=(kv_cache&&) = default;

  const StreamShape& shape() const noexcept { return shape_; }
  const kv_cache_options& options() const noexcept { return options_; }
  /// The number of tokens appended and not removed.
  Index size() const noexcept { return pages_.size(); }
  /// Memory of the rows in bytes, including reserved memory and pages shared with copies.
  Index bytes() const noexcept { return pages_.bytes(); }

  /// Reserves memory for `tokens` tokens: up to this size `extend` allocates no memory for rows.
  void reserve(Index tokens) {
    const Index most = detail::KeyPages<T>::most_tokens(shape_);
    if (tokens < 0 || tokens > most)
      refuse_size("kv_cache::reserve", std::to_string(tokens), "0.." + std::to_string(most));
    pages_.reserve(tokens);
  }
  void clear() noexcept { take_back_to(0); }

  /// True if truncate(tokens) will succeed. It succeeds for every number from the largest size so far minus
  /// `options().rollback` up to size(); for smaller numbers that depends on the remaining pages.
  bool can_truncate(Index tokens) const noexcept {
    if (tokens < 0 || tokens > size()) return false;
    for (Index b = 0; b < shape_.batch; ++b) {
      if (!pages_.keeps(b, detail::later_keys(mask_, b, tokens), tokens)) return false;
    }
    return true;
  }

  /// Removes the tokens from number `tokens` on, as speculative decoding does with rejected tokens. Throws Error, and
  /// changes nothing, if the next query would see evicted keys.
  void truncate(Index tokens) {
    constexpr std::string_view name = "kv_cache::truncate";
    if (tokens < 0 || tokens > size())
      refuse_size(name, std::to_string(tokens), "0.." + std::to_string(size()));
    if (!can_truncate(tokens)) {
      refuse_size(name, std::to_string(tokens),
                  "at least " + std::to_string(least_kept()) +
                      ", because earlier keys are evicted (rollback = " + std::to_string(options_.rollback) +
                      ")");
    }
    take_back_to(tokens);
  }

  /// Replaces batch row b by the previous batch row rows[b], as beam search does. Batch rows share pages.
  void reorder(std::span<const Index> rows) {
    detail::check_reorder("kv_cache::reorder", rows, shape_.batch);
    pages_.reorder(rows);
  }

  /// Appends tokens without queries: no outputs are computed.
  template <TensorLike K, TensorLike V, ExecutionLike E = openmp>
  void append(const K& k, const V& v, E&& execution = E{}) {
    const auto keys = view(k);
    const auto values = view(v);
    detail::check_tokens("kv_cache::append", keys, values, shape_.batch, shape_);
    check_growth("kv_cache::append", keys.rows);
    detail::with_executor(execution, [&](const auto& executor) {
      in_pieces(keys.rows, [&](Index first, Index count) {
        keep(keys.slice_rows(first, count), values.slice_rows(first, count), executor);
      });
    });
  }

  /// Writes the rows. A stream with the same shape, T, page_size, position encoding and scale can load them.
  void save(std::ostream& to) const;
  /// Reads what `save` wrote. The stream can then be truncated as far as the rows in the file allow. Throws FileError,
  /// and changes nothing, if the file is damaged or belongs to another kind of stream.
  void load(std::istream& from);

 private:
  friend detail::StreamCalls<kv_cache, true>;
  using Shown = detail::StreamMask<M>;
  using Real = detail::ArithmeticOf<T>;
  static constexpr std::string_view function = "kv_cache::extend";
  static constexpr detail::StateKind kind{"kv", 2, "kv_cache::save", "kv_cache::load"};
  static constexpr bool encodes = !std::is_same_v<P, no_position>;

  static const StreamShape& checked(const StreamShape& shape, const kv_cache_options& options,
                                    const softmax_attention<M, S, P>& attend);
  [[noreturn]] static void refuse_size(std::string_view name, std::string_view got, std::string_view wanted) {
    detail::refuse(name, "the number of tokens", got, wanted);
  }

  /// The properties that determine the rows of a file, or how they are read.
  std::vector<detail::StateField> fields() const;

  void check_growth(std::string_view name, Index rows) const {
    const Index most = detail::KeyPages<T>::most_tokens(shape_) - size();
    if (rows > most)
      detail::refuse(name, "the number of rows of k", std::to_string(rows),
                     "at most " + std::to_string(most));
  }

  template <class Call, class E>
  void take(const Call& call, const E& executor, Workspace& workspace) {
    check_growth(function, call.q_len());
    detail::check_reach(function, mask_, shape_.batch, shape_.heads, size(), size() + call.q_len());
    in_pieces(call.q_len(), [&](Index first, Index count) {
      extend_piece(detail::part_of(call, first, count), executor, workspace);
    });
  }

  /// Calls work(first, count), which appends tokens, for pieces of the `rows` tokens of one call.
  template <class Work>
  void in_pieces(Index rows, const Work& work) {
    struct Undo {
      kv_cache* stream;
      Index size;
      ~Undo() {
        if (stream != nullptr) stream->take_back_to(size);
      }
    } undo{this, size()};
    const Index end = size() + rows;
    for (Index first = size(), next = first; first < end; first = next) {
      next = end_of_piece(first, end);
      work(first - undo.size, next - first);
      // Pages from before the call are still needed if a later piece throws.
      if (next < end) evict(undo.size);
    }
    undo.stream = nullptr;
    if (options_.page_size > 0 && full_pages() != full_pages_) {
      full_pages_ = full_pages();
      evict(0);
    }
  }

  /// If the stream evicts pages, a long prompt is appended in pieces, so that it needs no more memory than the pages
  /// that stay. Pieces of 2048 tokens fill the tiles; no piece ends before a key that one of its queries may see.
  Index end_of_piece(Index first, Index end) const {
    constexpr Index most = 2048;
    if (end - first <= most || !evicts_before(end)) return end;
    return detail::end_of_piece(mask_, shape_.batch, shape_.heads, first, end, most);
  }
  bool evicts_before(Index size) const {
    if (options_.page_size == 0 || !options_.evict) return false;
    const KeyRange all{0, least_size(size)};
    for (Index b = 0; b < shape_.batch; ++b) {
      const KeyRanges later = detail::later_keys(mask_, b, all.end);
      if (std::none_of(later.begin(), later.end(), [&](const KeyRange& x) { return x.contains(all); }))
        return true;
    }
    return false;
  }

  template <class Call, class E>
  void extend_piece(const Call& call, const E& executor, Workspace& workspace) {
    const Index first = size();
    keep(call.k, call.v, executor);
    if constexpr (!encodes) {
      const auto problem = problem_of(call.q, call, first);
      detail::attend(problem, pages_, mask_, attend_.score, no_position{}, executor, workspace,
                     attend_.bf16_products);
    } else {
      const auto problem = problem_of(encoded(call.q, first, executor), call, first);
      using Tq = typename decltype(call.q)::Element;
      using To = typename decltype(call.out)::Element;
      if constexpr (detail::suits_tiles<std::remove_const_t<Tq>, T, T, To>) {
        if (detail::attends_by_tiles(problem_of(call.q, call, first), attend_.bf16_products)) {
          detail::attend_by_tiles(problem_of(rounded(problem.q), call, first), pages_, mask_, attend_.score,
                                  executor, workspace);
          return;
        }
      }
      detail::attend(problem, pages_, mask_, attend_.score, no_position{}, executor, workspace,
                     attend_.bf16_products);
    }
  }

  template <class Tk, class Tv, class E>
  void keep(TensorView<Tk> k, TensorView<Tv> v, const E& executor) {
    const Index numbers = k.batch * k.heads * k.rows * (shape_.head_dim + shape_.value_dim);
    detail::run_where_it_pays(static_cast<double>(numbers), 1e5, executor,
                              [&](const auto& where) { pages_.append(k, v, attend_.position, where); });
  }

  template <class Tq, class E>
  auto encoded(TensorView<const Tq> q, Index first, const E& executor) {
    using Encoded = Arithmetic<Tq>;
    auto& queries = std::get<std::vector<Encoded>>(queries_);
    queries.resize(static_cast<std::size_t>(q.batch * q.heads * q.rows * q.cols));
    const auto to = compact_view(queries.data(), q.batch, q.heads, q.rows, q.cols);
    const auto encode = [&](Index n, Index) {
      const Index b = n / q.heads, h = n % q.heads;
      for (Index i = 0; i < q.rows; ++i) detail::store_row(q.row(b, h, i), q.cols, to.row(b, h, i));
      attend_.position.encode(to.matrix(b, h), first, Role::query);
    };
    detail::run_where_it_pays(static_cast<double>(queries.size()), 1e4, executor,
                              [&](const auto& where) { where.for_each(q.batch * q.heads, encode); });
    return TensorView<const Encoded>(to);
  }

  /// Encoded queries as bfloat16, for matrix tiles.
  TensorView<const Eigen::bfloat16> rounded(TensorView<const float> q) {
    auto& queries = std::get<std::vector<Eigen::bfloat16>>(queries_);
    queries.resize(static_cast<std::size_t>(q.batch * q.heads * q.rows * q.cols));
    std::transform(q.data, q.data + queries.size(), queries.begin(),
                   [](float x) { return static_cast<Eigen::bfloat16>(x); });
    return longspan::compact_view(std::as_const(queries).data(), q.batch, q.heads, q.rows, q.cols);
  }

  /// The queries `q` of a call, and all keys so far.
  template <class Tq, class Call>
  auto problem_of(TensorView<const Tq> q, const Call& call, Index first) const {
    using To = typename decltype(call.out)::Element;
    // The shapes of the keys; their rows are in the pages.
    const TensorView<const T> k{nullptr, shape_.batch, shape_.kv_heads, size(), shape_.head_dim, 0, 0, 0};
    const TensorView<const T> v{nullptr, shape_.batch, shape_.kv_heads, size(), shape_.value_dim, 0, 0, 0};
    return detail::Problem<Tq, T, T, To>{q, k, v, call.out, call.lse, 0, 1}.at(function, first,
                                                                               attend_.scale);
  }

  /// The smallest size to which a stream of `size` tokens can always be truncated.
  Index least_size(Index size) const noexcept { return std::max<Index>(0, size - options_.rollback); }
  /// The number of pages that are full at the smallest size: only these are ever evicted.
  Index full_pages() const noexcept { return least_size(size()) / options_.page_size; }

  /// Evicts full pages that contain no token before `first` and that no later query will see.
  void evict(Index first) {
    if (options_.page_size == 0 || !options_.evict) return;
    for (Index b = 0; b < shape_.batch; ++b)
      pages_.keep_only(b, detail::later_keys(mask_, b, least_size(size())),
                       detail::divide_up(first, options_.page_size), full_pages());
  }
  void take_back_to(Index tokens) noexcept {
    pages_.truncate(tokens);
    full_pages_ = 0;
  }

  /// The smallest size from which on can_truncate is true for all sizes. It is false for all smaller sizes, because the
  /// set of keys that later queries see shrinks from token to token.
  Index least_kept() const noexcept {
    Index fails = pages_.end_of_evicted() - 1, least = size();
    while (least - fails > 1) {
      const Index middle = fails + (least - fails) / 2;
      (can_truncate(middle) ? least : fails) = middle;
    }
    return least;
  }

  softmax_attention<M, S, P> attend_;
  Shown mask_;
  StreamShape shape_;
  kv_cache_options options_;
  detail::KeyPages<T> pages_;
  /// The encoded queries of one call.
  std::tuple<std::vector<float>, std::vector<double>, std::vector<Eigen::bfloat16>> queries_;
  Index full_pages_ = 0;  ///< full_pages() at the last eviction
};

LONGSPAN_NAMESPACE_END

#include "longspan/stream/kv_cache-inl.hpp"
