// A block of keys and values in the type and layout of the kernels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "longspan/detail/bf16_products.hpp"
#include "longspan/detail/float_products.hpp"
#include "longspan/detail/microkernel.hpp"
#include "longspan/detail/scratch.hpp"
#include "longspan/detail/simd.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN
namespace detail {

template <class Products>
struct KeyBlock {
  const typename Products::Key* k = nullptr;
  const typename Products::Value* v = nullptr;
  Index k_stride = 0;
  Index v_stride = 0;  ///< rows of v can be read up to a multiple of tile_rows columns
  Index first_key = 0;
  Index keys = 0;
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

/// Gives blocks of one KV head: straight from the tensors where their type and layout allow it, through
/// scratch where rows must be converted, position-encoded or padded. A copy of float blocks that need none of
/// that would cost 5-16 %.
template <class Products, class Tk, class Tv, Position P>
class KeyBlocks {
 public:
  using Real = typename Products::Real;

  static constexpr bool copies_k = !std::is_same_v<Tk, Real> || !std::is_same_v<P, no_position>;
  static bool copies_v(Index value_dim) { return !std::is_same_v<Tv, Real> || value_dim % tile_rows != 0; }

  static KeyBlocks take(Arena& arena, Index head_dim, Index value_dim) {
    KeyBlocks blocks;
    blocks.padded_value_dim_ = round_up(value_dim, tile_rows);
    if (copies_k) blocks.k_ = arena.take<Real>(Products::keys_in_block * head_dim);
    if (copies_v(value_dim)) blocks.v_ = arena.take<Real>(Products::keys_in_block * blocks.padded_value_dim_);
    return blocks;
  }

  /// The keys [first_key, first_key + keys), at most one block of them.
  KeyBlock<Products> block(MatrixView<const Tk> k, MatrixView<const Tv> v, const P& position, Index first_key,
                           Index keys) const {
    KeyBlock<Products> block{nullptr, nullptr, k.row_stride, v.row_stride, first_key, keys};
    if constexpr (copies_k) {
      convert_rows(k.row(first_key), k.row_stride, keys, k.cols, k_, k.cols);
      position.encode(MatrixView<Real>{k_, keys, k.cols, k.cols}, first_key, Role::key);
      block.k = k_;
      block.k_stride = k.cols;
    } else {
      block.k = k.row(first_key);
    }
    if (v_ != nullptr) {
      convert_rows(v.row(first_key), v.row_stride, keys, v.cols, v_, padded_value_dim_);
      block.v = v_;
      block.v_stride = padded_value_dim_;
    } else if constexpr (std::is_same_v<Tv, Real>) {
      block.v = v.row(first_key);
    }
    return block;
  }

 private:
  Real* k_ = nullptr;
  Real* v_ = nullptr;
  Index padded_value_dim_ = 0;
};

#if defined(LONGSPAN_HAS_BF16_PRODUCTS)
/// bfloat16 keys are read in place, values in pairs of two keys.
template <>
class KeyBlocks<Bf16Products, Eigen::bfloat16, Eigen::bfloat16, no_position> {
 public:
  static KeyBlocks take(Arena& arena, Index, Index value_dim) {
    KeyBlocks blocks;
    blocks.padded_value_dim_ = round_up(value_dim, tile_rows);
    blocks.v_ = arena.take<Bf16Products::Value>(Bf16Products::keys_in_block / 2 * blocks.padded_value_dim_);
    return blocks;
  }

  KeyBlock<Bf16Products> block(MatrixView<const Eigen::bfloat16> k, MatrixView<const Eigen::bfloat16> v,
                               const no_position&, Index first_key, Index keys) const {
    Bf16Products::pair_values(v.row(first_key), v.row_stride, keys, v.cols, v_, padded_value_dim_);
    return {k.row(first_key), v_, k.row_stride, padded_value_dim_, first_key, keys};
  }

 private:
  Bf16Products::Value* v_ = nullptr;
  Index padded_value_dim_ = 0;
};
#endif

}  // namespace detail
LONGSPAN_END
