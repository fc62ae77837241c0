// What a mask shows to a tile of keys, query block by query block.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "longspan/detail/gradient/products.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/detail/tile/tile_mask.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The mask of a tile whose lanes are keys and whose rows are queries: TileMask turned round, with the same members, so
/// that cut_into_runs serves both. Lanes behind the last key repeat what it shows.
template <class Real, class M>
class KeyMask {
 public:
  using Scalar = Real;
  static constexpr bool may_hide = !std::is_same_v<M, everything>;
  static_assert(tile_lanes<Real> <= 64);

  /// Keys [first_key, first_key + keys), at most a tile of lanes.
  void prepare(const M& mask, Index first_key, Index keys) {
    mask_ = &mask;
    first_key_ = first_key;
    keys_ = keys;
  }
  /// The queries that follow belong to this head, and row 0 is at position `first_query`.
  void enter_head(Index batch, Index head, Index first_query) {
    batch_ = batch;
    head_ = head;
    first_query_ = first_query;
  }

  /// What packet c of keys shows to the rows.
  Coverage classify(int c, KeyRange rows) const {
    if constexpr (!may_hide) return Coverage::all;
    const Index first = c * w, count = (std::min)(w, keys_ - first);
    return longspan::classify(*mask_, Tile{batch_, head_, 1, first_query_ + rows.begin, rows.end - rows.begin,
                                           first_key_ + first, count});
  }

  /// Reads what each row of the block from `first_row` on sees of the keys.
  void enter_block(Index first_row, const Run& whole) {
    first_row_ = first_row;
    const std::uint64_t asked = low_bits(keys_);
    for (Index r = 0; r < whole.end; ++r) {
      std::uint64_t bits = seen_bits(*mask_, batch_, head_, first_query_ + first_row + r, first_key_, asked);
      if ((bits >> (keys_ - 1) & 1u) != 0) bits |= ~asked;
      bits_[static_cast<std::size_t>(r)] = bits;
    }
  }

  /// What packet c shows to the rows [begin, end) of the block that was entered.
  Coverage classify_entered(int c, Index begin, Index end) const {
    std::uint64_t any = 0, all = ~std::uint64_t{0};
    for (Index r = begin; r < end; ++r) {
      any |= bits_[static_cast<std::size_t>(r)];
      all &= bits_[static_cast<std::size_t>(r)];
    }
    const std::uint64_t of_packet = low_bits(w) << (c * w);
    return (any & of_packet) == 0 ? Coverage::none : (~all & of_packet) == 0 ? Coverage::all : Coverage::some;
  }

  /// Bit n: the row sees key n of the tile.
  std::uint64_t seen_by(Index row) const { return bits_[static_cast<std::size_t>(row - first_row_)]; }

  /// The condition under which the keys of packet c are seen by a row.
  Packet<Real> visible(int c, Index row) const {
    const Packet<Real> key = load(bit_of_lane.data());
    const auto bits = static_cast<Bits>(seen_by(row) >> (c * w) & low_bits(w));
    return equal(broadcast(std::bit_cast<Real>(one | bits)) & key, key);
  }

 private:
  static constexpr Index w = lanes<Real>;

  // The bits of the lanes are held in the fraction of a number from 1 to 2, as in TileMask.
  using Bits = BitsOf<Real>;
  static constexpr Bits one = std::bit_cast<Bits>(Real(1));
  static constexpr auto bit_of_lane = [] {
    std::array<Real, static_cast<std::size_t>(w)> numbers{};
    for (std::size_t n = 0; n < numbers.size(); ++n) numbers[n] = std::bit_cast<Real>(one | Bits{1} << n);
    return numbers;
  }();

  const M* mask_ = nullptr;
  Index first_key_ = 0, keys_ = 0, batch_ = 0, head_ = 0, first_query_ = 0, first_row_ = 0;
  std::array<std::uint64_t, static_cast<std::size_t>(rows_in_tile_query_block)>
      bits_;  ///< of the longest block
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
