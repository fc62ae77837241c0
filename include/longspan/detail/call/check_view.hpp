// Checks that a view can refer to real memory.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string_view>

#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The maximum number of elements of a view. Sizes of 0 count as 1 in this product, so that no single size exceeds the
/// limit either, and neither bytes nor positions overflow an Index.
inline constexpr double most_elements = 0x1p60;

/// The requirement that the sizes break: none is negative, and their product is at most most_elements. Null if they
/// meet both.
constexpr const char* fault_of_sizes(std::initializer_list<Index> sizes) noexcept {
  double product = 1;
  for (const Index size : sizes) {
    if (size < 0) return "no negative size";
    product *= static_cast<double>(std::max<Index>(1, size));
  }
  return product > most_elements ? "at most 2^60 elements" : nullptr;
}

template <class T>
ShortText shape_text(const MatrixView<T>& x) {
  return shape_text({x.rows, x.cols});
}

/// The requirement that a view breaks: one on its sizes, or that a view with elements has memory. Null if it meets all.
constexpr const char* fault_of_view(const void* data, std::initializer_list<Index> sizes) noexcept {
  if (const char* fault = fault_of_sizes(sizes); fault != nullptr) return fault;
  const bool empty = (std::min)(sizes) == 0;
  return data == nullptr && !empty ? "memory for its elements, not null" : nullptr;
}
template <class T>
constexpr const char* fault_of(const TensorView<T>& x) noexcept {
  return fault_of_view(x.data, {x.batch, x.heads, x.rows, x.cols});
}
template <class T>
constexpr const char* fault_of(const RowsView<T>& x) noexcept {
  return fault_of_view(x.data, {x.batch, x.heads, x.rows});
}
template <class T>
constexpr const char* fault_of(const MatrixView<T>& x) noexcept {
  return fault_of_view(x.data, {x.rows, x.cols});
}

template <class View>
[[noreturn]] LONGSPAN_COLD void refuse_view(std::string_view function, std::string_view argument,
                                            const View& x) {
  refuse(function, argument, shape_text(x), fault_of(x));
}

/// Throws Error if a view has a negative size, more than 2^60 elements, or elements but no memory.
template <class View>
void check_view(std::string_view function, std::string_view argument, const View& x) {
  if (fault_of(x) != nullptr) refuse_view(function, argument, x);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
