// The backward pass of Infini-attention: from the last segment to the first, with the gradient of the memory carried
// along.
#pragma once

#include <algorithm>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/composition.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/call/slices.hpp"
#include "longspan/detail/gradient/functor.hpp"
#include "longspan/detail/gradient/gates.hpp"
#include "longspan/detail/gradient/infini_states.hpp"
#include "longspan/detail/gradient/rows.hpp"
#include "longspan/detail/infini/local.hpp"
#include "longspan/execution.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/partial.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// First the memory before every segment (InfiniStates). Then for each segment, the last one first:
///   the gradient of local attention, from (1 - g) dout
///   for each query head and span of queries, in parallel: the gradient of the read
///   for each KV head and span of keys, in parallel: the gradient of the write, from the carried gradient of the memory
///   the carried gradient of the memory before the segment, from the sums of all spans in a fixed order
/// `Gradient` is a gradient_of<infini_attention> whose options have been checked.
template <class Call, class Gradient>
class InfiniBackward {
 public:
  using Real = typename Call::Real;

  InfiniBackward(const Call& call, const Gradient& gradient, MatrixView<const float> beta)
      : call_(call), of_(gradient), beta_(beta), states_(call.forward, gradient) {}

  template <class E>
  void run(const E& executor, Workspace& workspace) {
    const Index workers = executor.workers();
    take_scratch(workspace, [&](Arena& arena) {
      states_.cut(arena, workers);
      cut(arena);
    });
    fill_gates(beta_, q().heads, value_dim(), g_, rest_);
    if (wants_beta()) std::fill_n(dbeta_, q().heads * value_dim(), 0.0);
    states_.start(executor);
    for (Index s = states_.segments(); s-- > 0;) {
      states_.restore(s, executor);
      differentiate_segment(s, executor, workspace);
    }
    states_.copy_out(of_.dinitial);
    if (wants_beta()) {
      write_beta_gradient([&](Index h, Index c) { return dbeta_[h * value_dim() + c]; }, q().heads,
                          value_dim(), of_.dbeta);
    }
  }

 private:
  using Td = std::remove_const_t<typename decltype(Call::dout)::Element>;

  const auto& q() const { return call_.forward.q; }
  const auto& k() const { return call_.forward.k; }
  const auto& v() const { return call_.forward.v; }
  Index value_dim() const { return v().cols; }
  bool wants_beta() const { return of_.dbeta.data != nullptr; }
  /// False in a segment whose output is that of local attention alone.
  bool is_gated(Index s) const { return states_.reads(s) || of_.attend.empty_memory == EmptyMemory::gate; }
  /// Whether anything needs the gradient of the memory before segment s.
  bool carries(Index s) const { return s == 0 ? of_.dinitial.m.data != nullptr : s % of_.bptt_segments != 0; }

  void cut(Arena& arena) {
    const Index heads = q().heads, rows = states_.longest_segment(),
                tasks = q().batch * heads * states_.spans();
    g_ = arena.take<Real>(heads * value_dim());
    rest_ = arena.take<Real>(heads * value_dim());
    dbeta_ = arena.take<double>(wants_beta() ? heads * value_dim() : 0);
    dbeta_sums_ = arena.take<double>(wants_beta() ? tasks * value_dim() : 0);
    read_sums_ = arena.take<Real>(tasks * states_.sizes().sum_size());
    dlocal_ = scratch_output<Real>(call_.dout.slice_rows(0, rows), arena);
    local_ = ForwardResult<Real>::take(arena, q().slice_rows(0, rows), value_dim());
    dq_ = output_or_scratch<Real>(call_.dq.slice_rows(0, rows), arena);
    dk_ = output_or_scratch<Real>(call_.dk.slice_rows(0, rows), arena);
    dv_ = output_or_scratch<Real>(call_.dv.slice_rows(0, rows), arena);
  }

  /// The rows of a segment of a result: in place if its elements are of the arithmetic's type, otherwise in scratch.
  template <class T>
  static TensorView<Real> rows_in(const InfiniSegment& part, const TensorView<T>& of,
                                  const TensorView<Real>& scratch) {
    if constexpr (std::is_same_v<T, Real>) {
      return of.slice_rows(part.begin, part.rows);
    } else {
      return scratch.slice_rows(0, part.rows);
    }
  }

  template <class E>
  void differentiate_segment(Index s, const E& executor, Workspace& workspace) {
    const InfiniSegment part = states_.segment(s);
    const TensorView<Real> dq = rows_in(part, call_.dq, dq_), dk = rows_in(part, call_.dk, dk_),
                           dv = rows_in(part, call_.dv, dv_);
    differentiate_locally(part, dq, dk, dv, executor, workspace);
    states_.transpose(s, executor);
    const bool reads = states_.reads(s), writes = states_.writes(s), of_beta = is_gated(s) && wants_beta();
    const Index read_tasks = reads || of_beta ? q().batch * q().heads * states_.spans() : 0;
    const Index write_tasks = writes ? k().batch * k().heads * states_.spans() : 0;
    states_.with_encoding(part, [&](const auto& encoding) {
      executor.for_each(read_tasks + write_tasks, [&](Index task, Index worker) {
        if (task < read_tasks) {
          differentiate_read(part, task, worker, encoding, dq);
        } else {
          states_.differentiate_write(part, task - read_tasks, worker, encoding, dk, dv);
        }
      });
    });
    if (of_beta) add_beta();
    if (carries(s)) {
      states_.carry_back(s, writes, reads ? read_sums_ : nullptr, executor);
    } else {
      states_.drop_change();
    }
    const auto round = [&](const TensorView<Real>& from, const auto& to) {
      move_output(from, to.slice_rows(part.begin, part.rows), executor);
    };
    round(dq, call_.dq);
    round(dk, call_.dk);
    round(dv, call_.dv);
  }

  /// dq, dk and dv of local attention. Rows after the length of a batch row get 0.
  template <class E>
  void differentiate_locally(const InfiniSegment& part, const TensorView<Real>& dq,
                             const TensorView<Real>& dk, const TensorView<Real>& dv, const E& executor,
                             Workspace& workspace) {
    const bool is_gated = this->is_gated(part.number);
    const auto dlocal = dlocal_.slice_rows(0, part.rows);
    for_each_row(dlocal, executor, [&](Index b, Index h, Index i) {
      const Td* from = call_.dout.row(b, h, part.begin + i);
      const Real* share = rest_ + h * value_dim();
      Real* to = dlocal.row(b, h, i);
      for (Index c = 0; c < value_dim(); ++c) {
        const Real by = is_gated ? share[c] : Real(1);
        to[c] = by == Real(0) ? Real(0) : by * static_cast<Real>(from[c]);
      }
    });
    bool is_whole = true;
    for (Index b = 0; b < q().batch; ++b) is_whole = is_whole && states_.rows_of(part, b) == part.rows;
    ExecutionRef<E> inner{executor, workspace.inner()};
    for (Index b = 0; b < q().batch; b += is_whole ? q().batch : 1) {
      const Index count = is_whole ? q().batch : 1, rows = is_whole ? part.rows : states_.rows_of(part, b);
      const auto cut = [&](auto x) { return batch_rows(x, b, count).slice_rows(0, rows); };
      const auto cut_input = [&](const auto& x) { return cut(x.slice_rows(part.begin, part.rows)); };
      auto lse = batch_rows(local_.lse, b, count);
      lse.rows = rows;
      const ForwardResult<Real> result{cut(local_.out), lse};
      with_local(part, [&](const auto& gradient) {
        result.attend(gradient.attend, cut_input(q()), cut_input(k()), cut_input(v()), wants_beta(), inner);
        result.differentiate(gradient, cut_input(q()), cut_input(k()), cut_input(v()),
                             TensorView<const Real>(cut(dlocal)), cut(dq), cut(dk), cut(dv), inner);
      });
      for (const TensorView<Real>& x : {dq, dk, dv}) {
        for (Index h = 0; h < x.heads && rows < part.rows; ++h) {
          for (Index i = rows; i < part.rows; ++i) std::fill_n(x.row(b, h, i), x.cols, Real(0));
        }
      }
    }
  }

  /// Calls work(gradient) with the gradient of the local functor at the positions of a segment.
  template <class Work>
  void with_local(const InfiniSegment& part, const Work& work) const {
    const auto& local = of_.local.attend;
    using Shifted = std::remove_cvref_t<decltype(local_at(local, part.begin))>;
    if constexpr (!std::is_same_v<Shifted, std::remove_cvref_t<decltype(local)>>) {
      if (of_.attend.absolute_positions)
        return with_queries_at_end(gradient_of<Shifted>(local_at(local, part.begin)), work);
    }
    with_queries_at_end(of_.local, work);
  }

  /// Adds the gradient of the read of one span of queries to dq.
  template <Position P>
  void differentiate_read(const InfiniSegment& part, Index task, Index worker, const P& encoding,
                          const TensorView<Real>& dq) const {
    const Index head = task / states_.spans(), b = head / q().heads, h = head % q().heads;
    const State<Real> state = states_.state(part.number, b * k().heads + h / call_.forward.group());
    const bool reads = states_.reads(part.number), carries = reads && this->carries(part.number);
    double* of_beta = wants_beta() ? dbeta_sums_ + task * value_dim() : nullptr;
    if (wants_beta()) std::fill_n(of_beta, value_dim(), 0.0);
    Real* sum = read_sums_ + task * states_.sizes().sum_size();
    auto rows = states_.rows(worker);
    const auto take_block = [&](Index first, Index count, bool is_first) {
      if (reads) {
        rows.load_rows(q().slice_rows(part.begin + first, count).matrix(b, h), of_.attend.feature, encoding,
                       first, Role::query);
        rows.read(state);
      }
      for (Index i = 0; i < count; ++i) {
        const Td* dout = call_.dout.row(b, h, part.begin + first + i);
        if (of_beta != nullptr)
          add_beta_row(dout, local_.out.row(b, h, first + i), h, reads, rows, i, of_beta);
        if (reads) replace_read(dout, h, rows, i);
      }
      if (!reads) return;
      if (carries) rows.add_read_gradient(sum, is_first);
      rows.differentiate_read(state, false);
      rows.add_to(dq.slice_rows(first, count).matrix(b, h), of_.attend.feature, encoding, first, Role::query);
    };
    const bool any = states_.for_each_block(part, b, task % states_.spans(), take_block);
    if (!any && carries) std::fill_n(sum, states_.sizes().sum_size(), Real(0));
  }

  /// Adds g (1 - g) dout (read - local) of one row.
  template <class Rows>
  void add_beta_row(const Td* dout, const Real* local, Index h, bool reads, const Rows& rows, Index i,
                    double* sum) const {
    const Real by = reads ? rows.quotient(i) : Real(0);
    const Real *g = g_ + h * value_dim(), *rest = rest_ + h * value_dim();
    for (Index c = 0; c < value_dim(); ++c) {
      const Real both = g[c] * rest[c], known = reads ? rows.read_row(i)[c] * by : Real(0);
      if (both != Real(0))
        sum[c] += static_cast<double>(both * static_cast<Real>(dout[c]) * (known - local[c]));
    }
  }

  /// Replaces [numerator | norm] of one row by its gradient.
  template <class Rows>
  void replace_read(const Td* dout, Index h, Rows& rows, Index i) const {
    const Real by = rows.quotient(i), *g = g_ + h * value_dim();
    Real* read = rows.read_row(i);
    Real dot = 0;
    for (Index c = 0; c < value_dim(); ++c) {
      const Real change = g[c] == Real(0) ? Real(0) : g[c] * static_cast<Real>(dout[c]);
      dot += g[c] == Real(0) ? Real(0) : change * read[c] * by;
      read[c] = change * by;
    }
    rows.end_read_row(i, rows.norm_gradient(i, dot, by));
  }

  /// Adds the sums of all batch rows and spans to those of each head.
  void add_beta() {
    const Index spans = states_.spans(), size = value_dim();
    for (Index task = 0; task < q().batch * q().heads * spans; ++task) {
      double* to = dbeta_ + task / spans % q().heads * size;
      for (Index c = 0; c < size; ++c) to[c] += dbeta_sums_[task * size + c];
    }
  }

  const Call& call_;
  const Gradient& of_;
  MatrixView<const float> beta_;
  InfiniStates<typename Call::Forward, Gradient> states_;
  Real *g_ = nullptr, *rest_ = nullptr;              ///< [heads][value_dim]
  double *dbeta_ = nullptr, *dbeta_sums_ = nullptr;  ///< [heads][value_dim], [query heads][spans][value_dim]
  Real* read_sums_ = nullptr;                        ///< [query heads][spans]
  TensorView<Real> dlocal_{}, dq_{}, dk_{}, dv_{};   ///< of one segment
  ForwardResult<Real> local_{};                      ///< of one segment
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
