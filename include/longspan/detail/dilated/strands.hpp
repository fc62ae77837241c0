// The rows that a stream of dilated attention keeps, and how the kernel finds them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "longspan/detail/call/stream_mask.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/dilation.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// A mask without the keys after the end of a query's longest segment: no branch shows the query a later key.
template <Mask M>
struct WithinSegments {
  const M& mask;
  std::span<const Branch> branches;

  KeyRange keys(Index b, Index i) const
  requires RangeMask<M>
  {
    const KeyRange range = mask.keys(b, i);
    return {range.begin, (std::min)(range.end, end_of_segments(i))};
  }
  bool sees(Index b, Index h, Index i, Index j) const {
    return j < end_of_segments(i) && longspan::sees(mask, b, h, i, j);
  }
  KeyRanges key_ranges(const Tile& tile) const {
    return intersection(longspan::key_ranges(mask, tile),
                        KeyRanges({KeyRange::lowest, end_of_segments(tile.last_query())}));
  }

 private:
  Index end_of_segments(Index i) const {
    Index end = i + 1;
    for (const Branch& branch : branches)
      end = (std::max)(end, saturating_sum(i - i % branch.segment, branch.segment));
    return end;
  }
};
template <class M>
inline constexpr bool hides_later_keys<WithinSegments<M>> = hides_later_keys<M>;

/// Identifies a strand: the rows of a branch's open segment that the query heads with one KV head and one offset share.
struct Strand {
  std::size_t branch = 0;
  Index kv_head = 0;
  Index offset = 0;

  friend bool operator==(const Strand&, const Strand&) = default;
};

/// The rows of one strand in one batch row.
template <class Tk, class Tv>
struct StrandRows {
  std::vector<Tk> k;
  std::vector<Tv> v;
  std::vector<float> k_scale, v_scale;  ///< one for each row, if rows are int8
};

/// A source of keys and values for Dilated: the strands of a stream.
template <class Tk, class Tv>
struct StoredRows {
  using Key = Tk;
  using Value = Tv;
  static constexpr bool joins_segments = false;

  const std::vector<Branch>* branches;
  const std::vector<std::size_t>* strand_of;       ///< [branches][heads]
  const std::vector<StrandRows<Tk, Tv>>* strands;  ///< [batch][strands]
  Index heads, strands_in_batch, head_dim, value_dim;
  Index first_token;  ///< strands begin with the segments that contain it

  KeyRun<Tk, Tv> rows(std::size_t n, Index b, Index h, Index first, Index, Index count) const {
    const StrandRows<Tk, Tv>& strand = at(n, b, h);
    const Index row = row_of(n, first);
    KeyRun<Tk, Tv> run{{strand.k.data() + row * head_dim, count, head_dim, head_dim},
                       {strand.v.data() + row * value_dim, count, value_dim, value_dim},
                       true};
    if constexpr (std::is_same_v<Tk, std::int8_t>) {
      run.k_scale = strand.k_scale.data() + row;
      run.v_scale = strand.v_scale.data() + row;
    }
    return run;
  }

 private:
  const StrandRows<Tk, Tv>& at(std::size_t n, Index b, Index h) const {
    const std::size_t strand =
        (*strand_of)[n * static_cast<std::size_t>(heads) + static_cast<std::size_t>(h)];
    return (*strands)[static_cast<std::size_t>(b * strands_in_batch) + strand];
  }
  /// The index in the strand of the row at position `first`, which is the first row of its segment.
  Index row_of(std::size_t n, Index first) const {
    const Branch& branch = (*branches)[n];
    const Index segments = first / branch.segment - first_token / branch.segment;
    return segments * kept_rows(branch.segment, first % branch.segment, branch.dilation);
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
