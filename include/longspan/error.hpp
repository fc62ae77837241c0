// The two exceptions of the library, and the functions that build their texts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <initializer_list>
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
[[noreturn]] LONGSPAN_COLD void raise(const char* text) {
#if defined(__cpp_exceptions)
  throw E(text);
#elif defined(LONGSPAN_ERROR_HANDLER)
  LONGSPAN_ERROR_HANDLER(text);
#else
  std::fprintf(stderr, "%s\n", text);
  std::abort();
#endif
}

/// Throws E with a text made of these pieces. Not of std::string: g++ 12 compiles the members of std::string that a
/// translation unit uses anew, which would take 5 % of the compile time of one call of a functor.
template <class E>
[[noreturn]] LONGSPAN_COLD void raise_joined(std::initializer_list<std::string_view> pieces) {
  std::size_t size = 1;
  for (const std::string_view piece : pieces) size += piece.size();
  struct Text {
    char* begin;
    ~Text() { delete[] begin; }
  };
  const Text text{new char[size]};
  char* to = text.begin;
  for (const std::string_view piece : pieces) to = std::copy_n(piece.data(), piece.size(), to);
  *to = '\0';
  raise<E>(text.begin);
}

template <class E = Error>
[[noreturn]] LONGSPAN_COLD void refuse(std::string_view function, std::string_view argument,
                                       std::string_view got, std::string_view wanted) {
  raise_joined<E>({"longspan: ", function, ": ", argument, " is ", got, ", wanted ", wanted});
}

/// Throws E with a sentence of its own.
template <class E = Error>
[[noreturn]] LONGSPAN_COLD void fail(std::string_view function, std::string_view sentence) {
  raise_joined<E>({"longspan: ", function, ": ", sentence});
}

/// A short text on the stack: for the errors of every call, which are made without std::string (see raise_joined).
class ShortText {
 public:
  LONGSPAN_COLD void append(std::string_view words) noexcept {
    const std::size_t count = (std::min)(words.size(), sizeof text_ - size_);
    std::copy_n(words.data(), count, text_ + size_);
    size_ += count;
  }
  LONGSPAN_COLD void append(Index number) noexcept {
    char digits[24];
    std::snprintf(digits, sizeof digits, "%lld", static_cast<long long>(number));
    append(std::string_view(digits));
  }

  operator std::string_view() const noexcept { return {text_, size_}; }
  friend std::string operator+(const ShortText& a, std::string_view b) { return std::string(a).append(b); }

 private:
  char text_[256];
  std::size_t size_ = 0;
};

/// The pattern with a number in place of each '#'.
LONGSPAN_COLD inline ShortText number_text(std::string_view pattern,
                                           std::initializer_list<Index> numbers) noexcept {
  ShortText text;
  const Index* number = numbers.begin();
  for (const char& c : pattern) {
    if (c == '#') {
      text.append(*number++);
    } else {
      text.append(std::string_view(&c, 1));
    }
  }
  return text;
}

/// A number in at most six digits: 0, -1.5, nan.
LONGSPAN_COLD inline ShortText number_text(double x) noexcept {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", x);
  ShortText text;
  text.append(std::string_view(digits));
  return text;
}

/// The sizes in brackets: [2, 8, 512, 64].
LONGSPAN_COLD inline ShortText shape_text(std::initializer_list<Index> sizes) noexcept {
  ShortText text;
  for (const Index& size : sizes) {
    text.append(&size == sizes.begin() ? std::string_view("[") : std::string_view(", "));
    text.append(size);
  }
  text.append(std::string_view("]"));
  return text;
}
inline ShortText shape_text(Index a, Index b, Index c) { return shape_text({a, b, c}); }
inline ShortText shape_text(Index a, Index b, Index c, Index d) { return shape_text({a, b, c, d}); }

template <class T>
ShortText shape_text(const TensorView<T>& x) {
  return shape_text({x.batch, x.heads, x.rows, x.cols});
}

template <class T>
ShortText shape_text(const RowsView<T>& x) {
  return shape_text({x.batch, x.heads, x.rows});
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
