// Naive Infini-attention in double, in loops that follow the paper: the oracle of the tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "longspan/infini_options.hpp"
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
/// head, k and v of its KV head. Returns the memory after the last whole segment.
template <class T, class Tk, class Tv, class Feature>
InfiniMemory infini_attention(MatrixView<const T> q, MatrixView<const Tk> k, MatrixView<const Tv> v,
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

}  // namespace reference
LONGSPAN_NAMESPACE_END
