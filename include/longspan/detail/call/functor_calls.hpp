// The overloads of a functor's call and of a stream's `extend`, written once.
#pragma once

#include <string_view>

#include "longspan/call_sizes.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/eigen.hpp"
#include "longspan/execution.hpp"
#include "longspan/options.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Throws Error if the functor rejects its options or the sizes of a call. For functors that offer this check.
template <class F, class Call>
void check_call(const F& functor, const Call& call) {
  if constexpr (requires { functor.check_call(call); }) functor.check_call(call);
}

/// The overloads of a functor's call. Each one calls Derived::check(problem), which throws Error if the functor rejects
/// the call, and then Derived::attend(problem, executor, workspace), which writes the result.
template <class Derived, bool gives_lse>
struct FunctorCalls {
  /// The first half of a call, for functors that contain this one.
  template <class Call>
  void check_call(const Call& call) const {
    static_cast<const Derived&>(*this).check(call);
  }

  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out>
  void operator()(const Q& q, const K& k, const V& v, Out&& out) const {
    run(q, k, v, out, no_rows<LseOf<Q>>(), openmp{});
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, ExecutionLike E>
  void operator()(const Q& q, const K& k, const V& v, Out&& out, E&& execution) const {
    run(q, k, v, out, no_rows<LseOf<Q>>(), execution);
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse>
  requires gives_lse
  void operator()(const Q& q, const K& k, const V& v, Out&& out, Lse&& lse) const {
    run(q, k, v, out, rows_view(lse), openmp{});
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse, ExecutionLike E>
  requires gives_lse
  void operator()(const Q& q, const K& k, const V& v, Out&& out, Lse&& lse, E&& execution) const {
    run(q, k, v, out, rows_view(lse), execution);
  }

 private:
  template <class Q, class K, class V, class Out, class Lse, class E>
  void run(const Q& q, const K& k, const V& v, Out& out, Lse lse, E&& execution) const {
    const auto call = checked_problem(Derived::name, view(q), view(k), view(v), view(out), lse);
    check_call(call);
    with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
      static_cast<const Derived&>(*this).attend(call, executor, workspace);
    });
  }
};

/// Throws Error if the parts of a functor cannot fit any call of a stream of that shape.
template <class Functor>
void check_stream_parts(std::string_view function, const Functor& attend, const StreamShape& shape) {
  attend.position.check(shape.head_dim);
  resolved_scale(function, attend.scale, shape.head_dim);
  check_parts(attend, {function, shape.batch, shape.heads, 0, 0, 0});
}

/// The overloads of a stream's `extend`. Each one checks the mask, score and scale of the stream's functor `attend_`
/// and then calls Derived::take(problem, executor, workspace).
template <class Derived, bool gives_lse>
struct StreamCalls {
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out>
  void extend(const Q& q, const K& k, const V& v, Out&& out) {
    run(q, k, v, out, no_rows<LseOf<Q>>(), openmp{});
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, ExecutionLike E>
  void extend(const Q& q, const K& k, const V& v, Out&& out, E&& execution) {
    run(q, k, v, out, no_rows<LseOf<Q>>(), execution);
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse>
  requires gives_lse
  void extend(const Q& q, const K& k, const V& v, Out&& out, Lse&& lse) {
    run(q, k, v, out, rows_view(lse), openmp{});
  }
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, RowsLike Lse, ExecutionLike E>
  requires gives_lse
  void extend(const Q& q, const K& k, const V& v, Out&& out, Lse&& lse, E&& execution) {
    run(q, k, v, out, rows_view(lse), execution);
  }

  /// Writes what `extend` would write for the same arguments, and leaves the stream as it is: a copy is extended.
  template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, class... LseAndExecution>
  void peek(const Q& q, const K& k, const V& v, Out&& out, LseAndExecution&&... more) const {
    Derived copy(static_cast<const Derived&>(*this));
    copy.extend(q, k, v, out, more...);
  }

 private:
  template <class Q, class K, class V, class Out, class Lse, class E>
  void run(const Q& q, const K& k, const V& v, Out& out, Lse lse, E&& execution) {
    auto& stream = static_cast<Derived&>(*this);
    const auto call = checked_problem(Derived::function, view(q), view(k), view(v), view(out), lse);
    check_stream_call(Derived::function, call, stream.shape());
    if constexpr (requires { stream.attend_.score; }) {
      resolved_scale(Derived::function, stream.attend_.scale, call.head_dim());
      const Index size = stream.size();
      check_parts(stream.attend_,
                  {Derived::function, call.q.batch, call.q.heads, size, call.q_len(), size + call.kv_len()});
    }
    with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
      stream.take(call, executor, workspace);
    });
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
