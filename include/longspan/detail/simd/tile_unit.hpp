// The tile unit of a processor with AMX, and the same in plain C++.
//
// A tile is a register of 16 rows of 64 bytes. Its one operation here multiplies bfloat16:
//   C[m][n] += sum over k of A[m][2k] * B[k][2n] + A[m][2k + 1] * B[k][2n + 1]
// with C of 16 x 16 floats, A of 16 rows of 32 bfloat16, and B of 16 rows of 16 pairs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "longspan/amx.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

inline constexpr int rows_of_tile = 16;
inline constexpr int pairs_in_tile_row = 16;  ///< pairs of bfloat16, or floats

#if defined(LONGSPAN_TARGETS_AMX)

/// The hardware. Instructions are written out: the intrinsics of g++ 12 take no template argument for a tile's number,
/// and do not say that they read memory.
class HardwareTiles {
 public:
  /// During the lifetime of such an object all eight tiles of this thread are configured to their full size; the
  /// destructor restores the previous configuration (but not the contents of tiles, which no function preserves).
  class Scope {
   public:
    Scope() noexcept {
      asm volatile("sttilecfg %0" : "=m"(before_));
      Configuration all;
      asm volatile("ldtilecfg %0" : : "m"(all));
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    ~Scope() {
      if (before_.palette == 0) {
        asm volatile("tilerelease" : : : "memory");
      } else {
        asm volatile("ldtilecfg %0" : : "m"(before_) : "memory");
      }
    }

   private:
    struct alignas(64) Configuration {
      std::uint8_t palette = 1, start_row = 0;
      std::uint8_t reserved[14] = {};
      std::uint16_t bytes_in_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Configuration before_;
  };

  template <int tile>
  static LONGSPAN_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  /// Rows are `stride` bytes apart.
  template <int tile>
  static LONGSPAN_INLINE void load(const void* from, Index stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  static LONGSPAN_INLINE void store(void* to, Index stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
  }
  template <int c, int a, int b>
  static LONGSPAN_INLINE void add_products() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};

#endif

/// The same results to the bit, on any processor, for numbers whose sums stay 2^24 above the smallest normal number.
class EmulatedTiles {
 public:
  struct Scope {
    Scope() noexcept {}
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    ~Scope() {}
  };

  template <int tile>
  static void zero() {
    std::memset(words(tile), 0, sizeof(Tile));
  }
  template <int tile>
  static void load(const void* from, Index stride) {
    for (int r = 0; r < rows_of_tile; ++r)
      std::memcpy(words(tile) + r * pairs_in_tile_row, static_cast<const char*>(from) + r * stride, 64);
  }
  template <int tile>
  static void store(void* to, Index stride) {
    for (int r = 0; r < rows_of_tile; ++r)
      std::memcpy(static_cast<char*>(to) + r * stride, words(tile) + r * pairs_in_tile_row, 64);
  }
  /// Adds the products of even columns and those of odd columns separately, with fused multiply-adds, and then adds the
  /// sum of both to C.
  template <int c, int a, int b>
  static void add_products() {
    for (int m = 0; m < rows_of_tile; ++m) {
      for (int n = 0; n < pairs_in_tile_row; ++n) {
        float even = 0, odd = 0;
        for (int k = 0; k < pairs_in_tile_row; ++k) {
          const std::uint32_t x = words(a)[m * pairs_in_tile_row + k],
                              y = words(b)[k * pairs_in_tile_row + n];
          even = flushed(std::fma(number(x << 16), number(y << 16), even));
          odd = flushed(std::fma(number(x & 0xffff0000u), number(y & 0xffff0000u), odd));
        }
        std::uint32_t& sum = words(c)[m * pairs_in_tile_row + n];
        sum = std::bit_cast<std::uint32_t>(flushed(std::bit_cast<float>(sum) + flushed(even + odd)));
      }
    }
  }

 private:
  using Tile = std::uint32_t[rows_of_tile * pairs_in_tile_row];
  static std::uint32_t* words(int tile) {
    static thread_local Tile tiles[8];
    return tiles[tile];
  }
  static std::uint32_t without_denormals(std::uint32_t bits) {
    return (bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits;
  }
  static float number(std::uint32_t bits) { return std::bit_cast<float>(without_denormals(bits)); }
  static float flushed(float x) { return number(std::bit_cast<std::uint32_t>(x)); }
};

/// A tile unit for keys and values of int8. Row j of keys stands for k_scale[j] times its numbers, which are exact in
/// bfloat16, and so are those of values: scores are multiplied by k_scale, and weights by v_scale before they are
/// rounded.
template <class TileUnit>
struct RowScales : TileUnit {
  static constexpr bool scales_rows = true;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
