// Rotary and xpos as the definition of a call.
#pragma once

#include <cmath>
#include <functional>

#include "longspan/position.hpp"
#include "support/oracle.hpp"

namespace test {

using longspan::Pairing;

/// Rotary (stretch = 1) and xpos from their equations.
inline void turn(double* row, Index dims, Index position, Pairing pairing,
                 const std::function<double(Index)>& stretch) {
  for (Index p = 0; p < dims / 2; ++p) {
    const double angle = double(position) * std::pow(10000.0, -2.0 * double(p) / double(dims));
    double& x = row[pairing == Pairing::interleaved ? 2 * p : p];
    double& y = row[pairing == Pairing::interleaved ? 2 * p + 1 : p + dims / 2];
    const double a = x, b = y, by = stretch(p);
    x = by * (a * std::cos(angle) - b * std::sin(angle));
    y = by * (b * std::cos(angle) + a * std::sin(angle));
  }
}

inline Definition with_rotary(Pairing pairing, Index dims) {
  Definition what;
  what.encode = [=](double* row, Index cols, Index position, bool) {
    turn(row, dims == 0 ? cols : dims, position, pairing, [](Index) { return 1.0; });
  };
  return what;
}

inline Definition with_xpos(Pairing pairing, double scale_base, Index centre) {
  Definition what;
  what.encode = [=](double* row, Index cols, Index position, bool is_query) {
    const double power = double(position - centre) / scale_base * (is_query ? 1 : -1);
    turn(row, cols, position - centre, pairing,
         [=](Index p) { return std::pow((2.0 * double(p) / double(cols) + 0.4) / 1.4, power); });
  };
  return what;
}

}  // namespace test
