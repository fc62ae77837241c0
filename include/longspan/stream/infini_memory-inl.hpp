// Member functions of infini_memory: appending with and without queries, peek, recall, truncate, flush.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/eigen.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

template <Element T, class Local, FeatureMap F>
template <TensorLike Q, TensorLike K, TensorLike V, TensorLike Out, ExecutionLike E>
void infini_memory<T, Local, F>::peek(const Q& q, const K& k, const V& v, Out&& out, E&& execution) {
  const Index most = filled_.empty() ? 0 : *std::max_element(filled_.begin(), filled_.end());
  if (view(q).rows >= attend_.segment - most) {
    infini_memory copy = *this;
    return copy.extend(q, k, v, out, execution);
  }
  constexpr std::string_view function_name = "infini_memory::peek";
  const auto call = detail::checked_problem(function_name, view(q), view(k), view(v), view(out),
                                            detail::no_rows<detail::LseOf<Q>>());
  detail::check_stream_call(function_name, call, shape_);
  make_room(call.q_len());
  detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
    check_local(call, executor, workspace);
    for_each_run_of_rows([&](Index b, Index rows) {
      answer(detail::batch_rows(call.q, b, rows), detail::batch_rows(call.k, b, rows),
             detail::batch_rows(call.v, b, rows), detail::batch_rows(call.out, b, rows), b, rows, executor,
             workspace);
    });
  });
}

template <Element T, class Local, FeatureMap F>
template <TensorLike K, TensorLike V, ExecutionLike E>
void infini_memory<T, Local, F>::append(Index b, const K& k, const V& v, E&& execution) {
  check_row("infini_memory::append", b);
  const auto keys = view(k);
  const auto values = view(v);
  detail::check_tokens("infini_memory::append", keys, values, 1, shape_);
  make_room(keys.rows);
  detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
    append_rows(keys, values, b, 1, executor, workspace);
  });
}

template <Element T, class Local, FeatureMap F>
template <TensorLike K, TensorLike V, ExecutionLike E>
void infini_memory<T, Local, F>::append(const K& k, const V& v, E&& execution) {
  const auto keys = view(k);
  const auto values = view(v);
  detail::check_tokens("infini_memory::append", keys, values, shape_.batch, shape_);
  make_room(keys.rows);
  detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
    for_each_run_of_rows([&](Index b, Index rows) {
      append_rows(detail::batch_rows(keys, b, rows), detail::batch_rows(values, b, rows), b, rows, executor,
                  workspace);
    });
  });
}

template <Element T, class Local, FeatureMap F>
template <class Tk, class Tv, class E>
void infini_memory<T, Local, F>::append_rows(TensorView<Tk> k, TensorView<Tv> v, Index b, Index rows,
                                             const E& executor, Workspace& workspace) {
  for (Index first = 0, count = 0; first < k.rows; first += count) {
    for (Index row = b; row < b + rows; ++row) settle(row, executor, workspace);
    count = (std::min)(attend_.segment - filled_[at(b)], k.rows - first);
    open_.write(k.slice_rows(first, count), v.slice_rows(first, count), b, rows, stored(b));
    append_open(b, rows, count, executor, workspace);
  }
}

template <Element T, class Local, FeatureMap F>
template <TensorLike Q, TensorLike Out, ExecutionLike E>
void infini_memory<T, Local, F>::recall(const Q& q, Out&& out, E&& execution) {
  static_assert(std::is_same_v<detail::LseOf<Q>, Real>,
                "longspan: q must be double if the memory is double, otherwise float or 16-bit");
  const auto queries = view(q);
  const auto to = view(out);
  const auto wanted = [&](const auto& x, const char* what, Index cols) {
    detail::check_view("infini_memory::recall", what, x);
    if (x.batch != shape_.batch || x.heads != shape_.heads || x.rows != queries.rows || x.cols != cols) {
      detail::refuse("infini_memory::recall", what, detail::shape_text(x),
                     detail::shape_text(shape_.batch, shape_.heads, queries.rows, cols));
    }
  };
  wanted(queries, "q", shape_.head_dim);
  wanted(to, "out", shape_.value_dim);
  using Tq = std::remove_const_t<typename std::remove_cvref_t<decltype(queries)>::Element>;
  detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
    for_each_run_of_rows([&](Index b, Index rows) {
      if (!knows(b)) return;
      pass_with_gate(b, rows, workspace)
          .recall(TensorView<const Tq>(detail::batch_rows(queries, b, rows)), 0,
                  detail::batch_rows(to, b, rows), written_[at(b)], executor, workspace);
    });
  });
}

template <Element T, class Local, FeatureMap F>
template <ExecutionLike E>
void infini_memory<T, Local, F>::truncate(Index tokens, E&& execution) {
  if (!can_truncate(tokens)) {
    Index least = 0, most = size();
    for (Index b = 0; b < shape_.batch; ++b) {
      least = (std::max)(least, closed_[at(b)].begin);
      most = (std::min)(most, size(b));
    }
    detail::refuse(
        "infini_memory::truncate", "the number of tokens", std::to_string(tokens),
        least > most ? std::string("a size to which all batch rows can be truncated, but there is none")
                     : std::to_string(least) + ".." + std::to_string(most) +
                           (least == 0 ? "" : ", because earlier tokens cannot be removed from the memory"));
  }
  const auto is_open = [&](Index written) { return written <= tokens; };
  if (!std::all_of(written_.begin(), written_.end(), is_open)) {
    // The new memories are computed before anything changes.
    std::vector<Real> m = m_, z = z_;
    detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
      for (Index b = 0; b < shape_.batch; ++b) {
        if (is_open(written_[at(b)])) continue;
        const auto memory = view_of(m, z, b, 1);
        memory.copy(view_of(base_m_, base_z_, b, 1));
        Index first = 0;
        for (const Index length : closed_[at(b)].lengths) {
          const Index position = closed_[at(b)].begin + first;
          if (position + length > tokens) break;
          write(b, 1, first, length, memory, position, executor, workspace);
          first += length;
        }
      }
    });
    m_.swap(m);
    z_.swap(z);
  }
  for (Index b = 0; b < shape_.batch; ++b) {
    detail::ClosedSegments& closed = closed_[at(b)];
    closed.drop_after(tokens);
    written_[at(b)] = closed.begin + closed.rows;
    filled_[at(b)] = tokens - written_[at(b)];
  }
}

template <Element T, class Local, FeatureMap F>
template <class E>
void infini_memory<T, Local, F>::settle(Index b, const E& executor, Workspace& workspace) {
  detail::ClosedSegments& closed = closed_[at(b)];
  const Index old = size(b) - options_.rollback;
  if (closed.lengths.empty() || closed.begin + closed.lengths.front() > old) return;
  const auto base = view_of(base_m_, base_z_, b, 1);
  if (closed.begin + closed.rows <= old) {  // all closed segments are due: the current memory contains them
    base.copy(view_of(b, 1));
    open_.drop(b, closed.rows, filled_[at(b)]);
    return closed.drop(closed.lengths.size());
  }
  while (closed.begin + closed.lengths.front() <= old) {
    const Index count = closed.lengths.front();
    write(b, 1, 0, count, base, closed.begin, executor, workspace);
    open_.drop(b, count, stored(b) - count);
    closed.drop(1);
  }
}

template <Element T, class Local, FeatureMap F>
template <ExecutionLike E>
void infini_memory<T, Local, F>::flush(E&& execution) {
  detail::with_workspace(execution, [&](const auto& executor, Workspace& workspace) {
    for_each_run_of_rows([&](Index b, Index rows) {
      if (filled_[at(b)] > 0) close(b, rows, filled_[at(b)], executor, workspace);
    });
  });
}

template <Element T, class Local, FeatureMap F>
void infini_memory<T, Local, F>::make_room(Index more) {
  constexpr Index highest = (std::numeric_limits<Index>::max)();
  const auto sum = [](Index x, Index y) { return x > highest - y ? highest : x + y; };
  const Index segment = attend_.segment, rollback = options_.rollback;
  const Index limit = rollback == 0 ? segment : sum(sum(segment, segment), rollback);
  Index most = 0;
  for (Index b = 0; b < shape_.batch; ++b) most = (std::max)(most, stored(b));
  const Index wanted = (std::min)(limit, sum(most, more));
  if (wanted <= open_.room()) return;
  std::vector<std::int64_t> rows;
  for (Index b = 0; b < shape_.batch; ++b) rows.push_back(stored(b));
  open_.resize((std::min)(limit, (std::max)(wanted, sum(open_.room(), open_.room()))), rows);
}

template <Element T, class Local, FeatureMap F>
template <class Call, class E>
void infini_memory<T, Local, F>::take_in(const Call& call, Index b, Index rows, const E& executor,
                                         Workspace& workspace) {
  const auto part = [&](auto x, Index first, Index count) {
    return detail::batch_rows(x, b, rows).slice_rows(first, count);
  };
  for (Index first = 0; first < call.q_len();) {
    for (Index row = b; row < b + rows; ++row) settle(row, executor, workspace);
    const Index filled = filled_[at(b)], count = (std::min)(attend_.segment - filled, call.q_len() - first);
    const auto q = part(call.q, first, count);
    const auto out = part(call.out, first, count);
    if constexpr (std::is_same_v<typename Call::Key, T> && std::is_same_v<typename Call::Value, T>) {
      // A whole segment is read in place: with a copy a long chunk took 20 % longer.
      if (count == attend_.segment && options_.rollback == 0) {
        const auto k = part(call.k, first, count), v = part(call.v, first, count);
        attend(q, k, v, out, b, rows, executor, workspace);
        write(k, v, view_of(b, rows), written_[at(b)], executor, workspace);
        count_closed(b, rows, count);
        first += count;
        continue;
      }
    }
    answer(q, part(call.k, first, count), part(call.v, first, count), out, b, rows, executor, workspace);
    append_open(b, rows, count, executor, workspace);
    first += count;
  }
}

template <Element T, class Local, FeatureMap F>
template <class Call, class E>
void infini_memory<T, Local, F>::check_local(const Call& call, const E& executor, Workspace& workspace) {
  if (call.q_len() == 0) return;
  for_each_run_of_rows([&](Index b, Index rows) {
    pass_over(view_of(b, rows))
        .check(detail::batch_rows(call.q, b, rows), TensorView<const T>(open_.keys(b, rows, 0, 1)),
               TensorView<const T>(open_.values(b, rows, 0, 1)), detail::batch_rows(call.out, b, rows),
               executor, workspace, [](Index) { return Index{1}; });
  });
}

LONGSPAN_NAMESPACE_END
