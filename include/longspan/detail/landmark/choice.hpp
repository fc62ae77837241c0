// Chooses blocks by the scores of their landmarks.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "longspan/detail/landmark/retrieve.hpp"
#include "longspan/landmark_retrieval.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Receives the scores of some tokens at a time, so that the scores of a long chunk in a long stream fit into memory.
template <class T>
class LandmarkChoice {
 public:
  LandmarkChoice(LandmarkSelect select, Index batch, Index heads, Index kv_heads)
      : select_(select), batch_(batch), heads_(heads), kv_heads_(kv_heads) {}

  /// Starts the choice of `k` of `blocks` blocks for each query of `tokens` tokens.
  void start(Index tokens, Index blocks, Index k, Index workers) {
    constexpr Index most_scores = Index{1} << 24;
    tokens_ = tokens;
    blocks_ = blocks;
    k_ = k;
    slice_ = std::clamp<Index>(most_scores / std::max<Index>(1, batch_ * heads_ * blocks), 1, tokens);
    const Index lists = list_of(batch_ - 1, heads_ - 1, tokens - 1) + 1;
    chosen_.resize(at(lists * k));
    best_.resize(at(lists * k));
    scores_.resize(at(batch_ * heads_ * slice_ * blocks));
    highest_.assign(at((over_tokens() ? lists : workers) * blocks), T(0));
  }

  Index tokens_at_once() const noexcept { return slice_; }
  /// Where the caller writes the scores of query i of the current slice, `blocks` numbers.
  T* scores(Index b, Index h, Index i) { return scores_.data() + ((b * heads_ + h) * slice_ + i) * blocks_; }

  /// Processes the scores of the tokens [first, first + count), which the caller has written.
  template <class E>
  void take(Index first, Index count, const E& executor) {
    if (select_ != LandmarkSelect::per_token_and_head) {
      executor.for_each(batch_ * heads_ * count, [&](Index row, Index) {
        softmax_row(scores(row / count / heads_, row / count % heads_, row % count), blocks_);
      });
    }
    if (over_tokens()) {
      const Index together = select_ == LandmarkSelect::max_over_both ? heads_ : 1;
      executor.for_each(batch_ * heads_ / together, [&](Index list, Index) {
        for (Index row = list * together; row < (list + 1) * together; ++row) {
          for (Index i = 0; i < count; ++i)
            raise(highest_.data() + list * blocks_, scores(row / heads_, row % heads_, i));
        }
      });
      return;
    }
    const Index together = select_ == LandmarkSelect::per_token_and_head ? 1
                           : select_ == LandmarkSelect::per_kv_group     ? heads_ / kv_heads_
                                                                         : heads_;
    executor.for_each(batch_ * heads_ / together * count, [&](Index task, Index worker) {
      const Index i = task % count, row = task / count * together, b = row / heads_, h = row % heads_;
      const T* weights = scores(b, h, i);
      if (together > 1) {
        T* of_all = highest_.data() + worker * blocks_;
        std::copy_n(weights, blocks_, of_all);
        for (Index other = h + 1; other < h + together; ++other) raise(of_all, scores(b, other, i));
        weights = of_all;
      }
      choose(weights, list_of(b, h, first + i));
    });
  }

  /// Ends the choice: the scores of all tokens have been processed.
  void finish() {
    if (!over_tokens()) return;
    for (Index list = 0; list <= list_of(batch_ - 1, heads_ - 1, 0); ++list)
      choose(highest_.data() + list * blocks_, list);
  }

  /// The chosen blocks of a query, in rising order.
  std::span<const Index> of(Index b, Index h, Index i) const {
    return {chosen_.data() + list_of(b, h, i) * k_, at(k_)};
  }

 private:
  static std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
  bool over_tokens() const noexcept {
    return select_ == LandmarkSelect::max_over_tokens || select_ == LandmarkSelect::max_over_both;
  }
  /// The list of chosen blocks that belongs to a query.
  Index list_of(Index b, Index h, Index i) const noexcept {
    switch (select_) {
      case LandmarkSelect::per_token_and_head:
        return (b * heads_ + h) * tokens_ + i;
      case LandmarkSelect::max_over_heads:
        return b * tokens_ + i;
      case LandmarkSelect::max_over_tokens:
        return b * heads_ + h;
      case LandmarkSelect::max_over_both:
        return b;
      case LandmarkSelect::per_kv_group:
        break;
    }
    return (b * kv_heads_ + h / (heads_ / kv_heads_)) * tokens_ + i;
  }
  void raise(T* to, const T* from) const {
    for (Index n = 0; n < blocks_; ++n) to[n] = (std::max)(to[n], from[n]);
  }
  void choose(const T* weights, Index list) {
    choose_highest(weights, blocks_, k_, chosen_.data() + list * k_, best_.data() + list * k_);
  }

  LandmarkSelect select_;
  Index batch_, heads_, kv_heads_;
  Index tokens_ = 0, blocks_ = 0, k_ = 0, slice_ = 0;
  std::vector<Index> chosen_;               ///< [lists][k]
  std::vector<T> best_, scores_, highest_;  ///< [lists][k]; [batch][heads][slice][blocks]; maxima
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
