// A compact [batch, heads, rows, cols] tensor that owns its memory: 64-byte aligned, on huge pages where it is large.
#pragma once

#include <memory>
#include <span>
#include <type_traits>

#include "longspan/view.hpp"
#include "support/huge_pages.hpp"

namespace bench {

using longspan::Index;

template <class T>
class OwnedTensor {
 public:
  OwnedTensor() = default;

  /// Filled with zeros.
  OwnedTensor(Index batch, Index heads, Index rows, Index cols) : size_(batch * heads * rows * cols) {
    static_assert(std::is_trivially_destructible_v<T>);
    memory_ = huge_memory(static_cast<std::size_t>(size_) * sizeof(T));
    T* data = reinterpret_cast<T*>(memory_.get());
    std::uninitialized_value_construct_n(data, size_);
    view_ = longspan::compact_view(data, batch, heads, rows, cols);
  }

  longspan::TensorView<T> view() { return view_; }
  longspan::TensorView<const T> view() const { return view_; }
  std::span<T> values() { return {view_.data, static_cast<std::size_t>(size_)}; }
  std::span<const T> values() const { return {view_.data, static_cast<std::size_t>(size_)}; }

 private:
  PagedMemory memory_;
  longspan::TensorView<T> view_;
  Index size_ = 0;
};

/// The inputs of one call of attention.
template <class T>
struct Inputs {
  OwnedTensor<T> q, k, v;

  Index batch() const { return q.view().batch; }
  Index heads() const { return q.view().heads; }
  Index kv_heads() const { return k.view().heads; }
  Index q_len() const { return q.view().rows; }
  Index kv_len() const { return k.view().rows; }
  Index head_dim() const { return q.view().cols; }
  Index value_dim() const { return v.view().cols; }
  OwnedTensor<T> empty_output() const { return {batch(), heads(), q_len(), value_dim()}; }
};

}  // namespace bench
