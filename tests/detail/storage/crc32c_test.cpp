#include "longspan/detail/storage/crc32c.hpp"

#include <string>
#include <string_view>

#include "support/catch.hpp"

namespace {

std::uint32_t sum_of(std::string_view text, std::size_t cut = 0) {
  longspan::detail::Crc32c sum;
  sum.add(text.data(), cut);
  sum.add(text.data() + cut, text.size() - cut);
  return sum.value();
}

}  // namespace

TEST_CASE("crc32c: matches the published values", "[crc32c]") {
  CHECK(sum_of("") == 0);
  CHECK(sum_of("123456789") == 0xe3069283);
  // RFC 3720, appendix B.4.
  CHECK(sum_of(std::string(32, '\0')) == 0x8a9136aa);
  CHECK(sum_of(std::string(32, '\xff')) == 0x62a8ab43);
  std::string rising, falling;
  for (char c = 0; c < 32; ++c) {
    rising.push_back(c);
    falling.insert(falling.begin(), c);
  }
  CHECK(sum_of(rising) == 0x46dd794e);
  CHECK(sum_of(falling) == 0x113fdb5c);
}

TEST_CASE("crc32c: does not depend on how the bytes are cut", "[crc32c]") {
  const std::string text = "every cut of a text that is longer than four steps";
  for (std::size_t cut = 0; cut <= text.size(); ++cut) CHECK(sum_of(text, cut) == sum_of(text));
}
