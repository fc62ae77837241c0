// The two products of a compressive memory: the read by queries, and the write of a segment.
//
// Both use the value product of attention (microkernel.hpp). A read takes the rows of M as values and phi(q) as
// weights, with queries in the lanes; a write takes phi(k) as values and v as weights, with the columns of v in the
// lanes. Neither phi(Q) nor phi(K) is ever stored as a whole.
#pragma once

#include <algorithm>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/call/scratch.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/execution.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <class Real, FeatureMap F>
Packet<Real> feature_of(const F& feature, Packet<Real> x) {
  if constexpr (requires { feature.on_packet(x); }) {
    return feature.on_packet(x);
  } else {
    alignas(64) Real of_lane[std::size_t(lanes<Real>)];
    store<Real>(of_lane, x);
    for (Real& y : of_lane) y = static_cast<Real>(feature(static_cast<double>(y)));
    return load<Real>(of_lane);
  }
}

/// The scale of a value product that is not rescaled. (g++ warns about a null pointer.)
template <class Real>
inline constexpr Real unscaled[std::size_t(tile_lanes<Real>)] = {};

/// M [head_dim][stride] and z [head_dim] of every KV head. Rows and columns are padded with 0 to whole register tiles.
template <class Real>
struct MemoryView {
  Real* m = nullptr;
  Real* z = nullptr;
  Index batch = 0;
  Index kv_heads = 0;
  Index head_dim = 0;
  Index value_dim = 0;

  Index rows() const noexcept { return round_up(head_dim, tile_rows); }
  Index stride() const noexcept { return round_up(value_dim, std::max<Index>(lanes<Real>, tile_rows)); }
  Index heads() const noexcept { return batch * kv_heads; }
  Index m_size() const noexcept { return heads() * rows() * stride(); }
  Index z_size() const noexcept { return heads() * rows(); }
  Real* matrix(Index head) const noexcept { return m + head * rows() * stride(); }
  Real* norm(Index head) const noexcept { return z + head * rows(); }

  void clear() const {
    std::fill_n(m, m_size(), Real(0));
    std::fill_n(z, z_size(), Real(0));
  }
  /// Copies another memory of the same sizes.
  void copy(const MemoryView& from) const {
    std::copy_n(from.m, m_size(), m);
    std::copy_n(from.z, z_size(), z);
  }
};

/// The factors of the memory's output and of the other operand in a result, for each column: [heads][columns], or one
/// row for all heads if head_stride is 0.
template <class Real>
struct Shares {
  const Real* memory = nullptr;
  const Real* other = nullptr;
  Index head_stride = 0;
};

/// to[i] = memory_share * phi(q[i]) M / (phi(q[i]) z) + other_share * other[i]. `to` may be `other`.
template <class Real, class Tq, class Ts, class To, FeatureMap F, Position P>
class MemoryRead {
 public:
  static constexpr Index w = lanes<Real>, width = tile_lanes<Real>;

  MemoryRead(TensorView<const Tq> q, Index first_position, TensorView<const Ts> other, TensorView<To> to,
             const MemoryView<Real>& memory, const Shares<Real>& shares, const F& feature, const P& position)
      : q_(q),
        other_(other),
        to_(to),
        memory_(memory),
        shares_(shares),
        feature_(feature),
        position_(position),
        first_position_(first_position),
        tiles_(divide_up(q.rows, width)) {}

  template <class E>
  void run(const E& executor, Workspace& workspace) const {
    const WorkerScratch scratch(workspace, executor.workers(), [&](Arena& arena) { take(arena); });
    executor.for_each(q_.batch * q_.heads * tiles_, [&](Index task, Index worker) {
      Arena arena = scratch.of_worker(worker);
      const Index head = task / tiles_, first = task % tiles_ * width;
      read_tile(head / q_.heads, head % q_.heads, first, (std::min)(width, q_.rows - first), take(arena));
    });
  }

 private:
  struct Scratch {
    Real* phi;   ///< [head_dim][lanes]
    Real* read;  ///< [value_dim][lanes]
    Real* rows;  ///< [lanes][head_dim], for position encoding
  };

  Scratch take(Arena& arena) const {
    Scratch scratch{};
    scratch.phi = arena.take<Real>(q_.cols * width);
    scratch.read = arena.take<Real>(memory_.stride() * width);
    if constexpr (!std::is_same_v<P, no_position>) scratch.rows = arena.take<Real>(q_.cols * width);
    return scratch;
  }

  void read_tile(Index b, Index h, Index first, Index count, const Scratch& scratch) const {
    const int packets = static_cast<int>(divide_up(count, w));
    const Index stride = packets * w, kv_head = b * memory_.kv_heads + h / (q_.heads / memory_.kv_heads);
    prefetch_rows(q_, b, h, first, count);
    pack_features(b, h, first, count, stride, scratch);
    prefetch_rows(other_, b, h, first, count);
    alignas(64) Real by[std::size_t(width)];
    with_packets(packets, [&]<int wide>() {
      quotients<wide>(memory_.norm(kv_head), scratch.phi, by);
      // Without rows M has no memory, and no pointer into it may be computed.
      if (q_.cols == 0)
        return static_cast<void>(std::fill_n(scratch.read, memory_.stride() * stride, Real(0)));
      value_rows<wide>(static_cast<const Real*>(memory_.matrix(kv_head)), memory_.stride(),
                       round_up(memory_.value_dim, tile_rows), static_cast<const Real*>(scratch.phi), stride,
                       q_.cols, scratch.read, stride, Accumulate::overwrite, unscaled<Real>);
    });
    const Real* shares_of_memory = shares_.memory + h * shares_.head_stride;
    const Real* shares_of_other = shares_.other + h * shares_.head_stride;
    for (Index lane = 0; lane < count; lane += w) {
      write_packet(b, h, first + lane, (std::min)(w, count - lane), load<Real>(by + lane),
                   scratch.read + lane, stride, shares_of_memory, shares_of_other);
    }
  }

  /// Packing transposes squares of 16 rows, an access pattern that the hardware prefetcher does not recognise.
  template <class T>
  static void prefetch_rows(TensorView<const T> x, Index b, Index h, Index first, Index count) {
    for (Index i = 0; i < count; ++i)
      prefetch(x.row(b, h, first + i), x.cols * static_cast<Index>(sizeof(T)));
  }

  void pack_features(Index b, Index h, Index first, Index count, Index stride, const Scratch& scratch) const {
    if constexpr (!std::is_same_v<P, no_position>) {
      convert_rows(q_.row(b, h, first), q_.row_stride, count, q_.cols, scratch.rows, q_.cols);
      position_.encode(MatrixView<Real>{scratch.rows, count, q_.cols, q_.cols}, first_position_ + first,
                       Role::query);
    }
    for (Index lane = 0; lane < stride; lane += w) {
      const auto row_of = [&](Index i) {
        const Index row = (std::min)(lane + i, count - 1);
        if constexpr (std::is_same_v<P, no_position>) {
          return q_.row(b, h, first + row);
        } else {
          return static_cast<const Real*>(scratch.rows + row * q_.cols);
        }
      };
      FloatArithmetic<Real>::pack(row_of, q_.cols, Real(1), scratch.phi + lane, stride);
    }
    for (Index at = 0; at < q_.cols * stride; at += w) {
      store(scratch.phi + at, feature_of(feature_, load<Real>(scratch.phi + at)));
    }
  }

  /// 1 / (phi z) of each query; 0 if nothing has been written to the memory.
  template <int packets>
  void quotients(const Real* z, const Real* phi, Real* by) const {
    const Packet<Real> zero = broadcast(Real(0));
    Packet<Real> sum[std::size_t(packets)];
    LONGSPAN_UNROLL
    for (int n = 0; n < packets; ++n) sum[n] = zero;
    for (Index c = 0; c < q_.cols; ++c, phi += packets * w) {
      const Packet<Real> of_column = broadcast(z[c]);
      LONGSPAN_UNROLL
      for (int n = 0; n < packets; ++n) sum[n] = fma(of_column, load<Real>(phi + n * w), sum[n]);
    }
    LONGSPAN_UNROLL
    for (int n = 0; n < packets; ++n) {
      const Packet<Real> bounded = lane_max(sum[n], broadcast(static_cast<Real>(infini_least_norm)));
      store(by + n * w, select(equal(sum[n], zero), zero, broadcast(Real(1)) / bounded));
    }
  }

  void write_packet(Index b, Index h, Index first, Index count, Packet<Real> by, const Real* read,
                    Index stride, const Real* of_memory, const Real* of_other) const {
    alignas(64) Real factor[std::size_t(w)];
    store<Real>(factor, by);
    // An operand whose share is 0 has no effect, even if it contains NaN.
    const auto blend = [&](Index column, Real known, Real other) {
      const Real a = of_memory[column], o = of_other[column];
      return (a == Real(0) ? Real(0) : a * known) + (o == Real(0) ? Real(0) : o * other);
    };
    Index column = 0;
    for (; column + w <= memory_.value_dim; column += w) {
      Packet<Real> square[std::size_t(w)];
      LONGSPAN_UNROLL
      for (int i = 0; i < w; ++i) square[i] = load<Real>(read + (column + i) * stride) * by;
      transpose(square);
      const Packet<Real> a = load<Real>(of_memory + column), o = load<Real>(of_other + column),
                         zero = broadcast(Real(0));
      for (Index i = 0; i < count; ++i) {
        const Packet<Real> other = load_as<Real>(other_.row(b, h, first + i) + column);
        const Packet<Real> from_memory = select(equal(a, zero), zero, a * square[i]);
        const Packet<Real> from_other = select(equal(o, zero), zero, fma(o, other, zero));
        store_as(to_.row(b, h, first + i) + column, from_memory + from_other);
      }
    }
    for (; column < memory_.value_dim; ++column) {
      for (Index i = 0; i < count; ++i) {
        const Real other = static_cast<Real>(other_.row(b, h, first + i)[column]);
        to_.row(b, h, first + i)[column] =
            static_cast<To>(blend(column, read[column * stride + i] * factor[i], other));
      }
    }
  }

  TensorView<const Tq> q_;
  TensorView<const Ts> other_;
  TensorView<To> to_;
  const MemoryView<Real>& memory_;
  Shares<Real> shares_;
  const F& feature_;
  const P& position_;
  Index first_position_;
  Index tiles_;
};

/// M += phi(K)^T V and z += sum of phi(K) over the rows of a segment. The sums of a segment are computed separately and
/// added once: otherwise z would have a relative error of 1e-5 after 10^6 tokens.
template <class Real, class Tk, class Tv, FeatureMap F, Position P>
class MemoryWrite {
 public:
  static constexpr Index w = lanes<Real>, block_keys = 128, chunk_rows = 32;

  MemoryWrite(TensorView<const Tk> k, TensorView<const Tv> v, Index first_position,
              const MemoryView<Real>& memory, const F& feature, const P& position)
      : k_(k),
        v_(v),
        memory_(memory),
        feature_(feature),
        position_(position),
        first_position_(first_position),
        chunks_(divide_up(memory.rows(), chunk_rows)) {}

  /// Writes the first rows_of(b) rows of batch row b.
  template <class E, class RowsOf>
  void run(const E& executor, Workspace& workspace, const RowsOf& rows_of) const {
    const WorkerScratch scratch(workspace, executor.workers(), [&](Arena& arena) { take(arena); });
    executor.for_each(memory_.heads() * chunks_, [&](Index task, Index worker) {
      Arena arena = scratch.of_worker(worker);
      const Index head = task / chunks_, rows = rows_of(head / memory_.kv_heads);
      if (rows > 0) write_chunk(head, task % chunks_ * chunk_rows, rows, take(arena));
    });
  }

 private:
  struct Scratch {
    Real* phi;     ///< [block keys][chunk rows]
    Real* values;  ///< [block keys][stride], if v must be converted
    Real* sum;     ///< [chunk rows][stride]
    Real* norm;    ///< [chunk rows]
    Real* row;     ///< [head_dim], for position encoding
  };

  bool copies_values() const { return !std::is_same_v<Tv, Real> || memory_.value_dim % w != 0; }

  Scratch take(Arena& arena) const {
    Scratch scratch{};
    scratch.phi = arena.take<Real>(block_keys * chunk_rows);
    scratch.sum = arena.take<Real>(chunk_rows * memory_.stride());
    scratch.norm = arena.take<Real>(chunk_rows);
    if (copies_values()) scratch.values = arena.take<Real>(block_keys * memory_.stride());
    if constexpr (!std::is_same_v<P, no_position>) scratch.row = arena.take<Real>(round_up(k_.cols, w));
    return scratch;
  }

  /// Rows [first_row, first_row + chunk_rows) of one head's M and z.
  void write_chunk(Index head, Index first_row, Index keys, const Scratch& scratch) const {
    const Index b = head / memory_.kv_heads, h = head % memory_.kv_heads, stride = memory_.stride();
    const Index rows = (std::min)(chunk_rows, memory_.rows() - first_row);
    std::fill_n(scratch.norm, chunk_rows, Real(0));
    for (Index first = 0; first < keys; first += block_keys) {
      const Index in_block = (std::min)(block_keys, keys - first);
      feature_block(b, h, first, in_block, first_row, scratch);
      add_norms(in_block, scratch);
      const Real* values;
      Index values_stride = stride;
      if (copies_values()) {
        convert_rows(v_.row(b, h, first), v_.row_stride, in_block, v_.cols, scratch.values, stride);
        values = scratch.values;
      } else if constexpr (std::is_same_v<Tv, Real>) {
        values = v_.row(b, h, first);
        values_stride = v_.row_stride;
      }
      multiply(values, values_stride, rows, in_block, first == 0 ? Accumulate::overwrite : Accumulate::add,
               scratch);
    }
    Real* m = memory_.matrix(head) + first_row * stride;
    for (Index at = 0; at < rows * stride; at += w)
      store(m + at, load<Real>(m + at) + load<Real>(scratch.sum + at));
    for (Index r = 0; r < rows; ++r) memory_.norm(head)[first_row + r] += scratch.norm[r];
  }

  /// phi of the columns [first_row, first_row + chunk_rows) of the keys of a block; 0 after head_dim.
  void feature_block(Index b, Index h, Index first, Index keys, Index first_row,
                     const Scratch& scratch) const {
    const Index columns = (std::min)(chunk_rows, k_.cols - first_row);
    for (Index j = 0; j < keys; ++j) {
      Real* to = scratch.phi + j * chunk_rows;
      const Tk* from = k_.row(b, h, first + j);
      if constexpr (std::is_same_v<P, no_position>) {
        to_features(from + first_row, columns, to);
      } else {
        convert_rows(from, k_.cols, 1, k_.cols, scratch.row, k_.cols);
        position_.encode(MatrixView<Real>{scratch.row, 1, k_.cols, k_.cols}, first_position_ + first + j,
                         Role::key);
        to_features(static_cast<const Real*>(scratch.row) + first_row, columns, to);
      }
    }
  }

  template <class T>
  void to_features(const T* from, Index columns, Real* to) const {
    Index c = 0;
    for (; c + w <= columns; c += w) store(to + c, feature_of(feature_, load_as<Real>(from + c)));
    if (c < columns) {
      alignas(64) Real last[std::size_t(w)];
      store<Real>(last, feature_of(feature_, load_part<Real>(from + c, columns - c)));
      std::copy_n(last, columns - c, to + c);
    }
    std::fill_n(to + columns, chunk_rows - columns, Real(0));
  }

  /// Sums each block separately before it is added, to limit the rounding error.
  void add_norms(Index keys, const Scratch& scratch) const {
    for (Index c = 0; c < chunk_rows; c += w) {
      Packet<Real> sum = broadcast(Real(0));
      for (Index j = 0; j < keys; ++j) sum = sum + load<Real>(scratch.phi + j * chunk_rows + c);
      store(scratch.norm + c, load<Real>(scratch.norm + c) + sum);
    }
  }

  void multiply(const Real* values, Index values_stride, Index rows, Index keys, Accumulate into,
                const Scratch& scratch) const {
    const Index stride = memory_.stride();
    for (Index column = 0; column < stride; column += tile_packets * w) {
      with_packets(static_cast<int>(std::min<Index>(tile_packets, (stride - column) / w)), [&]<int wide>() {
        value_rows<wide>(static_cast<const Real*>(scratch.phi), chunk_rows, round_up(rows, tile_rows),
                         values + column, values_stride, keys, scratch.sum + column, stride, into,
                         unscaled<Real>);
      });
    }
  }

  TensorView<const Tk> k_;
  TensorView<const Tv> v_;
  const MemoryView<Real>& memory_;
  const F& feature_;
  const P& position_;
  Index first_position_;
  Index chunks_;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
