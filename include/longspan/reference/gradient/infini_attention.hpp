// The naive gradient of Infini-attention in double, in loops that follow its formulas.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/slices.hpp"
#include "longspan/detail/gradient/functor.hpp"
#include "longspan/detail/infini/local.hpp"
#include "longspan/gradient/infini_attention.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/gradient/exact.hpp"
#include "longspan/reference/gradient/softmax_attention.hpp"
#include "longspan/reference/gradient/softmax_rows.hpp"
#include "longspan/reference/infini_attention.hpp"
#include "longspan/reference/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// The gradient of read(memory, phi), whose result has the gradient `change`: added to `to` for the memory, returned
/// for phi.
inline std::vector<double> read_gradient(const InfiniMemory& memory, const std::vector<double>& phi,
                                         const std::vector<double>& change, InfiniMemory& to) {
  const std::vector<double> known = read(memory, phi);
  double norm = 0, dot = 0;
  for (std::size_t c = 0; c < phi.size(); ++c) norm += phi[c] * memory.z[c];
  for (std::size_t c = 0; c < known.size(); ++c) dot += change[c] == 0 ? 0 : change[c] * known[c];
  const double by = norm == 0 ? 0 : 1 / (std::max)(norm, infini_least_norm);
  const double of_norm = norm < infini_least_norm ? 0 : -dot * by;
  std::vector<double> dphi(phi.size());
  for (Index c = 0; c < memory.head_dim; ++c) {
    const auto n = static_cast<std::size_t>(c);
    for (Index column = 0; column < memory.value_dim; ++column) {
      const double of_column = change[static_cast<std::size_t>(column)] * by;
      dphi[n] += of_column * memory.at(c, column);
      to.at(c, column) += phi[n] * of_column;
    }
    dphi[n] += of_norm * memory.z[n];
    to.z[n] += phi[n] * of_norm;
  }
  return dphi;
}

/// Computes the local part with the references of the local functor, and the memory for each KV head separately, with
/// all memories kept. The gradients of rows after the length of a batch row are 0.
template <class Local, FeatureMap F>
struct exact<gradient_of<infini_attention<Local, F>>>
    : ExactGradientCalls<exact<gradient_of<infini_attention<Local, F>>>> {
  gradient_of<infini_attention<Local, F>> of;

  explicit exact(gradient_of<infini_attention<Local, F>> gradient) : of(std::move(gradient)) {}

  template <class Q, class K, class V, class Dout, class Dlse, class Dq, class Dk, class Dv>
  void differentiate_exactly(Q q, K k, V v, Dout dout, Dlse, Dq dq, Dk dk, Dv dv) const {
    Sums sums(q, k, v);
    for (Index b = 0; b < q.batch; ++b) {
      const auto part = [&](auto x) { return detail::batch_rows(x, b, 1).slice_rows(0, length(b, x.rows)); };
      const std::vector<double> local = differentiate_locally(part(q), part(k), part(v), part(dout), b, sums);
      for (Index h = 0; h < k.heads; ++h)
        differentiate_memory(part(q), part(k), part(v), part(dout), local, b, h, q.rows, sums);
    }
    sums.q.write(no_position{}, 0, Role::query, dq);
    sums.k.write(no_position{}, 0, Role::key, dk);
    sums.v.write(no_position{}, 0, Role::key, dv);
    const auto& dbeta = of.dbeta;
    for (Index r = 0; dbeta.data != nullptr && r < dbeta.rows; ++r) {
      std::fill_n(dbeta.row(r), dbeta.cols, 0.0f);
      for (Index c = 0; c < dbeta.cols; ++c) {
        double sum = 0;
        for (Index h = 0; h < q.heads; ++h) {
          for (Index column = 0; column < v.cols; ++column) {
            const bool is_of = (dbeta.rows == 1 || h == r) && (dbeta.cols == 1 || column == c);
            if (is_of) sum += sums.beta[static_cast<std::size_t>(h * v.cols + column)];
          }
        }
        dbeta.row(r)[c] = static_cast<float>(sum);
      }
    }
  }

 private:
  struct Sums {
    DoubleTensor q, k, v;
    std::vector<double> beta;  ///< [heads][value_dim]

    template <class Q, class K, class V>
    Sums(const Q& of_q, const K& of_k, const V& of_v)
        : q(of_q.batch, of_q.heads, of_q.rows, of_q.cols),
          k(of_k.batch, of_k.heads, of_k.rows, of_k.cols),
          v(of_v.batch, of_v.heads, of_v.rows, of_v.cols),
          beta(static_cast<std::size_t>(of_q.heads * of_v.cols)) {}
  };
  struct Gate {
    double g, rest;
  };

  Index length(Index b, Index rows) const {
    const auto& lengths = of.attend.lengths;
    return lengths.empty() ? rows : (std::min)(lengths[static_cast<std::size_t>(b)], rows);
  }
  Gate gate(Index h, Index column) const {
    const auto& beta = of.attend.beta;
    const double logit =
        beta.data == nullptr
            ? 0.0
            : static_cast<double>(beta.row(beta.rows == 1 ? 0 : h)[beta.cols == 1 ? 0 : column]);
    return {1 / (1 + std::exp(-logit)), 1 / (1 + std::exp(logit))};
  }
  bool is_gated(Index begin) const {
    return begin > 0 || of.attend.empty_memory == EmptyMemory::gate || of.initial.m.data != nullptr;
  }

  /// Adds the gradients of local attention of one batch row, and returns its output, [heads][rows][value_dim].
  template <class Q, class K, class V, class Dout>
  std::vector<double> differentiate_locally(Q q, K k, V v, Dout dout, Index b, Sums& sums) const {
    std::vector<double> values(static_cast<std::size_t>(q.heads * q.rows * v.cols));
    const auto local = compact_view(values.data(), 1, q.heads, q.rows, v.cols);
    for (Index begin = 0, rows; begin < q.rows; begin += rows) {
      rows = (std::min)(of.attend.segment, q.rows - begin);
      const auto part = [&](auto x) { return x.slice_rows(begin, rows); };
      DoubleTensor dlocal(1, q.heads, rows, v.cols), dq(1, q.heads, rows, q.cols),
          dk(1, k.heads, rows, k.cols), dv(1, k.heads, rows, v.cols);
      for (Index h = 0; h < q.heads; ++h) {
        for (Index i = 0; i < rows; ++i) {
          for (Index c = 0; c < v.cols; ++c) {
            const double share = is_gated(begin) ? gate(h, c).rest : 1;
            dlocal.row(0, h, i)[c] =
                share == 0 ? 0 : share * static_cast<double>(dout.row(0, h, begin + i)[c]);
          }
        }
      }
      const auto all = [](DoubleTensor& x) {
        return compact_view(x.values.data(), x.batch, x.heads, x.rows, x.cols);
      };
      const auto differentiate = [&](const auto& gradient) {
        using Gradient = std::remove_cvref_t<decltype(gradient)>;
        exact<std::remove_cvref_t<decltype(gradient.attend)>>{gradient.attend}(part(q), part(k), part(v),
                                                                               part(local));
        exact<Gradient>{gradient}(part(q), part(k), part(v), all(dlocal), all(dq), all(dk), all(dv));
      };
      using Shifted = std::remove_cvref_t<decltype(detail::local_at(of.local.attend, begin))>;
      if (of.attend.absolute_positions && !std::is_same_v<Shifted, Local>) {
        detail::with_queries_at_end(gradient_of<Shifted>(detail::local_at(of.local.attend, begin)),
                                    differentiate);
      } else {
        detail::with_queries_at_end(of.local, differentiate);
      }
      const auto add = [&](DoubleTensor& x, DoubleTensor& to) {
        for (Index h = 0; h < x.heads; ++h) {
          for (Index i = 0; i < rows; ++i) {
            for (Index c = 0; c < x.cols; ++c) to.row(b, h, begin + i)[c] += x.row(0, h, i)[c];
          }
        }
      };
      add(dq, sums.q);
      add(dk, sums.k);
      add(dv, sums.v);
    }
    return values;
  }

  /// The rows of one segment of one head as the memory sees them.
  template <class X>
  std::vector<double> seen_by_memory(X x, Index h, Index begin, Index rows, Role role) const {
    const MatrixView<typename X::Element> part{x.row(0, h, begin), rows, x.cols, x.row_stride};
    if (!of.attend.memory_uses_positions) return encoded(part, no_position{}, 0, role);
    return encoded(part, detail::position_of(of.attend.local), of.attend.absolute_positions ? begin : 0,
                   role);
  }
  /// Adds dphi phi'(x), taken back through the position encoding, to a row of dq or dk.
  void add_row(const std::vector<double>& dphi, const double* x, Index begin, Index i, Role role,
               double* to) const {
    std::vector<double> change;
    for (std::size_t c = 0; c < dphi.size(); ++c)
      change.push_back(dphi[c] * of.attend.feature.derivative(x[c]));
    const auto cols = static_cast<Index>(change.size());
    if (of.attend.memory_uses_positions) {
      encode_row_transposed(change.data(), cols, detail::position_of(of.attend.local),
                            (of.attend.absolute_positions ? begin : 0) + i, role);
    }
    for (Index c = 0; c < cols; ++c) to[c] += change[static_cast<std::size_t>(c)];
  }

  static void copy_in(const InfiniState<const float>& from, Index b, Index h, InfiniMemory& to) {
    if (from.m.data == nullptr) return;
    for (Index c = 0; c < to.head_dim; ++c) {
      for (Index column = 0; column < to.value_dim; ++column)
        to.at(c, column) = static_cast<double>(from.m.row(b, h, c)[column]);
      to.z[static_cast<std::size_t>(c)] = static_cast<double>(from.z(b, h, c));
    }
  }

  /// The part of the memory for KV head h of batch row b, whose tensors are given, in a call of `call_rows` rows.
  template <class Q, class K, class V, class Dout>
  void differentiate_memory(Q q, K k, V v, Dout dout, const std::vector<double>& local, Index b, Index h,
                            Index call_rows, Sums& sums) const {
    const Index segment = (std::min)(of.attend.segment, call_rows);
    const auto rows_from = [&](Index begin) { return std::clamp<Index>(q.rows - begin, 0, segment); };
    InfiniMemory memory(k.cols, v.cols), change = memory;
    copy_in(of.initial, b, h, memory);
    copy_in(of.dfinal, b, h, change);
    std::vector<InfiniMemory> before;
    for (Index begin = 0; begin < call_rows; begin += segment) {
      before.push_back(memory);
      const Index rows = rows_from(begin);
      const std::vector<double> keys = seen_by_memory(k, h, begin, rows, Role::key);
      write(memory, MatrixView<const double>{keys.data(), rows, k.cols, k.cols},
            v.slice_rows(begin, rows).matrix(0, h), of.attend.rule, of.attend.feature);
    }
    for (std::size_t s = before.size(); s-- > 0;) {
      const Index begin = static_cast<Index>(s) * segment, rows = rows_from(begin);
      InfiniMemory of_segment(k.cols, v.cols);
      const Index group = q.heads / k.heads;
      for (Index head = h * group; head < (h + 1) * group && is_gated(begin); ++head)
        differentiate_reads(q, dout, local, before[s], b, head, begin, rows, of_segment, sums);
      // The memory after the last whole segment of a call is the final one.
      if (begin + of.attend.segment <= call_rows)
        differentiate_write(k, v, before[s], change, b, h, begin, rows, of_segment, sums);
      const bool is_cut = s > 0 && static_cast<Index>(s) % of.bptt_segments == 0;
      const auto add = [&](const std::vector<double>& x, std::vector<double>& to) {
        for (std::size_t n = 0; n < x.size(); ++n) to[n] = is_cut ? 0 : to[n] + x[n];
      };
      add(of_segment.m, change.m);
      add(of_segment.z, change.z);
    }
    for (Index c = 0; of.dinitial.m.data != nullptr && c < k.cols; ++c) {
      for (Index column = 0; column < v.cols; ++column)
        of.dinitial.m.row(b, h, c)[column] = static_cast<float>(change.at(c, column));
      of.dinitial.z(b, h, c) = static_cast<float>(change.z[static_cast<std::size_t>(c)]);
    }
  }

  template <class Q, class Dout>
  void differentiate_reads(Q q, Dout dout, const std::vector<double>& local, const InfiniMemory& memory,
                           Index b, Index h, Index begin, Index rows, InfiniMemory& to, Sums& sums) const {
    const std::vector<double> queries = seen_by_memory(q, h, begin, rows, Role::query);
    for (Index i = 0; i < rows; ++i) {
      const double* x = queries.data() + i * q.cols;
      const std::vector<double> phi = features(x, q.cols, of.attend.feature), known = read(memory, phi);
      std::vector<double> change;
      for (Index c = 0; c < dout.cols; ++c) {
        const auto [g, rest] = gate(h, c);
        const double of_out = static_cast<double>(dout.row(0, h, begin + i)[c]);
        const auto at = static_cast<std::size_t>((h * dout.rows + begin + i) * dout.cols + c);
        change.push_back(g == 0 ? 0 : g * of_out);
        if (g * rest != 0) {
          sums.beta[static_cast<std::size_t>(h * dout.cols + c)] +=
              g * rest * of_out * (known[static_cast<std::size_t>(c)] - local[at]);
        }
      }
      add_row(read_gradient(memory, phi, change, to), x, begin, i, Role::query, sums.q.row(b, h, begin + i));
    }
  }

  template <class K, class V>
  void differentiate_write(K k, V v, const InfiniMemory& memory, const InfiniMemory& change, Index b, Index h,
                           Index begin, Index rows, InfiniMemory& to, Sums& sums) const {
    const bool is_delta = of.attend.rule == InfiniRule::delta;
    const std::vector<double> keys = seen_by_memory(k, h, begin, rows, Role::key);
    for (Index j = 0; j < rows; ++j) {
      const double* x = keys.data() + j * k.cols;
      const std::vector<double> phi = features(x, k.cols, of.attend.feature), known = read(memory, phi);
      std::vector<double> dphi = change.z, of_known;
      for (Index column = 0; column < v.cols; ++column) {
        double du = 0;
        const double u = static_cast<double>(v.row(0, h, begin + j)[column]) -
                         (is_delta ? known[static_cast<std::size_t>(column)] : 0);
        for (Index c = 0; c < k.cols; ++c) {
          du += phi[static_cast<std::size_t>(c)] * change.at(c, column);
          dphi[static_cast<std::size_t>(c)] += u * change.at(c, column);
        }
        sums.v.row(b, h, begin + j)[column] += du;
        of_known.push_back(-du);
      }
      if (is_delta) {
        const std::vector<double> more = read_gradient(memory, phi, of_known, to);
        for (std::size_t c = 0; c < dphi.size(); ++c) dphi[c] += more[c];
      }
      add_row(dphi, x, begin, j, Role::key, sums.k.row(b, h, begin + j));
    }
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
