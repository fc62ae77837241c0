// The exception of the library, and the functions that build its text.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>

#include "longspan/version.hpp"
#include "longspan/view.hpp"

#if !defined(__cpp_exceptions) && !defined(LONGSPAN_ERROR_HANDLER)
#include <cstdlib>
#endif

LONGSPAN_VOCABULARY_BEGIN

/// Thrown for a shape, an option or a file that a function does not accept, before it writes anything. The text names
/// the function, the argument, what it is, and what is wanted. Values of tensors are never an error. The type is the
/// same in all translation units, whatever their flags, so that one can catch what another throws.
class Error : public std::invalid_argument {
 public:
  LONGSPAN_INLINE explicit Error(const std::string& text) : std::invalid_argument(text) {}
  LONGSPAN_INLINE explicit Error(const char* text) : std::invalid_argument(text) {}
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Throws Error. With -fno-exceptions it calls LONGSPAN_ERROR_HANDLER(text) if the including program defines that macro
/// (the handler must not return); otherwise it prints the text and aborts.
[[noreturn]] inline void raise(const std::string& text) {
#if defined(__cpp_exceptions)
  throw Error(text);
#elif defined(LONGSPAN_ERROR_HANDLER)
  LONGSPAN_ERROR_HANDLER(text.c_str());
#else
  std::fprintf(stderr, "%s\n", text.c_str());
  std::abort();
#endif
}

[[noreturn]] inline void refuse(std::string_view function, std::string_view argument, std::string_view got,
                                std::string_view wanted) {
  std::string text = "longspan: ";
  text.append(function).append(": ").append(argument).append(" is ").append(got);
  raise(text.append(", wanted ").append(wanted));
}

/// A number in at most six digits: 0, -1.5, nan.
inline std::string number_text(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  return text;
}

inline std::string shape_text(Index a, Index b, Index c) {
  std::string text = "[";
  return text.append(std::to_string(a))
      .append(", ")
      .append(std::to_string(b))
      .append(", ")
      .append(std::to_string(c))
      .append("]");
}

inline std::string shape_text(Index a, Index b, Index c, Index d) {
  std::string text = shape_text(a, b, c);
  text.pop_back();
  return text + ", " + std::to_string(d) + "]";
}

template <class T>
std::string shape_text(const TensorView<T>& x) {
  return shape_text(x.batch, x.heads, x.rows, x.cols);
}

template <class T>
std::string shape_text(const RowsView<T>& x) {
  return shape_text(x.batch, x.heads, x.rows);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
