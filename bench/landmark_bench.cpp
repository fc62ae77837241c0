// landmark_attention and softmax_attention with the same causal mask: regular blocks of several lengths,
// and blocks of random lengths. Each result is checked against double before it is timed.
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "longspan/landmark_attention.hpp"
#include "longspan/softmax_attention.hpp"
#include "support/benchmark_program.hpp"
#include "support/exact_rows.hpp"
#include "support/hashed_values.hpp"
#include "support/landmark_rows.hpp"

namespace bench {
namespace {

struct Case {
  Index heads = 8;
  Index kv_heads = 8;
  Index n = 0;
  Index head_dim = 64;
  Index block = 64;  ///< 0: softmax_attention
  bool drawn = false;

  /// The name of a case: landmark_f32/heads:8/kv_heads:8/n:2048/d:64/block:64/threads:1, or landmark_drawn_f32/... for
  /// random blocks of that mean length.
  std::string name(Index threads) const {
    const auto part = [](const char* key, Index value) {
      return "/" + std::string(key) + ":" + std::to_string(value);
    };
    std::string text = block == 0 ? "softmax_f32" : drawn ? "landmark_drawn_f32" : "landmark_f32";
    text += part("heads", heads) + part("kv_heads", kv_heads) + part("n", n) + part("d", head_dim);
    return text + (block == 0 ? "" : part("block", block)) + part("threads", threads);
  }

  std::vector<Index> drawn_landmarks() const {
    std::vector<Index> keys;
    for (Index j = -1;;) {
      const auto bits = hashed(static_cast<std::uint64_t>(j + 1), 5) >> 1;
      j += 1 + static_cast<Index>(bits) % (2 * block - 1);
      if (j >= n) return keys;
      keys.push_back(j);
    }
  }
};

void run_case(benchmark::State& state, const Case& c, Index threads) {
  const Inputs<float> in = hashed_inputs<float>(c.heads, c.kv_heads, c.n, c.n, c.head_dim);
  OwnedTensor<float> out = in.empty_output();
  const std::vector<Index> list = c.drawn ? c.drawn_landmarks() : std::vector<Index>();
  const auto at = c.block == 0 ? longspan::landmarks::none()
                  : c.drawn    ? longspan::landmarks::at(list)
                               : longspan::landmarks::every(c.block);
  longspan::Execution<longspan::openmp> execution(longspan::openmp{threads});
  const auto call = [&] {
    if (c.block == 0) {
      longspan::softmax_attention{longspan::causal{}}(in.q.view(), in.k.view(), in.v.view(), out.view(),
                                                      execution);
    } else {
      longspan::landmark_attention{at}(in.q.view(), in.k.view(), in.v.view(), out.view(), execution);
    }
  };
  std::fill(out.values().begin(), out.values().end(), std::numeric_limits<float>::quiet_NaN());
  call();
  const std::vector<RowId> rows = sampled_rows(1, c.heads, c.n, 3);
  const double ratio = worst_ratio(std::as_const(out).view(), exact_landmark_rows(in, at, rows, threads));
  if (!(ratio <= highest_ratio) || !all_finite(std::as_const(out).values())) {
    state.SkipWithError(("wrong: error ratio " + std::to_string(ratio) + ", right is at most 16").c_str());
    return;
  }
  double roof = fma_peak(threads);
  const double seconds = timed_calls(state, call);
  roof = std::max(roof, fma_peak(threads));
  report_flop(state, attention_flop(Visible::causal, 1, c.heads, c.n, c.n, c.head_dim, c.head_dim), seconds,
              roof);
  set_counter(state, "max_ratio", ratio);
}

void add(const Case& c) {
  const Index all = default_threads();
  for (const Index threads : all > 1 ? std::vector<Index>{1, all} : std::vector<Index>{1}) {
    benchmark::RegisterBenchmark(c.name(threads).c_str(),
                                 [=](benchmark::State& state) { run_case(state, c, threads); })
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
}

void add_all() {
  for (const Index head_dim : {64, 128}) {
    for (const Index n : {512, 2048, 4096, 8192}) {
      add({8, 8, n, head_dim, 0});
      for (const Index block : {8, 16, 51, 64, 256}) add({8, 8, n, head_dim, block});
      add({8, 8, n, head_dim, 51, true});
    }
    add({32, 8, 2048, head_dim, 0});
    add({32, 8, 2048, head_dim, 64});
  }
}

}  // namespace
}  // namespace bench

int main(int count, char** words) { return bench::run_benchmarks(count, words, bench::add_all); }
