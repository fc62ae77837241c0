// The positions of landmarks among the keys, which cut a context into blocks.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <string_view>

#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A landmark is the last key of its block: block m consists of the keys after landmark m - 1 up to landmark m, and the
/// keys after the last landmark are a block without one. Owns nothing.
class landmarks {
 public:
  /// Every `length`-th key is a landmark: blocks of length - 1 tokens and their landmark.
  static constexpr landmarks every(Index length) noexcept { return landmarks(true, length, {}, {}); }
  /// The same keys, in rising order, in every batch row.
  static constexpr landmarks at(std::span<const Index> keys) noexcept {
    return landmarks(false, 0, keys, {});
  }
  /// One list of keys for each batch row.
  static constexpr landmarks at(std::span<const std::span<const Index>> lists) noexcept {
    return landmarks(false, 0, {}, lists);
  }
  static constexpr landmarks none() noexcept { return landmarks(false, 0, {}, {}); }

  /// The number of landmarks of batch row b among the first kv_len keys.
  constexpr Index count(Index b, Index kv_len) const noexcept {
    return regular_ ? kv_len / length_ : static_cast<Index>(list(b).size());
  }
  /// The key that is landmark m of batch row b.
  constexpr Index key(Index b, Index m) const noexcept {
    return regular_ ? (m + 1) * length_ - 1 : list(b)[static_cast<std::size_t>(m)];
  }
  /// The block of position j in a context of kv_len keys: the number of landmarks before it. Positions after the last
  /// key belong to the open block at the end; positions before key 0 belong to no block, which is -1.
  constexpr Index block_of(Index b, Index j, Index kv_len) const noexcept {
    if (j < 0) return -1;
    if (regular_) return (std::min)(j, kv_len) / length_;
    const auto keys = list(b);
    return std::lower_bound(keys.begin(), keys.end(), j) - keys.begin();
  }

  /// True if they fit a context of any length.
  constexpr bool fit_any_length() const noexcept { return regular_ || (keys_.empty() && lists_.empty()); }
  /// True if every batch row has the same blocks.
  constexpr bool same_in_all_rows() const noexcept { return lists_.empty(); }

  /// Throws Error if these are not landmarks of kv_len keys in each of `batch` rows.
  void check(std::string_view function, Index batch, Index kv_len) const {
    if (regular_ && length_ < 1)
      detail::refuse(function, "the length of a block", std::to_string(length_), "at least 1");
    if (!lists_.empty() && static_cast<Index>(lists_.size()) != batch) {
      detail::refuse(function, "the number of lists of landmarks", std::to_string(lists_.size()),
                     "one for each of the " + std::to_string(batch) + " batch rows");
    }
    for (Index b = 0; b < (same_in_all_rows() ? 1 : batch); ++b) {
      Index lowest = 0;
      for (const Index key : list(b)) {
        if (key < lowest || key >= kv_len) {
          detail::refuse(function, "a landmark of batch row " + std::to_string(b), std::to_string(key),
                         "rising keys from 0 to " + std::to_string(kv_len - 1));
        }
        lowest = key + 1;
      }
    }
  }

 private:
  constexpr landmarks(bool regular, Index length, std::span<const Index> keys,
                      std::span<const std::span<const Index>> lists) noexcept
      : regular_(regular), length_(length), keys_(keys), lists_(lists) {}

  constexpr std::span<const Index> list(Index b) const noexcept {
    return lists_.empty() ? keys_ : lists_[static_cast<std::size_t>(b)];
  }

  bool regular_;
  Index length_;
  std::span<const Index> keys_;
  std::span<const std::span<const Index>> lists_;
};

LONGSPAN_NAMESPACE_END

LONGSPAN_VOCABULARY_BEGIN

/// Controlled landmarks: an extra token (the CMT) joins the group of each query, and the controlled blocks share its
/// weight according to their own landmarks.
struct landmark_control {
  RowsView<const float> cmt{};  ///< [batch, heads, q_len], scaled logits; null: nothing is controlled
  MatrixView<const unsigned char> blocks{};  ///< [batch or 1, blocks], not 0 if the block is controlled
  double cutoff = 0;                         ///< a CMT weight below this counts as 0
};

LONGSPAN_VOCABULARY_END
