// The mask for the keys of softmax and softmax_stream.
#pragma once

#include <algorithm>

#include "arguments.hpp"
#include "longspan/mask.hpp"

namespace attend_npy {

/// Every mask of these keys is a window, so the kernel is compiled only once.
inline longspan::window softmax_mask(const Keys& keys, bool causal) {
  longspan::window mask;
  if (const auto width = keys.positive_integer("window"))
    mask.left = mask.right = std::min(*width - 1, longspan::window::unlimited);
  if (causal) mask.right = 0;
  return mask;
}

}  // namespace attend_npy
