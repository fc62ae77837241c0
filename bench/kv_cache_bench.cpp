// A kv_cache compared with a call over tensors with the same keys and values: the cost of pages, and the gain of
// smaller rows. Compare with --benchmark_enable_random_interleaving=true --benchmark_repetitions=9.
//
// Each cache is checked against that call before it is timed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

#include "longspan/mask.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/stream/kv_cache.hpp"
#include "support/benchmark_program.hpp"
#include "support/hashed_values.hpp"
#include "support/roof.hpp"

namespace bench {
namespace {

constexpr Index heads = 32, kv_heads = 8, head_dim = 128;
const longspan::softmax_attention attend{longspan::causal{}};

/// `rows` queries after `length` tokens.
struct Case {
  Index rows = 1;
  Index length = 0;
  Index threads = 1;
};

/// Repeats the same step; the cache is truncated after each.
template <class T>
class Step {
 public:
  Step(const Case& of, const longspan::kv_cache_options& options)
      : of_(of),
        in_(hashed_inputs<float>(heads, kv_heads, of.rows, of.length + of.rows, head_dim)),
        cache_(attend.stream<T>({1, heads, kv_heads, head_dim, head_dim}, options)),
        execution_(longspan::openmp{of.threads}) {
    cache_.reserve(of.length + of.rows);
    cache_.append(std::as_const(in_.k).view().slice_rows(0, of.length),
                  std::as_const(in_.v).view().slice_rows(0, of.length));
  }

  void of_cache() {
    cache_.extend(std::as_const(in_.q).view(), last(in_.k), last(in_.v), out_.view(), execution_);
    cache_.truncate(of_.length);
  }
  void of_tensors() {
    attend(std::as_const(in_.q).view(), std::as_const(in_.k).view(), std::as_const(in_.v).view(), out_.view(),
           execution_);
  }
  double difference() {
    of_tensors();
    const OwnedTensor<float> wanted = std::exchange(out_, in_.empty_output());
    of_cache();
    double worst = 0;
    for (std::size_t n = 0; n < out_.values().size(); ++n)
      worst = std::max(worst, std::abs(double(out_.values()[n]) - double(wanted.values()[n])));
    return worst;
  }
  Index bytes() const { return cache_.bytes(); }

 private:
  longspan::TensorView<const float> last(const OwnedTensor<float>& x) const {
    return x.view().slice_rows(of_.length, of_.rows);
  }

  Case of_;
  Inputs<float> in_;
  OwnedTensor<float> out_ = in_.empty_output();
  decltype(attend.stream<T>(longspan::StreamShape{})) cache_;
  longspan::Execution<longspan::openmp> execution_;
};

template <class T>
void run_case(benchmark::State& state, const Case& of, const longspan::kv_cache_options& options,
              bool on_tensors, double most_difference) {
  Step<T> step(of, options);
  if (const double difference = step.difference(); !(difference <= most_difference)) {
    state.SkipWithError(
        ("wrong: differs by " + std::to_string(difference) + " from the call over tensors").c_str());
    return;
  }
  const double seconds = timed_calls(state, [&] { on_tensors ? step.of_tensors() : step.of_cache(); });
  const double pairs = static_cast<double>(of.rows) *
                       (static_cast<double>(of.length) + 0.5 * static_cast<double>(of.rows + 1));
  report_flop(state, 4 * heads * head_dim * pairs, seconds, fma_peak(of.threads));
  set_counter(state, "state_MB", static_cast<double>(step.bytes()) / 1e6);
}

template <class T>
void add(const std::string& storage, const Case& of, const longspan::kv_cache_options& options,
         bool on_tensors, double most_difference) {
  benchmark::RegisterBenchmark(
      ("kv_cache/" + storage + "/heads:32/kv_heads:8/n:" + std::to_string(of.rows) +
       "/m:" + std::to_string(of.length) + "/d:128/threads:" + std::to_string(of.threads))
          .c_str(),
      [=](benchmark::State& state) { run_case<T>(state, of, options, on_tensors, most_difference); })
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
}

void add_all() {
  for (const Case size : {Case{1, 4096}, Case{1, 32768}, Case{512, 4096}}) {
    for (const Index threads : {Index{1}, default_threads()}) {
      const Case of{size.rows, size.length, threads};
      add<float>("tensors", of, {}, true, 1e-5);
      add<float>("array", of, {}, false, 1e-5);
      for (const Index page : {16, 64, 256})
        add<float>("page:" + std::to_string(page), of, {.page_size = page}, false, 1e-5);
      add<Eigen::bfloat16>("bf16", of, {.page_size = 256}, false, 0.02);
      add<Eigen::half>("f16", of, {.page_size = 256}, false, 0.003);
      add<std::int8_t>("int8", of, {.page_size = 256}, false, 0.02);
    }
  }
}

}  // namespace
}  // namespace bench

int main(int count, char** words) { return bench::run_benchmarks(count, words, bench::add_all); }
