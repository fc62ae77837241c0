// A progress line on stderr for long runs. Printed only on a terminal, not to pipes, files and logs.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <string_view>

#include "support/format.hpp"
#include "support/timing.hpp"

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

namespace bench {

/// Counts steps and, because steps have different lengths, their expected seconds.
class Progress {
 public:
  Progress(std::string unit, Index steps, double expected_seconds)
      : unit_(std::move(unit)), steps_(steps), expected_left_(expected_seconds), on_terminal_(terminal()) {}
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Prints at most ten times per second. Must not be called during a measurement.
  void show(std::string_view what) {
    if (!on_terminal_ || seconds_now() - last_shown_ < 0.1) return;
    last_shown_ = seconds_now();
    const double elapsed = last_shown_ - start_,
                 left = std::max(0.0, expected_left_ - (last_shown_ - last_step_));
    const double share = std::clamp(elapsed / std::max(elapsed + left, 1e-9), 0.0, 1.0);
    constexpr std::size_t width = 24;
    const auto filled = static_cast<std::size_t>(share * width);
    const std::string bar = std::string(filled, '#') + std::string(width - filled, '.');
    const auto minutes = static_cast<long>(left) / 60, seconds = static_cast<long>(left) % 60;
    std::fprintf(stderr, "\r\033[K[%s] %td/%td %s  %.1f s  %s %s/min  ETA %ld:%02ld  %.*s", bar.c_str(),
                 done_, steps_, unit_.c_str(), elapsed,
                 readable(60.0 * static_cast<double>(done_) / elapsed).c_str(), unit_.c_str(), minutes,
                 seconds, static_cast<int>(std::min<std::size_t>(what.size(), 40)), what.data());
    std::fflush(stderr);
  }

  /// Counts a finished step; the remaining steps are expected to take `expected_left` seconds.
  void step(double expected_left) {
    ++done_;
    expected_left_ = expected_left;
    last_step_ = seconds_now();
  }

  void clear() {
    if (on_terminal_ && last_shown_ > 0) std::fputs("\r\033[K", stderr);
    last_shown_ = 0;
  }

 private:
  static bool terminal() {
#if __has_include(<unistd.h>)
    return isatty(2) != 0;
#else
    return false;
#endif
  }

  std::string unit_;
  Index steps_, done_ = 0;
  double start_ = seconds_now(), last_step_ = start_, last_shown_ = 0;
  double expected_left_;
  bool on_terminal_;
};

}  // namespace bench
