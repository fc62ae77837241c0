// The concept of a stream: a program that decodes with one stream can decode with every other.
#pragma once

#include <concepts>
#include <istream>
#include <ostream>
#include <span>

#include "longspan/execution.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A functor with a state that it keeps from call to call, for queries of T. A copy is an independent stream.
///
///   shape()                     the sizes of all its calls
///   size(), bytes()             the number of tokens; the memory of what the stream keeps of them
///   extend(q, k, v, out)        appends any number of tokens and computes their outputs; an execution is optional,
///                               with an lse before it if the stream is an LseStream
///   peek(q, k, v, out)          computes the same outputs and leaves the stream as it is; arguments as for extend.
///                               It extends a copy, which costs memory and time; infini_memory copies itself only
///                               if the tokens would close a segment
///   append(k, v)                appends tokens whose queries are not needed; an execution is optional
///   reorder(rows)               batch row b becomes what row rows[b] was: the step of a beam search
///   clear()                     removes all tokens
///   truncate(n)                 removes all tokens except the first n. The last `rollback` tokens (an option of
///                               each stream) before the largest size that the stream has had can always be
///                               removed; later results have the bits of a stream that never saw the removed
///                               tokens. For smaller n it may throw Error, and then changes nothing
///   can_truncate(n)             true if truncate(n) will succeed
///   save(to), load(from)        writes and reads a file with checksums. A load that throws changes nothing
///
/// Not every stream can do everything:
///
///   an lse                      is written by kv_cache, landmark_cache and dilated_cache. The outputs of
///                               infini_memory and hybrid_stream are not partial results of a softmax
///   reset(b), append(b, k, v)   one batch row alone: only infini_memory, whose rows have their own sizes.
///                               In the other streams all batch rows have size() tokens
///   reorder(rows), load(from)   of a landmark_cache whose blocks are in a file throw Error: the file contains
///                               the blocks of one stream, in the order in which they were sealed
///
/// Streams are made from functors and from values like them, always in the same way:
///
///   softmax_attention{...}.stream<T>(shape, options)     kv_cache
///   dilated_attention{...}.stream<T>(shape, options)     dilated_cache
///   infini_attention{...}.stream<T>(shape, options)      infini_memory
///   landmark_retrieval{...}.stream<T>(shape)             landmark_cache
///   hybrid_retrieval{...}.stream<T>(shape)               hybrid_stream
///
/// How tokens are cut into calls of `extend` changes outputs only within the error bound, except in landmark_cache,
/// where a chunk retrieves only from the blocks that were sealed before it. Its option split_at_blocks makes its
/// results those of single tokens.
template <class S, class T = float>
concept Stream =
    std::copyable<S> &&
    requires(S stream, const S& seen, TensorView<const T> in, TensorView<T> out, openmp& executor,
             std::span<const Index> rows, std::ostream& to, std::istream& from) {
      { seen.shape() } -> std::same_as<const StreamShape&>;
      { seen.size() } -> std::same_as<Index>;
      { seen.bytes() } -> std::same_as<Index>;
      stream.extend(in, in, in, out);
      stream.extend(in, in, in, out, executor);
      stream.peek(in, in, in, out);
      stream.peek(in, in, in, out, executor);
      stream.append(in, in);
      stream.append(in, in, executor);
      stream.reorder(rows);
      stream.clear();
      stream.truncate(Index{});
      { seen.can_truncate(Index{}) } -> std::same_as<bool>;
      seen.save(to);
      stream.load(from);
    };

/// A stream that also returns an lse, so that its outputs can be merged with other partials.
template <class S, class T = float>
concept LseStream = Stream<S, T> && requires(S stream, TensorView<const T> in, TensorView<T> out,
                                             RowsView<T> lse, openmp& executor) {
  stream.extend(in, in, in, out, lse);
  stream.extend(in, in, in, out, lse, executor);
  stream.peek(in, in, in, out, lse, executor);
};

LONGSPAN_NAMESPACE_END
