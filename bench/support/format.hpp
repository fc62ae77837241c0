// Numbers as text for people.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

#include "longspan/view.hpp"

namespace bench {

inline std::string printed(const char* format, double x) {
  char text[64];
  std::snprintf(text, sizeof text, format, x);
  return text;
}

/// With three to four digits: 0.0104, 0.635, 10.67, 157.1, 2698.
inline std::string readable(double x) {
  const double size = std::abs(x);
  return printed(size < 0.1    ? "%.4f"
                 : size < 10   ? "%.3f"
                 : size < 100  ? "%.2f"
                 : size < 1000 ? "%.1f"
                               : "%.0f",
                 x);
}

/// With three digits and a unit, each unit `step` times the one before: 804 k, 1.21 M.
template <std::size_t units>
std::string scaled(double x, double step, const char* const (&unit)[units]) {
  std::size_t n = 0;
  while (n + 1 < units && x >= 999.5) {
    x /= step;
    ++n;
  }
  return printed(x < 9.995 ? "%.2f " : x < 99.95 ? "%.1f " : "%.0f ", x) + unit[n];
}

inline std::string per_second(double x) { return scaled(x, 1000, {"", "k", "M", "G", "T"}); }

inline std::string bytes_text(double bytes) { return scaled(bytes, 1024, {"B", "KiB", "MiB", "GiB", "TiB"}); }

/// 512, 2K, 128K; other numbers unchanged.
inline std::string length_text(longspan::Index n) {
  return n >= 1024 && n % 1024 == 0 ? std::to_string(n / 1024) + "K" : std::to_string(n);
}

/// "1 head", "8 heads".
inline std::string counted(longspan::Index n, const std::string& noun) {
  return std::to_string(n) + " " + noun + (n == 1 ? "" : "s");
}

inline std::string seconds_text(double seconds) {
  if (seconds < 0.001) return readable(seconds * 1e6) + " us";
  if (seconds < 1) return readable(seconds * 1e3) + " ms";
  return readable(seconds) + " s";
}

}  // namespace bench
