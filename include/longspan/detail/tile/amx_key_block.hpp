// Blocks of keys and values in the layout of matrix tiles: keys in place, values transposed.
#pragma once

#include "longspan/detail/tile/amx_arithmetic.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <algorithm>
#include <utility>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/tile/key_block.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/detail/tuning.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Keys are read in place, in steps of 32 rows and 32 columns; values are transposed.
template <class Unit>
struct KeyBlock<AmxArithmetic<Unit>> {
  using Policy = AmxArithmetic<Unit>;

  const typename Policy::Key* k = nullptr;
  const typename Policy::Value* v = nullptr;
  Index k_stride = 0;
  Index v_stride = 0;  ///< columns of values, a multiple of columns_in_tile
  Index first_key = 0;
  Index keys = 0;
  /// Where keys is no multiple of 32: its last rows, and rows of 0.
  const typename Policy::Key* last_step = nullptr;
  Index last_stride = 0;
  signed char& values_finite;  ///< -1: not known yet; kept with the values
  /// The next keys are prefetched while the block is absorbed. 16 to 40 queries of a KV head, 32768 keys in memory: 0.76
  /// to 0.80 of the time without, from the third-level cache 0.9 to 1.0 (Intel AMX).
  bool is_read_once = false;

  MatrixView<const typename Policy::Key> step(Index first) const {
    if (first + Policy::keys_in_step <= keys)
      return {k + first * k_stride, Policy::keys_in_step, 0, k_stride};
    return {last_step, Policy::keys_in_step, 0, last_stride};
  }
};

/// The transposed values of blocks of keys of one KV head, which a worker keeps from task to task: transposing them in
/// each task, for every 192 queries, would take 9 % of a call.
template <class Unit>
class KeptValues {
 public:
  using Policy = AmxArithmetic<Unit>;
  using Value = typename Policy::Value;

  /// For at most `blocks` blocks, and at most kept_value_bytes.
  static KeptValues take(Arena& arena, Index padded_value_dim, Index blocks) {
    constexpr Index most_bytes = tuning::kept_value_bytes;
    KeptValues kept;
    kept.in_block_ = Policy::keys_in_block / 2 * padded_value_dim;
    if (kept.in_block_ == 0) return kept;
    kept.blocks_ = (std::min)(blocks, most_bytes / (kept.in_block_ * Index(sizeof(Value))));
    kept.head_ = arena.take<Index>(1);
    kept.present_ = arena.take<bool>(kept.blocks_);
    kept.finite_ = arena.take<signed char>(kept.blocks_);
    kept.values_ = arena.take<Value>(kept.blocks_ * kept.in_block_);
    return kept;
  }
  void clear() const {
    if (head_ != nullptr) *head_ = -1;
  }
  void enter(Index head) const {
    if (head_ == nullptr || *head_ == head) return;
    *head_ = head;
    std::fill_n(present_, blocks_, false);
  }
  bool has(Index n) const { return 0 <= n && n < blocks_; }
  /// Memory for the values of block n. Sets `is_new` if the caller has to write them there.
  Value* find(Index n, bool& is_new) const {
    is_new = !std::exchange(present_[n], true);
    if (is_new) finite_[n] = -1;
    return values_ + n * in_block_;
  }
  signed char& finite(Index n) const { return finite_[n]; }

 private:
  Index* head_ = nullptr;
  bool* present_ = nullptr;  ///< of each block
  signed char* finite_ = nullptr;
  Value* values_ = nullptr;
  Index blocks_ = 0;
  Index in_block_ = 0;  ///< Values
};

template <class Unit>
class KeyBlocks<AmxArithmetic<Unit>, Eigen::bfloat16, Eigen::bfloat16, no_position> {
 public:
  using Policy = AmxArithmetic<Unit>;
  using Key = Eigen::bfloat16;

  /// Keeps the values of up to `kept_blocks` blocks of a head: see KeptValues.
  static KeyBlocks take(Arena& arena, Index head_dim, Index value_dim, Index kept_blocks = 0) {
    KeyBlocks blocks;
    blocks.padded_value_dim_ = round_up(value_dim, Policy::columns_in_tile);
    blocks.padded_head_dim_ = round_up(head_dim, Policy::columns_in_step);
    blocks.v_ = arena.take<typename Policy::Value>(Policy::keys_in_block / 2 * blocks.padded_value_dim_);
    blocks.copies_all_ = head_dim != blocks.padded_head_dim_;
    blocks.k_ = arena.take<Key>((blocks.copies_all_ ? Policy::keys_in_block : Policy::keys_in_step) *
                                blocks.padded_head_dim_);
    blocks.finite_ = arena.take<signed char>(1);
    if (kept_blocks > 0) blocks.kept_ = KeptValues<Unit>::take(arena, blocks.padded_value_dim_, kept_blocks);
    return blocks;
  }
  /// The keys are read once in this call, so blocks are in memory and no other tile hides the cache misses.
  void read_once() { reads_once_ = true; }
  /// To be called before the first task of a call.
  void clear() const { kept_.clear(); }
  /// The keys that follow are of KV head `head`, counted over all batch rows.
  void enter(Index head) const { kept_.enter(head); }

  /// The keys of a run that begins with key `first_key`, at most one key block. Valid until the next call.
  KeyBlock<Policy> block(const KeyRun<Key, Key>& run, const no_position& position, Index first_key) const {
    const bool is_whole = first_key % Policy::keys_in_block == 0;
    return block(run, position, first_key, is_whole ? first_key / Policy::keys_in_block : -1);
  }
  /// The same for the block whose values are kept as number `kept`, if there are so many.
  KeyBlock<Policy> block(const KeyRun<Key, Key>& run, const no_position&, Index first_key, Index kept) const {
    const MatrixView<const Key> k = run.k;
    bool is_new = true;
    auto* values = kept_.has(kept) ? kept_.find(kept, is_new) : v_;
    if (is_new) transpose(run.v, values);
    if (!kept_.has(kept)) *finite_ = -1;
    KeyBlock<Policy> block{k.data,
                           values,
                           k.row_stride,
                           padded_value_dim_,
                           first_key,
                           k.rows,
                           nullptr,
                           padded_head_dim_,
                           kept_.has(kept) ? kept_.finite(kept) : *finite_};
    block.is_read_once = reads_once_ && !copies_all_;
    const Index whole = k.rows / Policy::keys_in_step * Policy::keys_in_step;
    if (copies_all_) {
      copy_padded(k, 0);
      block.k = k_;
      block.k_stride = padded_head_dim_;
      block.last_step = k_ + whole * padded_head_dim_;
    } else if (whole < k.rows) {
      copy_padded(k, whole);
      block.last_step = k_;
    }
    return block;
  }

 private:
  void transpose(const MatrixView<const Key>& v, typename Policy::Value* to) const {
    if (reads_once_) {
      Policy::template transpose_values<true>(v.data, v.row_stride, v.rows, v.cols, to, padded_value_dim_);
    } else {
      Policy::template transpose_values<false>(v.data, v.row_stride, v.rows, v.cols, to, padded_value_dim_);
    }
  }
  /// Copies the rows from `first` on and appends rows of 0 up to a whole step.
  void copy_padded(const MatrixView<const Key>& k, Index first) const {
    Key* to = k_;
    for (Index j = first; j < round_up(k.rows, Policy::keys_in_step); ++j, to += padded_head_dim_) {
      const Index present = j < k.rows ? k.cols : 0;
      if (present > 0) std::copy_n(k.row(j), present, to);
      std::fill(to + present, to + padded_head_dim_, Key(0));
    }
  }

  Key* k_ = nullptr;
  typename Policy::Value* v_ = nullptr;
  signed char* finite_ = nullptr;  ///< of the values in v_
  KeptValues<Unit> kept_;
  Index padded_value_dim_ = 0;
  Index padded_head_dim_ = 0;
  bool copies_all_ = false;
  bool reads_once_ = false;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END

#endif
