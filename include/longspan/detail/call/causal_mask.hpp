// What a mask will still show: the keys that a stream has to keep.
#pragma once

#include <type_traits>

#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN
namespace detail {

/// Ranges that hold every key which a query at position `first` or behind it sees.
template <Mask M>
struct LaterKeys {
  static constexpr KeyRanges of(const M& mask, Index batch, Index first) {
    // The ends of a range mask never fall.
    if constexpr (RangeMask<M>) return KeyRanges({mask.keys(batch, first).begin, KeyRange::highest});
    return KeyRanges(KeyRange::everything());
  }
};

template <>
struct LaterKeys<sinks> {
  static constexpr KeyRanges of(const sinks& mask, Index, Index) { return KeyRanges(mask.keys(0, 0)); }
};

template <Mask A, Mask B>
struct LaterKeys<both<A, B>> {
  static constexpr KeyRanges of(const both<A, B>& mask, Index batch, Index first) {
    return intersection(LaterKeys<A>::of(mask.a, batch, first), LaterKeys<B>::of(mask.b, batch, first));
  }
};

template <Mask A, Mask B>
struct LaterKeys<either<A, B>> {
  static constexpr KeyRanges of(const either<A, B>& mask, Index batch, Index first) {
    return united(LaterKeys<A>::of(mask.a, batch, first), LaterKeys<B>::of(mask.b, batch, first));
  }
};

template <Mask M>
constexpr KeyRanges later_keys(const M& mask, Index batch, Index first) {
  return LaterKeys<M>::of(mask, batch, first);
}

/// Does M already hide the keys behind a query?
template <class M>
inline constexpr bool hides_later_keys = std::is_same_v<M, causal>;
template <class A, class B>
inline constexpr bool hides_later_keys<both<A, B>> = hides_later_keys<A> || hides_later_keys<B>;

/// The mask of a stream: M, and no query sees what comes behind it. A type of its own only where it must be,
/// so that a stream runs the kernels that calls of its functor do.
template <class M>
using CausalMask =
    std::conditional_t<hides_later_keys<M>, M,
                       std::conditional_t<std::is_same_v<M, everything>, causal, both<causal, M>>>;

template <Mask M>
constexpr CausalMask<M> causal_mask(const M& mask) {
  if constexpr (hides_later_keys<M>) {
    return mask;
  } else if constexpr (std::is_same_v<M, everything>) {
    return causal{};
  } else {
    return causal{} & mask;
  }
}

}  // namespace detail
LONGSPAN_END
