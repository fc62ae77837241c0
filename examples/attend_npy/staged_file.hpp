// Files that appear completely or not at all, several of them together.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "longspan/error.hpp"

namespace attend_npy {

/// The real target of a file named `path`, after resolving symbolic links. Throws Error for folders, devices, pipes,
/// and files in folders that do not exist, so that this does not happen only after a long computation.
inline std::filesystem::path checked_target(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (fs::exists(status)) {
    if (!fs::is_regular_file(status)) {
      throw longspan::FileError(path + ": is there already and is not a regular file");
    }
    return fs::canonical(path);
  }
  const fs::path folder = fs::absolute(path).parent_path();
  if (!fs::is_directory(folder, error)) {
    throw longspan::FileError(path + ": the folder to write it in does not exist");
  }
  return fs::canonical(folder) / fs::path(path).filename();
}

/// A file that has a temporary name in the folder of its target until `put_in_place`. Without that call it is removed
/// with this object.
class StagedFile {
 public:
  explicit StagedFile(const std::string& path) : path_(path), target_(checked_target(path)) {
    constexpr int names = 1000;
    for (int n = 0; n < names && !file_; ++n) {
      staged_ = target_;
      staged_ += "." + std::to_string(n) + ".part";
      file_.reset(std::fopen(staged_.c_str(), "wbx"));  // x: fails if the file exists
      if (!file_ && errno != EEXIST) break;
    }
    if (!file_) fail(std::generic_category().message(errno));
  }
  StagedFile(StagedFile&& other) noexcept
      : path_(std::move(other.path_)),
        target_(std::move(other.target_)),
        staged_(std::exchange(other.staged_, {})),
        previous_(std::move(other.previous_)),
        file_(std::move(other.file_)) {}
  StagedFile& operator=(StagedFile&&) = delete;
  ~StagedFile() {
    if (staged_.empty()) return;
    file_.reset();
    std::error_code ignored;
    std::filesystem::remove(staged_, ignored);
  }

  void write(const void* bytes, std::size_t count) {
    if (count > 0 && std::fwrite(bytes, 1, count, file_.get()) != count) {
      fail(std::generic_category().message(errno));
    }
  }

  /// Gives all files their real names; if one fails, restores every target and throws.
  static void put_in_place(std::span<StagedFile> files) {
    for (StagedFile& file : files) file.close();
    std::size_t placed = 0;
    try {
      for (; placed < files.size(); ++placed) files[placed].place(placed + 1 < files.size());
    } catch (...) {
      while (placed-- > 0) files[placed].take_back();
      throw;
    }
    for (StagedFile& file : files) file.settle();
  }

 private:
  struct CloseFile {
    void operator()(std::FILE* file) const noexcept { std::fclose(file); }
  };

  void close() {
    // The last bytes are written here, so a full disk may be noticed only now.
    if (file_ && std::fclose(file_.release()) != 0) fail(std::generic_category().message(errno));
  }

  /// The last file needs no backup, because a rename is atomic.
  void place(bool may_be_taken_back) {
    std::error_code error;
    if (may_be_taken_back && std::filesystem::exists(target_, error)) {
      previous_ = staged_;
      previous_ += ".previous";
      std::filesystem::rename(target_, previous_, error);
      if (error) {
        previous_.clear();
        fail(error.message());
      }
    }
    std::filesystem::rename(staged_, target_, error);
    if (!error) return;
    restore_previous();
    fail(error.message());
  }

  void take_back() noexcept {
    std::error_code ignored;
    std::filesystem::rename(target_, staged_, ignored);
    restore_previous();
  }

  void restore_previous() noexcept {
    if (previous_.empty()) return;
    std::error_code ignored;
    std::filesystem::rename(previous_, target_, ignored);
  }

  void settle() noexcept {
    std::error_code ignored;
    if (!previous_.empty()) std::filesystem::remove(previous_, ignored);
    staged_.clear();
  }

  [[noreturn]] void fail(const std::string& reason) const {
    throw longspan::FileError(path_ + ": cannot be written: " + reason);
  }

  std::string path_;
  std::filesystem::path target_, staged_, previous_;
  std::unique_ptr<std::FILE, CloseFile> file_;
};

}  // namespace attend_npy
