// Compares the emulated matrix unit with the definition of its product, and the hardware with the emulation.
#include "longspan/detail/simd/tile_unit.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "support/catch.hpp"
#include "support/has_tiles.hpp"
#include "support/random.hpp"

namespace {

using namespace longspan::detail;
using Words = std::array<std::uint32_t, 256>;  // a tile: 16 rows of 16 pairs, or floats

float first_of(std::uint32_t pair) { return std::bit_cast<float>(pair << 16); }
float second_of(std::uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

/// Random pairs of bfloat16: normally distributed, times 2^n with a random n in [-spread, spread].
Words drawn_pairs(test::Random& random, int spread) {
  Words pairs;
  const auto draw = [&] {
    const double x = random.normal() * std::exp2(static_cast<double>(random.between(-spread, spread)));
    return std::bit_cast<std::uint32_t>(static_cast<float>(x)) & 0xffff0000u;
  };
  for (std::uint32_t& pair : pairs) pair = draw() | draw() >> 16;
  return pairs;
}

/// c + a * b, computed by the unit with rows at a distance of `stride` bytes and tile registers other than 0, 1 and 2.
template <class Unit>
Words product(const Words& c, const Words& a, const Words& b, longspan::Index stride) {
  std::array<std::uint32_t, 16 * 64> wide{};
  const auto spread = [&](const Words& words) {
    for (std::size_t r = 0; r < 16; ++r)
      std::memcpy(reinterpret_cast<char*>(wide.data()) + r * static_cast<std::size_t>(stride), &words[16 * r],
                  64);
    return wide.data();
  };
  const typename Unit::Scope configured;
  Unit::template load<3>(spread(c), stride);
  Unit::template load<7>(spread(a), stride);
  Unit::template load<4>(spread(b), stride);
  Unit::template add_products<3, 7, 4>();
  Unit::template store<3>(wide.data(), stride);
  Words result;
  for (std::size_t r = 0; r < 16; ++r)
    std::memcpy(&result[16 * r], reinterpret_cast<char*>(wide.data()) + r * static_cast<std::size_t>(stride),
                64);
  return result;
}

}  // namespace

TEST_CASE("tile unit: a product adds the products of both elements of each pair", "[simd][amx]") {
  test::Random random(1);
  for (const longspan::Index stride : {64, 192, 256}) {
    const Words a = drawn_pairs(random, 2), b = drawn_pairs(random, 2);
    Words c;
    for (std::uint32_t& word : c) word = std::bit_cast<std::uint32_t>(static_cast<float>(random.normal()));
    const Words got = product<EmulatedTiles>(c, a, b, stride);
    int wrong = 0;
    for (std::size_t m = 0; m < 16; ++m) {
      for (std::size_t n = 0; n < 16; ++n) {
        double wanted = double(std::bit_cast<float>(c[16 * m + n])), size = std::abs(wanted);
        for (std::size_t k = 0; k < 16; ++k) {
          const std::uint32_t x = a[16 * m + k], y = b[16 * k + n];
          for (const double term :
               {double(first_of(x)) * double(first_of(y)), double(second_of(x)) * double(second_of(y))}) {
            wanted += term;
            size += std::abs(term);
          }
        }
        wrong += !(std::abs(double(std::bit_cast<float>(got[16 * m + n])) - wanted) <= 0x1p-22 * size);
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("tile unit: zero clears one tile and leaves the others", "[simd][amx]") {
  Words ones;
  ones.fill(std::bit_cast<std::uint32_t>(1.0f));
  const EmulatedTiles::Scope configured;
  EmulatedTiles::load<0>(ones.data(), 64);
  EmulatedTiles::load<1>(ones.data(), 64);
  EmulatedTiles::zero<0>();
  Words zeros, kept;
  EmulatedTiles::store<0>(zeros.data(), 64);
  EmulatedTiles::store<1>(kept.data(), 64);
  CHECK(zeros == Words{});
  CHECK(kept == ones);
}

#if defined(LONGSPAN_TARGETS_AMX)

TEST_CASE("tile unit: hardware and emulation have the same bits", "[simd][amx]") {
  if (!test::has_tiles()) return;
  test::Random random(2);
  for (int round = 0; round < 200; ++round) {
    const Words a = drawn_pairs(random, round % 10), b = drawn_pairs(random, round % 7);
    Words c;
    for (std::uint32_t& word : c)
      word = std::bit_cast<std::uint32_t>(static_cast<float>(std::exp2(round % 5) * random.normal()));
    REQUIRE(product<HardwareTiles>(c, a, b, 64) == product<EmulatedTiles>(c, a, b, 64));
  }
}

TEST_CASE("tile unit: hardware and emulation agree on infinity, NaN and denormals", "[simd][amx]") {
  if (!test::has_tiles()) return;
  test::Random random(3);
  for (const std::uint32_t special : {0x7f800000u, 0xff800000u, 0x7fc00000u, 0x00010000u, 0x807f0000u}) {
    Words a = drawn_pairs(random, 0), b = drawn_pairs(random, 0);
    a[35] = special | special >> 16;
    b[100] = special;
    const Words hardware = product<HardwareTiles>({}, a, b, 64),
                emulated = product<EmulatedTiles>({}, a, b, 64);
    int wrong = 0;
    for (std::size_t i = 0; i < hardware.size(); ++i) {
      const float x = std::bit_cast<float>(hardware[i]), y = std::bit_cast<float>(emulated[i]);
      wrong += !(hardware[i] == emulated[i] || (std::isnan(x) && std::isnan(y)));
    }
    INFO("bits " << special);
    CHECK(wrong == 0);
  }
}

TEST_CASE("tile unit: a Scope restores the tile configuration of the program", "[simd][amx]") {
  if (!test::has_tiles()) return;
  struct alignas(64) Bytes {
    unsigned char byte[64] = {};
  };
  Bytes of_program, after;
  of_program.byte[0] = 1;    // palette
  of_program.byte[16] = 32;  // tile 0: rows of 32 bytes
  of_program.byte[48] = 7;   // tile 0: 7 rows
  asm volatile("ldtilecfg %0" : : "m"(of_program));
  { const HardwareTiles::Scope configured; }
  asm volatile("sttilecfg %0" : "=m"(after));
  asm volatile("tilerelease" : : : "memory");
  CHECK(std::memcmp(&of_program, &after, sizeof after) == 0);

  { const HardwareTiles::Scope configured; }
  asm volatile("sttilecfg %0" : "=m"(after));
  CHECK(after.byte[0] == 0);  // no configuration before, none after
}

#endif
