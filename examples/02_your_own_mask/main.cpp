// A mask of your own: every token sees the last 256, and the heading of every chapter before it.
//
// `sees` alone makes a mask: it is asked for every query and key. Two more members name blocks of keys that
// can be skipped; the result is the same to the bit, and the cost that of the keys which are seen. A mask that
// is a tensor already needs none of this: `longspan::dense_mask` reads it. After copying, change: the two masks,
// and `random_tensor`, which stands for your model's projections.

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
  std::span<const Index> chapters;  // where each chapter starts, rising

  bool sees(Index i, Index j) const {
    const auto next = std::upper_bound(chapters.begin(), chapters.end(), j);
    return std::abs(i - j) < width || (next != chapters.begin() && j - next[-1] < heading_tokens);
  }
};

struct skipping : nearby_and_headings {
  /// What any query of the tile sees lies in these ranges; if they are many, the closest become one.
  KeyRanges key_ranges(const Tile& tile) const {
    KeyRanges ranges({tile.first_query - width + 1, tile.last_query() + width});
    for (const Index chapter : chapters) ranges.add({chapter, chapter + heading_tokens});
    return ranges;
  }
  /// `none` and `all` must be true; `some` leaves it to `sees`.
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
