// Naive Infini-attention in double, in loops that follow the paper: the oracle of the tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/slices.hpp"
#include "longspan/detail/infini/local.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/exact.hpp"
#include "longspan/reference/position.hpp"
#include "longspan/reference/softmax_attention.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// The memory of one KV head: m [head_dim][value_dim] and z [head_dim].
struct InfiniMemory {
  Index head_dim = 0, value_dim = 0;
  std::vector<double> m, z;

  InfiniMemory(Index d, Index dv)
      : head_dim(d),
        value_dim(dv),
        m(static_cast<std::size_t>(d * dv), 0.0),
        z(static_cast<std::size_t>(d), 0.0) {}

  double& at(Index c, Index column) { return m[static_cast<std::size_t>(c * value_dim + column)]; }
  double at(Index c, Index column) const { return m[static_cast<std::size_t>(c * value_dim + column)]; }
};

/// The feature map of a row, as doubles.
template <class T, class Feature>
std::vector<double> features(const T* row, Index cols, const Feature& feature) {
  std::vector<double> phi;
  for (Index c = 0; c < cols; ++c) phi.push_back(feature(static_cast<double>(row[c])));
  return phi;
}

/// phi M / (phi z), eq. 7; 0 if nothing has been written.
inline std::vector<double> read(const InfiniMemory& memory, const std::vector<double>& phi) {
  double norm = 0;
  std::vector<double> out(static_cast<std::size_t>(memory.value_dim), 0.0);
  for (Index c = 0; c < memory.head_dim; ++c) {
    norm += phi[static_cast<std::size_t>(c)] * memory.z[static_cast<std::size_t>(c)];
    for (Index column = 0; column < memory.value_dim; ++column) {
      out[static_cast<std::size_t>(column)] += phi[static_cast<std::size_t>(c)] * memory.at(c, column);
    }
  }
  for (double& x : out) x = norm == 0 ? 0 : x / (std::max)(norm, infini_least_norm);
  return out;
}

/// Writes the rows of a segment, eq. 8 or 9. The delta rule reads the memory as it was before the segment.
template <class Tk, class Tv, class Feature>
void write(InfiniMemory& memory, MatrixView<const Tk> k, MatrixView<const Tv> v, InfiniRule rule,
           const Feature& feature) {
  const InfiniMemory before = memory;
  for (Index j = 0; j < k.rows; ++j) {
    const std::vector<double> phi = features(k.row(j), k.cols, feature), known = read(before, phi);
    for (Index c = 0; c < memory.head_dim; ++c) {
      for (Index column = 0; column < memory.value_dim; ++column) {
        const double old = rule == InfiniRule::delta ? known[static_cast<std::size_t>(column)] : 0;
        memory.at(c, column) +=
            phi[static_cast<std::size_t>(c)] * (static_cast<double>(v.row(j)[column]) - old);
      }
      memory.z[static_cast<std::size_t>(c)] += phi[static_cast<std::size_t>(c)];
    }
  }
}

/// sigmoid(beta) * memory + (1 - sigmoid(beta)) * local, eq. 10, for one head: q and `local` [q_len][value_dim] of this
/// head, k and v of its KV head; `local` is the local attention, and beta has a logit for each column. Returns the
/// memory after the last whole segment.
template <class T, class Tk, class Tv, class Feature>
InfiniMemory infini_head(MatrixView<const T> q, MatrixView<const Tk> k, MatrixView<const Tv> v,
                         MatrixView<const double> local, const std::vector<double>& beta, Index segment,
                         InfiniRule rule, EmptyMemory empty_memory, const Feature& feature,
                         MatrixView<double> out) {
  InfiniMemory memory(k.cols, v.cols);
  for (Index begin = 0; begin < q.rows; begin += segment) {
    const Index rows = (std::min)(segment, q.rows - begin);
    for (Index i = begin; i < begin + rows; ++i) {
      const std::vector<double> known = read(memory, features(q.row(i), q.cols, feature));
      for (Index c = 0; c < v.cols; ++c) {
        const double gate = 1 / (1 + std::exp(-beta[static_cast<std::size_t>(c)]));
        const bool bypass = begin == 0 && empty_memory == EmptyMemory::bypass;
        out.row(i)[c] = bypass ? local.row(i)[c]
                               : gate * known[static_cast<std::size_t>(c)] + (1 - gate) * local.row(i)[c];
      }
    }
    if (rows < segment) break;
    write(memory, MatrixView<const Tk>{k.row(begin), rows, k.cols, k.row_stride},
          MatrixView<const Tv>{v.row(begin), rows, v.cols, v.row_stride}, rule, feature);
  }
  return memory;
}

/// Computes the local attention of each segment with the reference of the local functor, then the memory and the gate
/// for each head separately. Rows after the length of a batch row are 0.
template <class Local, FeatureMap F>
struct exact<infini_attention<Local, F>> : ExactCalls<exact<infini_attention<Local, F>>> {
  infini_attention<Local, F> attend;

  explicit exact(infini_attention<Local, F> functor) : attend(std::move(functor)) {}

  template <class Q, class K, class V, class Out>
  void attend_exactly(Q q, K k, V v, Out out, RowsView<double>) const {
    std::vector<double> memory(static_cast<std::size_t>(out.batch * out.heads * out.rows * out.cols), 0.0);
    const auto local = compact_view(memory.data(), out.batch, out.heads, out.rows, out.cols);
    if (attend.lengths.empty()) {
      attend_locally(q, k, v, local);
    } else {
      for (Index b = 0; b < q.batch; ++b) {
        const auto part = [&](auto x) {
          return detail::batch_rows(x, b, 1).slice_rows(0, length(b, q.rows));
        };
        attend_locally(part(q), part(k), part(v), part(local));
      }
    }
    const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
    for (Index b = 0; b < q.batch; ++b) {
      for (Index h = 0; h < q.heads; ++h) attend_head(q, k, v, local.matrix(b, h), out, b, h, h / group);
    }
  }

 private:
  Index length(Index b, Index rows) const {
    return attend.lengths.empty() ? rows : (std::min)(attend.lengths[static_cast<std::size_t>(b)], rows);
  }

  template <class Q, class K, class V>
  void attend_locally(Q q, K k, V v, TensorView<double> out) const {
    for (Index begin = 0; begin < q.rows; begin += (std::min)(attend.segment, q.rows - begin)) {
      const auto part = [&](auto x) {
        return x.slice_rows(begin, (std::min)(attend.segment, x.rows - begin));
      };
      auto local = attend.local;
      if constexpr (requires { local.first_query; }) local.first_query = queries_end_at_keys;
      if (attend.absolute_positions) {
        exact<std::remove_cvref_t<decltype(detail::local_at(local, begin))>>{detail::local_at(local, begin)}(
            part(q), part(k), part(v), part(out));
      } else {
        exact<Local>{local}(part(q), part(k), part(v), part(out));
      }
    }
  }

  template <class Q, class K, class V, class Out>
  void attend_head(Q q, K k, V v, MatrixView<const double> local, Out out, Index b, Index h,
                   Index kv_head) const {
    const Index rows = length(b, q.rows);
    const std::vector<double> of_q = seen_by_memory(q.matrix(b, h), rows, Role::query),
                              of_k = seen_by_memory(k.matrix(b, kv_head), rows, Role::key);
    std::vector<double> beta, result(static_cast<std::size_t>(rows * v.cols));
    for (Index c = 0; c < v.cols; ++c) {
      const auto& logits = attend.beta;
      beta.push_back(logits.data == nullptr ? 0.0
                                            : static_cast<double>(logits.row(
                                                  logits.rows == 1 ? 0 : h)[logits.cols == 1 ? 0 : c]));
    }
    infini_head(MatrixView<const double>{of_q.data(), rows, q.cols, q.cols},
                MatrixView<const double>{of_k.data(), rows, k.cols, k.cols}, v.matrix(b, kv_head), local,
                beta, attend.segment, attend.rule, attend.empty_memory, attend.feature,
                MatrixView<double>{result.data(), rows, v.cols, v.cols});
    for (Index i = 0; i < out.rows; ++i) {
      for (Index c = 0; c < out.cols; ++c)
        out.row(b, h, i)[c] = static_cast<typename Out::Element>(
            i < rows ? result[static_cast<std::size_t>(i * v.cols + c)] : 0.0);
    }
  }

  /// The first rows of a head, as the memory sees them: position-encoded if memory_uses_positions.
  template <class T>
  std::vector<double> seen_by_memory(MatrixView<T> x, Index rows, Role role) const {
    const auto position = detail::position_of(attend.local);
    std::vector<double> all;
    for (Index begin = 0; begin < rows; begin += (std::min)(attend.segment, rows - begin)) {
      const MatrixView<T> part{x.row(begin), (std::min)(attend.segment, rows - begin), x.cols, x.row_stride};
      const Index first = attend.absolute_positions ? begin : 0;
      const std::vector<double> encoded_rows = attend.memory_uses_positions
                                                   ? encoded(part, position, first, role)
                                                   : encoded(part, no_position{}, 0, role);
      all.insert(all.end(), encoded_rows.begin(), encoded_rows.end());
    }
    return all;
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
