// Where the landmarks stand among the keys: the cut of a context into blocks.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <string_view>

#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// A landmark is the last key of its block: block m holds the keys behind landmark m - 1 up to landmark m,
/// and the keys behind the last landmark are a block without one. Owns nothing.
class landmarks {
 public:
  /// Every `length`-th key: blocks of length - 1 tokens and their landmark.
  static constexpr landmarks every(Index length) noexcept { return landmarks(true, length, {}, {}); }
  /// These keys, rising, in every batch row.
  static constexpr landmarks at(std::span<const Index> keys) noexcept {
    return landmarks(false, 0, keys, {});
  }
  /// A list of its own for each batch row.
  static constexpr landmarks at(std::span<const std::span<const Index>> lists) noexcept {
    return landmarks(false, 0, {}, lists);
  }
  static constexpr landmarks none() noexcept { return landmarks(false, 0, {}, {}); }

  /// How many of batch row b are among the first kv_len keys.
  constexpr Index count(Index b, Index kv_len) const noexcept {
    return regular_ ? kv_len / length_ : static_cast<Index>(list(b).size());
  }
  /// Landmark m of batch row b.
  constexpr Index key(Index b, Index m) const noexcept {
    return regular_ ? (m + 1) * length_ - 1 : list(b)[static_cast<std::size_t>(m)];
  }
  /// The block in which position j stands, of kv_len keys: how many landmarks stand before it. Positions
  /// behind the keys are in the open block at the end, positions before them in none, which is -1.
  constexpr Index block_of(Index b, Index j, Index kv_len) const noexcept {
    if (j < 0) return -1;
    if (regular_) return (std::min)(j, kv_len) / length_;
    const auto keys = list(b);
    return std::lower_bound(keys.begin(), keys.end(), j) - keys.begin();
  }

  /// Are they landmarks of a context of any length?
  constexpr bool fit_any_length() const noexcept { return regular_ || (keys_.empty() && lists_.empty()); }
  /// Does every batch row have the same blocks?
  constexpr bool same_in_all_rows() const noexcept { return lists_.empty(); }

  /// Throws Error unless these are landmarks of kv_len keys in each of `batch` rows.
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

/// Controlled landmarks: an extra token (the CMT) joins the group of each query, and what weight it takes is
/// shared among the controlled blocks by their own landmarks.
struct landmark_control {
  RowsView<const float> cmt{};  ///< [batch, heads, q_len], scaled logits; null: nothing is controlled
  MatrixView<const unsigned char> blocks{};  ///< [batch or 1, blocks], not 0 for a controlled one
  double cutoff = 0;                         ///< a CMT weight below it counts as 0
};

LONGSPAN_VOCABULARY_END
