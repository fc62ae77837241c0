// A sealed block of a landmark cache, for one KV head: how its rows are computed and laid out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/storage/rows.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/element.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Converts rows of one type to contiguous rows of another.
template <class From, class To>
void copy_rows(const From* from, Index from_stride, Index rows, Index cols, To* to) {
  for (Index i = 0; i < rows; ++i) {
    const From* row = from + i * from_stride;
    if constexpr (std::is_same_v<To, std::remove_const_t<From>>) {
      std::copy_n(row, cols, to + i * cols);
    } else if constexpr (std::is_same_v<To, Arithmetic<To>>) {
      convert_rows(row, from_stride, 1, cols, to + i * cols, cols);
    } else {
      std::transform(row, row + cols, to + i * cols,
                     [](const From& x) { return static_cast<To>(static_cast<Arithmetic<To>>(x)); });
    }
  }
}

/// Keys [block][head_dim], the last of which is the landmark, then values [block - 1][value_dim]; for int8 the scales
/// of the keys and of the values come first.
template <StoredElement T>
struct SealedRows {
  using Real = ArithmeticOf<T>;
  static constexpr bool is_scaled = std::is_same_v<T, std::int8_t>;
  /// The element type of unsealed rows, and of the landmarks that are stored apart from the blocks. Landmarks are
  /// few, are read for every query and decide the choice, so they are never int8.
  using Open = std::conditional_t<is_scaled, float, T>;

  Index block = 2;
  Index head_dim = 0;
  Index value_dim = 0;

  /// The size in elements of T; for int8 a multiple of the size of a scale.
  Index size() const noexcept {
    return round_up(keys_at() + block * head_dim + (block - 1) * value_dim, is_scaled ? scale_size : 1);
  }

  /// The block as a run, which has no value for its last key.
  KeyRun<T, T> run(const T* rows) const noexcept {
    const T* keys = rows + keys_at();
    KeyRun<T, T> run{
        {keys, block, head_dim, head_dim}, {keys + block * head_dim, block - 1, value_dim, value_dim}, true};
    if constexpr (is_scaled) {
      run.k_scale = reinterpret_cast<const float*>(rows);
      run.v_scale = run.k_scale + block;
    }
    return run;
  }

  /// Writes the rows of a block, with keys encoded as if the block began at position 0.
  template <Position P>
  void seal(const Open* k, const Open* v, const P& position, T* rows) const {
    T *keys = rows + keys_at(), *values = keys + block * head_dim;
    if constexpr (is_scaled) {
      std::vector<Open> encoded(k, k + block * head_dim);
      encode(position, encoded.data(), block, 0);
      auto* scales = reinterpret_cast<float*>(rows);
      for (Index j = 0; j < block; ++j)
        store_row(encoded.data() + j * head_dim, head_dim, keys + j * head_dim, scales[j]);
      for (Index j = 0; j < block - 1; ++j)
        store_row(v + j * value_dim, value_dim, values + j * value_dim, scales[block + j]);
      std::fill(values + (block - 1) * value_dim, rows + size(), T{0});
    } else {
      std::copy_n(k, block * head_dim, keys);
      std::copy_n(v, (block - 1) * value_dim, values);
      encode(position, keys, block, 0);
    }
  }

  /// Encodes keys at the positions [first, first + count), in place.
  template <Position P>
  void encode(const P& position, Open* keys, Index count, Index first) const {
    if constexpr (std::is_same_v<P, no_position>) return;
    if constexpr (std::is_same_v<Open, Real>) {
      position.encode(MatrixView<Real>{keys, count, head_dim, head_dim}, first, Role::key);
    } else {
      std::vector<Real> wide(static_cast<std::size_t>(count * head_dim));
      copy_rows(keys, head_dim, count, head_dim, wide.data());
      position.encode(MatrixView<Real>{wide.data(), count, head_dim, head_dim}, first, Role::key);
      copy_rows(wide.data(), head_dim, count, head_dim, keys);
    }
  }

 private:
  static constexpr Index scale_size = static_cast<Index>(sizeof(float));  ///< in elements of int8
  Index keys_at() const noexcept { return is_scaled ? (2 * block - 1) * scale_size : 0; }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
