// A mask as one tile of queries meets it, key block by key block.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <type_traits>

#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/detail/tile/query_lanes.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"

LONGSPAN_BEGIN
namespace detail {

/// For any mask: asks `sees` for each pair of a tile that `classify` leaves open.
template <class Real, class M>
class TileMask {
 public:
  static constexpr bool may_hide = true;

  void prepare(const M& mask, const QueryLanes& lanes_of_tile) {
    mask_ = &mask;
    lanes_ = lanes_of_tile;
  }
  KeyRanges ranges() const { return key_ranges(*mask_, lanes_.tile(0, lanes_.count, {0, 0})); }

  /// What the queries in packet c see of the keys.
  Seen classify(int c, KeyRange keys) const {
    return longspan::classify(*mask_, lanes_.tile(c * lanes<Real>, lanes<Real>, keys));
  }
  void enter_block(Index) {}

  /// The condition under which the queries in packet c see key j.
  Packet<Real> visible(int c, Index j) const {
    alignas(64) std::array<Real, static_cast<std::size_t>(lanes<Real>)> seen;
    for (int i = 0; i < lanes<Real>; ++i) {
      const Index lane = c * lanes<Real> + i;
      const bool yes = sees(*mask_, lanes_.batch, lanes_.head(lane), lanes_.position(lane), j);
      seen[static_cast<std::size_t>(i)] = yes ? Real(1) : Real(0);
    }
    return less(broadcast(Real(0)), load(static_cast<const Real*>(seen.data())));
  }

 private:
  const M* mask_ = nullptr;
  QueryLanes lanes_;
};

/// Where each query sees one range of keys, a key's index is compared with the two ends that each lane holds.
template <class Real, RangeMask M>
class TileMask<Real, M> {
 public:
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

  Seen classify(int c, KeyRange keys) const {
    if constexpr (!may_hide) return Seen::all;
    const KeyRange first = keys_[at(c * lanes<Real>)], last = keys_[at((c + 1) * lanes<Real> - 1)];
    const bool some = KeyRange{first.begin, last.end}.overlaps(keys),
               all = KeyRange{last.begin, first.end}.contains(keys);
    return some ? all ? Seen::all : Seen::some : Seen::none;
  }

  /// Ends are held relative to the block, where they are small numbers and exact in Real.
  void enter_block(Index first_key) {
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

/// Strips in which a block is looked at where the edge of a mask crosses it.
template <class Real>
inline constexpr Index keys_in_strip = std::max<Index>(lanes<Real>, tile_rows);

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

/// What the packets see of the keys [begin, end) of a block that starts at `first_key`, as one run.
template <class Real, Mask M>
Run run_of(const TileMask<Real, M>& mask, int packets, Index first_key, Index begin, Index end) {
  unsigned seen = 0, whole = 0;  // bits of packets; no branch, since edges of masks are not foreseen
  for (int c = 0; c < packets; ++c) {
    const Seen of_packet = mask.classify(c, {first_key + begin, first_key + end});
    seen |= unsigned(of_packet != Seen::none) << c;
    whole |= unsigned(of_packet == Seen::all) << c;
  }
  const int first = seen == 0 ? 0 : std::countr_zero(seen), behind = static_cast<int>(std::bit_width(seen));
  // A packet between two that see something takes part, hidden.
  const unsigned taking_part = (1u << behind) - (1u << first);
  return {begin, end, first, behind - first, taking_part & ~whole};
}

/// Cuts a block into runs. A block that is seen whole is one run; where a mask's edge crosses it, it is
/// looked at in strips as many keys high as a packet has lanes, so that the causal diagonal shrinks packet by
/// packet (at q_len = 512, head_dim 64 that is 8 % of a call).
template <class Real, Mask M>
Runs cut_into_runs(const TileMask<Real, M>& mask, int packets, Index first_key, Index keys) {
  constexpr Index strip = keys_in_strip<Real>;
  Runs runs;
  const Run whole = run_of(mask, packets, first_key, 0, keys);
  if (whole.partial == 0 || whole.packets == 0) {
    runs.add(whole);
    return runs;
  }
  for (Index begin = 0; begin < keys; begin += strip) {
    runs.add(run_of(mask, packets, first_key, begin, std::min(keys, begin + strip)));
  }
  return runs;
}

}  // namespace detail
LONGSPAN_END
