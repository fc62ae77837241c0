// Slices of tensors by batch row and by head.
#pragma once

#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Batch rows [first, first + count) of a TensorView or RowsView.
template <class View>
View batch_rows(View x, Index first, Index count) {
  x.data += first * x.batch_stride;
  x.batch = count;
  return x;
}

/// Heads [first, first + count) of a TensorView or RowsView.
template <class View>
View slice_heads(View x, Index first, Index count) {
  if (x.batch > 0 && x.rows > 0 && count > 0) x.data += first * x.head_stride;
  x.heads = count;
  return x;
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
