// The mask that the keys of softmax and softmax_stream ask for.
#pragma once

#include <algorithm>

#include "arguments.hpp"
#include "longspan/mask.hpp"

namespace attend_npy {

/// All that can be asked for is a window, so the kernel is compiled once for all.
inline longspan::window softmax_mask(const Keys& keys, bool causal) {
  longspan::window mask;
  if (const auto width = keys.positive_integer("window"))
    mask.left = mask.right = std::min(*width - 1, longspan::window::unlimited);
  if (causal) mask.right = 0;
  return mask;
}

}  // namespace attend_npy
