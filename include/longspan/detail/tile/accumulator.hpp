// The running softmax of a tile of queries: maximum, sum and output of each lane.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The row max of a lane that has seen no key.
template <class Real>
inline constexpr Real empty_max = std::numeric_limits<Real>::lowest() / 4;

/// The natural log-sum-exp of a lane: -infinity if it has seen no key.
template <class Real>
Real lse_of(Real row_max, Real sum) {
  if (sum == Real(0)) return minus_infinity<Real>();
  return static_cast<Real>(static_cast<double>(row_max) / double(score_unit<Real>) +
                           std::log(static_cast<double>(sum)));
}

/// Invariant, with S the scores absorbed so far in score units: sum = sum of exp_score(S - row_max) and
/// o[column][lane] = sum of exp_score(S - row_max) * v[column]. row_max = max(S); for matrix tiles it may be up to
/// AmxArithmetic::most_rise lower. Before the first key sum == 0 and o == 0.
template <class Real>
struct Accumulator {
  Real* o = nullptr;  ///< [columns][stride]
  Real* row_max = nullptr;
  Real* sum = nullptr;
  Index columns = 0;
  Index stride = 0;  ///< lanes

  static Accumulator take(Arena& arena, Index columns, Index stride) {
    Accumulator a;
    a.o = arena.take<Real>(columns * stride);
    a.row_max = arena.take<Real>(stride);
    a.sum = arena.take<Real>(stride);
    a.columns = columns;
    a.stride = stride;
    return a;
  }

  void clear() const {
    std::fill_n(o, columns * stride, Real(0));
    std::fill_n(row_max, stride, empty_max<Real>);
    std::fill_n(sum, stride, Real(0));
  }

  /// Adds the keys that `other` has absorbed and this one has not. Exact if one of the two has absorbed nothing.
  void merge(const Accumulator& other) const {
    for (Index lane = 0; lane < stride; lane += lanes<Real>) {
      const Packet<Real> mine = load<Real>(row_max + lane), others = load<Real>(other.row_max + lane),
                         both = lane_max(mine, others);
      const Packet<Real> my_share = exp_score(mine - both), other_share = exp_score(others - both);
      store(row_max + lane, both);
      store(sum + lane, fma(load<Real>(sum + lane), my_share, load<Real>(other.sum + lane) * other_share));
      for (Index column = 0; column < columns; ++column) {
        Real* to = o + column * stride + lane;
        const Real* from = other.o + column * stride + lane;
        store(to, fma(load<Real>(to), my_share, load<Real>(from) * other_share));
      }
    }
  }
};

/// Keys are absorbed in chunks of at most 2^11, chunks are merged into spans of at most 2^17, and spans into the whole,
/// each cut at multiples of its length in key index. The error of a sum then grows with the square roots of 2^11 / 128,
/// 2^6 and keys / 2^17 instead of the square root of the number of keys. The cuts do not depend on the threads, so keys
/// can be split among threads without changing a bit.
inline constexpr Index keys_in_chunk = Index{1} << 11;
inline constexpr Index keys_in_span = Index{1} << 17;

/// The accumulators of one tile at the three levels, as many of them as `kv_len` keys need.
template <class Real>
class LeveledAccumulator {
 public:
  static LeveledAccumulator take(Arena& arena, Index columns, Index stride, Index kv_len) {
    LeveledAccumulator a;
    a.levels_ = 1 + (kv_len > keys_in_chunk) + (kv_len > keys_in_span);
    for (int level = 0; level < a.levels_; ++level)
      a.level_[level] = Accumulator<Real>::take(arena, columns, stride);
    return a;
  }

  /// Starts a tile of `stride` lanes, at most as many as `take` was given.
  void clear(Index stride) {
    for (int level = 0; level < levels_; ++level) {
      level_[level].stride = stride;
      level_[level].clear();
    }
    first_key_ = 0;
  }

  Index columns() const noexcept { return level_[0].columns; }

  /// The accumulator for the keys from `first_key` on. Keys are absorbed in rising order.
  const Accumulator<Real>& at_key(Index first_key) {
    if (levels_ > 1 && first_key / keys_in_chunk != first_key_ / keys_in_chunk) {
      carry(0);
      if (levels_ > 2 && first_key / keys_in_span != first_key_ / keys_in_span) carry(1);
      first_key_ = first_key;
    }
    return level_[0];
  }

  /// The merged result, after the last key.
  const Accumulator<Real>& whole() {
    for (int level = 0; level + 1 < levels_; ++level) carry(level);
    return level_[levels_ - 1];
  }

 private:
  void carry(int level) {
    level_[level + 1].merge(level_[level]);
    level_[level].clear();
  }

  Accumulator<Real> level_[3];
  int levels_ = 1;
  Index first_key_ = 0;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
