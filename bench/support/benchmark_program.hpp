// The common part of the Google Benchmark programs.
#pragma once

#include <benchmark/benchmark.h>

#include <string>

#include "longspan/amx.hpp"
#include "longspan/eigen.hpp"
#include "support/huge_pages.hpp"
#include "support/machine.hpp"
#include "support/roof.hpp"

namespace bench {

/// Runs the loop of a benchmark and returns the wall-clock seconds of one call.
template <class Call>
double timed_calls(benchmark::State& state, const Call& call) {
  const double start = seconds_now();
  for (auto _ : state) {
    call();
    benchmark::ClobberMemory();
  }
  return (seconds_now() - start) / static_cast<double>(state.iterations());
}

/// Sets a plain number: Google Benchmark would print a rate as "84.2/s".
inline void set_counter(benchmark::State& state, const char* name, double value) {
  state.counters[name] = benchmark::Counter(value);
}

/// Reports work per second, and its share of the machine's roof, which is sampled directly before and after the
/// calls.
inline void report_flop(benchmark::State& state, double flop, double seconds, double roof) {
  state.counters["FLOP/s"] = benchmark::Counter(flop / seconds, benchmark::Counter::kDefaults);
  set_counter(state, "%roof", 100 * flop / seconds / roof);
}

/// main() of a program whose benchmarks are registered by `add_all`.
template <class AddAll>
int run_benchmarks(int count, char** words, const AddAll& add_all) {
  longspan::request_amx();
  Eigen::setNbThreads(1);  // the naive version is parallel over heads
  benchmark::Initialize(&count, words);
  if (benchmark::ReportUnrecognizedArguments(count, words)) return 2;
  const Machine machine = this_machine();
  benchmark::AddCustomContext("cpu", machine.cpu);
  benchmark::AddCustomContext("compiler", machine.compiler);
  benchmark::AddCustomContext("flags", machine.flags);
  benchmark::AddCustomContext("instructions", machine.instructions);
  benchmark::AddCustomContext("eigen", machine.eigen);
  benchmark::AddCustomContext("longspan", machine.longspan);
  benchmark::AddCustomContext("matrix tiles", longspan::request_amx() ? "used" : "none");
  benchmark::AddCustomContext("pages", huge_pages_text());
  add_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace bench
