// The keys of landmark attention cut into chunks: whole landmark blocks that a tile of queries absorbs together.
#pragma once

#include <algorithm>
#include <span>

#include "longspan/detail/call/arena.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/landmarks.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// The options of the grouped softmax. A view without memory means that its option is not used.
struct LandmarkOptions {
  longspan::landmarks landmarks = longspan::landmarks::none();
  bool grouped = true;                ///< false: landmarks are absent, and all tokens are one group
  bool leak = false;                  ///< a landmark whose block has no visible token keeps its share
  TensorView<const float> gate_keep;  ///< [batch, heads, q_len, blocks], factors of the gates of the blocks
  landmark_control control;

  bool has_controlled() const noexcept { return control.cmt.data != nullptr; }
  bool is_controlled(Index b, Index m) const noexcept {
    return has_controlled() && control.blocks.row(control.blocks.rows == 1 ? 0 : b)[m] != 0;
  }
};

/// One landmark block: its tokens and its landmark. The open block at the end has no landmark.
struct LandmarkBlock {
  Index index = 0;
  KeyRange tokens;
  bool closed = true;

  Index landmark() const noexcept { return tokens.end; }
  Index end() const noexcept { return tokens.end + closed; }
};

inline LandmarkBlock landmark_block(const landmarks& at, Index b, Index m, Index kv_len) {
  const Index begin = m == 0 ? 0 : at.key(b, m - 1) + 1;
  if (m == at.count(b, kv_len)) return {m, {begin, kv_len}, false};
  return {m, {begin, at.key(b, m)}, true};
}

/// Keys in the widest landmark block.
inline Index widest_block(const landmarks& at, Index batch, Index kv_len) {
  Index widest = 0;
  for (Index b = 0; b < (at.same_in_all_rows() ? 1 : batch); ++b) {
    for (Index m = 0; m <= at.count(b, kv_len); ++m) {
      const LandmarkBlock block = landmark_block(at, b, m, kv_len);
      widest = (std::max)(widest, block.end() - block.tokens.begin);
    }
  }
  return widest;
}

/// Neighbouring landmark blocks of one kind (controlled or not) whose keys fit into one key block, or a single landmark
/// block that is wider than a key block.
struct LandmarkChunk {
  Index first_block = 0;
  Index blocks = 0;
  KeyRange keys;
  bool controlled = false;

  Index length() const noexcept { return keys.end - keys.begin; }
};

/// The chunks of each batch row. They depend on the landmarks alone, so that no bit of a query's result depends on the
/// other queries of the call.
class LandmarkPlan {
 public:
  /// `controlled(b, m)` returns true if block m of batch row b is controlled.
  template <class Controlled>
  static LandmarkPlan take(Arena& arena, const landmarks& at, Index batch, Index kv_len, Index most_keys,
                           bool same_in_all_rows, const Controlled& controlled) {
    LandmarkPlan plan;
    plan.rows_ = same_in_all_rows ? std::min<Index>(batch, 1) : batch;
    plan.begins_ = arena.take<Index>(plan.rows_ + 1);
    Index most_chunks = 0;
    for (Index b = 0; b < plan.rows_; ++b) most_chunks += at.count(b, kv_len) + 1;
    plan.chunks_ = arena.take<LandmarkChunk>(most_chunks);
    if (plan.chunks_ != nullptr) plan.fill(at, kv_len, most_keys, controlled);
    return plan;
  }

  /// An upper bound of the chunks of a batch row none of whose blocks is controlled: two neighbours have more than
  /// most_keys keys.
  static Index most_chunks(Index kv_len, Index most_keys) { return 2 * divide_up(kv_len, most_keys) + 1; }
  /// The number of a chunk among those of batch row b.
  Index index_of(Index b, const LandmarkChunk& chunk) const {
    return &chunk - (chunks_ + begins_[rows_ == 1 ? 0 : b]);
  }

  /// The chunks of batch row b that contain keys of the range.
  std::span<const LandmarkChunk> chunks(Index b, KeyRange keys) const {
    const Index row = rows_ == 1 ? 0 : b;
    const LandmarkChunk *first = chunks_ + begins_[row], *last = chunks_ + begins_[row + 1];
    first = std::partition_point(first, last, [&](const auto& c) { return c.keys.end <= keys.begin; });
    last = std::partition_point(first, last, [&](const auto& c) { return c.keys.begin < keys.end; });
    return {first, last};
  }

 private:
  template <class Controlled>
  void fill(const landmarks& at, Index kv_len, Index most_keys, const Controlled& controlled) {
    Index chunks = 0;
    for (Index b = 0; b < rows_; ++b) {
      begins_[b] = chunks;
      for (Index m = 0; m <= at.count(b, kv_len); ++m) {
        const LandmarkBlock block = landmark_block(at, b, m, kv_len);
        const KeyRange keys{block.tokens.begin, block.end()};
        if (keys.empty()) continue;
        const bool of_kind = block.closed && controlled(b, m);
        LandmarkChunk* last = chunks > begins_[b] ? chunks_ + chunks - 1 : nullptr;
        if (last != nullptr && last->controlled == of_kind && keys.end - last->keys.begin <= most_keys) {
          ++last->blocks;
          last->keys.end = keys.end;
        } else {
          chunks_[chunks++] = {m, 1, keys, of_kind};
        }
      }
    }
    begins_[rows_] = chunks;
  }

  LandmarkChunk* chunks_ = nullptr;
  Index* begins_ = nullptr;
  Index rows_ = 0;
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
