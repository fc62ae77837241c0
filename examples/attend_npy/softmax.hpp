// attend_npy softmax: exact attention.
#pragma once

#include <algorithm>
#include <array>
#include <string_view>

#include "arguments.hpp"
#include "attend_files.hpp"
#include "longspan/mask.hpp"
#include "longspan/score.hpp"
#include "longspan/softmax_attention.hpp"

namespace attend_npy {

inline constexpr std::string_view softmax_help =
    "causal=0|1   1: a query sees no later key (default 0)\n"
    "window=W     a query sees the keys less than W positions away\n"
    "scale=x      multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n"
    "softcap=c    scores become c * tanh(score / c)\n";

/// Every mask that the keys can ask for is a window, so the kernel is compiled once for all of them.
inline longspan::window softmax_mask(const Keys& keys) {
  longspan::window mask;
  if (const auto width = keys.positive_integer("window")) {
    mask.left = mask.right = std::min(*width - 1, longspan::window::unlimited);
  }
  if (keys.flag("causal")) mask.right = 0;
  return mask;
}

inline void softmax(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("softmax", std::array<std::string_view, 4>{"causal", "window", "scale", "softcap"});
  const longspan::window mask = softmax_mask(keys);
  const auto scale = keys.nonzero("scale");
  const auto cap = keys.positive_float("softcap");
  const auto run = [&](auto attend) {
    if (scale) attend.scale = *scale;
    attend_files(arguments, attend);
  };
  if (cap) {
    run(longspan::softmax_attention{mask, longspan::softcap{*cap}});
  } else {
    run(longspan::softmax_attention{mask});
  }
}

}  // namespace attend_npy
