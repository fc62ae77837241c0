// A source of blocks whose rows are in files, for sequences that do not fit into memory.
#pragma once

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <ios>
#include <iterator>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// The files of a sequence: elements in the byte order of this machine, [tokens, heads, head_dim] in q, [tokens,
/// kv_heads, head_dim] in k, [tokens, kv_heads, value_dim] in v, [tokens, heads, value_dim] in out.
struct SequenceFiles {
  std::string q, k, v;  ///< files to read
  std::string out;      ///< file to write, created if there is none; rows that are not written stay unchanged
  Index header_bytes = 0;  ///< bytes before the first row of q, k and v: 128 in most .npy files
};

/// A BlockSource over files of T.
///
///   file_blocks<float> source(shape, {"q.bin", "k.bin", "v.bin", "out.bin"});
///   auto stream = attend.stream(shape);
///   extend_by_blocks(stream, source, source.length(), 65536, execution);
///
/// Shapes  those of the stream, whose batch is 1
/// State   the rows of one block
/// Throws  FileError, with the name of the file and the system's reason, if a file cannot be opened, does not consist
///         of whole rows, has another number of rows than the others, or ends early while it is read, or if the
///         disk is full; Error for arguments. The outputs of closed blocks are then in the file, and the source can
///         still be used
template <MutableElement T>
class file_blocks {
 public:
  struct Block {
    TensorView<const T> q, k, v;
    TensorView<T> out;
  };

  file_blocks(const StreamShape& shape, const SequenceFiles& files)
      : q_(files.q, checked(shape, files).heads, shape.head_dim, files.header_bytes),
        k_(files.k, shape.kv_heads, shape.head_dim, files.header_bytes),
        v_(files.v, shape.kv_heads, shape.value_dim, files.header_bytes),
        out_name_(files.out),
        heads_(shape.heads),
        value_dim_(shape.value_dim) {
    for (const Rows* rows : {&k_, &v_}) {
      if (rows->tokens != q_.tokens) {
        detail::fail<FileError>(name, rows->title() + " has " + std::to_string(rows->tokens) +
                                          " tokens, but " + files.q + " has " + std::to_string(q_.tokens));
      }
    }
    // Creates the file if there is none; an existing file is kept.
    errno = 0;
    std::ofstream(out_name_, std::ios::binary | std::ios::app);
    out_.open(out_name_, std::ios::binary | std::ios::in | std::ios::out);
    if (!out_) detail::fail<FileError>(name, "cannot open the file " + out_name_ + " for writing" + reason());
  }

  /// The number of tokens in the files.
  Index length() const noexcept { return q_.tokens; }

  Block open(Index first, Index count) {
    if (first < 0 || count < 0 || first > length() - count) {
      detail::refuse(name, "the range of tokens",
                     std::to_string(count) + " from " + std::to_string(first) + " on",
                     "within [0, " + std::to_string(length()) + ")");
    }
    values_.resize(static_cast<std::size_t>(count * heads_ * value_dim_));
    return {q_.read(first, count), k_.read(first, count), v_.read(first, count),
            token_major(values_.data(), heads_, count, value_dim_)};
  }

  /// Writes the outputs of the rows [first, first + count), the block that was opened last.
  void close(Index first, Index count) {
    if (first < 0 || count < 0 || count * heads_ * value_dim_ > std::ssize(values_)) {
      detail::refuse(name, "the range of tokens",
                     std::to_string(count) + " from " + std::to_string(first) + " on",
                     "the block that is open");
    }
    const Index token = heads_ * value_dim_ * element;
    out_.clear();  // clears an error of an earlier call
    errno = 0;
    out_.seekp(static_cast<std::streamoff>(first * token));
    out_.write(reinterpret_cast<const char*>(values_.data()), static_cast<std::streamsize>(count * token));
    out_.flush();
    if (!out_) {
      detail::fail<FileError>(name, "cannot write the rows of tokens from " + std::to_string(first) +
                                        " on to the file " + out_name_ + reason());
    }
  }

 private:
  static constexpr std::string_view name = "file_blocks";
  static constexpr Index element = sizeof(T);

  /// Of the last call that failed. Standard streams leave it in errno where the system has one.
  static std::string reason() {
    return errno == 0 ? std::string() : ": " + std::error_code(errno, std::generic_category()).message();
  }

  static const StreamShape& checked(const StreamShape& shape, const SequenceFiles& files) {
    detail::check_stream_shape(name, shape);
    if (shape.batch != 1) detail::refuse(name, "the batch", std::to_string(shape.batch), "1");
    if (files.out == files.q || files.out == files.k || files.out == files.v)
      detail::refuse(name, "the file " + files.out, "both input and output", "a separate file for out");
    return shape;
  }

  template <class U>
  static TensorView<U> token_major(U* data, Index heads, Index rows, Index cols) {
    return {data, 1, heads, rows, cols, heads * rows * cols, cols, heads * cols};
  }

  struct Rows {
    std::string path;
    Index heads, cols, header;
    Index tokens = 0;
    std::ifstream file;
    std::vector<T> block;

    Rows(const std::string& where, Index of_heads, Index of_cols, Index header_bytes)
        : path(where), heads(of_heads), cols(of_cols), header(header_bytes) {
      errno = 0;
      file.open(path, std::ios::binary | std::ios::ate);
      const auto size = file ? static_cast<Index>(file.tellg()) : Index{-1};
      if (size < 0) detail::fail<FileError>(name, "cannot open " + title() + " for reading" + reason());
      const Index token = heads * cols * element, bytes = size - header;
      if (header < 0 || bytes < 0 || (token == 0 ? bytes != 0 : bytes % token != 0)) {
        detail::fail<FileError>(name, title() + " has " + std::to_string(size) + " bytes, wanted " +
                                          std::to_string(header) + " plus a multiple of the " +
                                          std::to_string(token) + " bytes of a token");
      }
      tokens = token == 0 ? 0 : bytes / token;
    }

    std::string title() const { return "the file " + path; }

    TensorView<const T> read(Index first, Index count) {
      const Index token = heads * cols;
      block.resize(static_cast<std::size_t>(count * token));
      file.clear();  // clears an error of an earlier call
      errno = 0;
      file.seekg(static_cast<std::streamoff>(header + first * token * element));
      file.read(reinterpret_cast<char*>(block.data()), static_cast<std::streamsize>(count * token * element));
      if (!file) {
        detail::fail<FileError>(name, file.eof()
                                          ? title() + " ends before token " + std::to_string(first + count)
                                          : "cannot read " + title() + reason());
      }
      return token_major(static_cast<const T*>(block.data()), heads, count, cols);
    }
  };

  Rows q_, k_, v_;
  std::string out_name_;
  Index heads_, value_dim_;
  std::fstream out_;
  std::vector<T> values_;
};

LONGSPAN_NAMESPACE_END
