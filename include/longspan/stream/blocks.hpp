// Extends a stream block by block, for a sequence that is too long for the memory.
#pragma once

#include <algorithm>
#include <concepts>
#include <string>

#include "longspan/eigen.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A source of rows that also receives the outputs: a file, a mapping, a generator.
///
///   auto block = source.open(first, count);  // has q, k, v and out, tensors of rows [first, first + count)
///   source.close(first, count);              // the outputs of these rows are complete
///
/// One block is open at a time, and blocks are opened in rising order.
template <class S>
concept BlockSource = requires(S& source, Index n) {
  { source.open(n, n).q } -> TensorLike;
  { source.open(n, n).k } -> TensorLike;
  { source.open(n, n).v } -> TensorLike;
  { source.open(n, n).out } -> TensorLike;
  source.close(n, n);
};

/// Extends `stream` from its current size to `length` tokens, at most `rows_at_once` tokens at a time. A stream that
/// was saved after some block and then loaded continues after that block.
///
///   extend_by_blocks(stream, source, length, 65536, execution);
///
/// State   that of the stream, and one block; the bits are those of one call
/// Throws  Error if rows_at_once is not positive; what the stream and the source throw
template <class Stream, BlockSource Source, ExecutionLike E = openmp>
void extend_by_blocks(Stream& stream, Source& source, Index length, Index rows_at_once, E&& execution = E{}) {
  if (rows_at_once < 1)
    detail::refuse("extend_by_blocks", "rows_at_once", std::to_string(rows_at_once), "at least 1");
  // Tokens are counted here, because the size of a stream of batch 0 does not grow.
  for (Index first = stream.size(), count = 0; first < length; first += count) {
    count = (std::min)(rows_at_once, length - first);
    auto block = source.open(first, count);
    stream.extend(block.q, block.k, block.v, block.out, execution);
    source.close(first, count);
  }
}

LONGSPAN_NAMESPACE_END
