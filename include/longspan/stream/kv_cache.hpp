// Softmax attention token by token: the keys and values of all tokens, or of those that a mask will show
// again.
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

/// softmax_attention carried from call to call: `extend` appends rows after those of the calls before, and each
/// query sees what one call over all rows would show it.
///
///   softmax_attention attend{causal{} & window{.left = 4095}, rotary(Pairing::half_split)};
///   const StreamShape shape{.heads = 32, .kv_heads = 8, .head_dim = 128, .value_dim = 128};
///   auto cache = attend.stream<Eigen::bfloat16>(shape, {.page_size = 256});
///   cache.extend(q, k, v, out);  // a prompt, a chunk or a single token; lse and an execution may follow
///
/// Shapes    q [batch, heads, n, head_dim]      k [batch, kv_heads, n, head_dim]
///           v [batch, kv_heads, n, value_dim]  out [batch, heads, n, value_dim]   lse [batch, heads, n]
///           any n >= 0, which may differ from call to call
/// Types     rows are kept as T: float, double, Eigen::bfloat16, Eigen::half or std::int8_t, whatever k and v
///           are; q and out are any elements, arithmetic is double where q is, else float
/// Positions are written by the cache: keys are encoded once, as they come, and then rounded to T
/// Masked    the mask of the functor, taken literally for every query whose keys it limits to the right: causal,
///           segments, padding, sinks, closed documents, a window with a right side, and what is made of them,
///           as `causal{} | sinks{n}` is. A query without such a limit (everything, a window without a right
///           side, the last of the documents, a user's mask without key ranges) sees no key after itself.
///           A chunk holds all keys that its queries may see, or is refused: `causal{} & mask` fits any chunk
/// Storage   see kv_cache_options. The kernels read pages where they lie. Copies share pages; a stream copies
///           only the open page, when it writes to it first. Pages that a stream evicts serve it and its
///           copies; copies may live on different threads
/// State     batch * kv_heads * (head_dim + value_dim) elements of T for each token that is kept, in int8 and
///           4 bytes for each row of either; 8 bytes for each page that ever was
/// Cost      as softmax_attention; each row is converted once. A token against 32768 takes 0.49 of the time
///           of float with rows of int8, 0.6 to 0.7 with half or bfloat16
/// Error     that of softmax_attention over the rows as they are kept, with pages of at least 16. Keeping
///           rounds each element of k and v: bfloat16 by 2^-9 of it, half by 2^-12, int8 by 1 / 254 of the
///           largest of its row
/// Bits      with one array, or pages of a multiple of 256, those of the call over all rows wherever that
///           runs the same kernel (see softmax_attention: up to 8 queries to a KV head, or more): one token at
///           a time or a few make no difference. Copies, other batch rows and the executor change none
/// Throws    Error when shapes disagree, a chunk is too short for its mask, or sizes could never fit; std::bad_alloc;
///           what an executor or a score throws. Then the stream is as it was before the call, except that it
///           may keep memory for more tokens; out and lse may be written in part
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
  /// The number of tokens appended, less those taken back.
  Index size() const noexcept { return pages_.size(); }
  /// Memory of the rows, with the room for more, and with what is shared with copies.
  Index bytes() const noexcept { return pages_.bytes(); }

  /// Memory for `tokens` tokens: until there are more, `extend` allocates none for rows.
  void reserve(Index tokens) {
    const Index most = detail::KeyPages<T>::most_tokens(shape_);
    if (tokens < 0 || tokens > most)
      refuse_size("kv_cache::reserve", std::to_string(tokens), "0.." + std::to_string(most));
    pages_.reserve(tokens);
  }
  void clear() noexcept { take_back_to(0); }

  /// Will `truncate(tokens)` succeed? It will for every number from the largest size so far less
  /// `options().rollback` up to size(); a smaller number depends on the pages that are left.
  bool can_truncate(Index tokens) const noexcept {
    if (tokens < 0 || tokens > size()) return false;
    for (Index b = 0; b < shape_.batch; ++b) {
      if (!pages_.keeps(b, detail::later_keys(mask_, b, tokens), tokens)) return false;
    }
    return true;
  }

  /// Takes back the tokens from number `tokens` on: the step back of speculative decoding. Throws Error, and
  /// changes nothing, where the next query would see keys that are evicted already.
  void truncate(Index tokens) {
    constexpr std::string_view name = "kv_cache::truncate";
    if (tokens < 0 || tokens > size())
      refuse_size(name, std::to_string(tokens), "0.." + std::to_string(size()));
    if (!can_truncate(tokens)) {
      refuse_size(name, std::to_string(tokens),
                  "at least " + std::to_string(least_kept()) +
                      ": the keys before are evicted, with rollback = " + std::to_string(options_.rollback));
    }
    take_back_to(tokens);
  }

  /// Batch row b becomes what row rows[b] was: the step of a beam search. Rows share pages.
  void reorder(std::span<const Index> rows) {
    detail::check_reorder("kv_cache::reorder", rows, shape_.batch);
    pages_.reorder(rows);
  }

  /// Appends tokens whose queries are not needed.
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

  /// Writes the rows; a stream of the same shape, T, page, positions and scale can load them.
  void save(std::ostream& to) const;
  /// Takes over what `save` wrote; as many tokens can be taken back as the file has the rows for. Throws FileError,
  /// and changes nothing, where the file is damaged or belongs to another kind of stream.
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

  /// All that shaped the rows of a file, or decides how they are read.
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

  /// work(first, count), which appends tokens, for pieces of the `rows` tokens of one call.
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

  /// Where later pages replace earlier ones, a long prompt is appended in pieces, and needs no more memory than
  /// what stays. Pieces of 2048 keep the tiles full; none ends before a key that one of its queries may see.
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
    if constexpr (encodes) {
      attend(encoded(call.q, first, executor), call, first, executor, workspace);
    } else {
      attend(call.q, call, first, executor, workspace);
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

  template <class Tq, class Call, class E>
  void attend(TensorView<const Tq> q, const Call& call, Index first, const E& executor,
              Workspace& workspace) const {
    using To = typename decltype(call.out)::Element;
    // The shapes of all keys so far; their rows are in the pages.
    const TensorView<const T> k{nullptr, shape_.batch, shape_.kv_heads, size(), shape_.head_dim, 0, 0, 0};
    const TensorView<const T> v{nullptr, shape_.batch, shape_.kv_heads, size(), shape_.value_dim, 0, 0, 0};
    const auto problem =
        detail::Problem<Tq, T, T, To>{q, k, v, call.out, call.lse, 0, 1}.at(function, first, attend_.scale);
    detail::attend(problem, pages_, mask_, attend_.score, no_position{}, executor, workspace,
                   attend_.bf16_products);
  }

  /// The size to which a stream of `size` tokens promises to go back.
  Index least_size(Index size) const noexcept { return std::max<Index>(0, size - options_.rollback); }
  /// Pages that are full then: only these are ever evicted.
  Index full_pages() const noexcept { return least_size(size()) / options_.page_size; }

  /// Evicts full pages that hold none of the tokens before `first` and that no later query will see.
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

  /// The least number of tokens from which on each can be truncated to: can_truncate only fails before it, since
  /// what later queries see shrinks from token to token.
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
  std::tuple<std::vector<float>, std::vector<double>> queries_;  ///< of one call, encoded
  Index full_pages_ = 0;                                         ///< when pages were last evicted
};

LONGSPAN_NAMESPACE_END

#include "longspan/stream/kv_cache-inl.hpp"
