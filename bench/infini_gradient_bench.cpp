// The gradient of infini_attention for several lengths, segments and both rules.
//
// "%roof" counts the useful products: five of causal attention within segments, and those of the memory. The forward
// pass of local attention and that of the memory, which are computed again, are not useful. Before it is timed, the
// gradients of one head are compared with the reference in double; a wrong result is an error and has no time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "longspan/detail/call/slices.hpp"
#include "longspan/gradient/infini_attention.hpp"
#include "longspan/reference/gradient/infini_attention.hpp"
#include "support/benchmark_program.hpp"
#include "support/exact_rows.hpp"
#include "support/hashed_values.hpp"

namespace bench {
namespace {

struct Case {
  Index length = 0;
  Index segment = 2048;
  Index head_dim = 64;
  Index heads = 8;
  longspan::InfiniRule rule = longspan::InfiniRule::linear;

  std::string text() const {
    return std::string(rule == longspan::InfiniRule::linear ? "linear" : "delta") +
           "/heads:" + std::to_string(heads) + "/n:" + std::to_string(length) +
           "/d:" + std::to_string(head_dim) + "/segment:" + std::to_string(segment);
  }
  auto backward() const {
    longspan::infini_attention attend;
    attend.segment = segment;
    attend.rule = rule;
    return gradient(attend);
  }
  double flop() const {
    const double of_memory = 6 + (rule == longspan::InfiniRule::linear ? 4 : 10);
    double sum = of_memory * static_cast<double>(heads * length) * static_cast<double>(head_dim * head_dim);
    for (Index begin = 0; begin < length; begin += segment) {
      const Index rows = std::min(segment, length - begin);
      sum += 2.5 * attention_flop(Visible::causal, 1, heads, rows, rows, head_dim, head_dim);
    }
    return sum;
  }
};

/// The largest error, as a share of the largest number of the gradient.
double worst_share(longspan::TensorView<const float> got, const std::vector<double>& wanted) {
  double largest = 0, worst = 0;
  for (Index i = 0; i < got.rows; ++i) {
    for (Index c = 0; c < got.cols; ++c) {
      const double right = wanted[static_cast<std::size_t>(i * got.cols + c)];
      const double error = std::abs(static_cast<double>(got.row(0, 0, i)[c]) - right);
      largest = std::max(largest, std::abs(right));
      if (!(error <= worst)) worst = error;  // NaN is the worst
    }
  }
  return worst / largest;
}

void backward(benchmark::State& state, const Case& c, Index threads) {
  const Inputs<float> in = hashed_inputs<float>(c.heads, c.heads, c.length, c.length, c.head_dim);
  OwnedTensor<float> dout = in.empty_output(), dq = in.empty_output(), dk = in.empty_output(),
                     dv = in.empty_output();
  fill_hashed(dout, 4);
  const auto gradient = c.backward();
  longspan::Execution execution(longspan::openmp{threads});
  const auto call = [&] {
    gradient(in.q.view(), in.k.view(), in.v.view(), std::as_const(dout).view(), dq.view(), dk.view(),
             dv.view(), execution);
  };
  call();
  if (c.length <= 4096) {
    const auto head = [](auto x) { return longspan::detail::slice_heads(x, 0, 1); };
    const auto size = static_cast<std::size_t>(c.length * c.head_dim);
    std::vector<double> of_q(size), of_k(size), of_v(size);
    const auto to = [&](std::vector<double>& x) {
      return longspan::compact_view(x.data(), 1, 1, c.length, c.head_dim);
    };
    longspan::reference::exact{gradient}(head(in.q.view()), head(in.k.view()), head(in.v.view()),
                                         head(std::as_const(dout).view()), to(of_q), to(of_k), to(of_v));
    const double worst = std::max({worst_share(head(std::as_const(dq).view()), of_q),
                                   worst_share(head(std::as_const(dk).view()), of_k),
                                   worst_share(head(std::as_const(dv).view()), of_v)});
    if (!(worst <= 400 * 0x1p-24)) {
      state.SkipWithError(
          ("wrong: an error of " + printed("%.3g", worst) + " of the largest number").c_str());
      return;
    }
  }
  double seconds = 0;
  const double roof =
      roof_around([&] { return fma_peak(threads); }, [&] { seconds = timed_calls(state, call); });
  report_flop(state, c.flop(), seconds, roof);
}

void add_all() {
  std::vector<Index> team{1};
  if (default_threads() > 1) team.push_back(default_threads());
  for (const longspan::InfiniRule rule : {longspan::InfiniRule::linear, longspan::InfiniRule::delta}) {
    for (const Index head_dim : {64, 128}) {
      for (const auto& [length, segment] :
           {std::pair<Index, Index>{512, 128}, {4096, 512}, {4096, 2048}, {16384, 2048}}) {
        for (const Index threads : team) {
          const Case c{length, segment, head_dim, 8, rule};
          benchmark::RegisterBenchmark(
              ("gradient_" + c.text() + "/threads:" + std::to_string(threads)).c_str(),
              [=](benchmark::State& state) { backward(state, c, threads); })
              ->UseRealTime()
              ->Unit(benchmark::kMillisecond);
        }
      }
    }
  }
}

}  // namespace
}  // namespace bench

int main(int count, char** words) { return bench::run_benchmarks(count, words, bench::add_all); }
