// A user-defined mask: every token sees the last 256 tokens, and the heading of every earlier chapter.
//
// The member `sees` alone makes a mask: it is called for every query and key. Two more members tell which blocks of
// keys can be skipped; the result is the same to the bit, and only visible keys cost time. For a mask that is a
// tensor use `longspan::dense_mask` instead. After copying, change: the two masks, and `random_tensor`, which stands
// for your model's projections.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <longspan/longspan.hpp>
#include <random>
#include <span>
#include <unsupported/Eigen/CXX11/Tensor>
#include <vector>

using longspan::Index, longspan::KeyRange, longspan::KeyRanges, longspan::Coverage, longspan::Tile;
using Tensor = Eigen::Tensor<float, 4, Eigen::RowMajor>;

struct nearby_and_headings {
  Index width, heading_tokens;
  std::span<const Index> chapters;  // the first token of each chapter, in rising order

  bool sees(Index i, Index j) const {
    const auto next = std::upper_bound(chapters.begin(), chapters.end(), j);
    return std::abs(i - j) < width || (next != chapters.begin() && j - next[-1] < heading_tokens);
  }
};

struct skipping : nearby_and_headings {
  /// Ranges that contain every key which some query of the tile sees; if there are too many, the closest are merged.
  KeyRanges key_ranges(const Tile& tile) const {
    KeyRanges ranges({tile.first_query - width + 1, tile.last_query() + width});
    for (const Index chapter : chapters) ranges.add({chapter, chapter + heading_tokens});
    return ranges;
  }
  /// `none` and `all` must be correct; for `some` the kernel calls `sees`.
  Coverage classify(const Tile& tile) const {
    const KeyRange keys = tile.key_range(), near_all{tile.last_query() - width + 1, tile.first_query + width};
    if (near_all.contains(keys)) return Coverage::all;
    for (const KeyRange& range : key_ranges(tile)) {
      if (range.overlaps(keys)) return Coverage::some;
    }
    return Coverage::none;
  }
};

static Tensor random_tensor(Index heads, Index length, Index head_dim, unsigned seed) {
  std::mt19937 generator(seed);
  Tensor x(1, heads, length, head_dim);
  for (Index n = 0; n < x.size(); ++n) x.data()[n] = static_cast<float>(generator()) * 0x1p-31f - 1;
  return x;
}

template <class Mask>
static double milliseconds(const Mask& mask, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out) {
  const longspan::softmax_attention attend{longspan::causal{} & mask};
  longspan::Execution execution;
  attend(q, k, v, out, execution);  // the first call allocates the scratch memory
  const auto start = std::chrono::steady_clock::now();
  attend(q, k, v, out, execution);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

int main() {
  const Index heads = 4, kv_heads = 2, length = 8192, head_dim = 64;
  const Tensor q = random_tensor(heads, length, head_dim, 1);
  const Tensor k = random_tensor(kv_heads, length, head_dim, 2);
  const Tensor v = random_tensor(kv_heads, length, head_dim, 3);
  Tensor out(q.dimensions()), out_skipping(q.dimensions());

  const std::vector<Index> chapters{0, 1500, 2100, 4096, 6700};
  const nearby_and_headings asked{256, 16, chapters};
  const double slow = milliseconds(asked, q, k, v, out);
  const double fast = milliseconds(skipping{asked}, q, k, v, out_skipping);

  const Eigen::Tensor<float, 0, Eigen::RowMajor> difference = (out - out_skipping).abs().maximum();
  std::printf("sees alone %.1f ms, skipping %.1f ms, largest difference %g\n", slow, fast, difference());
}
