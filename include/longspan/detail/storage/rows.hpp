// Conversion of rows of keys and values to the type in which a stream stores them.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "longspan/detail/simd/packet.hpp"
#include "longspan/element.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A type in which a stream can store rows: an element type, or std::int8_t with a scale for each row.
template <class T>
concept StoredElement = MutableElement<T> || std::same_as<T, std::int8_t>;

namespace detail {

template <StoredElement T>
struct StoredArithmetic {
  using type = Arithmetic<T>;
};
template <>
struct StoredArithmetic<std::int8_t> {
  using type = float;
};

/// The type of the arithmetic with rows that are stored as T.
template <StoredElement T>
using ArithmeticOf = typename StoredArithmetic<T>::type;

template <class From, class T>
void store_row(const From* from, Index cols, T* to) {
  if constexpr (std::is_same_v<From, T>) {
    std::copy_n(from, cols, to);
  } else {
    using Real = ArithmeticOf<T>;
    for (Index c = 0; c < cols; ++c) to[c] = static_cast<T>(static_cast<Real>(from[c]));
  }
}

/// Rounds a row to multiples of its scale, which is the largest magnitude / 127: the error of an element is at most
/// half the scale. A row that contains NaN or infinity gets the scale NaN, so that all of its elements are NaN; a row
/// whose magnitudes are all below 127 * 2^-126 becomes 0.
template <class From>
void store_row(const From* from, Index cols, std::int8_t* to, float& scale) {
  float top = 0;
  bool finite = true;
  for (Index c = 0; c < cols; ++c) {
    const float x = static_cast<float>(from[c]);
    top = (std::max)(top, std::abs(x));
    finite = finite && is_finite(x);
  }
  // A scale below 2^-126 would count as 0 in the kernels.
  const bool counts = top / 127 >= (std::numeric_limits<float>::min)();
  if (!finite || !counts) {
    scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    std::fill_n(to, cols, std::int8_t{0});
    return;
  }
  scale = top / 127;
  for (Index c = 0; c < cols; ++c) {
    const float steps = std::nearbyint(static_cast<float>(from[c]) / scale);
    to[c] = static_cast<std::int8_t>(std::clamp(steps, -127.0f, 127.0f));
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
