// CRC-32C, the checksum of state files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

using Crc32cTables = std::array<std::array<std::uint32_t, 256>, 8>;

/// Table t contains the checksum of a byte followed by t bytes of 0.
constexpr Crc32cTables make_crc32c_tables() {
  constexpr std::uint32_t reversed_polynomial = 0x82f63b78;
  Crc32cTables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? reversed_polynomial : 0);
    tables[0][byte] = crc;
  }
  for (std::size_t t = 1; t < 8; ++t) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t before = tables[t - 1][byte];
      tables[t][byte] = before >> 8 ^ tables[0][before & 0xff];
    }
  }
  return tables;
}

inline constexpr Crc32cTables crc32c_tables = make_crc32c_tables();

/// The checksum with the Castagnoli polynomial (RFC 3720, appendix B.4), computed eight bytes at a time with one
/// table for each byte (Kounavis and Berry 2005). It detects every burst of errors of up to 32 bits and every flip of
/// a single bit.
class Crc32c {
 public:
  void add(const void* data, std::size_t bytes) noexcept {
    const auto* at = static_cast<const unsigned char*>(data);
    for (; bytes >= 8; at += 8, bytes -= 8) {
      std::uint32_t low = 0, high = 0;
      for (unsigned i = 0; i < 4; ++i) {
        low |= std::uint32_t{at[i]} << (8 * i);
        high |= std::uint32_t{at[i + 4]} << (8 * i);
      }
      low ^= state_;
      state_ = 0;
      for (unsigned i = 0; i < 4; ++i) {
        state_ ^= crc32c_tables[7 - i][low >> (8 * i) & 0xff] ^ crc32c_tables[3 - i][high >> (8 * i) & 0xff];
      }
    }
    for (; bytes > 0; ++at, --bytes) state_ = crc32c_tables[0][(state_ ^ *at) & 0xff] ^ state_ >> 8;
  }

  std::uint32_t value() const noexcept { return ~state_; }

 private:
  std::uint32_t state_ = ~std::uint32_t{0};
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
