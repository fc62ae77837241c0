// The POSIX calls that a file of blocks needs. A failed call throws FileError with the system's reason.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// A file that is open and locked for one owner.
class MappedFile {
 public:
  /// A read-only mapping of bytes of the file.
  class Mapping {
   public:
    Mapping(int file, Index offset, Index length) {
      const Index page = static_cast<Index>(::sysconf(_SC_PAGESIZE));
      skipped_ = offset % page;
      length_ = static_cast<std::size_t>(length + skipped_);
      memory_ = ::mmap(nullptr, length_, PROT_READ, MAP_SHARED, file, static_cast<off_t>(offset - skipped_));
    }
    Mapping(Mapping&& other) noexcept
        : memory_(std::exchange(other.memory_, MAP_FAILED)),
          length_(other.length_),
          skipped_(other.skipped_) {}
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    Mapping& operator=(Mapping&&) = delete;
    ~Mapping() {
      if (is_there()) ::munmap(memory_, length_);
    }

    bool is_there() const noexcept { return memory_ != MAP_FAILED; }
    const std::byte* bytes() const noexcept { return static_cast<const std::byte*>(memory_) + skipped_; }
    void release() const noexcept { ::madvise(memory_, length_, MADV_DONTNEED); }

   private:
    void* memory_ = MAP_FAILED;
    std::size_t length_ = 0;
    Index skipped_ = 0;
  };

  MappedFile(std::string path, std::string_view function) : path_(std::move(path)), function_(function) {
    file_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file_ < 0) failed("open " + name());
    if (::flock(file_, LOCK_EX | LOCK_NB) != 0) {
      const int error = errno;
      ::close(std::exchange(file_, -1));
      if (error == EWOULDBLOCK) fail<FileError>(function_, name() + " is in use by another cache");
      errno = error;
      failed("lock " + name());
    }
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() {
    if (file_ >= 0) ::close(file_);
  }

  Index size() const {
    struct ::stat status {};
    if (::fstat(file_, &status) != 0 || !S_ISREG(status.st_mode)) damaged("is not a regular file");
    return static_cast<Index>(status.st_size);
  }

  void read(Index from, void* to, Index count) const {
    auto* bytes = static_cast<char*>(to);
    while (count > 0) {
      const auto got = ::pread(file_, bytes, static_cast<std::size_t>(count), static_cast<off_t>(from));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) failed("read " + std::to_string(count) + " bytes of " + name());
      if (got == 0) damaged("is cut short");
      bytes += got;
      from += got;
      count -= got;
    }
  }

  void write(Index to, const void* from, Index count) const {
    const auto* bytes = static_cast<const char*>(from);
    while (count > 0) {
      const auto put = ::pwrite(file_, bytes, static_cast<std::size_t>(count), static_cast<off_t>(to));
      if (put < 0 && errno == EINTR) continue;
      if (put <= 0) failed("write " + std::to_string(count) + " bytes to " + name());
      bytes += put;
      to += put;
      count -= put;
    }
  }

  void reserve(Index from, Index count) const {
#if defined(__APPLE__)
    constexpr std::array<char, 65536> zeros{};
    for (Index done = 0; done < count; done += static_cast<Index>(zeros.size()))
      write(from + done, zeros.data(), (std::min)(static_cast<Index>(zeros.size()), count - done));
#else
    int error = EINTR;
    while (error == EINTR)
      error = ::posix_fallocate(file_, static_cast<off_t>(from), static_cast<off_t>(count));
    if (error == 0) return;
    errno = error;
    failed("write " + std::to_string(count) + " bytes to " + name());
#endif
  }

  void give_back([[maybe_unused]] Index from, [[maybe_unused]] Index count) const noexcept {
#if defined(FALLOC_FL_PUNCH_HOLE)
    // If this fails, the space stays in use, which does not affect results.
    [[maybe_unused]] const int failed = ::fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                                    static_cast<off_t>(from), static_cast<off_t>(count));
#endif
  }

  Mapping map(Index from, Index count) const {
    Mapping mapping(file_, from, count);
    if (!mapping.is_there()) failed("map " + std::to_string(count) + " bytes of " + name());
    return mapping;
  }

  /// Removes the file of that name, if there is one.
  static void remove(const std::string& path) noexcept { ::unlink(path.c_str()); }
  /// Gives the file another name, replacing a file of that name.
  void rename(const std::string& path) {
    std::string to = path;
    if (::rename(path_.c_str(), to.c_str()) != 0) failed("rename " + name() + " to " + to);
    path_.swap(to);
  }

  /// `how` is a verb with what follows it: "is cut short".
  [[noreturn]] void damaged(const std::string& how) const {
    fail<FileError>(
        function_,
        name() + " " + how + "; wanted an empty file, or one that a cache of the same shape has written");
  }

 private:
  std::string name() const { return "the file " + path_; }
  /// A system call has failed. `act` says what it should do, and names the file.
  [[noreturn]] void failed(const std::string& act) const {
    const std::string why = std::error_code(errno, std::generic_category()).message();
    fail<FileError>(function_, "cannot " + act + ": " + why);
  }

  std::string path_;
  std::string_view function_;
  int file_ = -1;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
