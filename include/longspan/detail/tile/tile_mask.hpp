// What a mask shows to one tile of queries, key block by key block.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Keys of a block that the same packets of queries see: scores, weights and values of a run are computed for
/// the packets [first_packet, first_packet + packets) only.
struct Run {
  Index begin = 0;  ///< in the block
  Index end = 0;
  int first_packet = 0;
  int packets = 0;
  unsigned partial = 0;  ///< bit c: packet c sees some of its pairs only

  bool continues_in(const Run& next) const noexcept {
    return end == next.begin && first_packet == next.first_packet && packets == next.packets;
  }
};

/// The longest key block of any arithmetic policy.
inline constexpr Index most_keys_in_block = 256;

/// The length of a strip: the keys that are tested together if the edge of a mask crosses a block.
template <class Real>
inline constexpr Index keys_in_strip = std::max<Index>(lanes<Real>, tile_rows);

/// For any mask. If `classify` answers `some` for a block, the mask is asked once for each pair and the answers are
/// kept as bits.
template <class Real, class M>
class TileMask {
 public:
  using Scalar = Real;
  static constexpr bool may_hide = true;

  void prepare(const M& mask, const QueryLanes& lanes_of_tile) {
    mask_ = &mask;
    lanes_ = lanes_of_tile;
  }
  KeyRanges ranges() const { return key_ranges(*mask_, lanes_.tile(0, lanes_.count, {0, 0})); }

  /// What the queries in packet c see of the keys.
  Coverage classify(int c, KeyRange keys) const {
    return longspan::classify(*mask_, lanes_.tile(c * w, w, keys));
  }

  /// Reads the block that `whole` leaves open; `whole` is what `classify` said of all its keys.
  void enter_block(Index first_key, const Run& whole) {
    first_key_ = first_key;
    const auto used = static_cast<std::size_t>((whole.end + 63) / 64);
    for (int c = 0; c < tile_packets; ++c) {
      PacketBits& of_packet = bits_[std::size_t(c)];
      const bool takes_part = whole.first_packet <= c && c < whole.first_packet + whole.packets;
      const Words none{}, all = words_of({0, whole.end});
      if (!takes_part || (whole.partial >> c & 1u) == 0) {
        of_packet = takes_part ? PacketBits{all, all} : PacketBits{none, none};
        continue;
      }
      Words open = all, seen = none;
      if constexpr (!has_cheap_bits<M>) ask_classify(c, whole.end, open, seen);
      of_packet = {none, all};
      for (Index lane = c * w; lane < (c + 1) * w; ++lane) {
        if (lane >= lanes_.count && lane > c * w) {
          repeat_lane_before(lane);
          continue;
        }
        const Index head = lanes_.head(lane), position = lanes_.position(lane);
        for (std::size_t n = 0; n < used; ++n) {
          std::uint64_t bits = seen[n];
          if (open[n] != 0) {
            bits |= seen_bits(*mask_, lanes_.batch, head, position, first_key + 64 * static_cast<Index>(n),
                              open[n]);
          }
          of_packet.any[n] |= bits;
          of_packet.all[n] &= bits;
          spread(bits, lane, n);
        }
      }
    }
  }

  /// What packet c sees of the keys [begin, end) of the block that was entered, a strip.
  Coverage classify_entered(int c, Index begin, Index end) const {
    static_assert(64 % keys_in_strip<Real> == 0);
    const std::size_t word = static_cast<std::size_t>(begin) / 64;
    const std::uint64_t keys = bits_of_range({begin, end}, 64 * static_cast<Index>(word));
    const PacketBits& of_packet = bits_[std::size_t(c)];
    const bool any = (keys & of_packet.any[word]) != 0, all = (keys & ~of_packet.all[word]) == 0;
    return any ? all ? Coverage::all : Coverage::some : Coverage::none;
  }

  /// The condition under which the queries in packet c see key j.
  Packet<Real> visible(int c, Index j) const {
    const auto at = static_cast<std::size_t>(j - first_key_);
    const Packet<Real> key = broadcast(one_and_bit.data() + at % group);
    const Real* of_lanes = lane_bits_.data() + at / group * std::size_t(tile_lanes<Real>) + c * w;
    return equal(load(of_lanes) & key, key);
  }

 private:
  static constexpr int w = lanes<Real>;
  static constexpr std::size_t words = std::size_t(most_keys_in_block) / 64;
  using Words = std::array<std::uint64_t, words>;
  struct PacketBits {
    Words any, all;  ///< bit n: does one of the packet's queries see key n of the block, do they all?
  };

  static Words words_of(KeyRange keys) {
    Words of_keys;
    for (std::size_t n = 0; n < words; ++n) of_keys[n] = bits_of_range(keys, 64 * static_cast<Index>(n));
    return of_keys;
  }

  /// Closes the strips of which the mask's own classify knows all.
  void ask_classify(int c, Index keys, Words& open, Words& seen) const {
    for (Index begin = 0; begin < keys; begin += keys_in_strip<Real>) {
      const Index end = (std::min)(keys, begin + keys_in_strip<Real>);
      const Coverage of_strip = classify(c, {first_key_ + begin, first_key_ + end});
      if (of_strip == Coverage::some) continue;
      const Words strip = words_of({begin, end});
      for (std::size_t n = 0; n < words; ++n) {
        open[n] &= ~strip[n];
        if (of_strip == Coverage::all) seen[n] |= strip[n];
      }
    }
  }

  // The bits of a lane are held 16 to a Real, in the fraction of a number from 1 to 2: so they are compared as
  // numbers, on any machine and under any flags, and lanes need no transposition.
  static constexpr std::size_t group = 16, groups = std::size_t(most_keys_in_block) / group;
  using Bits = std::conditional_t<sizeof(Real) == 4, std::uint32_t, std::uint64_t>;
  static constexpr Bits one = std::bit_cast<Bits>(Real(1));
  static constexpr auto one_and_bit = [] {
    std::array<Real, group> numbers{};
    for (std::size_t n = 0; n < numbers.size(); ++n) numbers[n] = std::bit_cast<Real>(one | Bits{1} << n);
    return numbers;
  }();

  /// Row n of lane_bits_ is that of the keys from group * n on.
  Real* group_of(std::size_t n, Index lane) { return lane_bits_.data() + Index(n) * tile_lanes<Real> + lane; }
  void spread(std::uint64_t bits, Index lane, std::size_t word) {
    for (std::size_t n = 0; n < 64 / group; ++n, bits >>= group)
      *group_of(word * (64 / group) + n, lane) = std::bit_cast<Real>(one | static_cast<Bits>(bits & 0xffff));
  }
  void repeat_lane_before(Index lane) {
    for (std::size_t n = 0; n < groups; ++n) *group_of(n, lane) = *group_of(n, lane - 1);
  }

  const M* mask_ = nullptr;
  QueryLanes lanes_;
  Index first_key_ = 0;
  std::array<PacketBits, std::size_t(tile_packets)> bits_;
  alignas(64) std::array<Real, groups * std::size_t(tile_lanes<Real>)> lane_bits_;
};

/// Where each query sees one range of keys, a key's index is compared with the two ends that each lane holds.
template <class Real, RangeMask M>
class TileMask<Real, M> {
 public:
  using Scalar = Real;
  static constexpr bool may_hide = !std::is_same_v<M, everything>;

  void prepare(const M& mask, const QueryLanes& lanes_of_tile) {
    if constexpr (!may_hide) return;
    for (int lane = 0; lane < tile_lanes<Real>; ++lane) {
      // Lanes of one position see the same keys.
      const bool repeats = lane > 0 && lanes_of_tile.row(lane) == lanes_of_tile.row(lane - 1);
      keys_[at(lane)] =
          repeats ? keys_[at(lane - 1)] : mask.keys(lanes_of_tile.batch, lanes_of_tile.position(lane));
    }
  }
  KeyRanges ranges() const {
    if constexpr (!may_hide) return KeyRanges(KeyRange::everything());
    return KeyRanges({keys_.front().begin, keys_.back().end});
  }

  Coverage classify(int c, KeyRange keys) const {
    if constexpr (!may_hide) return Coverage::all;
    const KeyRange first = keys_[at(c * lanes<Real>)], last = keys_[at((c + 1) * lanes<Real> - 1)];
    const bool some = KeyRange{first.begin, last.end}.overlaps(keys),
               all = KeyRange{last.begin, first.end}.contains(keys);
    return some ? all ? Coverage::all : Coverage::some : Coverage::none;
  }

  /// Ends are held relative to the block, where they are small numbers and exact in Real.
  void enter_block(Index first_key, const Run&) {
    first_key_ = first_key;
    constexpr Index beyond = 1 << 20;
    for (int lane = 0; lane < tile_lanes<Real>; ++lane) {
      const KeyRange of_lane = keys_[at(lane)];
      const auto relative = [&](Index key) {
        return static_cast<Real>(std::clamp(key, first_key - 1, first_key + beyond) - first_key) - Real(0.5);
      };
      begin_[at(lane)] = relative(of_lane.begin);
      end_[at(lane)] = relative(of_lane.end);
    }
  }
  Coverage classify_entered(int c, Index begin, Index end) const {
    return classify(c, {first_key_ + begin, first_key_ + end});
  }
  Packet<Real> visible(int c, Index j) const {
    const Packet<Real> key = broadcast(static_cast<Real>(j - first_key_));
    return less(load(begin_.data() + c * lanes<Real>), key) & less(key, load(end_.data() + c * lanes<Real>));
  }

 private:
  static constexpr std::size_t at(int lane) { return static_cast<std::size_t>(lane); }
  static constexpr std::size_t size = static_cast<std::size_t>(tile_lanes<Real>);

  std::array<KeyRange, size> keys_{};
  alignas(64) std::array<Real, size> begin_{}, end_{};
  Index first_key_ = 0;
};

/// The runs of one block of keys, of at most `capacity` strips.
struct Runs {
  static constexpr int capacity = 32;
  std::array<Run, capacity> run;
  int count = 0;

  const Run* begin() const noexcept { return run.data(); }
  const Run* end() const noexcept { return run.data() + count; }
  bool empty() const noexcept { return count == 0; }
  bool any_partial() const noexcept {
    return std::any_of(begin(), end(), [](const Run& each) { return each.partial != 0; });
  }

  void add(const Run& next) {
    if (next.packets == 0) return;
    if (count > 0) {
      Run& last = run[static_cast<std::size_t>(count - 1)];
      if (last.continues_in(next) && last.partial == next.partial) {
        last.end = next.end;
        return;
      }
    }
    run[static_cast<std::size_t>(count++)] = next;
  }
};

/// What the packets see of the keys [begin, end) of a block, as one run: packet c answers `seen_by(c)`.
template <class SeenBy>
Run run_of(int packets, Index begin, Index end, const SeenBy& seen_by) {
  unsigned seen = 0, whole = 0;  // bits of packets; no branch, since edges of masks are not foreseen
  for (int c = 0; c < packets; ++c) {
    const Coverage of_packet = seen_by(c);
    seen |= unsigned(of_packet != Coverage::none) << c;
    whole |= unsigned(of_packet == Coverage::all) << c;
  }
  const int first = seen == 0 ? 0 : std::countr_zero(seen), behind = static_cast<int>(std::bit_width(seen));
  // A packet between two that see something takes part, hidden.
  const unsigned taking_part = (1u << behind) - (1u << first);
  return {begin, end, first, behind - first, taking_part & ~whole};
}

/// Cuts a block into runs, and enters it where one of them is partial. A block that is seen whole is one run;
/// where a mask's edge crosses it, it is looked at in strips as many keys high as a packet has lanes, so that
/// the causal diagonal shrinks packet by packet (at q_len = 512, head_dim 64 that is 8 % of a call).
template <Index strip, class MaskOfTile>
Runs cut_into_runs(MaskOfTile& mask, int packets, Index first_key, Index keys) {
  static_assert(64 % strip == 0 && strip % keys_in_strip<typename MaskOfTile::Scalar> == 0);
  Runs runs;
  const Run whole = run_of(packets, 0, keys, [&](int c) {
    return mask.classify(c, {first_key, first_key + keys});
  });
  if (whole.partial == 0 || whole.packets == 0) {
    runs.add(whole);
    return runs;
  }
  mask.enter_block(first_key, whole);
  for (Index begin = 0; begin < keys; begin += strip) {
    const Index end = (std::min)(keys, begin + strip);
    runs.add(run_of(packets, begin, end, [&](int c) { return mask.classify_entered(c, begin, end); }));
  }
  return runs;
}

template <class MaskOfTile>
Runs cut_into_runs(MaskOfTile& mask, int packets, Index first_key, Index keys) {
  return cut_into_runs<keys_in_strip<typename MaskOfTile::Scalar>>(mask, packets, first_key, keys);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
