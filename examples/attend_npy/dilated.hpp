// attend_npy dilated: LongNet's dilated attention.
#pragma once

#include <array>
#include <cstddef>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "arguments.hpp"
#include "attend_files.hpp"
#include "longspan/dilated_attention.hpp"
#include "longspan/mask.hpp"

namespace attend_npy {

inline constexpr std::string_view dilated_help =
    "segments=W,W,...         segment lengths, one for each branch\n"
    "dilations=r,r,...        their dilations (default 1 each)\n"
    "causal=0|1               1: a query sees no later key (default 0)\n"
    "phase=modulo|blocked     offset of head h: h mod r, or as torchscale (default modulo)\n"
    "overlap=multiset|set     a key of several branches counts several times, or once (default multiset)\n"
    "zero_pad=0|1             1: short segments are filled with zeros, as torchscale does (default 0)\n"
    "scale=x                  multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n";

inline std::vector<longspan::Branch> dilated_branches(const Keys& keys) {
  const std::vector<Index> segments = keys.positive_integers("segments");
  std::vector<Index> dilations = keys.positive_integers("dilations");
  if (segments.empty()) throw Error("the key segments is missing");
  if (dilations.empty()) dilations.assign(segments.size(), 1);
  if (dilations.size() != segments.size()) {
    throw Error("the key dilations has " + std::to_string(dilations.size()) + " numbers, wanted " +
                std::to_string(segments.size()) + " as the key segments has");
  }
  std::vector<longspan::Branch> branches;
  for (std::size_t n = 0; n < segments.size(); ++n) branches.push_back({segments[n], dilations[n]});
  return branches;
}

inline void dilated(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("dilated", std::array<std::string_view, 7>{"segments", "dilations", "causal", "phase", "overlap",
                                                        "zero_pad", "scale"});
  // Causal and not are both a window, so the kernel is compiled once for the two.
  longspan::window mask;
  if (keys.flag("causal")) mask.right = 0;
  longspan::dilated_attention attend{dilated_branches(keys), mask};
  attend.phase =
      keys.choice("phase", "modulo", "blocked") == 0 ? longspan::Phase::modulo : longspan::Phase::blocked;
  attend.overlap =
      keys.choice("overlap", "multiset", "set") == 0 ? longspan::Overlap::multiset : longspan::Overlap::set;
  attend.zero_pad_compat = keys.flag("zero_pad");
  if (const auto scale = keys.nonzero("scale")) attend.scale = *scale;
  attend_files(arguments, attend);
}

}  // namespace attend_npy
