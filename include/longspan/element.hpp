// The element types of tensors, and the type of the arithmetic with them.
#pragma once

#include <type_traits>

#include "longspan/detail/eigen_core.hpp"
#include "longspan/version.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// float, double, Eigen::bfloat16 or Eigen::half. The 16-bit types are used for storage only.
template <class T>
concept Element =
    std::is_same_v<std::remove_const_t<T>, float> || std::is_same_v<std::remove_const_t<T>, double> ||
    std::is_same_v<std::remove_const_t<T>, Eigen::bfloat16> ||
    std::is_same_v<std::remove_const_t<T>, Eigen::half>;

/// An element type that can be written.
template <class T>
concept MutableElement = Element<T> && !std::is_const_v<T>;

/// The type of the arithmetic for queries of type T: double for double, float for all others.
template <Element T>
using Arithmetic = std::conditional_t<std::is_same_v<std::remove_const_t<T>, double>, double, float>;

LONGSPAN_VOCABULARY_END
