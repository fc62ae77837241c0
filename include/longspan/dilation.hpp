// Branches of dilated attention: the tokens that they cover, schedules of branches, and their cost.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// Cuts the sequence into segments of `segment` tokens and keeps every `dilation`-th token of each segment: those whose
/// index in the segment is the head's offset plus a multiple of `dilation`.
struct Branch {
  Index segment = 1;
  Index dilation = 1;

  LONGSPAN_INLINE constexpr bool operator==(const Branch&) const = default;
};

/// How the heads are distributed over the `dilation` possible offsets.
enum class Phase : std::uint8_t {
  modulo,   ///< h mod dilation: the paper
  blocked,  ///< h / ceil(heads / dilation): torchscale, and the weights of LongViT and GigaPath
};

/// How often a key counts that several branches of a query contain.
enum class Overlap : std::uint8_t {
  multiset,  ///< once for each of these branches, as in the paper
  set,       ///< once
};

/// How the gradient treats the weights by which the branches of dilated attention are merged.
enum class Mixing : std::uint8_t {
  exact,     ///< as functions of q and k: the gradient of the functor
  detached,  ///< as constants, as torchscale trains
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN

/// The offset of head `h` of `heads` in the segments of a branch, in [0, dilation).
constexpr Index head_offset(Phase phase, Index h, Index heads, Index dilation) noexcept {
  return phase == Phase::modulo ? h % dilation : h / ((heads - 1) / dilation + 1);
}

/// True if a branch keeps the token at position n >= 0 for a head with that offset.
constexpr bool covers(const Branch& branch, Index offset, Index n) noexcept {
  return n % branch.segment % branch.dilation == offset;
}

/// The number of rows that a head keeps of a segment of `length` tokens: floor((length - 1 - offset) / dilation) + 1.
constexpr Index kept_rows(Index length, Index offset, Index dilation) noexcept {
  return length <= offset ? 0 : (length - 1 - offset) / dilation + 1;
}

namespace detail {

/// Throws Error if a branch is not positive.
inline void check_each_branch(std::string_view function, std::span<const Branch> branches) {
  for (std::size_t n = 0; n < branches.size(); ++n) {
    const Branch& branch = branches[n];
    if (branch.segment >= 1 && branch.dilation >= 1) continue;
    refuse(
        function, "branch " + std::to_string(n),
        "[segment " + std::to_string(branch.segment) + ", dilation " + std::to_string(branch.dilation) + "]",
        "both at least 1");
  }
}

inline void check_branches(std::string_view function, std::span<const Branch> branches) {
  if (branches.empty()) refuse(function, "the number of branches", "0", "at least one");
  check_each_branch(function, branches);
}

/// The number of keys including the zeros that zero_pad_compat appends to kv_len tokens.
inline Index padded_length(std::span<const Branch> branches, Index kv_len) {
  Index longest = kv_len;
  for (const Branch& branch : branches) {
    if (kv_len == 0) break;
    const Index segment = (std::min)(branch.segment, kv_len), step = (std::min)(branch.dilation, segment);
    longest = (std::max)(longest, (kv_len - 1) / segment * segment + (segment + step - 1) / step * step);
  }
  return longest;
}

/// The branch (segment * ratio, dilation * ratio), with both limited to the largest Index.
constexpr Branch times(const Branch& branch, Index ratio) noexcept {
  constexpr Index most = (std::numeric_limits<Index>::max)();
  return {branch.segment > most / ratio ? most : branch.segment * ratio,
          branch.dilation > most / ratio ? most : branch.dilation * ratio};
}

inline void check_schedule(const Branch& first, Index ratio) {
  check_branches("geometric_branches", std::span<const Branch>(&first, 1));
  if (ratio < 2) refuse("geometric_branches", "the ratio", std::to_string(ratio), "at least 2");
}

}  // namespace detail

/// `count` branches; segment and dilation of each are `ratio` times those of the branch before.
///
/// Throws  Error if segment or dilation is below 1, or the ratio below 2
/// Source  Ding et al. 2023 (arXiv 2307.02486), eq. 11 and 12
inline std::vector<Branch> geometric_branches(Branch first, Index ratio, Index count) {
  detail::check_schedule(first, ratio);
  std::vector<Branch> branches;
  for (Index n = 0; n < count; ++n, first = detail::times(first, ratio)) branches.push_back(first);
  return branches;
}

/// The same, with as many branches as it takes until a segment has `length` tokens; the last branch then connects both
/// ends of the sequence.
inline std::vector<Branch> geometric_branches_to(Branch first, Index ratio, Index length) {
  detail::check_schedule(first, ratio);
  std::vector<Branch> branches{first};
  while (branches.back().segment < length) branches.push_back(detail::times(branches.back(), ratio));
  return branches;
}

/// The number of pairs of a query and a key in one branch over `length` tokens, for a head with that offset. For full
/// segments that the dilation divides: length * segment / dilation^2, and slightly more than half of it if causal.
inline double dilated_pairs(const Branch& branch, Index offset, Index length, bool is_causal) {
  detail::check_each_branch("dilated_pairs", std::span<const Branch>(&branch, 1));
  const auto pairs = [&](Index tokens) {
    const auto rows = static_cast<double>(kept_rows(tokens, offset, branch.dilation));
    return is_causal ? rows * (rows + 1) / 2 : rows * rows;
  };
  return static_cast<double>(length / branch.segment) * pairs(branch.segment) +
         pairs(length % branch.segment);
}

/// The cost of dilated attention over `length` tokens: 2 (head_dim + value_dim) flop for each pair.
///
/// Source  eq. 17, which counts only one of the two products: 2 N d sum_i w_i / r_i^2
inline double dilated_flop(std::span<const Branch> branches, Index heads, Index length, Index head_dim,
                           Index value_dim, bool is_causal, Phase phase = Phase::modulo) {
  detail::check_each_branch("dilated_flop", branches);
  double pairs = 0;
  for (const Branch& branch : branches) {
    for (Index h = 0; h < heads; ++h)
      pairs += dilated_pairs(branch, head_offset(phase, h, heads, branch.dilation), length, is_causal);
  }
  return 2 * pairs * static_cast<double>(head_dim + value_dim);
}

/// The share of the pairs (head, token) that some branch covers; the outputs of the others are 0. It is 1 if a dilation
/// is 1.
inline double dilated_coverage(std::span<const Branch> branches, Index heads, Index length,
                               Phase phase = Phase::modulo) {
  detail::check_each_branch("dilated_coverage", branches);
  if (heads == 0 || length == 0) return 1;
  if (std::any_of(branches.begin(), branches.end(), [](const Branch& b) { return b.dilation == 1; }))
    return 1;
  Index covered = 0;
  for (Index h = 0; h < heads; ++h) {
    for (Index n = 0; n < length; ++n) {
      covered += std::any_of(branches.begin(), branches.end(), [&](const Branch& branch) {
        return covers(branch, head_offset(phase, h, heads, branch.dilation), n);
      });
    }
  }
  return static_cast<double>(covered) / static_cast<double>(heads) / static_cast<double>(length);
}

/// The maximum number of rows of keys and values that a causal stream keeps for each head: sum_i ceil(w_i / r_i).
inline double dilated_rows(std::span<const Branch> branches) {
  detail::check_each_branch("dilated_rows", branches);
  double rows = 0;
  for (const Branch& branch : branches)
    rows += static_cast<double>(kept_rows(branch.segment, 0, branch.dilation));
  return rows;
}

/// The number of layers after which information from any token can have reached any other with a geometric schedule:
/// log(N (a - 1) / w_0) to the base a.
///
/// Source  eq. 19 and 20
inline double dilated_path_length(Index first_segment, Index ratio, Index length) {
  if (ratio < 2) detail::refuse("dilated_path_length", "the ratio", std::to_string(ratio), "at least 2");
  const double reach = static_cast<double>(length) * static_cast<double>(ratio - 1) /
                       static_cast<double>(std::max<Index>(1, first_segment));
  return (std::max)(1.0, std::log(reach) / std::log(static_cast<double>(ratio)));
}

LONGSPAN_NAMESPACE_END
