// Timing: calls are repeated until a sample is long enough, contenders take turns, and reports use medians.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <span>
#include <vector>

#include "longspan/view.hpp"

namespace bench {

using longspan::Index;

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Work>
double seconds_of(const Work& work) {
  const double start = seconds_now();
  work();
  return seconds_now() - start;
}

struct Times {
  double median = 0;
  double min = 0;
  Index samples = 0;
};

inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

inline Times summary(const std::vector<double>& seconds) {
  if (seconds.empty()) return {};
  return {median(seconds), *std::min_element(seconds.begin(), seconds.end()),
          static_cast<Index>(seconds.size())};
}

struct Rounds {
  Index most = 7;
  double sample_seconds = 0.02;  ///< shorter calls are repeated within a sample
  double limit_seconds = 5;      ///< a round that would end later is not started, except for the first
};

/// The mean time of a call, measured for at least `sample_seconds`.
inline double sample_of(const std::function<void()>& call, double sample_seconds) {
  const double start = seconds_now();
  for (Index calls = 1;; ++calls) {
    call();
    const double taken = seconds_now() - start;
    if (taken >= sample_seconds) return taken / static_cast<double>(calls);
  }
}

/// The time of one call, for each job and round. The jobs take turns within a round, so that a changing
/// clock rate or a lost core affects all of them alike. `between` is called after each sample.
inline std::vector<std::vector<double>> interleaved(std::span<const std::function<void()>> jobs,
                                                    const Rounds& rounds,
                                                    const std::function<void()>& between) {
  std::vector<std::vector<double>> seconds(jobs.size());
  const double start = seconds_now();
  double longest_round = 0;
  for (Index round = 0; round < rounds.most; ++round) {
    const double round_start = seconds_now();
    if (round > 0 && round_start - start + longest_round > rounds.limit_seconds) break;
    for (std::size_t n = 0; n < jobs.size(); ++n) {
      seconds[n].push_back(sample_of(jobs[n], rounds.sample_seconds));
      between();
    }
    longest_round = std::max(longest_round, seconds_now() - round_start);
  }
  return seconds;
}

}  // namespace bench
