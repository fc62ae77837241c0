// Tensors in .npy files, the file format of numpy. Files are not trusted: everything except a C-order array of
// float32 or float64 throws an Error of one sentence, and no size in a file is used before it has been compared with
// the bytes of the file.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "longspan/error.hpp"
#include "longspan/view.hpp"

namespace npy {

static_assert(std::endian::native == std::endian::little,
              "npy.hpp reads and writes the machine's own byte order");

using longspan::Index;

/// An array with values in C order: the last dimension is contiguous.
struct Array {
  std::vector<Index> shape;
  std::variant<std::vector<float>, std::vector<double>> values;
};

/// The number of values of a shape; nothing if the product of its dimensions other than 0 is too large to be counted in
/// bytes. The strides of an empty array, which are such products, can therefore be counted as well.
inline std::optional<Index> value_count(std::span<const Index> shape) {
  Index product = 1;
  for (const Index dimension : shape) {
    if (dimension == 0) continue;
    if (dimension > std::numeric_limits<Index>::max() / Index(sizeof(double)) / product) return std::nullopt;
    product *= dimension;
  }
  return std::find(shape.begin(), shape.end(), 0) == shape.end() ? product : 0;
}

/// A shape as numpy prints it: (), (3,), (3, 4).
inline std::string shape_text(std::span<const Index> shape) {
  std::string text = "(";
  for (const Index dimension : shape) text += std::to_string(dimension) + ", ";
  if (shape.size() > 1) text.resize(text.size() - 2);
  if (shape.size() == 1) text.pop_back();
  return text + ")";
}

namespace detail {

// numpy itself reads headers of at most 10000 characters; an array's own needs less than 1000.
constexpr std::uintmax_t most_header_bytes = 65536;
constexpr std::size_t most_dimensions = 32;
constexpr std::string_view magic = "\x93NUMPY";

[[noreturn]] inline void refuse(const std::string& path, const std::string& why) {
  throw longspan::FileError(path + ": " + why);
}

/// Text from a file, made safe to print on a terminal.
inline std::string shown(std::string_view text) {
  std::string safe(text.substr(0, 32));
  for (char& c : safe) c = c >= ' ' && c <= '~' ? c : '?';
  return text.size() > safe.size() ? safe + "..." : safe;
}

struct Header {
  std::string descr;
  bool fortran_order = false;
  std::vector<Index> shape;
};

/// Reads the header's text: a Python dictionary with the keys descr, fortran_order and shape, each once, in any order,
/// followed by white space.
class HeaderText {
 public:
  HeaderText(std::string_view text, const std::string& path) : rest_(text), path_(path) {}

  Header parse() {
    std::optional<std::string> descr;
    std::optional<bool> fortran_order;
    std::optional<std::vector<Index>> shape;
    expect('{');
    while (!take('}')) {
      const std::string key = quoted();
      expect(':');
      if (key == "descr") {
        set(descr, key, [&] { return dtype(); });
      } else if (key == "fortran_order") {
        set(fortran_order, key, [&] { return boolean(); });
      } else if (key == "shape") {
        set(shape, key, [&] { return tuple(); });
      } else {
        refuse(path_, "its header has the unknown key '" + shown(key) + "'");
      }
      if (!take(',')) {
        expect('}');
        break;
      }
    }
    skip_space();
    if (!rest_.empty()) malformed();
    if (!descr || !fortran_order || !shape) {
      refuse(path_, "its header lacks one of descr, fortran_order and shape");
    }
    return {std::move(*descr), *fortran_order, std::move(*shape)};
  }

 private:
  template <class T, class Read>
  void set(std::optional<T>& value, const std::string& key, const Read& read) {
    if (value) refuse(path_, "its header has the key '" + key + "' twice");
    value = read();
  }

  std::string dtype() {
    skip_space();
    if (rest_.starts_with('[')) refuse(path_, "its dtype is a record, wanted float32 or float64");
    return quoted();
  }

  std::string quoted() {
    const char quote = take('"') ? '"' : '\'';
    if (quote == '\'') expect(quote);
    const std::size_t length = rest_.find(quote);
    if (length == std::string_view::npos) malformed();
    const std::string text(rest_.substr(0, length));
    rest_.remove_prefix(length + 1);
    if (text.find('\\') != std::string::npos) malformed();
    return text;
  }

  bool boolean() {
    skip_space();
    for (const auto& [word, value] : {std::pair<std::string_view, bool>{"True", true}, {"False", false}}) {
      if (!rest_.starts_with(word)) continue;
      rest_.remove_prefix(word.size());
      return value;
    }
    malformed();
  }

  std::vector<Index> tuple() {
    std::vector<Index> dimensions;
    expect('(');
    while (!take(')')) {
      if (dimensions.size() == most_dimensions) refuse(path_, "its shape has more than 32 dimensions");
      dimensions.push_back(dimension());
      if (take(',')) continue;
      if (dimensions.size() == 1) malformed();  // (3) is a number in parentheses, only (3,) is a tuple
      expect(')');
      break;
    }
    return dimensions;
  }

  Index dimension() {
    skip_space();
    if (rest_.starts_with('-')) refuse(path_, "its shape has a negative dimension");
    Index value = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    if (error == std::errc::result_out_of_range) refuse(path_, "its shape has a dimension above 2^63 - 1");
    const auto length = static_cast<std::size_t>(end - rest_.data());
    if (error != std::errc() || (length > 1 && rest_.front() == '0')) malformed();
    rest_.remove_prefix(length);
    return value;
  }

  void skip_space() { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\r\n"), rest_.size())); }

  bool take(char c) {
    skip_space();
    if (!rest_.starts_with(c)) return false;
    rest_.remove_prefix(1);
    return true;
  }

  void expect(char c) {
    if (!take(c)) malformed();
  }

  [[noreturn]] void malformed() const {
    refuse(path_, "its header is not the dictionary that numpy writes, at '" + shown(rest_) + "'");
  }

  std::string_view rest_;
  const std::string& path_;
};

struct CloseFile {
  void operator()(std::FILE* file) const noexcept { std::fclose(file); }
};

/// A regular file that is read from beginning to end, with its real size.
class InputFile {
 public:
  explicit InputFile(const std::string& path) : path_(path) {
    std::error_code error;
    const auto status = std::filesystem::status(path, error);
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
      refuse(path, "is not a regular file");  // checked first: opening a pipe would wait for its writer
    }
    file_.reset(std::fopen(path.c_str(), "rb"));
    if (!file_) refuse(path, "cannot be read: " + std::generic_category().message(errno));
    left_ = std::filesystem::file_size(path, error);
    if (error) refuse(path, "cannot be read: " + error.message());
  }

  std::uintmax_t bytes_left() const noexcept { return left_; }

  void read(void* to, std::size_t bytes) {
    if (bytes == 0) return;
    if (bytes > left_ || std::fread(to, 1, bytes, file_.get()) != bytes) refuse(path_, "ends too early");
    left_ -= bytes;
  }

  /// True at the end of the file, even if it has grown since it was opened.
  bool at_end() { return left_ == 0 && std::fgetc(file_.get()) == EOF; }

 private:
  const std::string& path_;
  std::unique_ptr<std::FILE, CloseFile> file_;
  std::uintmax_t left_ = 0;
};

inline Header read_header(InputFile& file, const std::string& path) {
  std::array<char, 8> start{};
  if (file.bytes_left() < start.size() + 2) refuse(path, "is not a .npy file: it has less than 10 bytes");
  file.read(start.data(), start.size());
  if (std::string_view(start.data(), magic.size()) != magic) {
    refuse(path, "is not a .npy file: it does not start with the six bytes \\x93NUMPY");
  }
  const int major = static_cast<unsigned char>(start[6]), minor = static_cast<unsigned char>(start[7]);
  if (major < 1 || major > 3 || minor != 0) {
    refuse(path, "has .npy version " + std::to_string(major) + "." + std::to_string(minor) +
                     ", wanted 1.0, 2.0 or 3.0");
  }
  std::array<unsigned char, 4> length_bytes{};
  file.read(length_bytes.data(), major == 1 ? 2 : 4);
  std::uintmax_t length = 0;
  for (std::size_t i = length_bytes.size(); i-- > 0;) length = length << 8 | length_bytes[i];
  if (length > most_header_bytes) {
    refuse(path, "names a header of " + std::to_string(length) + " bytes, wanted at most " +
                     std::to_string(most_header_bytes));
  }
  if (length > file.bytes_left()) refuse(path, "ends within its header");
  std::string text(static_cast<std::size_t>(length), '\0');
  file.read(text.data(), text.size());
  return HeaderText(text, path).parse();
}

template <class T>
std::vector<T> read_values(InputFile& file, const std::string& path, const std::vector<Index>& shape) {
  const std::optional<Index> count = value_count(shape);
  if (!count) refuse(path, "has the shape " + shape_text(shape) + ", which is too large for any memory");
  const auto bytes = static_cast<std::uintmax_t>(*count) * sizeof(T);
  if (bytes != file.bytes_left()) {
    refuse(path, "holds " + std::to_string(file.bytes_left()) + " bytes of values, wanted " +
                     std::to_string(bytes) + " for the shape " + shape_text(shape));
  }
  std::vector<T> values(static_cast<std::size_t>(*count));
  file.read(values.data(), static_cast<std::size_t>(bytes));
  if (!file.at_end()) refuse(path, "has grown while it was read");
  return values;
}

}  // namespace detail

/// Reads an array. Throws longspan::FileError, whose text starts with the path, unless the file contains exactly one
/// array of float32 or float64 in C order.
inline Array read(const std::string& path) {
  detail::InputFile file(path);
  detail::Header header = detail::read_header(file, path);
  if (header.descr != "<f4" && header.descr != "<f8") {
    const bool big_endian = header.descr == ">f4" || header.descr == ">f8";
    detail::refuse(path, "has the dtype '" + detail::shown(header.descr) + "'" +
                             (big_endian ? ", which is big-endian" : "") +
                             ", wanted '<f4' (float32) or '<f8' (float64)");
  }
  if (header.fortran_order) {
    detail::refuse(path, "is in Fortran order, wanted C order: save numpy.ascontiguousarray(x)");
  }
  Array array;
  if (header.descr == "<f4") {
    array.values = detail::read_values<float>(file, path, header.shape);
  } else {
    array.values = detail::read_values<double>(file, path, header.shape);
  }
  array.shape = std::move(header.shape);
  return array;
}

/// The bytes before the values: version 1.0, padded so that the values start at a multiple of 64 bytes.
template <class T>
std::string header_bytes(std::span<const Index> shape) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "npy.hpp writes float32 and float64");
  constexpr std::size_t preamble = 10, alignment = 64;
  std::string text = std::string("{'descr': '") + (sizeof(T) == 4 ? "<f4" : "<f8") +
                     "', 'fortran_order': False, 'shape': " + shape_text(shape) + ", }";
  const std::size_t bytes = (preamble + text.size() + 1 + alignment - 1) / alignment * alignment;
  text.resize(bytes - preamble - 1, ' ');
  text += '\n';
  const auto length = [&](std::size_t shift) { return static_cast<char>(text.size() >> shift & 0xff); };
  return std::string(detail::magic) + '\x01' + '\x00' + length(0) + length(8) + text;
}

/// Writes an array to anything with write(pointer, bytes).
template <class File, class T>
void write(File& file, std::span<const Index> shape, std::span<const T> values) {
  const std::string header = header_bytes<T>(shape);
  file.write(header.data(), header.size());
  file.write(values.data(), values.size_bytes());
}

}  // namespace npy
