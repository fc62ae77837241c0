// The inner loops of attention alone, with data in the L1 cache, on one thread: the speed that a whole call can
// reach.
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "support/benchmark_program.hpp"
#include "support/hashed_values.hpp"

namespace bench {
namespace {

using longspan::detail::lanes;
using longspan::detail::load;
using longspan::detail::Packet;
using longspan::detail::store;
using longspan::detail::tile_packets;

constexpr Index width = lanes<float>;

OwnedTensor<float> hashed_matrix(Index rows, Index cols, std::uint64_t seed) {
  OwnedTensor<float> matrix(1, 1, rows, cols);
  fill_hashed(matrix, seed);
  return matrix;
}

/// Does not time a loop that is wrong. `error` is in units of the allowed error of float arithmetic.
bool is_right(benchmark::State& state, double error, double most) {
  set_counter(state, "max_ratio", error);
  if (error <= most) return true;
  state.SkipWithError(
      ("wrong: error ratio " + printed("%.3g", error) + ", right is at most " + printed("%g", most)).c_str());
  return false;
}

/// Applies `exponential`, a function of a packet, in place to 2048 numbers from -20 to 0.
template <class Exponential>
void run_exponential(benchmark::State& state, double base, double most_ulp, const Exponential& exponential) {
  constexpr Index count = 2048;
  OwnedTensor<float> x(1, 1, 1, count), y(1, 1, 1, count);
  for (Index n = 0; n < count; ++n)
    x.view().data[n] = -20 * static_cast<float>(n) / static_cast<float>(count - 1);
  const float* from = x.view().data;
  float* to = y.view().data;
  const auto call = [&] {
    for (Index n = 0; n < count; n += width) store(to + n, exponential(load(from + n)));
  };
  call();
  double worst = 0;
  for (Index n = 0; n < count; ++n) {
    const double exact = std::pow(base, static_cast<double>(from[n]));
    const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
    worst = std::max(worst, std::abs(static_cast<double>(to[n]) - exact) / ulp);
  }
  set_counter(state, "max_ulp", worst);
  if (!(worst <= most_ulp))
    return state.SkipWithError("wrong: the error exceeds the documented number of ulp");
  const double seconds = timed_calls(state, call);
  state.counters["exp/s"] = static_cast<double>(count) / seconds;
}

template <int packets>
void run_scores(benchmark::State& state, Index keys, Index head_dim) {
  constexpr Index stride = packets * width;
  const auto of_tile = longspan::detail::tile_stride<float, packets>(stride);
  const OwnedTensor<float> k = hashed_matrix(keys, head_dim, 1), q = hashed_matrix(head_dim, stride, 2);
  OwnedTensor<float> s(1, 1, keys, stride), highest(1, 1, 1, stride);
  const auto call = [&] {
    longspan::detail::score_rows<packets>(k.view().data, head_dim, keys, q.view().data, head_dim,
                                          s.view().data, highest.view().data, of_tile);
  };
  call();
  double worst = 0;
  for (Index j = 0; j < keys; ++j) {
    for (Index lane = 0; lane < stride; ++lane) {
      double exact = 0, size = 0;
      for (Index c = 0; c < head_dim; ++c) {
        const double term = double(k.view().row(0, 0, j)[c]) * double(q.view().row(0, 0, c)[lane]);
        exact += term;
        size += std::abs(term);
      }
      const double error = std::abs(double(s.view().row(0, 0, j)[lane]) - exact);
      worst = std::max(worst, error / (std::ldexp(1.0, -24) * size));
    }
  }
  if (!is_right(state, worst, static_cast<double>(head_dim))) return;
  double seconds = 0;
  const double roof = roof_around([] { return fma_peak(1); }, [&] { seconds = timed_calls(state, call); });
  report_flop(state, 2.0 * static_cast<double>(keys * head_dim * stride), seconds, roof);
}

template <int packets>
void run_values(benchmark::State& state, Index keys, Index value_dim) {
  constexpr Index stride = packets * width;
  const auto of_tile = longspan::detail::tile_stride<float, packets>(stride);
  const longspan::detail::RowRun all{keys, 0, packets};
  const OwnedTensor<float> v = hashed_matrix(keys, value_dim, 1), p = hashed_matrix(keys, stride, 2);
  const OwnedTensor<float> scale(1, 1, 1, stride);
  OwnedTensor<float> o(1, 1, value_dim, stride);
  const auto call = [&] {
    longspan::detail::value_rows<packets>(v.view().data, value_dim, value_dim, p.view().data, of_tile,
                                          std::span(&all, 1), o.view().data, of_tile,
                                          longspan::detail::Accumulate::rescale, scale.view().data);
  };
  call();
  double worst = 0;
  for (Index c = 0; c < value_dim; ++c) {
    for (Index lane = 0; lane < stride; ++lane) {
      double exact = 0, size = 0;
      for (Index j = 0; j < keys; ++j) {
        const double term = double(v.view().row(0, 0, j)[c]) * double(p.view().row(0, 0, j)[lane]);
        exact += term;
        size += std::abs(term);
      }
      const double error = std::abs(double(o.view().row(0, 0, c)[lane]) - exact);
      worst = std::max(worst, error / (std::ldexp(1.0, -24) * size));
    }
  }
  if (!is_right(state, worst, static_cast<double>(keys))) return;
  double seconds = 0;
  const double roof = roof_around([] { return fma_peak(1); }, [&] { seconds = timed_calls(state, call); });
  report_flop(state, 2.0 * static_cast<double>(keys * value_dim * stride), seconds, roof);
}

/// The exp scores of a whole block of scores, including shift and sum. The scores are restored before each call,
/// which is part of the time: 2 of about 6 cycles per packet.
template <int packets>
void run_weights(benchmark::State& state, Index keys) {
  constexpr Index stride = packets * width;
  const OwnedTensor<float> scores = hashed_matrix(keys, stride, 1);
  OwnedTensor<float> p(1, 1, keys, stride), shift(1, 1, 1, stride), total(1, 1, 1, stride);
  for (float& x : shift.values()) x = 4;
  const auto call = [&] {
    std::copy(scores.values().begin(), scores.values().end(), p.values().begin());
    std::fill(total.values().begin(), total.values().end(), 0.0f);
    longspan::detail::exp_rows<packets>(p.view().data, stride, keys, shift.view().data, total.view().data);
  };
  call();
  double worst = 0;
  for (Index lane = 0; lane < stride; ++lane) {
    double sum = 0;
    for (Index j = 0; j < keys; ++j) sum += std::exp2(double(scores.view().row(0, 0, j)[lane]) - 4);
    worst = std::max(worst, std::abs(double(total.view().data[lane]) - sum) / (std::ldexp(1.0, -24) * sum));
  }
  if (!is_right(state, worst, static_cast<double>(keys))) return;
  const double seconds = timed_calls(state, call);
  state.counters["exp/s"] = static_cast<double>(keys * stride) / seconds;
}

template <class Run>
void add(const std::string& name, const Run& run) {
  benchmark::RegisterBenchmark(name.c_str(), run)->UseRealTime();
}

template <int packets>
void add_tiles() {
  const std::string tile = "/packets:" + std::to_string(packets);
  for (const Index d : {64, 128}) {
    const std::string shape = tile + "/keys:128/d:" + std::to_string(d);
    add("score_rows" + shape, [d](benchmark::State& state) { run_scores<packets>(state, 128, d); });
    add("value_rows" + shape, [d](benchmark::State& state) { run_values<packets>(state, 128, d); });
  }
  add("exp_rows" + tile + "/keys:128", [](benchmark::State& state) { run_weights<packets>(state, 128); });
}

void add_all() {
  add("weight/n:2048", [](benchmark::State& state) {
    run_exponential(state, 2, 2, [](Packet<float> x) { return longspan::detail::exp_score(x); });
  });
  // Eigen's own exponential, for comparison.
  add("eigen_exp/n:2048", [](benchmark::State& state) {
    run_exponential(state, std::exp(1.0), 4, [](Packet<float> x) { return longspan::detail::exp(x); });
  });
  add_tiles<1>();
  add_tiles<2>();
  if constexpr (tile_packets == 3) add_tiles<3>();
}

}  // namespace
}  // namespace bench

int main(int count, char** words) { return bench::run_benchmarks(count, words, bench::add_all); }
