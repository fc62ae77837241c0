// Infini-attention of one segment: local attention, the read from the memory, the gate, and the write.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/infini/local.hpp"
#include "longspan/detail/infini/memory_kernels.hpp"
#include "longspan/execution.hpp"
#include "longspan/functor.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// One batch row of a tensor.
template <class T>
TensorView<T> batch_row(TensorView<T> x, Index b) {
  x.data += b * x.batch_stride;
  x.batch = 1;
  return x;
}

/// An infini_attention functor with its options resolved, and the memories that it reads and writes.
template <class Real, class Local, FeatureMap F>
struct InfiniPass {
  const Local& local;
  const F& feature;
  InfiniRule rule = InfiniRule::linear;
  bool memory_uses_positions = false;
  bool absolute_positions = false;
  MemoryView<Real> memory{};
  Shares<Real> gate{};
  Shares<Real> difference{};  ///< value minus read, for the delta rule

  /// out = gate(memory, local) for queries of one segment. k and v are the keys and values of the segment so far; the
  /// first is at `position`, and the last q.rows of them are at the positions of the queries. If nothing is `known`
  /// (the memory is empty and has no share), the output is that of local attention alone. Batch row b has rows_of(b)
  /// rows; for outputs after them the local part is 0.
  template <class Tq, class Tk, class Tv, class To, class E, class RowsOf>
  void attend(TensorView<const Tq> q, TensorView<const Tk> k, TensorView<const Tv> v, TensorView<To> out,
              Index position, bool known, const E& executor, Workspace& workspace,
              const RowsOf& rows_of) const {
    ExecutionRef<E> inner{executor, workspace.inner()};
    for_each_call(Problem<Tq, Tk, Tv, To>{q, k, v, out, {}}, rows_of, [&](const auto& call) {
      attend_locally(call.q, call.k, call.v, call.out, position, inner);
    });
    const Index before = k.rows - q.rows;
    for (Index b = 0; b < k.batch; ++b) {
      const auto to = batch_row(out, b);
      for (Index h = 0; h < to.heads; ++h) {
        for (Index i = std::max<Index>(0, rows_of(b) - before); i < to.rows; ++i)
          std::fill_n(to.row(0, h, i), to.cols, To(0));
      }
    }
    if (known) recall(q, k.rows - q.rows, out, position, executor, workspace);
  }

  /// Throws Error if the local functor will reject the call in `attend`; writes nothing. A user-defined functor with
  /// lse is called without queries for this check; one without lse needs a query for each key and is not checked.
  template <class Tq, class Tk, class Tv, class To, class E, class RowsOf>
  void check(TensorView<const Tq> q, TensorView<const Tk> k, TensorView<const Tv> v, TensorView<To> out,
             const E& executor, Workspace& workspace, const RowsOf& rows_of) const {
    const Index queries = (std::min)(q.rows, k.rows);
    const Problem<Tq, Tk, Tv, To> call{q.slice_rows(0, queries), k, v, out.slice_rows(0, queries), {}};
    if constexpr (requires { local.check_call(call); }) {
      check_sizes(local, call, rows_of);
    } else if constexpr (LseFunctor<Local, Real>) {
      attend(q.slice_rows(0, 0), k, v, out.slice_rows(0, 0), 0, false, executor, workspace, rows_of);
    }
  }

  /// The same for functors that offer check_call.
  template <class Call, class RowsOf>
  static void check_sizes(const Local& local, const Call& call, const RowsOf& rows_of) {
    if constexpr (requires { local.check_call(call); }) {
      for_each_call(call, rows_of, [&](const auto& part) {
        at_end_of_keys(local, [&](const auto& functor) { functor.check_call(part); });
      });
    }
  }

  /// out = gate(memory, out) for queries that come after the first `first_query` queries of their segment.
  template <class Tq, class To, class E>
  void recall(TensorView<const Tq> q, Index first_query, TensorView<To> out, Index position,
              const E& executor, Workspace& workspace) const {
    with_encoding(position, [&](const auto& encoding) {
      MemoryRead<Real, Tq, To, To, F, std::remove_cvref_t<decltype(encoding)>>(
          q, first_query, TensorView<const To>(out), out, memory, gate, feature, encoding)
          .run(executor, workspace.inner());
    });
  }

  /// Writes the first rows_of(b) rows of a segment of each batch row. `change` [batch, kv_heads, rows,
  /// value_dim] is scratch of the delta rule.
  template <class Tk, class Tv, class E, class RowsOf>
  void write(TensorView<const Tk> k, TensorView<const Tv> v, TensorView<Real> change, Index position,
             const E& executor, Workspace& workspace, const RowsOf& rows_of) const {
    with_encoding(position, [&](const auto& encoding) {
      using P = std::remove_cvref_t<decltype(encoding)>;
      if (rule == InfiniRule::delta) {
        // v minus what the memory returns for k: a read with keys in place of queries.
        MemoryRead<Real, Tk, Tv, Real, F, P>(k, 0, v, change, memory, difference, feature, encoding)
            .run(executor, workspace.inner());
        MemoryWrite<Real, Tk, Real, F, P>(k, TensorView<const Real>(change), 0, memory, feature, encoding)
            .run(executor, workspace.inner(), rows_of);
      } else {
        MemoryWrite<Real, Tk, Tv, F, P>(k, v, 0, memory, feature, encoding)
            .run(executor, workspace.inner(), rows_of);
      }
    });
  }

 private:
  /// The last q.rows keys are at the positions of the queries, which is the default of all functors. The functor is not
  /// copied unless its first_query differs: a copy of dilated_attention would allocate its branches.
  template <class Tq, class Tk, class Tv, class To, class E>
  void attend_locally(TensorView<const Tq> q, TensorView<const Tk> k, TensorView<const Tv> v,
                      TensorView<To> out, Index position, E& execution) const {
    const auto call = [&](const auto& functor) { functor(q, k, v, out, execution); };
    if (absolute_positions) {
      at_end_of_keys(local_at(local, position), call);
    } else {
      at_end_of_keys(local, call);
    }
  }

  /// Calls work(functor) with a functor whose last query is at the position of the last key.
  template <class Functor, class Work>
  static void at_end_of_keys(const Functor& functor, const Work& work) {
    if constexpr (requires { functor.first_query; }) {
      if (functor.first_query != queries_end_at_keys) {
        auto copy = functor;
        copy.first_query = queries_end_at_keys;
        return work(copy);
      }
    }
    work(functor);
  }

  /// Calls work(part) for each call of the local functor: one call, or one for each batch row if some batch rows are
  /// shorter than others.
  template <class Call, class RowsOf, class Work>
  static void for_each_call(const Call& call, const RowsOf& rows_of, const Work& work) {
    bool whole = true;
    for (Index b = 0; b < call.k.batch; ++b) whole = whole && rows_of(b) >= call.kv_len();
    if (whole) return work(call);
    const Index before = call.kv_len() - call.q_len();
    for (Index b = 0; b < call.k.batch; ++b) {
      const Index rows = std::clamp<Index>(rows_of(b), 0, call.kv_len());
      const Index queries = std::max<Index>(0, rows - before);
      Call part = call;
      part.q = batch_row(call.q, b).slice_rows(0, queries);
      part.k = batch_row(call.k, b).slice_rows(0, rows);
      part.v = batch_row(call.v, b).slice_rows(0, rows);
      part.out = batch_row(call.out, b).slice_rows(0, queries);
      work(part);
    }
  }

  /// Calls work(encoding) with the position encoding of queries and keys for the memory.
  template <class Work>
  void with_encoding(Index position, const Work& work) const {
    using P = decltype(position_of(local));
    if constexpr (!std::is_same_v<P, no_position>) {
      if (memory_uses_positions)
        return work(ShiftedPosition<P>{position_of(local), absolute_positions ? position : 0});
    }
    work(no_position{});
  }
};

/// Fills the gate's shares, [heads][columns] each: sigmoid(beta) and 1 - sigmoid(beta). Each is computed from its own
/// exponential, so that a small share keeps its digits. Without beta, beta is 0.
template <class Real>
Shares<Real> gate_shares(MatrixView<const float> beta, Index heads, Index columns, Index stride, Real* memory,
                         Real* other) {
  for (Index h = 0; h < heads; ++h) {
    for (Index c = 0; c < stride; ++c) {
      const bool given = beta.data != nullptr && c < columns;
      const Real logit = given ? beta.row(beta.rows == 1 ? 0 : h)[beta.cols == 1 ? 0 : c] : Real(0);
      memory[h * stride + c] = 1 / (1 + std::exp(-logit));
      other[h * stride + c] = 1 / (1 + std::exp(logit));
    }
  }
  return {memory, other, stride};
}

/// The shares of the delta rule, which subtract the memory's output from a value: -1 and 1.
template <class Real>
Shares<Real> difference_shares(Index stride, Real* memory, Real* other) {
  std::fill_n(memory, stride, Real(-1));
  std::fill_n(other, stride, Real(1));
  return {memory, other, 0};
}

/// Scratch memory of a call, apart from the memories.
template <class Real>
struct InfiniScratch {
  Real* gate[2] = {};        ///< [heads][stride]
  Real* difference[2] = {};  ///< [stride]
  Real* change = nullptr;    ///< [batch, kv_heads, rows, value_dim], for the delta rule

  static InfiniScratch take(Arena& arena, const MemoryView<Real>& memory, Index heads, Index rows,
                            InfiniRule rule) {
    InfiniScratch scratch;
    for (Real*& shares : scratch.gate) shares = arena.take<Real>(heads * memory.stride());
    if (rule != InfiniRule::delta) return scratch;
    for (Real*& shares : scratch.difference) shares = arena.take<Real>(memory.stride());
    scratch.change = arena.take<Real>(memory.heads() * rows * memory.value_dim);
    return scratch;
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
