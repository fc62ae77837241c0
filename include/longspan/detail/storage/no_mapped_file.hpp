// MappedFile for systems without mapped files: opening one throws Error.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

class MappedFile {
 public:
  struct Mapping {
    const std::byte* bytes() const noexcept { return nullptr; }
    void release() const noexcept {}
  };

  MappedFile(const std::string& path, std::string_view function) {
    fail<FileError>(function, "cannot map the file " + path + ": this system has no mapped files");
  }

  Index size() const { return 0; }
  void read(Index, void*, Index) const {}
  void write(Index, const void*, Index) const {}
  void reserve(Index, Index) const {}
  void give_back(Index, Index) const noexcept {}
  Mapping map(Index, Index) const { return {}; }
  static void remove(const std::string&) noexcept {}
  void rename(const std::string&) {}
  [[noreturn]] void damaged(const std::string& how) const { raise<FileError>(how.c_str()); }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
