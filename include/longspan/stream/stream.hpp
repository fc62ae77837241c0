// The concept of a stream: a program that decodes with one stream can decode with every other.
#pragma once

#include <concepts>
#include <istream>
#include <ostream>

#include "longspan/execution.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A functor with a state that it keeps from call to call, for queries of T. A copy is an independent stream.
///
///   shape()                     the sizes of all its calls
///   size(), bytes()             the number of tokens; the memory of what the stream keeps of them
///   extend(q, k, v, out)        appends any number of tokens and computes their outputs; an execution is optional.
///                               All streams except infini_memory and hybrid_stream also take an lse before it
///   clear()                     removes all tokens
///   truncate(n)                 removes all tokens except the first n. The last `rollback` tokens (an option of
///                               each stream) before the largest size that the stream has had can always be
///                               removed; later results have the bits of a stream that never saw the removed
///                               tokens. For smaller n it may throw Error, and then changes nothing
///   can_truncate(n)             true if truncate(n) will succeed
///   save(to), load(from)        writes and reads a file with checksums. A load that throws changes nothing
///
/// How tokens are cut into calls of `extend` changes outputs only within the error bound, except in landmark_cache,
/// where a chunk retrieves only from the blocks that were sealed before it. Its option split_at_blocks makes its
/// results those of single tokens.
template <class S, class T = float>
concept Stream =
    std::copyable<S> && requires(S stream, const S& seen, TensorView<const T> in, TensorView<T> out,
                                 openmp& executor, std::ostream& to, std::istream& from) {
      { seen.shape() } -> std::same_as<const StreamShape&>;
      { seen.size() } -> std::same_as<Index>;
      { seen.bytes() } -> std::same_as<Index>;
      stream.extend(in, in, in, out);
      stream.extend(in, in, in, out, executor);
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
};

LONGSPAN_NAMESPACE_END
