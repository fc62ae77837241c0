// A mask that also hides the keys after each query.
#pragma once

#include <type_traits>

#include "longspan/detail/call/stream_mask.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// M without the keys after a query. It is a new type only where necessary, so that a stream runs the same kernels as
/// calls of its functor.
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
LONGSPAN_NAMESPACE_END
