// Member functions of landmark_cache that drop, clear, truncate, reorder and load, and the updates of its index.
#pragma once

#include <cstddef>
#include <istream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "longspan/detail/landmark/block_counts.hpp"
#include "longspan/detail/landmark/file.hpp"
#include "longspan/detail/landmark/sealed_rows.hpp"
#include "longspan/error.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
void landmark_cache<T, P, Map, Finder>::drop(Index count) {
  if (count < 0 || count > blocks())
    detail::refuse("landmark_cache::drop", "the number of blocks", std::to_string(count),
                   "0.." + std::to_string(blocks()));
  store_.drop(count);
  finder_.drop(dropped());
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
void landmark_cache<T, P, Map, Finder>::clear() {
  const detail::BlockCounts& counts = store_.counts();
  auto empty = empty_store(counts.capacity, counts.drop_at_once);
  if (store_.has_file())
    detail::replace_landmark_blocks(options_.path, options_.resident_bytes, row_fields(), empty);
  store_ = std::move(empty);
  forget_last_call();
  is_index_stale_ = finds;
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
void landmark_cache<T, P, Map, Finder>::truncate(Index tokens) {
  if (!can_truncate(tokens)) {
    const std::string least = std::to_string(store_.counts().least());
    detail::refuse("landmark_cache::truncate", "the number of tokens", std::to_string(tokens),
                   least + ".." + std::to_string(size()) + ", because the cache cannot be truncated further");
  }
  const Index before = store_.counts().sealed, dropped_before = dropped();
  store_.truncate(tokens);
  if (finds && store_.counts().sealed < before) unindex_blocks(dropped() < dropped_before);
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
void landmark_cache<T, P, Map, Finder>::reorder(std::span<const Index> rows) {
  constexpr const char* name = "landmark_cache::reorder";
  detail::check_reorder(name, rows, shape_.batch);
  refuse_with_file(name);
  store_.reorder(rows);
  is_index_stale_ = finds;
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
void landmark_cache<T, P, Map, Finder>::load(std::istream& from) {
  refuse_with_file("landmark_cache::load");
  const detail::BlockCounts& counts = store_.counts();
  store_ = detail::loaded_landmark_store(from, fields(), empty_store(counts.capacity, counts.drop_at_once));
  forget_last_call();
  is_index_stale_ = finds;
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
void landmark_cache<T, P, Map, Finder>::index_blocks(Index first) {
  if constexpr (finds) {
    for (Index kv_row = 0; kv_row < shape_.batch * shape_.kv_heads; ++kv_row) {
      const Index b = kv_row / shape_.kv_heads, h = kv_row % shape_.kv_heads;
      const auto keys = store_.landmarks(b, h, 0, blocks());
      std::vector<Real> key(at(keys.cols));
      for (Index n = first; n < blocks(); ++n) {
        detail::copy_rows(keys.row(n), keys.cols, 1, keys.cols, key.data());
        finder_.add(b, h, dropped() + n, std::span<const Real>(key));
      }
    }
  }
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
void landmark_cache<T, P, Map, Finder>::index_anew() {
  finder_.clear();
  index_blocks(0);
  is_index_stale_ = false;
}

template <StoredElement T, Position P, PositionMap Map, LandmarkIndex<detail::ArithmeticOf<T>> Finder>
void landmark_cache<T, P, Map, Finder>::unindex_blocks(bool returns) {
  const bool was_stale = std::exchange(is_index_stale_, true);
  if constexpr (requires(Index n) { finder_.truncate(n); }) {
    if (returns || was_stale) return;
    finder_.truncate(store_.counts().sealed);
    is_index_stale_ = false;
  }
}

LONGSPAN_NAMESPACE_END
