// A file of blocks of one size, each written once and then read in place through a mapping.
//
//   4096 bytes      the header of a state file (state_file.hpp): the properties of the blocks, the number of blocks,
//                   the number of dropped blocks
//   blocks          for each block its bytes and their CRC-32C, padded to a multiple of 4096 bytes
//
// Blocks are written by pwrite into space that was reserved before, so that a full disk is an error of a call and
// never of a memory access. The header counts a block only after all of its bytes are written: if the process ends
// between any two writes, the file contains the blocks counted so far.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/storage/crc32c.hpp"
#include "longspan/detail/storage/state_fields.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

#if defined(__unix__) || (defined(__APPLE__) && defined(__MACH__))
#define LONGSPAN_HAS_MAPPED_FILES
#include "longspan/detail/storage/mapped_file.hpp"
#else
#include "longspan/detail/storage/no_mapped_file.hpp"
#endif

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The properties of the blocks of a file. An error about a file of other blocks names the first field that differs.
struct BlockFileKind {
  StateKind kind;
  std::span<const StateField> fields;
  Index block_bytes = 0;
};

class BlockFile {
 public:
  /// Opens the file, or creates it if there is none. Reads every block once, compares its checksum, and then calls
  /// read(n, bytes).
  template <class Read>
  BlockFile(const std::string& path, const BlockFileKind& kind, const Read& read)
      : file_(path, kind.kind.load), kind_(kind.kind), numbers_(values_of(kind.fields)) {
    bytes_ = kind.block_bytes;
    stride_ = round_up(bytes_ + checksum_bytes, page);
    at_once_ = std::max<Index>(1, mapped_at_once / stride_);
    if (is_new()) {
      file_.reserve(0, page);
      write_header(0, 0);
    } else {
      read_header(kind);
      read_blocks(read);
    }
  }

  Index blocks() const noexcept { return blocks_; }
  Index dropped() const noexcept { return dropped_.load(); }

  /// Reserves space on the disk for `more` blocks. Throws Error if there is none.
  void reserve(Index more) {
    const Index wanted = blocks_ + more;
    if (wanted <= reserved_) return;
    file_.reserve(place(reserved_), (wanted - reserved_) * stride_);
    while (static_cast<Index>(mapped_.size()) * at_once_ < wanted) map_more();
    reserved_ = wanted;
  }

  /// Writes block number blocks() + ahead, which is not part of the file until `count` counts it.
  void write(Index ahead, const std::byte* block) {
    Crc32c sum;
    sum.add(block, static_cast<std::size_t>(bytes_));
    const std::uint32_t value = sum.value();
    const Index to = place(blocks_ + ahead);
    file_.write(to, block, bytes_);
    file_.write(to + bytes_, &value, checksum_bytes);
  }

  /// Counts `more` written blocks as part of the file, and the blocks before number `dropped` as dropped.
  void count(Index more, Index dropped) {
    write_header(blocks_ + more, dropped);
    blocks_ += more;
    dropped_ = dropped;
  }

  /// The bytes of block n. Valid as long as the file is open.
  const std::byte* block(Index n) const noexcept {
    const auto& part = mapped_[static_cast<std::size_t>(n / at_once_)];
    return part.bytes() + n % at_once_ * stride_;
  }

  /// Frees the disk space of block n if it has been dropped. To be called when nothing reads the block any more.
  void give_back(Index n) noexcept {
    if (n < dropped_.load()) file_.give_back(place(n), stride_);
  }
  /// Releases the mapped pages from this process's memory; the system reads them again on the next access.
  void release() {
    const std::scoped_lock lock(mapping_);
    for (const auto& part : mapped_) part.release();
  }
  /// Gives the file another name, replacing a file of that name; a process that has the replaced file open keeps it.
  void rename(const std::string& path) { file_.rename(path); }

 private:
  static constexpr Index page = 4096, checksum_bytes = 4;
  /// The bytes of address space of one mapping.
  static constexpr Index mapped_at_once = Index{1} << 30;

  Index place(Index n) const noexcept { return page + n * stride_; }

  /// True if the file is empty, or if a process ended before it wrote the header.
  bool is_new() const {
    const Index size = file_.size();
    if (size != page) return size == 0;
    std::array<char, page> bytes{};
    file_.read(0, bytes.data(), page);
    return is_zero(bytes);
  }
  static bool is_zero(std::span<const char> bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [](char c) { return c == 0; });
  }

  void map_more() {
    const std::scoped_lock lock(mapping_);
    const Index first = static_cast<Index>(mapped_.size()) * at_once_;
    mapped_.push_back(file_.map(place(first), at_once_ * stride_));
  }

  void write_header(Index blocks, Index dropped) {
    std::array<char, page> bytes{};
    const StateHeader header(kind_, numbers_.size() + 2, static_cast<std::uint64_t>(bytes_));
    std::size_t at = 0;
    const auto put = [&](const void* from, std::size_t size) {
      std::memcpy(bytes.data() + at, from, size);
      at += size;
    };
    put(&header, sizeof(header));
    put(numbers_.data(), numbers_.size() * sizeof(std::int64_t));
    const std::int64_t counts[]{blocks, dropped};
    put(counts, sizeof(counts));
    Crc32c sum;
    sum.add(bytes.data(), at);
    const std::uint32_t value = sum.value();
    put(&value, sizeof(value));
    file_.write(0, bytes.data(), static_cast<Index>(at));  // one write within one sector is atomic
  }

  void read_header(const BlockFileKind& kind) {
    std::array<char, page> bytes{};
    if (file_.size() < page) file_.damaged("is cut short to " + std::to_string(file_.size()) + " bytes");
    file_.read(0, bytes.data(), page);
    const StateHeader wanted(kind_, numbers_.size() + 2, static_cast<std::uint64_t>(bytes_));
    StateHeader header;
    std::memcpy(&header, bytes.data(), sizeof(header));
    if (!std::equal(header.magic, header.magic + 8, wanted.magic) ||
        !std::equal(header.name, header.name + 8, wanted.name)) {
      file_.damaged("is of another kind");
    }
    const std::size_t summed = sizeof(header) + (numbers_.size() + 2) * sizeof(std::int64_t);
    std::uint32_t stored = 0;
    std::memcpy(&stored, bytes.data() + summed, sizeof(stored));
    Crc32c sum;
    sum.add(bytes.data(), summed);
    if (stored != sum.value() || header.version != wanted.version || header.numbers != wanted.numbers)
      file_.damaged("is damaged in its header, or of another version");
    if (!is_zero(std::span(bytes).subspan(summed + sizeof(stored))))
      file_.damaged("is damaged after its header");
    std::vector<std::int64_t> numbers(numbers_.size() + 2);
    std::memcpy(numbers.data(), bytes.data() + sizeof(header), numbers.size() * sizeof(std::int64_t));
    check_fields(kind_.load, numbers, kind.fields);
    const Index blocks = numbers[numbers_.size()], dropped = numbers[numbers_.size() + 1];
    if (header.payload != wanted.payload || dropped < 0 || dropped > blocks)
      file_.damaged("is damaged in its header");
    if (blocks > (file_.size() - page) / stride_) file_.damaged("is cut short");
    blocks_ = reserved_ = blocks;
    dropped_ = dropped;
    if (dropped > 0) file_.give_back(place(0), dropped * stride_);
  }

  template <class Read>
  void read_blocks(const Read& read) {
    while (static_cast<Index>(mapped_.size()) * at_once_ < blocks_) map_more();
    std::vector<std::byte> bytes(static_cast<std::size_t>(bytes_ + checksum_bytes));
    for (Index n = dropped(); n < blocks_; ++n) {
      file_.read(place(n), bytes.data(), bytes_ + checksum_bytes);
      std::uint32_t stored = 0;
      std::memcpy(&stored, bytes.data() + bytes_, sizeof(stored));
      Crc32c sum;
      sum.add(bytes.data(), static_cast<std::size_t>(bytes_));
      if (stored != sum.value()) file_.damaged("is damaged in block " + std::to_string(n));
      read(n, static_cast<const std::byte*>(bytes.data()));
    }
  }

  MappedFile file_;
  StateKind kind_;
  std::vector<std::int64_t> numbers_;
  Index bytes_ = 0, stride_ = 0, at_once_ = 1;
  Index blocks_ = 0, reserved_ = 0;
  std::atomic<Index> dropped_ = 0;  ///< read on any thread that releases a block
  std::mutex mapping_;              ///< guards mapped_: copies of a stream on other threads release pages
  std::vector<MappedFile::Mapping> mapped_;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
