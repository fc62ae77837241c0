// What all attention functors have in common: whatever takes one takes each.
#pragma once

#include "longspan/execution.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// Called with q, k, v and out, of T, and an execution if wanted.
template <class F, class T = float>
concept AttentionFunctor =
    requires(const F& attend, TensorView<const T> in, TensorView<T> out, openmp& execution) {
      attend(in, in, in, out);
      attend(in, in, in, out, execution);
    };

/// Takes an lse behind out as well: its results are partials, which can be merged.
template <class F, class T = float>
concept LseFunctor =
    AttentionFunctor<F, T> &&
    requires(const F& attend, TensorView<const T> in, TensorView<T> out, RowsView<T> lse, openmp& execution) {
      attend(in, in, in, out, lse);
      attend(in, in, in, out, lse, execution);
    };

LONGSPAN_NAMESPACE_END
