// What all streams have in common: a program that decodes with one decodes with each.
#pragma once

#include <concepts>
#include <istream>
#include <ostream>

#include "longspan/execution.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A functor carried from call to call, for queries of T. A copy is a stream of its own.
///
///   shape()                     the sizes of all its calls
///   size(), bytes()             number of tokens appended; memory of what is kept of them
///   extend(q, k, v, out)        appends any number of tokens and computes their outputs; an execution may
///                               follow. All streams but infini_memory also take an lse before it
///   clear()                     forgets everything
///   truncate(n)                 takes back all tokens but the first n. The last `rollback` tokens (an option of
///                               each stream) before the largest size that the stream has had can be taken back;
///                               results and bits of every token that stays are those of a stream that never saw
///                               the others. Beyond that it may throw Error, and then changes nothing
///   can_truncate(n)             will truncate(n) succeed?
///   save(to), load(from)        a checked file. A load that throws changes nothing
///
/// How tokens are cut into calls of `extend` changes outputs only within the error bound, except in landmark_cache: each
/// chunk retrieves from the blocks that were sealed before it. Its option split_at_blocks makes its results those of
/// single steps.
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

/// A stream whose outputs are partials: they can be merged with others.
template <class S, class T = float>
concept LseStream = Stream<S, T> && requires(S stream, TensorView<const T> in, TensorView<T> out,
                                             RowsView<T> lse, openmp& executor) {
  stream.extend(in, in, in, out, lse);
  stream.extend(in, in, in, out, lse, executor);
};

LONGSPAN_NAMESPACE_END
