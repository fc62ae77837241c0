// attend_npy landmark: grouped softmax over blocks with landmarks.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "arguments.hpp"
#include "attend_files.hpp"
#include "longspan/landmark_attention.hpp"
#include "longspan/mask.hpp"

namespace attend_npy {

inline constexpr std::string_view landmark_help =
    "block=B              every B-th key is a landmark, the last of its block\n"
    "landmarks=7,15,23    or: these keys are, in every batch row\n"
    "causal=0|1           1: a query sees no later key (default 0)\n"
    "scale=x              multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n";

/// "7,15,23"
inline std::vector<Index> landmark_list(std::string_view text) {
  std::vector<Index> keys;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t comma = std::min(text.find(',', begin), text.size());
    const auto key = number_in<Index>(text.substr(begin, comma - begin));
    if (!key || *key < (keys.empty() ? 0 : keys.back() + 1)) {
      throw Error("the key landmarks is '" + std::string(text) + "', wanted rising integers like 7,15,23");
    }
    keys.push_back(*key);
    begin = comma + 1;
  }
  return keys;
}

inline void landmark(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("landmark", std::array<std::string_view, 4>{"block", "landmarks", "causal", "scale"});
  const auto block = keys.positive_integer("block");
  const auto listed = keys.text("landmarks");
  if (block.has_value() == listed.has_value()) {
    throw Error(block ? "the keys block and landmarks are both given, wanted one"
                      : "the key block is missing, and so is landmarks");
  }
  const std::vector<Index> list = listed ? landmark_list(*listed) : std::vector<Index>();
  // Causal and not are both a window, so the kernel is compiled once for the two.
  longspan::window mask;
  if (keys.flag("causal")) mask.right = 0;
  longspan::landmark_attention attend{
      block ? longspan::landmarks::every(*block) : longspan::landmarks::at(list), mask};
  if (const auto scale = keys.nonzero("scale")) attend.scale = *scale;
  attend_files(arguments, attend);
}

}  // namespace attend_npy
