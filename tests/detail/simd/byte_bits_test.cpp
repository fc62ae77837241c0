#include "longspan/detail/simd/byte_bits.hpp"

#include <cstddef>
#include <cstdint>

#include "support/catch.hpp"
#include "support/guarded_memory.hpp"
#include "support/random.hpp"

using longspan::Index;
namespace detail = longspan::detail;

TEST_CASE("bits_of_bytes: bit n is 1 if byte n is not 0, and nothing after the bytes is read",
          "[byte_bits]") {
  test::for_each_case(300, [](test::Random& random) {
    const Index count = random.between(1, 64);
    const test::GuardedArray<unsigned char> bytes(count, test::Guard::behind);
    std::uint64_t wanted = 0;
    for (Index n = 0; n < count; ++n) {
      const auto byte = random.pick<unsigned char>({0, 0, 0, 1, 0x7f, 0x80, 0x81, 0xff});
      bytes.data()[n] = byte;
      wanted |= std::uint64_t{byte != 0} << n;
    }
    CHECK(detail::bits_of_bytes(bytes.data(), count) == wanted);
  });
}

TEST_CASE("bits_of_8_bytes: every value of a byte, at every place", "[byte_bits]") {
  for (int place = 0; place < 8; ++place) {
    for (int value = 0; value < 256; ++value) {
      unsigned char bytes[8] = {};
      bytes[place] = static_cast<unsigned char>(value);
      const std::uint64_t wanted = value == 0 ? 0 : std::uint64_t{1} << place;
      if (detail::bits_of_8_bytes(bytes) != wanted) CHECK(detail::bits_of_8_bytes(bytes) == wanted);
    }
  }
  SUCCEED();
}
