// Conversion of rows of keys and values to the type in which a stream stores them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "longspan/detail/simd/element_packets.hpp"
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

/// Calls work(numbers, first, count) for pieces of a row, converted to float.
template <class From, class Work>
void in_floats(const From* from, Index cols, const Work& work) {
  constexpr Index piece = 64, w = lanes<float>;
  alignas(64) float numbers[std::size_t(piece)];
  for (Index first = 0; first < cols; first += piece) {
    const Index count = (std::min)(piece, cols - first);
    Index c = 0;
    for (; c + w <= count; c += w) store<float>(numbers + c, load_as<float>(from + first + c));
    for (; c < count; ++c) numbers[c] = static_cast<float>(from[first + c]);
    work(static_cast<const float*>(numbers), first, count);
  }
}

/// Rounds a row to multiples of its scale, which is the largest magnitude / 127: the error of an element is at most
/// half the scale. A row that contains NaN or infinity gets the scale NaN, so that all of its elements are NaN; a row
/// whose magnitudes are all below 127 * 2^-126 becomes 0.
template <class From>
void store_row(const From* from, Index cols, std::int8_t* to, float& scale) {
  std::uint32_t top_bits = 0;  // the compiler vectorises a maximum of integers
  in_floats(from, cols, [&](const float* x, Index, Index count) {
    for (Index c = 0; c < count; ++c)
      top_bits = (std::max)(top_bits, std::bit_cast<std::uint32_t>(x[c]) & 0x7fffffffu);
  });
  const float top = std::bit_cast<float>(top_bits);
  const bool finite = top_bits < 0x7f800000u;
  // A scale below 2^-126 would count as 0 in the kernels.
  const bool counts = top / 127 >= (std::numeric_limits<float>::min)();
  if (!finite || !counts) {
    scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    std::fill_n(to, cols, std::int8_t{0});
    return;
  }
  scale = top / 127;
  in_floats(from, cols, [=, by = scale](const float* x, Index first, Index count) {
    for (Index c = 0; c < count; ++c) {
      const float steps = std::nearbyint(x[c] / by);
      to[first + c] = static_cast<std::int8_t>(steps < -127 ? -127.0f : steps > 127 ? 127.0f : steps);
    }
  });
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
