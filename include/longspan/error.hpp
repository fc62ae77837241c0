// The two exceptions of the library, and the functions that build their texts.
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

/// Thrown for a shape, an option or another argument that a function does not accept, before it writes anything. The
/// text names the function, the argument, what it is, and what is wanted. Values of tensors are never an error. Error
/// and FileError are the same types in all translation units, whatever their flags, so that one can catch what another
/// throws.
class Error : public std::invalid_argument {
 public:
  LONGSPAN_INLINE explicit Error(const std::string& text) : std::invalid_argument(text) {}
  LONGSPAN_INLINE explicit Error(const char* text) : std::invalid_argument(text) {}
};

/// A file, or a C++ stream of bytes, that cannot be used although the arguments are right: it cannot be opened,
/// is in use, is damaged, holds the state of a stream with other options, or its disk is full. The text names
/// function and file, and the system's reason if there is one.
class FileError : public std::runtime_error {
 public:
  LONGSPAN_INLINE explicit FileError(const std::string& text) : std::runtime_error(text) {}
  LONGSPAN_INLINE explicit FileError(const char* text) : std::runtime_error(text) {}
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Throws E. With -fno-exceptions it calls LONGSPAN_ERROR_HANDLER(text) if the including program defines that macro
/// (the handler must not return); otherwise it prints the text and aborts.
template <class E = Error>
[[noreturn]] void raise(const std::string& text) {
#if defined(__cpp_exceptions)
  throw E(text);
#elif defined(LONGSPAN_ERROR_HANDLER)
  LONGSPAN_ERROR_HANDLER(text.c_str());
#else
  std::fprintf(stderr, "%s\n", text.c_str());
  std::abort();
#endif
}

template <class E = Error>
[[noreturn]] void refuse(std::string_view function, std::string_view argument, std::string_view got,
                         std::string_view wanted) {
  std::string text = "longspan: ";
  text.append(function).append(": ").append(argument).append(" is ").append(got);
  raise<E>(text.append(", wanted ").append(wanted));
}

/// Throws E with a sentence of its own.
template <class E = Error>
[[noreturn]] void fail(std::string_view function, std::string_view sentence) {
  raise<E>(std::string("longspan: ").append(function).append(": ").append(sentence));
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
