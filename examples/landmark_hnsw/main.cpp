// A landmark cache that gets candidate blocks from an approximate index, hnswlib's, instead of scoring the landmarks of
// all blocks. Copy `HnswIndex` to use your own index.
#include <hnswlib/hnswlib.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <longspan/longspan.hpp>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace {

using longspan::Index;

constexpr Index head_dim = 64, block = 64;

/// One graph for each KV head of each batch row, with the inner product, which ranks landmarks. Copies of the cache
/// share it, so a copy that gets other tokens needs `clear` and its blocks added again.
class HnswIndex {
 public:
  explicit HnswIndex(Index wanted) : wanted_(wanted) {}

  void add(Index b, Index kv_head, Index n, std::span<const float> key) {
    std::unique_ptr<Graph>& graph = (*graphs_)[{b, kv_head}];
    if (graph == nullptr) graph = std::make_unique<Graph>(&space_, 1024);
    if (graph->cur_element_count == graph->max_elements_) graph->resizeIndex(2 * graph->max_elements_);
    graph->addPoint(key.data(), static_cast<hnswlib::labeltype>(n));
  }
  /// Dropped blocks stay in the graph; the cache ignores them.
  void drop(Index) {}
  /// Unsealed blocks stay too: a block that is added again replaces the point with its number.
  void truncate(Index) {}
  void clear() { graphs_->clear(); }

  std::vector<Index> candidates(Index b, Index kv_head, std::span<const float> query) const {
    std::vector<Index> blocks;
    const auto found = graphs_->find({b, kv_head});
    if (found == graphs_->end()) return blocks;
    auto nearest = found->second->searchKnn(query.data(), static_cast<std::size_t>(wanted_));
    for (; !nearest.empty(); nearest.pop()) blocks.push_back(static_cast<Index>(nearest.top().second));
    return blocks;
  }

 private:
  using Graph = hnswlib::HierarchicalNSW<float>;

  Index wanted_;
  static inline hnswlib::InnerProductSpace space_{static_cast<std::size_t>(head_dim)};
  std::shared_ptr<std::map<std::pair<Index, Index>, std::unique_ptr<Graph>>> graphs_ =
      std::make_shared<std::map<std::pair<Index, Index>, std::unique_ptr<Graph>>>();
};

/// Numbers from -1 to 1 that depend only on the token, instead of those of a model.
std::vector<float> row_of(Index token) {
  std::vector<float> x;
  auto state = static_cast<std::uint32_t>(token) * 2654435761u + 1;
  for (Index c = 0; c < head_dim; ++c) {
    state = state * 1664525u + 1013904223u;
    x.push_back(static_cast<float>(state >> 8) * 0x1p-23f - 1);
  }
  return x;
}

/// Streams `length` tokens and queries block after block with its own landmark: counts how many are found, and takes
/// the time.
template <class Cache>
Index ask(Cache cache, Index length, Index questions, const char* name) {
  constexpr Index chunk = 4096;
  for (Index first = 0; first < length; first += chunk) {
    std::vector<float> k;
    for (Index j = first; j < std::min(first + chunk, length); ++j) {
      const std::vector<float> row = row_of(j);
      k.insert(k.end(), row.begin(), row.end());
    }
    const auto rows =
        longspan::compact_view<const float>(k.data(), 1, 1, std::min(chunk, length - first), head_dim);
    cache.append(rows, rows);
  }
  longspan::Execution execution;
  std::vector<float> out(head_dim);
  std::chrono::duration<double, std::milli> took{};
  Index found = 0;
  for (Index n = 0; n < questions; ++n) {
    const Index wanted = n * (cache.blocks() / questions);
    std::vector<float> q = row_of(wanted * block + block - 1);
    for (float& x : q) x *= 4;
    const std::vector<float> token = row_of(length + n);
    const auto next = longspan::compact_view(token.data(), 1, 1, 1, head_dim);
    const auto start = std::chrono::steady_clock::now();
    cache.extend(longspan::compact_view<const float>(q.data(), 1, 1, 1, head_dim), next, next,
                 longspan::compact_view(out.data(), 1, 1, 1, head_dim), execution);
    took += std::chrono::steady_clock::now() - start;
    const auto blocks = cache.retrieved(0, 0, 0);
    found += std::find(blocks.begin(), blocks.end(), wanted) != blocks.end();
  }
  std::printf("%-10s %td of %td blocks found among %td, %.3f ms a token\n", name, found, questions,
              cache.blocks(), took.count() / static_cast<double>(questions));
  return found;
}

}  // namespace

int main(int count, char** words) {
  const Index length = count > 1 ? std::atoll(words[1]) : 400'000, questions = 100;
  if (length < questions * block) {
    std::fprintf(stderr, "usage: landmark_hnsw [tokens, at least %td]\n", questions * block);
    return 2;
  }
  const longspan::StreamShape shape{.head_dim = head_dim, .value_dim = head_dim};
  const longspan::landmark_cache_options options{.block_size = block, .top_k = 4};
  const longspan::landmark_retrieval every_one{options};
  const longspan::landmark_retrieval indexed{options, HnswIndex(16)};
  const Index all = ask(every_one.stream(shape), length, questions, "every one");
  const Index some = ask(indexed.stream(shape), length, questions, "hnswlib");
  return all == questions && some >= questions * 9 / 10 ? 0 : 1;
}
