// The keys that dilated and dilated_stream share.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "longspan/dilated_attention.hpp"

namespace attend_npy {

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

template <longspan::Mask M>
longspan::dilated_attention<M> dilated_functor(const Keys& keys, const M& mask) {
  longspan::dilated_attention attend{dilated_branches(keys), mask};
  attend.phase =
      keys.choice("phase", "modulo", "blocked") == 0 ? longspan::Phase::modulo : longspan::Phase::blocked;
  attend.overlap =
      keys.choice("overlap", "multiset", "set") == 0 ? longspan::Overlap::multiset : longspan::Overlap::set;
  if (const auto scale = keys.nonzero("scale")) attend.scale = *scale;
  return attend;
}

}  // namespace attend_npy
