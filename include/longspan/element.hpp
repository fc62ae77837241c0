// The element types a tensor may hold, and the type in which the arithmetic on them is done.
#pragma once

#include <type_traits>

#include "longspan/detail/simd/eigen_core.hpp"
#include "longspan/version.hpp"

LONGSPAN_BEGIN

namespace detail {
template <class T, class... Types>
inline constexpr bool is_one_of = (std::is_same_v<T, Types> || ...);
}  // namespace detail

/// float, double, Eigen::bfloat16 or Eigen::half. The 16-bit types are for storage only.
template <class T>
concept Element = detail::is_one_of<std::remove_const_t<T>, float, double, Eigen::bfloat16, Eigen::half>;

/// An element type that can be written.
template <class T>
concept MutableElement = Element<T> && !std::is_const_v<T>;

/// Arithmetic is done in the type of the queries: double for double, float for all others.
template <Element T>
using Arithmetic = std::conditional_t<std::is_same_v<std::remove_const_t<T>, double>, double, float>;

LONGSPAN_END
