// The file of a stream's state: a few numbers and a payload of arrays, each with a checksum.
//
//   8 bytes   "longspan"                     8 bytes   the kind of state, padded with 0
//   u32       version of the kind's layout   u32       n, the number of numbers
//   u64       bytes of payload               n x i64   the numbers
//   u32       CRC-32C of everything above
//   payload, arrays back to back
//   u32       CRC-32C of the payload
//
// Everything is little-endian. The reader trusts nothing: callers check the numbers before they use them as sizes of
// allocations, and an array grows no faster than its bytes are read.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <istream>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "longspan/detail/storage/crc32c.hpp"
#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// A kind of state: a name of at most 8 letters, the version of its layout, and the names of the writing and the
/// reading function in messages.
struct StateKind {
  std::string_view name;
  std::uint32_t version = 1;
  std::string_view save;
  std::string_view load;
};

struct StateHeader {
  char magic[8] = {'l', 'o', 'n', 'g', 's', 'p', 'a', 'n'};
  char name[8] = {};
  std::uint32_t version = 0;
  std::uint32_t numbers = 0;
  std::uint64_t payload = 0;

  StateHeader() = default;
  StateHeader(const StateKind& kind, std::size_t count, std::uint64_t bytes)
      : version(kind.version), numbers(static_cast<std::uint32_t>(count)), payload(bytes) {
    std::copy_n(kind.name.begin(), std::min<std::size_t>(kind.name.size(), 8), name);
  }
};
static_assert(sizeof(StateHeader) == 32 && std::is_trivially_copyable_v<StateHeader>);
static_assert(std::endian::native == std::endian::little,
              "longspan: state files are little-endian, so the processor must be little-endian");

/// The bytes of `count` elements of T. Throws Error if the number does not fit into an Index.
template <class T>
Index array_bytes(std::string_view function, Index count) {
  constexpr Index most = PTRDIFF_MAX / static_cast<Index>(sizeof(T));
  if (count < 0 || count > most)
    refuse<FileError>(function, "the number of elements of an array", std::to_string(count),
                      "0.." + std::to_string(most));
  return count * static_cast<Index>(sizeof(T));
}

/// Writes a state: the constructor writes the header, `array` a part of the payload, `finish` the checksum.
class StateWriter {
 public:
  StateWriter(std::ostream& to, const StateKind& kind, std::span<const std::int64_t> numbers, Index payload)
      : to_(to), kind_(kind), payload_(payload) {
    put_bytes(StateHeader(kind, numbers.size(), static_cast<std::uint64_t>(payload)));
    put(numbers.data(), numbers.size_bytes());
    put_checksum();
  }

  template <class T>
  void array(const T* data, Index count) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto bytes = static_cast<std::size_t>(count) * sizeof(T);
    written_ += static_cast<Index>(bytes);
    put(data, bytes);
  }

  void finish() {
    if (written_ != payload_)
      refuse(kind_.save, "the payload", std::to_string(written_) + " bytes", std::to_string(payload_));
    put_checksum();
    to_.flush();
    if (!to_)
      refuse<FileError>(kind_.save, "the output stream", "broken or full",
                        "space for " + std::to_string(payload_) + " bytes of state");
  }

 private:
  template <class T>
  void put_bytes(const T& value) {
    put(&value, sizeof(T));
  }
  void put(const void* data, std::size_t bytes) {
    if (bytes == 0) return;
    sum_.add(data, bytes);
    to_.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  }
  void put_checksum() {
    put_bytes(sum_.value());
    sum_ = {};
  }

  std::ostream& to_;
  StateKind kind_;
  Index payload_;
  Index written_ = 0;
  Crc32c sum_;
};

/// Reads a state. The constructor reads and checks the header and fills `numbers`. The caller checks these numbers,
/// passes the payload size that they imply to `expect_payload`, reads the arrays into new objects, and uses the objects
/// only after `finish`.
class StateReader {
 public:
  StateReader(std::istream& from, const StateKind& kind, std::span<std::int64_t> numbers)
      : from_(from), kind_(kind) {
    const StateHeader wanted(kind, numbers.size(), 0);
    get(&header_, sizeof(header_), "the header");
    if (!std::equal(wanted.magic, wanted.magic + 8, header_.magic))
      refuse<FileError>(kind.load, "the file", "not a state of longspan",
                        "a file that begins with \"longspan\"");
    if (!std::equal(wanted.name, wanted.name + 8, header_.name))
      reject("the file", "a state of another kind", kind.name);
    if (header_.version != wanted.version)
      reject("the layout", "version " + std::to_string(header_.version) + " in the file",
             std::to_string(wanted.version));
    if (header_.numbers != wanted.numbers)
      reject("the header", std::to_string(header_.numbers) + " numbers", std::to_string(wanted.numbers));
    get(numbers.data(), numbers.size_bytes(), "the header");
    check_sum("the checksum of the header");
  }

  void expect_payload(Index bytes) const {
    if (header_.payload != static_cast<std::uint64_t>(bytes)) {
      reject("the payload", std::to_string(header_.payload) + " bytes",
             std::to_string(bytes) + " for the sizes in the header");
    }
  }
  /// The same before all sizes are known: checks that the payload has at least the size that the header implies.
  void expect_payload_of_at_least(Index bytes) const {
    if (header_.payload < static_cast<std::uint64_t>(bytes)) {
      reject("the payload", std::to_string(header_.payload) + " bytes",
             "at least " + std::to_string(bytes) + " for the sizes in the header");
    }
  }
  /// Throws FileError about the file, by the name of the function that loads it.
  [[noreturn]] void reject(std::string_view what, std::string_view got, std::string_view wanted) const {
    refuse<FileError>(kind_.load, what, got, wanted);
  }

  /// Returns a copy of the next array of the payload, whatever its alignment in the file.
  template <class T>
  std::vector<T> array(Index count) {
    static_assert(std::is_trivially_copyable_v<T>);
    constexpr Index most_at_once = (Index{1} << 20) / static_cast<Index>(sizeof(T));
    array_bytes<T>(kind_.load, count);
    std::vector<T> values;
    // Grows at most by a factor of 2 at a time, so that a file that claims more than it contains costs no memory.
    for (Index have = 0; have < count;) {
      const Index next = (std::min)(count, (std::max)(2 * have, most_at_once));
      values.resize(static_cast<std::size_t>(next));
      get(values.data() + have, static_cast<std::size_t>(next - have) * sizeof(T), "the payload");
      have = next;
    }
    return values;
  }

  /// Checks the payload's checksum. The caller must not use the arrays before.
  void finish() { check_sum("the checksum of the payload"); }

 private:
  void get(void* data, std::size_t bytes, std::string_view what) {
    if (bytes == 0) return;
    from_.read(static_cast<char*>(data), static_cast<std::streamsize>(bytes));
    if (!from_) refuse<FileError>(kind_.load, what, "cut short", std::to_string(bytes) + " bytes");
    sum_.add(data, bytes);
  }

  void check_sum(std::string_view what) {
    const std::uint32_t computed = sum_.value();
    std::uint32_t stored = 0;
    get(&stored, sizeof(stored), what);
    if (stored != computed)
      refuse<FileError>(kind_.load, what, std::to_string(stored), std::to_string(computed));
    sum_ = {};
  }

  std::istream& from_;
  StateKind kind_;
  StateHeader header_;
  Crc32c sum_;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
