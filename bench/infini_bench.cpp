// infini_attention for several lengths, and a step of its stream compared with a step of a cache of one segment's keys.
//
// Before it is timed, each result is checked against double; a wrong result is an error and has no time.
#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "longspan/infini_attention.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "support/benchmark_program.hpp"
#include "support/hashed_values.hpp"
#include "support/infini_rows.hpp"

namespace bench {
namespace {

struct Case {
  Index length = 0;
  Index segment = 2048;
  Index head_dim = 128;
  Index heads = 8;
  longspan::InfiniRule rule = longspan::InfiniRule::linear;

  std::string text() const {
    return std::string(rule == longspan::InfiniRule::linear ? "linear" : "delta") +
           "/heads:" + std::to_string(heads) + "/n:" + std::to_string(length) +
           "/d:" + std::to_string(head_dim) + "/segment:" + std::to_string(segment);
  }
  longspan::infini_attention<> attend() const {
    longspan::infini_attention attend;
    attend.segment = segment;
    attend.rule = rule;
    return attend;
  }
};

void prefill(benchmark::State& state, const Case& c, Index threads) {
  const Inputs<float> in = hashed_inputs<float>(c.heads, c.heads, c.length, c.length, c.head_dim);
  OwnedTensor<float> out = in.empty_output();
  longspan::Execution execution(longspan::openmp{threads});
  const auto call = [&] { c.attend()(in.q.view(), in.k.view(), in.v.view(), out.view(), execution); };
  call();
  // The weights of the delta rule's memory have both signs, so the error bound does not apply.
  if (c.rule == longspan::InfiniRule::linear) {
    const auto exact =
        exact_infini_rows(in, c.segment, sampled_rows(1, c.heads, c.length, 4), default_threads());
    const double ratio = worst_ratio(std::as_const(out).view(), exact);
    if (!(ratio <= highest_ratio)) {
      state.SkipWithError(("wrong: error ratio " + printed("%.3g", ratio) + ", right is at most 16").c_str());
      return;
    }
    set_counter(state, "max_ratio", ratio);
  }
  double seconds = 0;
  const double roof =
      roof_around([&] { return fma_peak(threads); }, [&] { seconds = timed_calls(state, call); });
  double flop = infini_flop(1, c.heads, c.heads, c.length, c.segment, c.head_dim, c.head_dim);
  if (c.rule == longspan::InfiniRule::delta) {
    flop += 2.0 *
            static_cast<double>(c.heads * ((c.length - 1) / c.segment * c.segment) * c.head_dim * c.head_dim);
  }
  report_flop(state, flop, seconds, roof);
  set_counter(state, "ns/token", 1e9 * seconds / static_cast<double>(c.length));
}

/// A sequence of any length in chunks of eight segments with the same tokens: the time per token
/// must not grow with the length.
void stream(benchmark::State& state, const Case& c, Index threads) {
  const Index chunk = std::min(c.length, 8 * c.segment);
  const Inputs<float> in = hashed_inputs<float>(c.heads, c.heads, chunk, chunk, c.head_dim);
  OwnedTensor<float> out = in.empty_output();
  longspan::Execution execution(longspan::openmp{threads});
  auto memory = c.attend().stream({1, c.heads, c.heads, c.head_dim, c.head_dim});
  const double seconds = timed_calls(state, [&] {
    memory.clear();
    for (Index done = 0; done < c.length; done += chunk) {
      memory.extend(in.q.view(), in.k.view(), in.v.view(), out.view(), execution);
    }
  });
  set_counter(state, "ns/token", 1e9 * seconds / static_cast<double>(c.length));
  set_counter(state, "state_bytes", static_cast<double>(memory.bytes()));
}

/// One token after half a segment.
void step(benchmark::State& state, const Case& c, Index threads) {
  const Index filled = c.segment + c.segment / 2;
  const Inputs<float> in = hashed_inputs<float>(c.heads, c.heads, filled, filled, c.head_dim);
  OwnedTensor<float> out = in.empty_output();
  longspan::Execution execution(longspan::openmp{threads});
  auto memory = c.attend().stream({1, c.heads, c.heads, c.head_dim, c.head_dim});
  memory.extend(in.q.view(), in.k.view(), in.v.view(), out.view(), execution);
  const auto token = [](const auto& x) { return x.view().slice_rows(0, 1); };
  timed_calls(state, [&] {
    memory.peek(token(in.q), token(in.k), token(in.v), out.view().slice_rows(0, 1), execution);
  });
}

/// The same token with a cache of `segment` keys.
void cache_step(benchmark::State& state, const Case& c, Index threads) {
  const Inputs<float> in = hashed_inputs<float>(c.heads, c.heads, c.segment, c.segment, c.head_dim);
  OwnedTensor<float> out = in.empty_output();
  longspan::Execution execution(longspan::openmp{threads});
  const longspan::softmax_attention attend{longspan::causal{}};
  timed_calls(state, [&] {
    attend(in.q.view().slice_rows(0, 1), in.k.view(), in.v.view(), out.view().slice_rows(0, 1), execution);
  });
}

void add(const Case& c, const char* kind, void (*run)(benchmark::State&, const Case&, Index)) {
  std::vector<Index> team{1};
  if (default_threads() > 1) team.push_back(default_threads());
  for (const Index threads : team) {
    const std::string name = kind + c.text() + "/threads:" + std::to_string(threads);
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { run(state, c, threads); })
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
}

void add_all() {
  add({512, 128, 64}, "infini_", prefill);
  for (const Index length : {16384, 65536, 262144}) add({length}, "infini_", prefill);
  add({65536, 2048, 128, 8, longspan::InfiniRule::delta}, "infini_", prefill);
  for (const Index length : {16384, 1048576, 4194304}) add({length}, "infini_stream_", stream);
  add({1, 2048, 128}, "infini_step_", step);
  add({1, 2048, 128}, "cache_step_", cache_step);
}

}  // namespace
}  // namespace bench

int main(int count, char** words) { return bench::run_benchmarks(count, words, bench::add_all); }
