// Chunks in which the streaming variants take their tokens.
#pragma once

#include <string>
#include <vector>

#include "arguments.hpp"

namespace attend_npy {

/// The wanted chunks, which must add up to the tokens; one of all tokens where none are wanted.
inline std::vector<Index> chunks_of(const std::vector<Index>& wanted, Index tokens) {
  if (wanted.empty()) return {tokens};
  Index left = tokens;
  for (const Index length : wanted) left = left < 0 || length > left ? -1 : left - length;
  if (left != 0) throw Error("the key chunks does not add up to the " + std::to_string(tokens) + " tokens");
  return wanted;
}

}  // namespace attend_npy
