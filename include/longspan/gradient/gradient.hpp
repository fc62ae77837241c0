// Gradients of functors: the form that all of them share.
#pragma once

#include <utility>

#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// The vector-Jacobian product of a functor, for training: from dout, the gradient of a loss with respect to the output
/// of a call, it computes the gradients with respect to q, k and v.
///
///   softmax_attention attend{causal{}};
///   attend(q, k, v, out, lse);                                        // forward; out and lse are kept
///   gradient(attend)(q, k, v, out, lse, dout, dq, dk, dv);            // backward
///   gradient(attend)(q, k, v, out, lse, dout, dq, dk, dv, execution);
///   gradient(attend)(q, k, v, out, lse, dout, dlse, dq, dk, dv, execution);  // if the loss depends on lse too
///
/// A functor that returns no lse (infini_attention, gated) is differentiated without out and lse, whose parts are
/// computed again:
///
///   gradient(attend)(q, k, v, dout, dq, dk, dv, execution);                  // execution is optional
///
/// Include the header of gradient/ that has the name of the functor; it says what is particular to the functor.
///
/// Shapes    dout as out, dlse as lse, dq as q, dk as k, dv as v. q, k, v, out, lse and all options have to be those of
///           the forward call: nothing else is kept of it
/// Types     each tensor float, double, Eigen::bfloat16 or Eigen::half; arithmetic, lse and dlse are double when q is,
///           else float
/// Result    dq, dk and dv are overwritten, not added to
/// Aliasing  dq, dk and dv overlap no input, nor each other
/// Throws    Error when shapes disagree or the functor refuses its options, before anything is written. What an
///           executor throws passes through
template <class Functor>
struct gradient_of;

/// gradient_of<Functor> for a functor with its parts and options.
template <class Functor>
gradient_of<Functor> gradient(Functor functor) {
  return gradient_of<Functor>(std::move(functor));
}

LONGSPAN_NAMESPACE_END
