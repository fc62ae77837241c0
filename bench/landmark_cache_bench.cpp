// One step of a landmark_cache: a token after a long stream. softmax_bench measures full attention with the same
// shapes.
//
// Before it is timed, the cache is checked against its reference with 4096 tokens of the same shapes.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "longspan/position.hpp"
#include "longspan/reference/landmark_cache.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "support/benchmark_program.hpp"
#include "support/hashed_values.hpp"

namespace bench {
namespace {

constexpr Index heads = 32, kv_heads = 8, head_dim = 128, tokens_at_once = 4096;
const longspan::StreamShape shape{1, heads, kv_heads, head_dim, head_dim};

/// One token at a time after a stream of `length` tokens, which repeat every 4096.
template <class Cache>
class Stream {
 public:
  Stream(Cache cache, Index length)
      : cache_(std::move(cache)), in_(hashed_inputs<float>(heads, kv_heads, 1, tokens_at_once, head_dim)) {
    while (cache_.size() < length) {
      const Index count = std::min(tokens_at_once, length - cache_.size());
      cache_.append(in_.k.view().slice_rows(0, count), in_.v.view().slice_rows(0, count));
    }
  }

  template <class E>
  void step(E& execution) {
    cache_.extend(in_.q.view(), in_.k.view().slice_rows(0, 1), in_.v.view().slice_rows(0, 1), out_.view(),
                  execution);
  }
  const Cache& cache() const { return cache_; }
  const OwnedTensor<float>& out() const { return out_; }
  const Inputs<float>& in() const { return in_; }

 private:
  Cache cache_;
  Inputs<float> in_;
  OwnedTensor<float> out_{1, heads, 1, head_dim};
};

/// The bytes of one block.
template <class T, class P, class Map>
double landmark_bytes(const longspan::landmark_cache<T, P, Map>&) {
  return static_cast<double>(sizeof(T)) * static_cast<double>(kv_heads * head_dim);
}

/// An empty cache whose blocks are written to a temporary file, which is removed.
longspan::landmark_cache<float> in_file(longspan::landmark_cache_options options) {
  const auto path = std::filesystem::temp_directory_path() / "longspan_landmark_cache_bench";
  std::filesystem::remove(path);
  options.path = path.string();
  longspan::landmark_cache<float> cache(shape, options);
  std::filesystem::remove(path);
  return cache;
}

/// The largest difference from the reference of one step after 4096 tokens; outputs are about 1.
template <class Cache, class Reference>
double error_of(Cache empty, Reference reference) {
  Stream<Cache> stream(std::move(empty), tokens_at_once);
  longspan::serial execution;
  stream.step(execution);
  const auto& in = stream.in();
  OwnedTensor<float> out(1, heads, 1, head_dim);
  const auto none = longspan::compact_view(in.q.view().data, 1, heads, 0, head_dim);
  const longspan::RowsView<double> no_lse;
  reference.extend(none, in.k.view(), in.v.view(), out.view().slice_rows(0, 0), no_lse);
  reference.extend(in.q.view(), in.k.view().slice_rows(0, 1), in.v.view().slice_rows(0, 1), out.view(),
                   no_lse);
  double worst = 0;
  for (std::size_t n = 0; n < out.values().size(); ++n)
    worst = std::max(worst, std::abs(double(out.values()[n]) - double(stream.out().values()[n])));
  return worst;
}

/// make() returns an empty cache.
template <class Make, class Reference>
void run_case(benchmark::State& state, const Make& make, const Reference& reference, double most_error,
              Index length, Index threads) {
  const double error = error_of(make(), reference);
  if (!(error <= most_error)) {
    state.SkipWithError(("wrong: differs by " + std::to_string(error) + " from the reference").c_str());
    return;
  }
  Stream<decltype(make())> stream(make(), length);
  longspan::Execution<longspan::openmp> execution(longspan::openmp{threads});
  stream.step(execution);
  const double seconds = timed_calls(state, [&] { stream.step(execution); });
  const double scanned = landmark_bytes(stream.cache()) * static_cast<double>(stream.cache().blocks());
  set_counter(state, "landmark_GB/s", scanned / seconds / 1e9);
  set_counter(state, "state_MB", static_cast<double>(stream.cache().bytes()) / 1e6);
}

template <class Make, class Reference>
void add(const std::string& name, const Make& make, const Reference& reference, double most_error,
         Index length) {
  for (const Index threads : {Index{1}, default_threads()}) {
    benchmark::RegisterBenchmark(
        (name + "/heads:32/kv_heads:8/n:1/m:" + std::to_string(length) +
         "/d:128/block:64/top_k:4/threads:" + std::to_string(threads))
            .c_str(),
        [=](benchmark::State& state) { run_case(state, make, reference, most_error, length, threads); })
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
}

void add_all() {
  using longspan::landmark_cache;
  const longspan::rotary turned(longspan::Pairing::half_split);
  const longspan::landmark_cache_options options{.block_size = 64, .top_k = 4};
  const longspan::reference::landmark_cache<> plain(shape, options);
  using Stingy = landmark_cache<float, longspan::rotary>;
  using Exact = landmark_cache<float, longspan::rotary, longspan::exact_positions>;
  for (const Index length : {4096, 65536, 262144, 524288, 1048576}) {
    add(
        "landmark_cache", [=] { return landmark_cache<float>(shape, options); }, plain, 1e-5, length);
    // Keys and values are rounded to 8 bits.
    add(
        "landmark_cache_bf16", [=] { return landmark_cache<Eigen::bfloat16>(shape, options); }, plain, 0.05,
        length);
    add(
        "landmark_cache_file", [=] { return in_file(options); }, plain, 1e-5, length);
    add(
        "landmark_cache_rotary_stingy", [=] { return Stingy(shape, options, turned); },
        longspan::reference::landmark_cache<longspan::rotary>(shape, options, turned), 1e-5, length);
    add(
        "landmark_cache_rotary_exact", [=] { return Exact(shape, options, turned); },
        longspan::reference::landmark_cache<longspan::rotary, longspan::exact_positions>(shape, options,
                                                                                         turned),
        1e-5, length);
  }
}

}  // namespace
}  // namespace bench

int main(int count, char** words) { return bench::run_benchmarks(count, words, bench::add_all); }
