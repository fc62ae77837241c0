// Softmax attention token by token: the keys and values of all tokens, or of those that a mask will show
// again.
#pragma once

#include <algorithm>
#include <array>
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

#include "longspan/detail/call/causal_mask.hpp"
#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/storage/key_pages.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/detail/tile/forward.hpp"
#include "longspan/eigen.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN

/// softmax_attention carried from call to call: rows taken in by `extend` stand behind those of the calls
/// before, and each sees what the one causal call over all rows would show it.
///
///   softmax_attention attend{causal{} & window{.left = 4095}, rotary(Pairing::half_split)};
///   const StreamShape shape{.heads = 32, .kv_heads = 8, .head_dim = 128, .value_dim = 128};
///   auto cache = attend.stream<Eigen::bfloat16>(shape, {.page = 256});
///   cache.extend(q, k, v, out);  // a prompt, a chunk or a single token; lse and an execution may follow
///
/// Shapes    q [batch, heads, n, head_dim]      k [batch, kv_heads, n, head_dim]
///           v [batch, kv_heads, n, value_dim]  out [batch, heads, n, value_dim]   lse [batch, heads, n]
///           any n >= 0, which may differ from call to call
/// Types     rows are kept as T: float, double, Eigen::bfloat16, Eigen::half or std::int8_t, whatever k and v
///           are; q and out are any elements, arithmetic is double where q is, else float
/// Positions are written by the cache: keys are encoded once, as they come, and then rounded to T
/// Masked    the mask of the functor, and what comes behind a query
/// Storage   see kv_cache_options. The kernels read pages where they lie. Copies share pages: the only one
///           that is ever copied is the open one, by whoever goes on first. Pages that a stream gives back
///           serve it and its copies; copies may live on different threads
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
/// Throws    Error when shapes disagree, before anything changes. What an executor or a score throws leaves a
///           stream that has taken in some of the call's rows
/// Source    pages: Kwon et al. 2023 (arXiv 2309.06180), section 4; sinks: Xiao et al. 2023
///           (arXiv 2309.17453)
template <StoredElement T, Mask M, Score S, Position P>
class kv_cache : public detail::StreamCalls<kv_cache<T, M, S, P>, true> {
 public:
  kv_cache(softmax_attention<M, S, P> attend, const StreamShape& shape, const kv_cache_options& options = {})
      : attend_(std::move(attend)),
        mask_(detail::causal_mask(attend_.mask)),
        shape_(checked(shape, options, attend_)),
        options_(options),
        pages_(shape, options.page) {}

  const StreamShape& shape() const noexcept { return shape_; }
  const kv_cache_options& options() const noexcept { return options_; }
  /// Tokens taken in.
  Index size() const noexcept { return pages_.size(); }
  /// Memory of the rows, with the room for more, and with what is shared with copies.
  Index bytes() const noexcept { return pages_.bytes(); }

  /// Memory for `tokens` tokens: until there are more, `extend` allocates none for rows.
  void reserve(Index tokens) { pages_.reserve(tokens); }
  void clear() { forget_from(0); }

  /// Forgets the tokens from number `tokens` on: the step back of speculative decoding. Refused where the
  /// next query would see keys that are forgotten already.
  void truncate(Index tokens) {
    constexpr std::string_view name = "kv_cache::truncate";
    if (tokens < 0 || tokens > size())
      detail::refuse(name, "the number of tokens", std::to_string(tokens), "0.." + std::to_string(size()));
    for (Index b = 0; b < shape_.batch; ++b) {
      if (!pages_.keeps(b, detail::later_keys(mask_, b, tokens), tokens)) {
        detail::refuse(name, "the number of tokens", std::to_string(tokens),
                       "one whose keys are kept: those that the mask would not show again are forgotten");
      }
    }
    forget_from(tokens);
  }

  /// Batch row b becomes what row rows[b] was: the step of a beam search. Rows share pages.
  void reorder(std::span<const Index> rows) {
    constexpr std::string_view name = "kv_cache::reorder";
    if (static_cast<Index>(rows.size()) != shape_.batch)
      detail::refuse(name, "the number of rows", std::to_string(rows.size()), std::to_string(shape_.batch));
    for (const Index row : rows) {
      if (row < 0 || row >= shape_.batch)
        detail::refuse(name, "a row", std::to_string(row), "0 to " + std::to_string(shape_.batch - 1));
    }
    pages_.reorder(rows);
  }

  /// Takes tokens whose queries nobody asks for.
  template <TensorLike K, TensorLike V, ExecutionLike E = openmp>
  void absorb(const K& k, const V& v, E&& execution = E{}) {
    const auto keys = view(k);
    const auto values = view(v);
    detail::check_tokens("kv_cache::absorb", keys, values, shape_.batch, shape_);
    const Index most = tokens_at_once(keys.rows);
    detail::with_executor(execution, [&](const auto& executor) {
      for (Index first = 0; first < keys.rows; first += most) {
        const Index count = std::min(most, keys.rows - first);
        keep(keys.slice_rows(first, count), values.slice_rows(first, count), executor);
        forget_unseen();
      }
    });
  }

  /// Writes the rows; a stream of the same shape, T and page can load them.
  void save(std::ostream& to) const {
    detail::StateWriter writer(to, kind, numbers(), pages_.payload_bytes());
    pages_.save(writer);
    writer.finish();
  }
  /// Takes over what `save` wrote. Throws Error, and changes nothing, where the file is damaged or belongs to
  /// another shape, type or page.
  void load(std::istream& from) {
    Numbers found{};
    detail::StateReader reader(from, kind, found);
    Numbers wanted = numbers();
    wanted.back() = found.back();
    if (found != wanted)
      detail::refuse(kind.load, "the file", "a state of other shapes or options", "one of this stream's");
    const Index size = found.back(), most = Index{1} << 44;
    if (size < 0 || size > most)
      detail::refuse(kind.load, "the number of tokens", std::to_string(size), "0.." + std::to_string(most));
    detail::KeyPages<T> loaded(shape_, options_.page);
    loaded.load(reader, size);
    reader.finish();
    for (Index b = 0; b < shape_.batch; ++b) {
      if (!loaded.keeps(b, detail::later_keys(mask_, b, size), size))
        detail::refuse(kind.load, "the file", "a state without keys that the mask will show",
                       "one with them");
    }
    pages_ = std::move(loaded);
    known_full_ = 0;
  }

 private:
  friend detail::StreamCalls<kv_cache, true>;
  using Causal = detail::CausalMask<M>;
  using Real = detail::ArithmeticOf<T>;
  using Numbers = std::array<std::int64_t, 9>;
  static constexpr std::string_view function = "kv_cache::extend";
  static constexpr detail::StateKind kind{"kv", 1, "kv_cache::save", "kv_cache::load"};
  static constexpr bool encodes = !std::is_same_v<P, no_position>;

  static const StreamShape& checked(const StreamShape& shape, const kv_cache_options& options,
                                    const softmax_attention<M, S, P>& attend) {
    detail::check_stream_shape("kv_cache", shape);
    attend.position.check(shape.head_dim);
    if (options.page < 0)
      detail::refuse("kv_cache", "the page", std::to_string(options.page), "at least 0 tokens");
    if (attend.first_query != queries_end_at_keys) {
      detail::refuse("kv_cache", "first_query", std::to_string(attend.first_query),
                     "unset: queries stand behind the tokens before");
    }
    return shape;
  }

  Numbers numbers() const {
    const std::int64_t type = std::is_same_v<T, Eigen::half> ? 16 : static_cast<std::int64_t>(sizeof(T));
    return {shape_.batch, shape_.heads,  shape_.kv_heads, shape_.head_dim, shape_.value_dim,
            type,         options_.page, encodes,         size()};
  }

  /// What can be forgotten is taken in piece by piece: a long prompt needs no more memory than what follows.
  /// Pieces of 2048 keep the tiles full.
  Index tokens_at_once(Index rows) const {
    const KeyRange all{0, size() + rows};
    for (Index b = 0; b < shape_.batch && options_.page > 0 && options_.forget; ++b) {
      const KeyRanges later = detail::later_keys(mask_, b, all.end);
      if (std::none_of(later.begin(), later.end(), [&](const KeyRange& x) { return x.contains(all); }))
        return 2048;
    }
    return std::max<Index>(1, rows);
  }

  template <class Call, class E>
  void take(const Call& call, const E& executor, Workspace& workspace) {
    const Index most = tokens_at_once(call.q_len());
    for (Index first = 0; first < call.q_len(); first += most)
      take_in(detail::part_of(call, first, std::min(most, call.q_len() - first)), executor, workspace);
  }

  template <class Call, class E>
  void take_in(const Call& call, const E& executor, Workspace& workspace) {
    const Index first = size();
    keep(call.k, call.v, executor);
    if constexpr (encodes) {
      attend(encoded(call.q, first, executor), call, first, executor, workspace);
    } else {
      attend(call.q, call, first, executor, workspace);
    }
    forget_unseen();
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
        detail::Problem<Tq, T, T, To>{q, k, v, call.out, call.lse, 0, 1}.at(first, attend_.scale);
    detail::forward_over(problem, pages_, mask_, attend_.score, no_position{}, executor, workspace,
                         attend_.bf16_products);
  }

  void forget_unseen() {
    if (options_.page == 0 || !options_.forget || size() / options_.page == known_full_) return;
    known_full_ = size() / options_.page;
    for (Index b = 0; b < shape_.batch; ++b) pages_.keep_only(b, detail::later_keys(mask_, b, size()));
  }
  void forget_from(Index tokens) {
    pages_.truncate(tokens);
    known_full_ = 0;
  }

  softmax_attention<M, S, P> attend_;
  Causal mask_;
  StreamShape shape_;
  kv_cache_options options_;
  detail::KeyPages<T> pages_;
  std::tuple<std::vector<float>, std::vector<double>> queries_;  ///< of one call, encoded
  Index known_full_ = 0;  ///< full pages when it was last asked which of them are seen
};

LONGSPAN_END
