// Blocks of keys and values in the layout of matrix tiles: keys in place, encoded or converted, values transposed.
#pragma once

#include "longspan/detail/tile/amx_arithmetic.hpp"

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC)

#include <algorithm>
#include <cstdint>
#include <type_traits>
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

/// Keys are read in steps of 32 rows and 32 columns; values are transposed.
template <class Unit>
struct KeyBlock<AmxArithmetic<Unit>> {
  using Policy = AmxArithmetic<Unit>;

  const typename Policy::Key* k = nullptr;
  const typename Policy::Value* v = nullptr;
  Index k_stride = 0;
  Index v_stride = 0;  ///< columns of values, a multiple of columns_in_tile
  Index first_key = 0;
  Index keys = 0;
  const typename Policy::Key* last_step =
      nullptr;  ///< where keys is no multiple of 32: its last rows, and rows of 0
  Index last_stride = 0;
  const float* k_scale = nullptr;  ///< of each key, 128 times that of the row, only with RowScales
  const float* v_scale = nullptr;
  mutable signed char values_finite = -1;
  signed char* kept_finite = nullptr;  ///< the same, if values are kept
  /// The next keys are prefetched while the block is absorbed. 16 to 40 queries of a KV head, 32768 keys in memory:
  /// 0.76 to 0.80 of the time without, from the third-level cache 0.9 to 1.0 (Intel AMX).
  bool is_read_once = false;

  MatrixView<const typename Policy::Key> step(Index first) const {
    if (first + Policy::keys_in_step <= keys)
      return {k + first * k_stride, Policy::keys_in_step, 0, k_stride};
    return {last_step, Policy::keys_in_step, 0, last_stride};
  }
};

/// Memory for a block in the layout of matrix tiles. `keys` is null if keys are read in place.
template <class Unit>
struct BlockRows {
  typename AmxArithmetic<Unit>::Key* keys = nullptr;
  typename AmxArithmetic<Unit>::Value* values = nullptr;
  signed char* values_finite = nullptr;
};

/// The transposed values and the encoded keys of blocks of one KV head, which a worker keeps from task to
/// task: transposing values in each task, for every 192 queries, would take 9 % of a call.
template <class Unit>
class KeptBlocks {
 public:
  using Policy = AmxArithmetic<Unit>;
  using Key = typename Policy::Key;
  using Value = typename Policy::Value;

  /// For at most `blocks` blocks, and at most kept_block_bytes of values and of keys. `key_columns` is 0 if keys are
  /// read in place.
  static KeptBlocks take(Arena& arena, Index key_columns, Index value_columns, Index blocks) {
    constexpr Index in_block = Policy::keys_in_block;
    KeptBlocks kept;
    kept.keys_in_block_ = in_block * key_columns;
    kept.values_in_block_ = in_block / 2 * value_columns;
    const Index largest =
        (std::max)(kept.keys_in_block_ * Index(sizeof(Key)), kept.values_in_block_ * Index(sizeof(Value)));
    if (largest == 0) return kept;
    kept.blocks_ = (std::min)(blocks, tuning::kept_block_bytes / largest);
    kept.head_ = arena.take<Index>(1);
    kept.present_ = arena.take<bool>(kept.blocks_);
    kept.finite_ = arena.take<signed char>(kept.blocks_);
    kept.values_ = arena.take<Value>(kept.blocks_ * kept.values_in_block_);
    if (key_columns > 0) kept.keys_ = arena.take<Key>(kept.blocks_ * kept.keys_in_block_);
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
  /// The number of the block that begins with key `first_key`, if keys are cut at multiples of keys_in_block.
  static Index number_of(Index first_key) {
    return first_key % Policy::keys_in_block == 0 ? first_key / Policy::keys_in_block : -1;
  }
  /// Memory for block n, or `unkept` if that block is not kept. Sets `is_new` if the caller has to write its rows.
  BlockRows<Unit> find(Index n, const BlockRows<Unit>& unkept, bool& is_new) const {
    is_new = n < 0 || n >= blocks_;
    if (is_new) return unkept;
    is_new = !std::exchange(present_[n], true);
    if (is_new) finite_[n] = -1;
    return {keys_ == nullptr ? nullptr : keys_ + n * keys_in_block_, values_ + n * values_in_block_,
            finite_ + n};
  }

 private:
  Index* head_ = nullptr;
  bool* present_ = nullptr;  ///< of each block
  signed char* finite_ = nullptr;
  Key* keys_ = nullptr;
  Value* values_ = nullptr;
  Index blocks_ = 0;
  Index keys_in_block_ = 0;    ///< Keys
  Index values_in_block_ = 0;  ///< Values
};

template <class Unit, Position P>
class KeyBlocks<AmxArithmetic<Unit>, Eigen::bfloat16, Eigen::bfloat16, P> {
 public:
  using Policy = AmxArithmetic<Unit>;
  using Key = Eigen::bfloat16;

  /// Keeps up to `kept_blocks` blocks of a head: see KeptBlocks.
  static KeyBlocks take(Arena& arena, Index head_dim, Index value_dim, Index kept_blocks = 0) {
    KeyBlocks blocks;
    blocks.value_columns_ = round_up(value_dim, Policy::columns_in_tile);
    blocks.key_columns_ = round_up(head_dim, Policy::columns_in_step);
    blocks.copies_all_ = encodes || head_dim != blocks.key_columns_;
    blocks.own_.values =
        arena.take<typename Policy::Value>(Policy::keys_in_block / 2 * blocks.value_columns_);
    blocks.own_.keys = arena.take<Key>((blocks.copies_all_ ? Policy::keys_in_block : Policy::keys_in_step) *
                                       blocks.key_columns_);
    if constexpr (encodes) blocks.rows_ = arena.take<float>(Policy::keys_in_block * head_dim);
    if (kept_blocks > 0) {
      blocks.kept_ = KeptBlocks<Unit>::take(arena, encodes ? blocks.key_columns_ : 0, blocks.value_columns_,
                                            kept_blocks);
    }
    return blocks;
  }
  /// The keys are read once in this call, so blocks are in memory and no other tile hides the cache misses.
  void read_once() { reads_once_ = true; }
  /// To be called before the first task of a call.
  void clear() const { kept_.clear(); }
  /// The keys that follow are of KV head `head`, counted over all batch rows.
  void enter(Index head) const { kept_.enter(head); }

  /// The keys of a run that begins with key `first_key`, at most one key block. Valid until the next call.
  KeyBlock<Policy> block(const KeyRun<Key, Key>& run, const P& position, Index first_key) const {
    return block(run, position, first_key, KeptBlocks<Unit>::number_of(first_key));
  }
  /// The same for a block that is kept as number `kept`, if there are so many.
  KeyBlock<Policy> block(const KeyRun<Key, Key>& run, const P& position, Index first_key, Index kept) const {
    const MatrixView<const Key> k = run.k;
    bool is_new = true;
    const BlockRows<Unit> rows = kept_.find(kept, own_, is_new);
    if (is_new) transpose(run.v, rows.values);
    KeyBlock<Policy> block{k.data, rows.values, k.row_stride, value_columns_, first_key, k.rows};
    block.kept_finite = rows.values_finite;
    block.is_read_once = reads_once_ && !copies_all_;
    block.last_stride = key_columns_;
    const Index whole = k.rows / Policy::keys_in_step * Policy::keys_in_step;
    if (copies_all_) {
      Key* keys = encodes ? rows.keys : own_.keys;
      if constexpr (encodes) {
        if (is_new) encode(k, position, first_key, keys);
      } else {
        copy_padded(k, 0, keys);
      }
      block.k = keys;
      block.k_stride = key_columns_;
      block.last_step = keys + whole * key_columns_;
    } else if (whole < k.rows) {
      copy_padded(k, whole, own_.keys);
      block.last_step = own_.keys;
    }
    return block;
  }

 private:
  static constexpr bool encodes = !std::is_same_v<P, no_position>;

  void transpose(const MatrixView<const Key>& v, typename Policy::Value* to) const {
    if (reads_once_) {
      Policy::template transpose_values<true>(v.data, v.row_stride, v.rows, v.cols, to, value_columns_);
    } else {
      Policy::transpose_values(v.data, v.row_stride, v.rows, v.cols, to, value_columns_);
    }
  }
  /// Copies the rows from `first` on and appends rows of 0 up to a whole step.
  void copy_padded(const MatrixView<const Key>& k, Index first, Key* to) const {
    for (Index j = first; j < k.rows; ++j, to += key_columns_) {
      std::copy_n(k.row(j), k.cols, to);
      std::fill(to + k.cols, to + key_columns_, Key(0));
    }
    pad(k.rows, to);
  }
  /// Encodes rows in float, rounds them to bfloat16, and appends rows of 0 up to a whole step.
  void encode(const MatrixView<const Key>& k, const P& position, Index first_key, Key* to) const {
    convert_rows(k.data, k.row_stride, k.rows, k.cols, rows_, k.cols);
    position.encode(MatrixView<float>{rows_, k.rows, k.cols, k.cols}, first_key, Role::key);
    Policy::round_rows(rows_, k.cols, k.rows, k.cols, to, key_columns_);
    pad(k.rows, to + k.rows * key_columns_);
  }
  void pad(Index rows, Key* to) const {
    std::fill_n(to, (round_up(rows, Policy::keys_in_step) - rows) * key_columns_, Key(0));
  }

  BlockRows<Unit> own_;
  float* rows_ = nullptr;  ///< [keys_in_block][head_dim], for position encoding
  KeptBlocks<Unit> kept_;
  Index value_columns_ = 0;
  Index key_columns_ = 0;
  bool copies_all_ = false;
  bool reads_once_ = false;
};

/// Rows of int8 become bfloat16 without their scales.
template <class Unit>
class KeyBlocks<AmxArithmetic<Unit>, std::int8_t, std::int8_t, no_position> {
 public:
  using Policy = AmxArithmetic<Unit>;

  static KeyBlocks take(Arena& arena, Index head_dim, Index value_dim, Index kept_blocks = 0) {
    KeyBlocks blocks;
    blocks.value_columns_ = round_up(value_dim, Policy::columns_in_tile);
    blocks.key_columns_ = round_up(head_dim, Policy::columns_in_step);
    blocks.own_.values =
        arena.take<typename Policy::Value>(Policy::keys_in_block / 2 * blocks.value_columns_);
    blocks.own_.keys = arena.take<typename Policy::Key>(Policy::keys_in_block * blocks.key_columns_);
    blocks.k_scale_ = arena.take<float>(Policy::keys_in_block);
    blocks.v_scale_ = arena.take<float>(Policy::keys_in_block);
    if (kept_blocks > 0)
      blocks.kept_ = KeptBlocks<Unit>::take(arena, blocks.key_columns_, blocks.value_columns_, kept_blocks);
    return blocks;
  }
  void clear() const { kept_.clear(); }
  void enter(Index head) const { kept_.enter(head); }

  KeyBlock<Policy> block(const KeyRun<std::int8_t, std::int8_t>& run, const no_position&,
                         Index first_key) const {
    const Index keys = run.k.rows, padded = round_up(keys, Policy::keys_in_step);
    bool is_new = true;
    const BlockRows<Unit> rows = kept_.find(KeptBlocks<Unit>::number_of(first_key), own_, is_new);
    if (is_new) {
      Policy::transpose_values(run.v.data, run.v.row_stride, keys, run.v.cols, rows.values, value_columns_);
      Policy::round_rows(run.k.data, run.k.row_stride, keys, run.k.cols, rows.keys, key_columns_);
      std::fill_n(rows.keys + keys * key_columns_, (padded - keys) * key_columns_, typename Policy::Key(0));
    }
    const auto scaled = [&](const float* from, float* to) {
      std::transform(from, from + keys, to, [](float scale) { return 128 * scale; });
      std::fill(to + keys, to + padded, 0.0f);
    };
    scaled(run.k_scale, k_scale_);
    scaled(run.v_scale, v_scale_);
    KeyBlock<Policy> block{rows.keys, rows.values, key_columns_, value_columns_, first_key, keys};
    block.last_step = rows.keys + keys / Policy::keys_in_step * Policy::keys_in_step * key_columns_;
    block.last_stride = key_columns_;
    block.k_scale = k_scale_;
    block.v_scale = v_scale_;
    return block;
  }

 private:
  BlockRows<Unit> own_;
  float* k_scale_ = nullptr;  ///< [keys_in_block]
  float* v_scale_ = nullptr;
  KeptBlocks<Unit> kept_;
  Index value_columns_ = 0;
  Index key_columns_ = 0;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END

#endif
