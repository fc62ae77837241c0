// A block of keys and values in the type and layout of the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/bf16_arithmetic.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <class Policy>
struct KeyBlock {
  const typename Policy::Key* k = nullptr;
  const typename Policy::Value* v = nullptr;
  Index k_stride = 0;
  Index v_stride = 0;  ///< at least the columns rounded up to a multiple of tile_rows, which may be read
  Index first_key = 0;
  Index keys = 0;
  mutable signed char values_finite = -1;  ///< found once for all tiles of a task; -1: not yet
  /// The rows are contiguous and read once in this call: their values are prefetched while they are scored, and the
  /// keys that follow while their values are added.
  bool is_read_once = false;
};

/// Converts rows to Real; columns [cols, to_cols) become 0.
template <class Real, class T>
void convert_rows(const T* from, Index from_stride, Index rows, Index cols, Real* to, Index to_cols) {
  constexpr Index w = lanes<Real>;
  for (Index i = 0; i < rows; ++i, from += from_stride, to += to_cols) {
    Index c = 0;
    for (; c + w <= cols; c += w) store(to + c, load_as<Real>(from + c));
    std::transform(from + c, from + cols, to + c, [](const T& x) { return static_cast<Real>(x); });
    std::fill_n(to + cols, to_cols - cols, Real(0));
  }
}

/// The same for rows of int8, each multiplied by its scale.
template <class Real>
void convert_rows(const std::int8_t* from, Index from_stride, const float* scale, Index rows, Index cols,
                  Real* to, Index to_cols) {
  constexpr Index w = lanes<Real>;
  for (Index i = 0; i < rows; ++i, from += from_stride, to += to_cols) {
    const Real of_row = static_cast<Real>(scale[i]);
    Index c = 0;
    for (; c + w <= cols; c += w) store(to + c, load_as<Real>(from + c) * broadcast(of_row));
    std::transform(from + c, from + cols, to + c,
                   [&](std::int8_t x) { return static_cast<Real>(x) * of_row; });
    std::fill_n(to + cols, to_cols - cols, Real(0));
  }
}

/// Prepares key blocks of one KV head: in place if type and layout allow it, in scratch memory if rows must be
/// converted, position-encoded or padded. Copying float blocks that need none of that would cost 5-16 % of a call.
template <class Policy, class Tk, class Tv, Position P>
class KeyBlocks {
 public:
  using Real = typename Policy::Real;

  static constexpr bool is_scaled = std::is_same_v<Tk, std::int8_t>;
  static constexpr bool copies_k = !std::is_same_v<Tk, Real> || !std::is_same_v<P, no_position>;
  static bool copies_v(Index value_dim) { return !std::is_same_v<Tv, Real> || value_dim % tile_rows != 0; }

  static KeyBlocks take(Arena& arena, Index head_dim, Index value_dim) {
    KeyBlocks blocks;
    blocks.padded_value_dim_ = round_up(value_dim, tile_rows);
    if (copies_k) blocks.k_ = arena.take<Real>(Policy::keys_in_block * head_dim);
    if (copies_v(value_dim)) blocks.v_ = arena.take<Real>(Policy::keys_in_block * blocks.padded_value_dim_);
    return blocks;
  }

  /// The keys are read once in this call, so blocks are in memory and no other tile hides the cache misses.
  void read_once() { reads_once_ = true; }

  /// The keys of a run that begins with key `first_key`, at most one key block. Valid until the next call.
  KeyBlock<Policy> block(const KeyRun<Tk, Tv>& run, const P& position, Index first_key) const {
    const MatrixView<const Tk> k = run.k;
    const MatrixView<const Tv> v = run.v;
    KeyBlock<Policy> block{nullptr, nullptr, k.row_stride, v.row_stride, first_key, k.rows};
    if constexpr (copies_k) {
      if constexpr (is_scaled) {
        convert_rows(k.data, k.row_stride, run.k_scale, k.rows, k.cols, k_, k.cols);
      } else {
        convert_rows(k.data, k.row_stride, k.rows, k.cols, k_, k.cols);
      }
      position.encode(MatrixView<Real>{k_, k.rows, k.cols, k.cols}, first_key, Role::key);
      block.k = k_;
      block.k_stride = k.cols;
    } else {
      block.k = k.data;
      block.is_read_once = reads_once_ && k.row_stride == k.cols && v.row_stride == v.cols;
    }
    if constexpr (is_scaled) {
      convert_rows(v.data, v.row_stride, run.v_scale, v.rows, v.cols, v_, padded_value_dim_);
    } else if (v_ != nullptr) {
      convert_rows(v.data, v.row_stride, v.rows, v.cols, v_, padded_value_dim_);
    } else if constexpr (std::is_same_v<Tv, Real>) {
      block.v = v.data;
      return block;
    }
    block.v = v_;
    block.v_stride = padded_value_dim_;
    return block;
  }

 private:
  Real* k_ = nullptr;
  Real* v_ = nullptr;
  Index padded_value_dim_ = 0;
  bool reads_once_ = false;
};

#if defined(LONGSPAN_HAS_BF16_ARITHMETIC)
/// bfloat16 keys are read in place; values are paired, two keys to an element.
template <>
class KeyBlocks<Bf16Arithmetic, Eigen::bfloat16, Eigen::bfloat16, no_position> {
 public:
  static KeyBlocks take(Arena& arena, Index, Index value_dim) {
    KeyBlocks blocks;
    blocks.padded_value_dim_ = round_up(value_dim, tile_rows);
    blocks.v_ =
        arena.take<Bf16Arithmetic::Value>(Bf16Arithmetic::keys_in_block / 2 * blocks.padded_value_dim_);
    return blocks;
  }

  KeyBlock<Bf16Arithmetic> block(const KeyRun<Eigen::bfloat16, Eigen::bfloat16>& run, const no_position&,
                                 Index first_key) const {
    Bf16Arithmetic::pair_values(run.v.data, run.v.row_stride, run.v.rows, run.v.cols, v_, padded_value_dim_);
    return {run.k.data, v_, run.k.row_stride, padded_value_dim_, first_key, run.k.rows};
  }

 private:
  Bf16Arithmetic::Value* v_ = nullptr;
  Index padded_value_dim_ = 0;
};
#endif

}  // namespace detail
LONGSPAN_NAMESPACE_END
