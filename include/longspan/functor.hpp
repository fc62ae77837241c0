// The concepts of attention functors. Everything that accepts one functor accepts all that satisfy the concept.
#pragma once

#include "longspan/execution.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A functor that can be called with q, k, v and out, of T, and optionally an execution.
template <class F, class T = float>
concept AttentionFunctor =
    requires(const F& attend, TensorView<const T> in, TensorView<T> out, openmp& execution) {
      attend(in, in, in, out);
      attend(in, in, in, out, execution);
    };

/// A functor that also accepts an lse after out: its results are partials, which can be merged.
template <class F, class T = float>
concept LseFunctor =
    AttentionFunctor<F, T> &&
    requires(const F& attend, TensorView<const T> in, TensorView<T> out, RowsView<T> lse, openmp& execution) {
      attend(in, in, in, out, lse);
      attend(in, in, in, out, lse, execution);
    };

LONGSPAN_NAMESPACE_END
